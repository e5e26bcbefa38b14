"""States of every dtype, shape and kind, values that are not finite, and solves without a graph."""

import math
from typing import Any

import pytest
import torch
from leapfrog import INTERPS, NODES, Field, decay, loop, on, solve, tensor
from methods import slow_but
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
SHAPES = [(), (2, 3), (2, 0, 3), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((3,), (0,)))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t_dtype", slow_but([torch.float64], [torch.float32, torch.float64]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.one_in(4)
def test_dtypes_and_shapes(dtype: torch.dtype, t_dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=wide)
    eps = torch.finfo(dtype).eps
    for nodes in (torch.linspace(0, 1, 9), tensor(0.0, 0.125, 0.5, 0.75, 1.0)):
        for t_grad in (False, True):
            t = nodes.to(device, t_dtype).requires_grad_(t_grad)
            y0 = start.to(device, dtype).requires_grad_()
            for out in (
                solve(decay, y0, t),
                solve(decay, y0, t, grid_constructor=on(nodes), interp="cubic"),
            ):
                assert out.dtype is dtype
                assert out.shape == (len(nodes), *shape)
                assert out.device == y0.device
                expected = loop(decay, start.to(dtype).to(wide), nodes.double())
                torch.testing.assert_close(out.detach().cpu().to(wide), expected, rtol=30 * eps, atol=30 * eps)
                (grad,) = torch.autograd.grad(out[-1].abs().square().sum(), y0)
                assert grad.dtype is dtype
                wanted = start.requires_grad_()
                end = loop(decay, wanted, nodes.double())[-1]
                (wanted_grad,) = torch.autograd.grad(end.abs().square().sum(), wanted)
                torch.testing.assert_close(grad.cpu().to(wide), wanted_grad, rtol=60 * eps, atol=60 * eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_between_nodes_in_every_dtype(dtype: torch.dtype, interp: str, device: str) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    y0 = torch.tensor(1.5, device=device, dtype=dtype)
    t = torch.tensor([0.0, 0.3, 1.0], device=device, requires_grad=True)
    out = solve(decay, y0, t, step_size=0.25, interp=interp)
    x = loop(decay, torch.tensor(1.5, dtype=wide), torch.linspace(0, 1, 5, dtype=torch.float64))
    s, f = 0.2, -0.5 * x
    if interp == "linear":
        inside = (1 - s) * x[1] + s * x[2]
    else:
        ends = (1 + 2 * s) * (1 - s) ** 2 * x[1] + s**2 * (3 - 2 * s) * x[2]
        inside = ends + 0.25 * (s * (1 - s) ** 2 * f[1] - s**2 * (1 - s) * f[2])
    eps = max(torch.finfo(dtype).eps, torch.finfo(t.dtype).eps)
    assert out.dtype is dtype
    torch.testing.assert_close(
        out.detach().cpu().to(wide), torch.stack([x[0], inside, x[-1]]), rtol=20 * eps, atol=20 * eps
    )
    (grad,) = torch.autograd.grad(out.abs().sum(), t)
    assert grad.dtype is t.dtype
    assert torch.isfinite(grad).all()


def test_bfloat16_times() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.bfloat16)
    out = solve(decay, tensor(1.0), t, step_size=0.25)
    expected = loop(decay, tensor(1.0), torch.linspace(0, 1, 5, dtype=torch.float64))[[0, 1, 2, 4]]
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)


MIXED = ((), (3,), (2, 3), (0,))


def mixed_state(requires_grad: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for shape in MIXED
    )


def mixed_func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scalar, vector, matrix, empty = y
    return torch.sin(vector).sum() * t, matrix[0] * scalar, -matrix + vector, 2 * empty


def flat_func(t: Tensor, y: Tensor) -> Tensor:
    parts = (y[0], y[1:4], y[4:10].view(2, 3), y[10:])
    return torch.cat([part.reshape(-1) for part in mixed_func(t, parts)])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", ["uniform", "irregular"])
