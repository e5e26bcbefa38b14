"""The adaptive methods: accuracy against SciPy, evaluations, tolerances, outputs, and the steps that are made."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from adaptive import (
    METHODS,
    PROBLEMS,
    Counted,
    decayed,
    decaying,
    error_of,
    f64,
    fast_by_adams,
    lengths,
    methods,
    pendulum,
    reference,
    scipy_evaluations,
    solve,
    solved,
    stacked,
)
from methods import slow_but
from problems import orders
from scipy.integrate import solve_ivp
from torch import Tensor

from torchdiffeq_lmm import SolveReport

# ---------------------------------------------------------------------------------------------------------- accuracy

ACCURACY = [
    ("Robertson", "bdf", 1e-6, 5),
    ("Robertson", "bdf", 1e-4, 3),
    ("HIRES", "bdf", 1e-4, 25),
    ("HIRES", "bdf", 1e-6, 25),
    ("van der Pol", "bdf", 1e-6, 20),
    ("pendulum", "adams", 1e-4, 20),
    ("pendulum", "adams", 1e-7, 20),
    ("pendulum", "bdf", 1e-6, 60),
    ("Kepler", "adams", 1e-4, 60),
    ("Kepler", "adams", 1e-7, 40),
    ("Kepler", "bdf", 1e-6, 1500),
]


@pytest.mark.parametrize(
    ("name", "method", "rtol", "factor"),
    slow_but([case for case in ACCURACY if case[1] == "adams" and case[:3] != ("Kepler", "adams", 1e-7)], ACCURACY),
)
def test_every_output_is_as_accurate_as_the_tolerance(name: str, method: str, rtol: float, factor: float) -> None:
    """Up to a factor that is the problem's own: what it makes of errors on the way."""
    assert error_of(name, method, rtol) <= factor * rtol


@pytest.mark.parametrize(
    ("name", "rtol"),
    [("Robertson", 1e-6), ("HIRES", 1e-4), ("HIRES", 1e-6)],
)
@pytest.mark.slow
def test_bdf_needs_no_more_evaluations_than_scipys(name: str, rtol: float) -> None:
    """But for those for Jacobians, which SciPy does not count."""
    assert solved(name, "bdf", rtol)[1].evaluations <= 1.2 * scipy_evaluations(name, rtol)


@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_adams_needs_no_more_evaluations_than_vode(rtol: float) -> None:
    assert solved("pendulum", "adams", rtol)[1].evaluations <= 1.2 * scipy_evaluations("pendulum", rtol)


def test_adams_needs_fewer_evaluations_than_dopri5() -> None:
    problem, rtol = PROBLEMS["pendulum"], 1e-7
    func = Counted(problem.f)
    t = torch.tensor(problem.times, dtype=torch.float64)
    y = torchdiffeq.odeint(func, f64(*problem.y0), t, rtol=rtol, atol=rtol * problem.level)
    assert np.abs(y.numpy() - reference("pendulum")).max() < 1e-5
    assert solved("pendulum", "adams", rtol)[1].evaluations < len(func.times)


@fast_by_adams
def test_the_error_is_proportional_to_the_tolerance(method: str) -> None:
    """Over six decades: the slope of log error against log rtol, and every decade less than the one before."""
    tolerances = [10.0**-power for power in range(3, 10)]
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    wanted = decayed(t)
    with torch.no_grad():
        errors = [
            float((solve(decaying, f64(2.0), t, method, rtol, rtol)[:, 0] - wanted).abs().max()) for rtol in tolerances
        ]
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.7 < slope < 1.3, errors
    assert errors == sorted(errors, reverse=True)
    assert all(error <= 10 * rtol for error, rtol in zip(errors, tolerances, strict=True))


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("method", "factor"), slow_but([("adams", 3.0)], [("bdf", 1.1), ("adams", 3.0)]))
def test_outputs_inside_steps_are_as_accurate_as_nodes(method: str, factor: float) -> None:
    """Up to a factor for polynomials of degree 12, at the end of what they go through."""
    first, second = SolveReport(), SolveReport()
    y0, rtol = f64(1.0, 0.5), 1e-6
    with torch.no_grad():
        solve(pendulum, y0, (0.0, 10.0), method, rtol, rtol, report=first)
        nodes = np.array(first.times)
        inside = np.concatenate([nodes[:-1] + part * np.diff(nodes) for part in (0.3, 0.7)])
        times = np.unique(np.concatenate([nodes, inside]))
        y = solve(pendulum, y0, torch.from_numpy(times), method, rtol, rtol, report=second).numpy()
    # Outputs change nothing.
    assert second.times == first.times
    assert second.orders == first.orders
    errors = np.abs(y - reference("pendulum", tuple(times))).max(1)
    is_node = np.isin(times, nodes)
    assert is_node.sum() == len(nodes)
    assert errors[~is_node].max() <= factor * errors[is_node].max()
    assert np.median(errors[~is_node]) <= 1.5 * np.median(errors[is_node])


