"""Gradients of unfiltered solves, by auto-differentiation and by odeint_adjoint."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from leapfrog import INTERPS, Field, curved, loop, solve, tensor
from methods import slow_but
from problems import orders
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------- odeint_adjoint


@pytest.mark.parametrize("is_tuple", slow_but([True], [False, True]))
@pytest.mark.parametrize("direction", slow_but([-1], [1, -1]))
@pytest.mark.parametrize("method", slow_but(["leapfrog"], ["leapfrog", "rk4"]))
def test_odeint_adjoint_is_of_second_order(method: str, direction: int, is_tuple: bool) -> None:
    """Gradients with respect to y0, parameters and t, against those of a fine solve by another method."""
    field = Field()
    func: Any = field
    if is_tuple:
        func = nn.Module()
        func.add_module("field", field)
        func.forward = lambda t, y: tuple(field(t, torch.cat(y)).split([2, 1]))
    start = tensor(0.3, -0.8, 1.1)

    def gradients(interface: Any, **keywords: Any) -> Tensor:
        y0 = start.clone().requires_grad_()
        t = (direction * tensor(0.0, 0.5, 1.0)).requires_grad_()
        out = interface(func, tuple(y0.split([2, 1])) if is_tuple else y0, t, **keywords)
        out = torch.cat(out, dim=-1) if is_tuple else out
        grads = torch.autograd.grad((out**2).sum() + out[1].prod(), (y0, t, field.weight, field.bias))
        return torch.cat([grad.reshape(-1) for grad in grads])

    expected = gradients(torchdiffeq.odeint, method="dopri5", rtol=1e-9, atol=1e-10)
    errors = []
    for step_size in (1 / 16, 1 / 32, 1 / 64):
        actual = gradients(
            torchdiffeq.odeint_adjoint,
            method=method,
            options={"step_size": step_size},
            adjoint_method="leapfrog",
            adjoint_options={"step_size": step_size},
        )
        errors.append((actual - expected).abs().max().item())
    assert errors[-1] < 1e-2
    assert np.mean(orders(errors)) > 1.7


class Decay(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.w * y


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.one_in(3)
def test_odeint_adjoint_in_other_dtypes(dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """The precision of the parameter beside that of the state: torchdiffeq's augmented state mixes the two."""
    func = Decay(w_dtype.to_complex() if dtype.is_complex else w_dtype)
    y0 = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    out = torchdiffeq.odeint_adjoint(func, y0, torch.tensor([0.0, 1.0]), method="leapfrog", options={"step_size": 0.01})
    assert out.dtype is dtype
    grads = torch.autograd.grad(out[-1].abs().square().sum(), (y0, func.w))
    assert grads[1].dtype is func.w.dtype
    factor = math.exp(-0.5)
    torch.testing.assert_close(out[-1], y0 * factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads[0], 2 * y0 * factor**2, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grads[1], torch.full_like(func.w, -10 * factor**2), rtol=2e-3, atol=2e-3)


# -------------------------------------------------------------------------------------------------------- gradcheck


def small_field(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.tanh(weight * y.flip(0)) + t * y.conj() * weight[0]


# A truncated last step, so that the number of steps does not jump. Outputs on nodes lie between equal steps, where the
# broken line of linear interpolation has f as the mean of its two slopes.
GRADCHECKS: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "t is the grid": ((0.1, 0.2, 0.5, 0.55, 1.0), {}),
    "t is the grid, uniform": ((0.0, 0.25, 0.5, 0.75, 1.0), {}),
    "one step": ((0.1, 0.8), {}),
    "on nodes, linear": ((0.1, 0.3, 0.5, 0.95), {"step_size": 0.1}),
    "on nodes, cubic": ((0.1, 0.3, 0.5, 0.95), {"step_size": 0.1, "interp": "cubic"}),
    "between nodes, linear": ((0.1, 0.37, 0.44, 0.46, 0.93, 0.95), {"step_size": 0.1}),
    "between nodes, cubic": ((0.1, 0.37, 0.44, 0.46, 0.93, 0.95), {"step_size": 0.1, "interp": "cubic"}),
    "constructed": ((0.1, 0.83, 1.0), {"grid_constructor": curved}),
    "constructed, cubic": ((0.1, 0.4, 0.83, 1.0), {"grid_constructor": curved, "interp": "cubic"}),
    "perturbed": ((0.1, 0.37, 0.95), {"step_size": 0.1, "interp": "cubic", "perturb": True}),
}
FEW_GRADCHECKS = ("t is the grid", "between nodes, linear", "between nodes, cubic", "constructed, cubic", "perturbed")