def test_tuple_states(name: str, direction: int) -> None:
    nodes = direction * NODES[name]
    y0 = mixed_state(requires_grad=True)
    out = solve(mixed_func, y0, nodes)
    expected = loop(flat_func, torch.cat([part.reshape(-1) for part in y0]), nodes)
    assert isinstance(out, tuple)
    assert [part.shape for part in out] == [(len(nodes), *shape) for shape in MIXED]
    actual = torch.cat([part.reshape(len(nodes), -1) for part in out], dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), y0),
        torch.autograd.grad(expected.square().sum(), y0),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("t_value", [0.0, 7.5])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.1}, {"interp": "cubic"}], ids=str)
def test_a_single_time(options: dict[str, Any], t_value: float) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=True)
    out = solve(field, y0, tensor(t_value), **options)
    assert field.times == []
    assert torch.equal(out, y0[None])
    (grad,) = torch.autograd.grad(out.sum(), y0)
    assert grad.tolist() == [1.0] * 3
    parts = solve(mixed_func, mixed_state(), tensor(t_value), **options)
    assert all(torch.equal(a[0], b) for a, b in zip(parts, mixed_state(), strict=True))


def test_the_result_is_no_view_of_the_initial_state() -> None:
    y0 = tensor(1.0, 2.0)
    for t in (tensor(0.0), tensor(0.0, 1.0)):
        solve(decay, y0, t).zero_()
        assert y0.tolist() == [1.0, 2.0]


def test_func_may_keep_and_change_what_it_returns() -> None:
    """One buffer for all slopes: f must have been used up by the time of the next evaluation."""
    buffer = torch.empty(3, dtype=torch.float64)
    field = Field()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return buffer.copy_(field(t, y))

    y0 = tensor(0.3, -0.8, 1.1)
    with torch.no_grad():
        out = solve(func, y0, NODES["irregular"])
        torch.testing.assert_close(out, loop(field, y0, NODES["irregular"]), rtol=1e-12, atol=1e-12)


def test_no_grad_makes_no_graph() -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=True)
    t = tensor(0.0, 0.13, 1.0, requires_grad=True)
    with torch.no_grad():
        for options in ({}, {"step_size": 0.1}, {"step_size": 0.1, "interp": "cubic"}, {"grid_constructor": on(t)}):
            out = solve(field, y0, t, **options)
            assert not out.requires_grad
            assert out.grad_fn is None
    with torch.inference_mode():
        out = solve(field, y0, t, step_size=0.1)
    assert out.is_inference()


def test_no_graph_where_nothing_requires_a_gradient() -> None:
    assert not solve(decay, tensor(1.0), tensor(0.0, 1.0), step_size=0.1).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("step_size", [0.1, 0.3])
def test_what_is_not_finite_shows(step_size: float, interp: str, bad: float) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.55, bad, -1.0) * torch.ones_like(y)

    t = tensor(0.0, 0.15, 0.3, 0.9, 1.0)
    out = solve(func, torch.ones(2, dtype=torch.float64), t, step_size=step_size, interp=interp)
    assert torch.isfinite(out[:3]).all()
    assert not torch.isfinite(out[3:]).any()


def test_infinities_keep_their_sign() -> None:
    out = solve(lambda t, y: torch.full_like(y, -math.inf), tensor(1.0), tensor(0.0, 1.0))
    assert out[-1].item() == -math.inf


@pytest.mark.parametrize("t_grad", [False, True])
def test_what_is_not_finite_does_not_go_back_in_time(t_grad: bool) -> None:
    """The state at a node does not depend on f there, whether or not t requires a gradient."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.45, math.nan, -1.0) * y

    out = solve(func, tensor(1.0), tensor(0.0, 0.5, 1.0).requires_grad_(t_grad), step_size=0.1)
    assert torch.isfinite(out[1]).all()
    assert torch.isnan(out[2]).all()