@pytest.mark.parametrize(
    ("method", "order"),
    slow_but([("bdf", 2), ("adams", 2)], itertools.product(METHODS, [1, 2, 3, 4])),
)
def test_the_order_of_outputs_on_equal_steps(method: str, order: int) -> None:
    """With max_order k, max_step h, and a tolerance that allows the longest step at order k, but at no lower one.

    On a circle all derivatives are of the same size. Adams methods correct by the formula of one order more.
    """
    # Orders rise one by one: the higher ones come later.
    t = torch.linspace(0, 1.5, 25, dtype=torch.float64) if order < 3 else torch.linspace(0, 3, 50, dtype=torch.float64)
    wanted = torch.stack([torch.cos(t), torch.sin(t)], -1)
    expected = order + (method == "adams")
    errors = []
    with torch.no_grad():
        for h in (0.05, 0.025, 0.0125):
            report = SolveReport()
            y = solve(
                lambda t, y: torch.stack([-y[1], y[0]]),
                wanted[0],
                t,
                method,
                0.0,
                1.5 * (h / 0.75) ** (order + 1) * error_constant(method, order),
                max_order=order,
                max_step=h,
                report=report,
            )
            assert set(report.orders[-20:]) == {order}
            assert np.median(lengths(report)) == pytest.approx(h)
            errors.append(float((y - wanted).abs()[1:].max()))
    assert np.mean(orders(errors)) == pytest.approx(expected, abs=0.3), errors


def error_constant(method: str, order: int) -> float:
    """Of the estimate of a step's error: that of BDF, or the last coefficient of Adams's correctors."""
    return 1 / (order + 1) if method == "bdf" else (1 / 2, 1 / 12, 1 / 24, 19 / 720)[order - 1]


@methods
def test_one_output_time(method: str) -> None:
    func = Counted(decaying)
    y = solve(func, f64(2.0), (0.5,), method)
    assert torch.equal(y, f64(2.0)[None])
    assert not func.times


@fast_by_adams
def test_outputs_that_are_closer_than_steps_can_be(method: str) -> None:
    t = [0.0, 1.0, math.nextafter(1.0, 2), 1.0 + 1e-12, 2.0, math.nextafter(2.0, 3)]
    y = solve(decaying, f64(2.0), t, method)[:, 0]
    torch.testing.assert_close(y, decayed(f64(*t)), rtol=1e-5, atol=1e-5)
    assert float((y[1:4] - y[1]).abs().max()) < 1e-11


@methods
def test_times_that_differ_by_rounding_alone(method: str) -> None:
    t = [1.0, math.nextafter(1.0, 2)]
    y = solve(decaying, f64(2.0), t, method)
    torch.testing.assert_close(y, f64(2.0, 2.0)[:, None], rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("direction", "method"),
    slow_but([(-1, "adams")], [(1, "bdf"), (1, "adams"), (-1, "adams"), (-1, "bdf")]),
)
def test_the_report_and_the_callbacks_agree_with_what_is_called(direction: int, method: str) -> None:
    """The pulse makes attempts fail."""

    def pulse(t: Tensor, y: Tensor) -> Tensor:
        return direction * (-y + 50 / (1 + ((direction * t - 2) / 0.02) ** 2))

    func, report = Counted(pulse), SolveReport()
    end = 4.0 * direction
    with torch.no_grad():
        solve(func, f64(1.0), (0.0, 0.7 * direction, end), method, 1e-5, 1e-7, report=report)
    assert report.evaluations == len(func.times)
    assert report.rejected > 0
    assert func.count("step") == report.steps + report.rejected + report.unsolved
    assert func.count("accept") == report.steps == len(report.orders) == len(report.times) - 1
    assert func.count("reject") == report.rejected + report.unsolved
    assert (report.times[0], report.times[-1]) == (0.0, end)
    assert (direction * np.diff(report.times) > 0).all()
    # Every attempt is followed by what became of it, with the same arguments.
    for attempt, result in zip(func.log[::2], func.log[1::2], strict=True):
        assert attempt[0] == "step"
        assert attempt[1:2] + attempt[3:] == result[1:2] + result[3:]
        assert torch.equal(attempt[2], result[2])
    accepted = [entry for entry in func.log if entry[0] == "accept"]
    assert [entry[1] for entry in accepted] == pytest.approx(report.times[:-1])
    assert [entry[3] for entry in accepted] == pytest.approx(lengths(report), rel=1e-6)
    # Short steps in the pulse, long ones away from it.
    middle = (np.abs(np.array(report.times[1:]) - 2 * direction)) < 0.05
    assert np.median(lengths(report)[middle]) < 0.2 * lengths(report).max()