@pytest.mark.parametrize(
    ("dtype", "direction"),
    slow_but([(torch.float64, 1)], [(torch.float64, 1), (torch.float64, -1), (torch.complex128, 1)]),
)
@pytest.mark.parametrize("name", slow_but(FEW_GRADCHECKS, GRADCHECKS))
def test_gradcheck(name: str, direction: int, dtype: torch.dtype) -> None:
    times, options = GRADCHECKS[name]
    generator = torch.Generator().manual_seed(0)
    y0, weight = (torch.randn(2, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    t = (direction * tensor(*times)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y0, weight, t: solve(small_field(weight), y0, t, **options),
        (y0, weight, t),
        eps=1e-6,
        atol=1e-6,
        fast_mode=(dtype, direction) != (torch.float64, 1),
    )


@pytest.mark.parametrize(
    "name",
    slow_but(["between nodes, cubic"], ["t is the grid", "on nodes, linear", "between nodes, cubic", "constructed"]),
)
def test_gradcheck_of_a_tuple(name: str) -> None:
    times, options = GRADCHECKS[name]
    a, b = tensor(0.4, -0.3, requires_grad=True), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.sin(y[0] * y[1]) * t, y[0].sum() - y[1] ** 2

    assert torch.autograd.gradcheck(
        lambda a, b, t: solve(func, (a, b), t, **options), (a, b, tensor(*times, requires_grad=True)), atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["constructed"],
        ["t is the grid", "between nodes, linear", "between nodes, cubic", "constructed"],
    ),
)
@pytest.mark.parametrize("direction", slow_but([-1], [1, -1]))
def test_gradgradcheck(direction: int, name: str) -> None:
    times, options = GRADCHECKS[name]
    y0, weight = tensor(0.4, -0.3, requires_grad=True), tensor(0.8, 1.2, requires_grad=True)
    t = (direction * tensor(*times)).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda y0, weight, t: solve(small_field(weight), y0, t, **options),
        (y0, weight, t),
        atol=1e-5,
        fast_mode=direction == 1,
    )


@pytest.mark.parametrize("interp", INTERPS)
def test_the_value_does_not_depend_on_whether_t_requires_a_gradient(interp: str) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    for t in (tensor(0.0, 0.1, 0.2, 0.47, 1.05), torch.tensor([0.0, 0.1, 0.2, 0.47, 1.05])):
        for options in ({}, {"step_size": 0.1}, {"grid_constructor": curved}):
            plain = solve(field, y0, t, interp=interp, **options)
            differentiable = solve(field, y0, t.clone().requires_grad_(), interp=interp, **options)
            torch.testing.assert_close(differentiable, plain, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_output_time_is_the_slope() -> None:
    """Moving an output inside the solve moves it along the interpolation; at a node, along f."""
    t = tensor(0.0, 0.3, 0.42, 1.05, requires_grad=True)
    out = solve(lambda t, y: torch.cos(t) + 0 * y, tensor(0.0), t, step_size=0.1)
    x = loop(lambda t, y: torch.cos(t) + 0 * y, tensor(0.0), torch.linspace(0, 0.5, 6, dtype=torch.float64))[:, 0]
    (at_node,) = torch.autograd.grad(out[1, 0], t, retain_graph=True)
    assert at_node[1].item() == pytest.approx(math.cos(0.3), rel=1e-12)
    (between,) = torch.autograd.grad(out[2, 0], t)
    assert between[2].item() == pytest.approx(((x[5] - x[4]) / 0.1).item(), rel=1e-12)
