"""`CostateFilter(order=...)`: gradients of time-varying parameters to the method's own order, by every method."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from methods import IMPLICIT, NAMES, ORDER, in_turn, slow_but
from per_node import OBSERVATIONS, PerNode, density_errors, reference
from problems import EPIDEMIC, GRIDS, LOTKA_VOLTERRA, PENDULUM, VAN_DER_POL, Problem, Reference, orders
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter, SolveReport
from torchdiffeq_lmm.filters.grad_filter import HIGHEST_ORDER

F64 = torch.float64
TOTALS = [((1.0,), "method"), ((0.25, 0.5, 0.75, 1.0), "method"), ((0.5, 1.0), 3)]
STEPS = (40, 60, 100)
FEW = (20, 40, 60)
"""Where errors are at their order by then."""
FEWEST = (16, 24, 40)
"""Where they are so by then."""
LATE = (60, 100, 160)
"""Where two observations are neighbours, the errors of ab3 come to their order late."""
TIGHT = 1e-12
FINE = 1e-9
"""For equations of implicit methods where errors are measured that are hundreds of times as large."""
HIGH = [name for name in NAMES if ORDER[name] > 2]
PROBLEMS = (LOTKA_VOLTERRA, EPIDEMIC, PENDULUM, VAN_DER_POL)


def order_of(errors: Sequence[float], steps: Sequence[int] = STEPS) -> float:
    """The order of a fit through all errors, or of the last two, where the first ones are not small yet."""
    logs = np.log(steps), np.log(errors)
    fits = [np.polyfit(logs[0][part], logs[1][part], 1) for part in (slice(None), slice(-2, None))]
    return -float(min(fit[0] for fit in fits))


def reached(name: str, order: int | str) -> int:
    return min(ORDER[name], HIGHEST_ORDER if order == "method" else int(order))


# Every grid, every pattern of observations and every problem has its turn with a method of each family.
SETTINGS = [
    (list(GRIDS)[i % len(GRIDS)], observations, PROBLEMS[i % len(PROBLEMS)], order)
    for i, (observations, order) in enumerate(
        (observations, order) for observations in OBSERVATIONS for order in ("method", 3)
    )
]


@pytest.mark.parametrize(
    ("name", "grid", "observations", "problem", "order"),
    in_turn(SETTINGS, few=1, fast=("ab3",), names=HIGH),
    ids=lambda value: value.name if isinstance(value, Problem) else str(value),
)
def test_order_at_every_node(name: str, grid: str, observations: str, problem: Problem, order: int | str) -> None:
    wanted = CostateFilter(order=order)
    errors, numbers = [], FEW if name in IMPLICIT and name != "bdf3" else STEPS
    if name in ("am4", "bdf4", "bdf5", "bdf6"):
        numbers = FEWEST
    if name == "ab3" and observations == "at neighbours":
        numbers = LATE
    for steps in numbers:
        error, nodes = density_errors(name, wanted, grid, observations, problem, steps, FINE)
        errors.append(float(error[nodes].max()))
    assert order_of(errors, numbers) > reached(name, order) - 0.45, errors
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("name", slow_but([], ["ab4", "abm5", "am4", "bdf4"]))
def test_it_is_more_accurate_than_the_default_from_few_steps_on(name: str) -> None:
    """And the more so the higher the order."""
    errors = []
    for order in (2, 3, "method"):
        error, nodes = density_errors(name, CostateFilter(order=order), "growing", "four", LOTKA_VOLTERRA, 60, FINE)
        errors.append(float(error[nodes].max()))
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("order", slow_but(["method"], [3, "method"]))
@pytest.mark.parametrize("name", slow_but(["leapfrog", "ab2"], ["leapfrog", "ab2", "ab1", "bdf2"]))
def test_of_a_method_of_second_order_or_first_it_is_the_default(name: str, order: int | str) -> None:
    nodes = GRIDS["random"](20, PENDULUM.horizon)
    found, expected = (
        PerNode(PENDULUM, nodes).gradients(name, [7, 20], CostateFilter(order=wanted)) for wanted in (order, 2)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "grid"),
    in_turn(["uniform", "growing"], few=1, fast=("ab3",), names=["nystrom3", "ab3", "ab5", "abm4", "am4", "bdf5"]),
)
def test_with_checkpoints_it_is_the_same(name: str, grid: str) -> None:
    nodes = GRIDS[grid](12, PENDULUM.horizon)
    found = []
    for mode in ("autograd", "checkpoint"):
        of = PerNode(PENDULUM, nodes)
        states = torchdiffeq_lmm.odeint(
            of,
            torch.tensor(PENDULUM.x0, dtype=F64),
            nodes[[0, 7, 12]],
            method=name,
            options={"grid_constructor": lambda func, y0, t: nodes},
            grad_filter=CostateFilter(order="method"),
            backward=mode,
            adjoint_params=of.rows if mode != "autograd" else None,
            rtol=TIGHT,
            atol=TIGHT,
        )
        states[1:].square().sum().backward()
        found.append(of.theta.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def total_error(name: str, grid: str, observed: Sequence[float], order: int | str, steps: int) -> float:
    """Of ∂E/∂c for θ(t) + c with trapezoid weights, relative; observations are at nodes."""
    problem = LOTKA_VOLTERRA
    nodes = GRIDS[grid](steps, problem.horizon)
    c = torch.zeros(2, dtype=F64, requires_grad=True)

    def func(t: Tensor, x: Tensor) -> Tensor:
        return problem.torch_f(x, torch.as_tensor(problem.theta(t.numpy())) + c)

    at = [round(steps * fraction) for fraction in observed]
    states = torchdiffeq_lmm.odeint(
        func,
        torch.tensor(problem.x0, dtype=F64),
        nodes[[0, *at]],
        method=name,
        options={"grid_constructor": lambda func, y0, t: nodes},
        grad_filter=CostateFilter("trapezoid", order=order),
        rtol=FINE,
        atol=FINE,
    )
    (0.5 * (states[1:] - torch.tensor(problem.target, dtype=F64)).square().sum()).backward()
    exact = total(problem, tuple(nodes[at].tolist()))
    return float(np.abs(c.grad.numpy() - exact).max() / np.abs(exact).max())


@cache
def total(problem: Problem, observed: tuple[float, ...]) -> np.ndarray:
    """∫ (∂f/∂θ)ᵀ p dt by Gauss's quadrature between observations."""
    of, result = reference(problem, observed), np.zeros(2)
    # A smooth integrand: the shorter the pieces the fewer points.
    points, weights = np.polynomial.legendre.leggauss(6 + 34 // len(observed))
    for begin, end in pairwise((0.0, *observed)):
        t = (begin + end + (end - begin) * points) / 2
        values = problem.theta_vjp(of.state(t), problem.theta(t), of.costates(t, np.full(len(t), 0.5)))
        result += (end - begin) / 2 * values @ weights
    return result


@pytest.mark.parametrize(
    ("name", "grid", "observed", "order"),
    in_turn(
        [(grid, observed, order) for grid in ("uniform", "growing", "abrupt") for observed, order in TOTALS],
        few=1,
        fast=("ab3",),
        names=HIGH,
    ),
)
def test_totals_of_shared_parameters_keep_the_order(
    name: str, grid: str, observed: tuple[float, ...], order: int | str
) -> None:
    numbers = FEWEST if name in IMPLICIT and name != "milne_simpson" else FEW
    if name == "bdf5":
        numbers = STEPS
    errors = [total_error(name, grid, observed, order, steps) for steps in numbers]
    # On the way the error may change its sign.
    worst = [max(errors[i:]) for i in range(len(errors))]
    wanted = reached(name, order)
    assert order_of(worst, numbers) > wanted - 0.5 or errors[-1] < 2 / numbers[-1] ** wanted, errors


@pytest.mark.slow
def test_where_every_node_is_observed_totals_are_second_order() -> None:
    """Between two observations there are two evaluations then, and no quadrature of higher order."""
    numbers = (16, 32, 64)
    errors = [total_error("am5", "uniform", [(n + 1) / N for n in range(N)], "method", N) for N in numbers]
    assert np.mean(orders(errors)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(("interp", "order"), slow_but([], [("cubic", 4), ("linear", 2)]))
def test_observations_between_nodes_have_the_order_of_their_interpolation(interp: str, order: int) -> None:
    """But for the nodes beside them, over which an observation is spread."""
    errors = []
    for steps in (80, 160, 320):
        nodes = GRIDS["uniform"](steps, PENDULUM.horizon)
        h = PENDULUM.horizon / steps
        times = [(round(0.4 * steps) + 0.5) * h, (round(0.65 * steps) + 0.5) * h, PENDULUM.horizon]
        of = PerNode(PENDULUM, nodes)
        states = torchdiffeq_lmm.odeint(
            of,
            torch.tensor(PENDULUM.x0, dtype=F64),
            torch.tensor([0.0, *times], dtype=F64),
            method="ab4",
            options={"grid_constructor": lambda func, y0, t, nodes=nodes: nodes, "interp": interp},
            grad_filter=CostateFilter(order="method"),
        )
        (0.5 * (states[1:] - torch.tensor(PENDULUM.target, dtype=F64)).square().sum()).backward()
        exact = Reference(PENDULUM, times).density(nodes)
        error = (of.theta.grad[:-1] / h - exact).abs().amax(1)
        far = [all(abs(t - at) > h for at in times[:-1]) for t in nodes[:-1].tolist()]
        errors.append(float(error[torch.tensor(far)].max()))
    assert orders(errors)[-1] == pytest.approx(order, abs=0.4), errors


@pytest.mark.parametrize("order", [1, 4, True, "3", None, 2.5])
def test_another_order_is_refused(order: object) -> None:
    with pytest.raises(ValueError, match=r"order must be one of .*2, 3, 'method'.*, got"):
        CostateFilter(order=order)


@pytest.mark.usefixtures("_method_tables")
def test_methods_of_ones_own_too() -> None:
    """Of fourth order, with roots of ρ on the unit circle, and of third order, by backward differences."""
    thirds = [Fraction(n, 3) for n in (-1, 4, -5, 8, 0)]
    torchdiffeq_lmm.register_method("nystrom4", [0, 0, -1, 0, 1], thirds)
    nodes, errors = [GRIDS["uniform"](steps, PENDULUM.horizon) for steps in STEPS], []
    for at in nodes:
        found = PerNode(PENDULUM, at).gradients("nystrom4", [len(at) // 2, len(at) - 1], CostateFilter(order="method"))
        exact = Reference(PENDULUM, at[[len(at) // 2, -1]].tolist()).density(at, last=True)
        errors.append(float((found - exact)[:-1].abs().max()))
    assert order_of(errors) > 4 - 0.45, errors


@pytest.mark.parametrize("method", slow_but(["adams"], ["bdf", "adams"]))
def test_adaptive_methods_by_their_tolerance(method: str) -> None:
    """At the worst node; the default is left behind."""
    errors = {order: [density_error(method, rtol, order) for rtol in (1e-4, 1e-7)] for order in (2, 3, "method")}
    assert all(later < 0.7 * earlier for of in errors.values() for earlier, later in pairwise(of))
    assert errors[3][-1] < 0.25 * errors[2][-1]
    assert errors["method"][-1] < 0.2 * errors[3][-1]
    assert errors["method"][-1] < 1e-4


def density_error(method: str, rtol: float, order: int | str) -> float:
    seen: dict[float, list[Tensor]] = {}

    def func(t: Tensor, x: Tensor) -> Tensor:
        time = float(t)
        theta = torch.tensor(PENDULUM.theta(np.array(time))).requires_grad_()
        seen.setdefault(time, []).append(theta)
        return PENDULUM.torch_f(x, theta)

    report = SolveReport()
    states = torchdiffeq_lmm.odeint(
        func,
        torch.tensor(PENDULUM.x0, dtype=F64),
        torch.tensor([0.0, PENDULUM.horizon], dtype=F64),
        method=method,
        rtol=rtol,
        atol=rtol,
        options={"report": report},
        grad_filter=CostateFilter(order=order),
    )
    (0.5 * (states[-1] - torch.tensor(PENDULUM.target, dtype=F64)).square().sum()).backward()
    nodes = torch.tensor(report.times, dtype=F64)
    exact = reference(PENDULUM, (PENDULUM.horizon,)).density(nodes, last=True)
    grads = torch.stack([sum(th.grad for th in seen[t] if th.grad is not None) + torch.zeros(2) for t in report.times])
    steps = nodes.diff()
    error = (grads / torch.cat([steps, steps[-1:]])[:, None] - exact).abs().amax(1)
    # BDF do not use f at the first node.
    return float(error[1 if method == "bdf" else 0 :].max())


@pytest.mark.parametrize("order", slow_but(["method"], [3, "method"]))
@pytest.mark.parametrize("rate", slow_but([1e4], [1e2, 1e4, 1e6]))
def test_costates_of_stiff_components_stay_bounded(rate: float, order: int | str) -> None:
    """x' = -rate (x - θ): the density is rate p, p ≤ exp(rate (t - T)), and what is added up over a layer is E's."""
    steps = 40
    nodes = torch.linspace(0, 1, steps + 1, dtype=F64)
    theta = torch.linspace(1, 2, steps + 1, dtype=F64).requires_grad_()
    index = {t: n for n, t in enumerate(nodes.tolist())}
    states = torchdiffeq_lmm.odeint(
        lambda t, x: -rate * (x - theta[index[float(t)]]),
        torch.ones(1, dtype=F64),
        nodes[[0, -1]],
        method="bdf5",
        options={"grid_constructor": lambda func, y0, t: nodes},
        grad_filter=CostateFilter(order=order),
        rtol=1e-10,
        atol=1e-12,
    )
    states[-1].sum().backward()
    costates = theta.grad[1:] * steps / rate
    assert costates.abs().max() <= 1.5
    # Ten nodes before the observation nothing is left of it.
    assert costates[:-10].abs().max() < 0.05
