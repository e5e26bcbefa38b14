"""Outputs inside a step."""

import numpy as np
import pytest
import torch
from methods import slow_but
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from torchdiffeq_lmm.forward.interpolation import check_interpolation, cubic_hermite, linear_interpolation, slide

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
FRACTIONS = [1e-9, 0.1, 0.37, 0.5, 0.9, 1 - 1e-9]


def states(count: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_linear_is_the_straight_line(fraction: float, dtype: torch.dtype) -> None:
    x0, x1 = states(2, dtype)
    out = linear_interpolation(fraction, x0, x1)
    expected = x0.numpy() + fraction * (x1.numpy() - x0.numpy())
    assert out.dtype is dtype
    torch.testing.assert_close(out, torch.as_tensor(expected, dtype=dtype))


@pytest.mark.parametrize("step", [1e-3, 0.4, 7.0])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_cubic_is_scipys_hermite_spline(fraction: float, step: float) -> None:
    x0, f0, x1, f1 = states(4)
    spline = CubicHermiteSpline([0.0, step], np.stack([x0, x1]), np.stack([f0, f1]))
    torch.testing.assert_close(
        cubic_hermite(fraction, step, x0, f0, x1, f1), torch.as_tensor(spline(fraction * step)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_cubic_reproduces_cubics(fraction: float) -> None:
    a, b, c, d = states(4)
    start, step = 0.3, 0.8

    def x(t: float) -> Tensor:
        return a + b * t + c * t**2 + d * t**3

    def slope(t: float) -> Tensor:
        return b + 2 * c * t + 3 * d * t**2

    out = cubic_hermite(fraction, step, x(start), slope(start), x(start + step), slope(start + step))
    torch.testing.assert_close(out, x(start + fraction * step), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_weights_with_a_gradient_keep_the_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, f0, x1, f1 = states(4, dtype, shape)
    fraction = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for out, number in (
        (linear_interpolation(fraction, x0, x1), linear_interpolation(0.3, x0, x1)),
        (cubic_hermite(fraction, step, x0, f0, x1, f1), cubic_hermite(0.3, 0.5, x0, f0, x1, f1)),
    ):
        assert out.dtype is dtype
        assert out.shape == shape
        torch.testing.assert_close(out.detach(), number)


@pytest.mark.parametrize("dtype", slow_but([torch.float64], [torch.float64, torch.complex128]))
def test_gradients(dtype: torch.dtype) -> None:
    x0, f0, x1, f1 = (x.requires_grad_() for x in states(4, dtype))
    fraction = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_interpolation, (fraction, x0, x1))
    assert torch.autograd.gradcheck(cubic_hermite, (fraction, step, x0, f0, x1, f1))
    assert torch.autograd.gradgradcheck(cubic_hermite, (fraction, step, x0, f0, x1, f1))


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_known_interpolations(interp: str) -> None:
    check_interpolation(interp)


@pytest.mark.parametrize("interp", ["quadratic", "Linear", "", None, 3, ["linear"]])
def test_unknown_interpolations(interp: object) -> None:
    with pytest.raises(ValueError, match=r"interp must be one of \('linear', 'cubic'\), got ") as error:
        check_interpolation(interp)
    assert repr(interp) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_slide_has_the_derivatives_of_a_straight_line(dtype: torch.dtype) -> None:
    x, f = (state.requires_grad_() for state in states(2, dtype))
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = slide(x, shift, f)
    assert torch.equal(value, x)

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        cotangent = torch.ones_like(value) * (1 + 2j if dtype.is_complex else 1)
        first = torch.autograd.grad(value, (x, shift, f), cotangent, create_graph=True)
        return (
            *first,
            *torch.autograd.grad(first[1], f, retain_graph=True),
            *torch.autograd.grad(first[2].real.sum(), shift),
        )

    for actual, expected in zip(gradients(value), gradients(x + shift * f), strict=True):
        torch.testing.assert_close(actual, expected)


def test_slide_keeps_its_value_where_the_slope_is_not_finite() -> None:
    x, _ = states(2)
    slope = torch.full_like(x, torch.nan)
    assert torch.equal(slide(x, torch.zeros((), dtype=x.dtype), slope), x)
