"""torchdiffeq's midpoint and heun2 with a gradient filter."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from problems import GRIDS, PENDULUM, Reference, derivative_of_a_shared_parameter, orders
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter

STAGES = {"midpoint": 0.5, "heun2": 1.0}


def stage_times(method: str, nodes: Tensor) -> Tensor:
    """All times at which a method evaluates f, once each."""
    stages = nodes[:-1] + STAGES[method] * nodes.diff()
    return torch.cat([nodes[:-1], stages]).unique()


@cache
def reference(observed: tuple[float, ...]) -> Reference:
    return Reference(PENDULUM, list(observed))


def gradient_errors(method: str, nodes: Tensor, observed: list[int], grad_filter: object) -> Tensor:
    """Of the gradient divided by the cell of the time of every evaluation, which lasts up to the next."""
    times = stage_times(method, nodes)
    theta = torch.tensor(PENDULUM.theta(times.numpy()).T.copy()).requires_grad_()

    def func(t: Tensor, x: Tensor) -> Tensor:
        index = int((times - t).abs().argmin())
        assert (times[index] - t).abs() < 1e-12
        return PENDULUM.torch_f(x, theta[index])

    x0 = torch.tensor(PENDULUM.x0, dtype=torch.float64)
    options = {"grid_constructor": lambda func, y0, t: nodes}
    states = torchdiffeq_lmm.odeint(
        func, x0, nodes[[0, *observed]], method=method, options=options, grad_filter=grad_filter
    )
    (0.5 * (states[1:] - torch.tensor(PENDULUM.target, dtype=torch.float64)).square().sum()).backward()
    of = reference(tuple(nodes[observed].tolist()))
    if method == "midpoint":
        widths, exact = torch.cat([times, nodes[-1:]]).diff(), of.density(torch.cat([times, nodes[-1:]]))
    else:
        steps = nodes.diff()
        widths, exact = torch.cat([steps, steps[-1:]]), of.density(nodes, last=True)
    return (theta.grad / widths[:, None] - exact).abs().amax(1)


@pytest.mark.parametrize(
    ("grid", "observations"),
    slow_but(
        [("growing", "four")],
        [("uniform", "at the end"), ("truncated", "four"), ("growing", "four"), ("random", "at the end")],
    ),
)
@pytest.mark.parametrize("method", slow_but(["midpoint"], STAGES))
def test_second_order_at_all_stages(method: str, grid: str, observations: str) -> None:
    filtered, unfiltered = [], []
    for steps in (20, 40, 80, 160):
        nodes = GRIDS[grid](steps, PENDULUM.horizon)
        observed = [steps] if observations == "at the end" else [steps // 4, steps // 2, 3 * steps // 4, steps]
        # What does not converge shows it in few steps.
        if steps > 20:
            filtered.append(float(gradient_errors(method, nodes, observed, "auto").max()))
        if steps < 160:
            unfiltered.append(float(gradient_errors(method, nodes, observed, None).max()))
    assert np.mean(orders(filtered)) > 1.85, filtered
    assert abs(np.mean(orders(unfiltered))) < 0.2
    assert unfiltered[-1] > 0.3


@pytest.mark.parametrize("method", slow_but(["midpoint"], STAGES))
def test_total_of_a_shared_parameter_with_trapezoid_weights_is_second_order(method: str) -> None:
    def total(steps: int) -> float:
        nodes = GRIDS["growing"](steps, PENDULUM.horizon)
        phi = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, x: Tensor) -> Tensor:
            return PENDULUM.torch_f(x, torch.stack([1 + phi * torch.sin(3 * t), 1.5 + t]))

        options = {"grid_constructor": lambda func, y0, t: nodes}
        x0 = torch.tensor(PENDULUM.x0, dtype=torch.float64)
        last = torchdiffeq_lmm.odeint(
            func, x0, nodes[[0, -1]], method=method, options=options, grad_filter=CostateFilter("trapezoid")
        )[-1]
        (0.5 * (last - torch.tensor(PENDULUM.target, dtype=torch.float64)).square().sum()).backward()
        return float(phi.grad)

    exact = derivative_of_a_shared_parameter(reference((PENDULUM.horizon,)))
    # The error may change its sign on the way, and then has no order between two steps.
    for steps in (20, 40, 80):
        assert abs(total(steps) - exact) < 2 / steps**2


@pytest.mark.parametrize(
    "options", [{"step_size": 0.1}, {"step_size": 0.13}, {"step_size": 0.13, "interp": "cubic"}, {}]
)
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("method", STAGES)
@pytest.mark.one_in(5)
def test_values_and_other_gradients_are_torchdiffeqs(
    method: str, direction: int, perturb: bool, options: dict[str, object]
) -> None:
    results = []
    for odeint in (torchdiffeq.odeint, filtered_odeint):
        y0 = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
        t = direction * torch.tensor([0.0, 0.31, 0.7, 1.0], dtype=torch.float64)
        out = odeint(
            lambda t, y: torch.tanh(2 * y) * torch.cos(3 * t) - y,
            y0,
            t,
            method=method,
            options={**options, "perturb": perturb},
        )
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        results.append((out.detach(), *torch.autograd.grad((out * cotangent).sum(), y0)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def filtered_odeint(func: Callable[..., Tensor], y0: Tensor, t: Tensor, **arguments: object) -> Tensor:
    return torchdiffeq_lmm.odeint(func, y0, t, grad_filter="auto", **arguments)


@pytest.mark.parametrize("method", STAGES)
def test_without_filter_it_is_torchdiffeqs_own_solver(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = torchdiffeq.odeint
    monkeypatch.setattr(
        torchdiffeq, "odeint", lambda *args, **kwargs: called.append(kwargs["method"]) or original(*args, **kwargs)
    )
    t = torch.linspace(0, 1, 3)
    torchdiffeq_lmm.odeint(lambda t, y: -y, torch.ones(1), t, method=method)
    torchdiffeq_lmm.odeint(lambda t, y: -y, torch.ones(1), t, method=method, grad_filter="auto")
    assert called == [method, f"filtered_{method}"]


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "heun3", None])
def test_other_methods_of_torchdiffeq_are_refused(method: str | None) -> None:
    with pytest.raises(ValueError, match=r"grad_filter 'auto' is for.*midpoint and heun2, got method"):
        torchdiffeq_lmm.odeint(
            lambda t, y: -y, torch.ones(1), torch.linspace(0, 1, 3), method=method, grad_filter="auto"
        )


@pytest.mark.parametrize("method", STAGES)
def test_perturb_sees_a_jump_as_torchdiffeq_does(method: str) -> None:
    results = [
        odeint(
            lambda t, y: -y * (1 if t < 0.5 else 3.0),
            torch.ones(1, dtype=torch.float64),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            method=method,
            options={"step_size": 0.25, "perturb": True},
        )
        for odeint in (torchdiffeq.odeint, filtered_odeint)
    ]
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)
