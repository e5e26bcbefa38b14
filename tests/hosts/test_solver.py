"""torchdiffeq's solve with leapfrog, without a filter: values, orders, and the number of evaluations."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from leapfrog import INTERPS, NODES, Field, loop, on, solve, tensor
from methods import slow_but
from problems import GRIDS, PENDULUM, PROBLEMS, Problem, Reference, orders
from torch import Tensor

# --------------------------------------------------------------------------------------- values, against the loop


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("through", ["t", "grid_constructor"])
@pytest.mark.parametrize("name", NODES)
def test_values_and_gradients_are_those_of_the_loop(name: str, through: str, direction: int) -> None:
    nodes = direction * NODES[name]
    field = Field()
    y0 = tensor(0.3, -0.8, 1.1, requires_grad=True)
    cotangent = torch.randn(len(nodes), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = loop(field, y0, nodes)
    options = {} if through == "t" else {"grid_constructor": on(nodes)}
    actual = solve(field, y0, nodes, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = (y0, field.weight, field.bias)
    torch.testing.assert_close(
        torch.autograd.grad((actual * cotangent).sum(), inputs),
        torch.autograd.grad((expected * cotangent).sum(), inputs),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("start", [0.0, -2.0])
@pytest.mark.parametrize("step_size", [0.1, 0.3, 0.07, 1.0, 5.0])
@pytest.mark.parametrize("direction", [1, -1])
def test_step_size_is_the_loop_on_its_nodes(direction: int, step_size: float, start: float) -> None:
    t = tensor(start, start + direction)
    inner = start + direction * step_size * torch.arange(math.ceil(1 / step_size - 1e-9), dtype=torch.float64)
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    expected = loop(field, y0, torch.cat([inner, t[-1:]]))
    out = solve(field, y0, t, step_size=step_size)
    torch.testing.assert_close(out, torch.stack([y0, expected[-1]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step_size", [torch.tensor(0.1, dtype=torch.float64), np.float64(0.1), torch.tensor([0.1])])
def test_step_sizes_of_other_types(step_size: Any) -> None:
    field, y0, t = Field(), tensor(0.3, -0.8, 1.1), tensor(0.0, 1.0)
    torch.testing.assert_close(solve(field, y0, t, step_size=step_size), solve(field, y0, t, step_size=0.1))


def test_exact_for_a_quadratic_after_an_exact_start() -> None:
    """x' = 2 t from t = 0 with a first step that Euler makes exact, as far as its own length squared."""
    nodes = torch.cat([tensor(0.0, 1e-9), torch.linspace(0.1, 1, 7, dtype=torch.float64)])
    out = solve(lambda t, y: torch.zeros_like(y) + 2 * t, tensor(0.0), nodes)
    # The ratio 1e8 of the steps amplifies the 1e-18 of the start by its square.
    torch.testing.assert_close(out[:, 0], nodes**2, rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ orders, forward


def field_of(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: problem.torch_f(x, torch.as_tensor(problem.theta(np.array(t.item()))))


def exact(problem: Problem, t: Tensor) -> Tensor:
    reference = Reference(problem, [problem.horizon])
    return torch.as_tensor(np.stack([reference.state(s) for s in t.tolist()]))


def measured_order(problem: Problem, t: Tensor, options: Callable[[int], dict[str, Any]]) -> float:
    """The mean order over N = 40, 80, 160."""
    truth, errors = exact(problem, t), []
    for steps in (40, 80, 160):
        out = solve(field_of(problem), tensor(*problem.x0), t, **options(steps))
        errors.append((out - truth).abs().max().item())
    return float(np.mean(orders(errors)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
@pytest.mark.one_in(2)
def test_second_order_on_every_grid(problem: Problem, grid: str) -> None:
    t = tensor(0.0, problem.horizon)
    order = measured_order(problem, t, lambda n: {"grid_constructor": on(GRIDS[grid](n, problem.horizon))})
    assert 1.8 < order < 2.4


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("grid", slow_but(["random"], GRIDS))
@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_second_order_at_observations_between_nodes(problem: Problem, grid: str, interp: str) -> None:
    t = problem.horizon * tensor(0.0, 0.2347, 0.5113, 0.77701, 1.0)
    order = measured_order(
        problem, t, lambda n: {"grid_constructor": on(GRIDS[grid](n, problem.horizon)), "interp": interp}
    )
    assert 1.7 < order < 2.7


@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_second_order_at_observations_on_nodes(problem: Problem) -> None:
    t = problem.horizon * tensor(0.0, 0.25, 0.5, 0.8, 1.0)
    order = measured_order(problem, t, lambda n: {"step_size": problem.horizon / n})
    assert 1.8 < order < 2.4


@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_second_order_with_t_as_the_grid(problem: Problem) -> None:
    errors = []
    for steps in (40, 80, 160):
        t = GRIDS["growing"](steps, problem.horizon)
        out = solve(field_of(problem), tensor(*problem.x0), t)
        errors.append((out - exact(problem, t)).abs().max().item())
    assert 1.7 < np.mean(orders(errors)) < 2.4


# ----------------------------------------------------------------------------------------------- evaluation counts


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("end", "step_size", "count"), [(1.0, 0.1, 10), (1.1, 0.1, 11), (1.0, 0.3, 4), (0.5, 2.0, 1)])
def test_one_evaluation_per_step(end: float, step_size: float, count: int, grad: bool, interp: str) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=grad)
    t = tensor(0.0, *(step_size * n for n in range(1, count)), end, requires_grad=grad)
    out = solve(field, y0, t, step_size=step_size, interp=interp)
    # A single step takes one more, at its end.
    expected = [step_size * n for n in range(count)] if count > 1 else [0.0, end]
    assert field.times == pytest.approx(expected)
    if grad:
        out.sum().backward()
        assert len(field.times) == len(expected)


@pytest.mark.parametrize(("interp", "extra"), [("linear", 0), ("cubic", 1)])
def test_evaluations_for_outputs_between_nodes(interp: str, extra: int) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    solve(field, y0, tensor(0.0, 0.13, 0.14, 0.55, 1.0), step_size=0.1, interp=interp)
    assert len(field.times) == 10
    field.times.clear()
    # Only in the last step is there no next evaluation to take the slope from.
    solve(field, y0, tensor(0.0, 0.55, 0.93, 0.97, 1.0), step_size=0.1, interp=interp)
    assert len(field.times) == 10 + extra


@pytest.mark.parametrize("interp", INTERPS)
def test_evaluations_with_t_as_the_grid(interp: str) -> None:
    field = Field()
    solve(field, tensor(0.3, -0.8, 1.1), tensor(0.0, 0.1, 0.7, 1.0), interp=interp)
    assert field.times == [0.0, 0.1, 0.7]


def test_evaluations_up_to_an_event() -> None:
    for interp, extra in (("linear", 0), ("cubic", 1)):
        times: list[float] = []

        def func(t: Tensor, y: Tensor, times: list[float] = times) -> Tensor:
            times.append(t.item())
            return -torch.ones_like(y)

        solve(func, tensor(1.0), tensor(0.0, 9.0), lambda t, y: y[0] - 0.35, step_size=0.1, interp=interp)
        assert len(times) == 7 + extra