def test_the_report_counts_the_jacobians_that_are_asked_for() -> None:
    asked, report = [], SolveReport()

    def jac(t: Tensor, y: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.diag(-1e3 * (1 + y**2))

    y = solve(
        lambda t, y: -1e3 * (y + y**3 / 3 - torch.cos(t)), f64(1.0, 2.0), (0.0, 2.0), "bdf", jac=jac, report=report
    )
    assert report.jacobians == len(asked) > 0
    assert report.jacobians < report.steps / 2
    root = float(y[-1, 0])
    # Next to the equilibrium, behind it by its own change in a time constant.
    assert root + root**3 / 3 == pytest.approx(math.cos(2.0), abs=2e-3)


def test_an_equation_that_is_not_solved_asks_for_a_shorter_step() -> None:
    """y' = y² + 1 has no solution to the equation of so long a first step."""
    func, report = Counted(lambda t, y: y * y + 1), SolveReport()
    y = solve(func, f64(0.0), (0.0, 1.3), "bdf", first_step=0.64, report=report)
    assert float(y[-1]) == pytest.approx(math.tan(1.3), rel=1e-4)
    assert report.unsolved > 0
    assert func.count("step") == report.steps + report.rejected + report.unsolved
    assert func.count("reject") == report.rejected + report.unsolved


@pytest.mark.slow
def test_attempts_whose_equation_is_not_solved_are_given_up_soon() -> None:
    """At a loose tolerance steps reach over the jump of the solution, where theirs has none nearby."""
    span, report = (0.0, 1000.0), SolveReport()

    def numbers(t: Any, y: Any) -> list[Any]:
        return [y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]]

    solve(stacked(numbers), f64(2.0, 0.0), span, "bdf", rtol=1e-3, atol=1e-3, report=report)
    assert report.unsolved > 3
    assert report.evaluations <= 1.2 * solve_ivp(numbers, span, (2.0, 0.0), "BDF", rtol=1e-3, atol=1e-3).nfev


@pytest.mark.parametrize(("method", "rate"), slow_but([("bdf", 1e4)], [("bdf", 1e4), ("adams", 30.0)]))
def test_steps_are_short_in_a_transient_and_long_after_it(method: str, rate: float) -> None:
    report = SolveReport()
    with torch.no_grad():
        solve(
            lambda t, y: -rate * (y - torch.cos(0.1 * t)),
            f64(0.0),
            (0.0, 20.0),
            method,
            1e-5,
            1e-7,
            report=report,
        )
    steps, ends = lengths(report), np.array(report.times[1:])
    transient = ends < 3 / rate
    assert transient.sum() >= 5
    # Adams methods are bound by their stability afterwards.
    longer = 1e3 if method == "bdf" else 2.0
    assert np.median(steps[ends > 10]) > longer * np.median(steps[transient])
    assert report.orders[0] == 1
    assert max(report.orders) >= 3
    assert max(np.diff(report.orders)) == 1


@fast_by_adams
def test_the_order_rises(method: str) -> None:
    report = SolveReport()
    with torch.no_grad():
        solve(pendulum, f64(1.0, 0.5), (0.0, 10.0), method, 1e-8, 1e-10, report=report)
    assert report.orders[0] == 1
    assert max(report.orders) >= (5 if method == "bdf" else 7)
    assert all(after <= before + 1 for before, after in zip(report.orders, report.orders[1:], strict=False))


@methods
def test_a_report_tells_of_the_last_solve(method: str) -> None:
    report = SolveReport()
    for end in (1.0, 2.0):
        solve(decaying, f64(2.0), (0.0, end), method, report=report)
        assert report.times[-1] == end
    assert report.times[0] == 0.0
    assert report.times == sorted(report.times)
    assert f"{report.steps} from t = 0 to 2" in str(report)


@fast_by_adams
def test_two_solves_are_the_same(method: str) -> None:
    results: list[Any] = []
    for _ in range(2):
        report = SolveReport()
        y0 = f64(1.0, 0.5, requires_grad=True)
        y = solve(pendulum, y0, (0.0, 1.3, 3.0), method, report=report)
        (gradient,) = torch.autograd.grad((y**2).sum(), y0)
        results.append((report.times, report.orders, y.tolist(), gradient.tolist()))
    assert results[0] == results[1]
