"""Problems for the adaptive methods, tight references for them by SciPy, and solves that count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, sin
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from scipy.integrate import ode, solve_ivp
from torch import Tensor

from torchdiffeq_lmm import SolveReport

F64 = torch.float64
METHODS = ("bdf", "adams")
methods = pytest.mark.parametrize("method", METHODS)
fast_by_adams = pytest.mark.parametrize("method", slow_but(["adams"], METHODS))
"""For tests whose steps by bdf, which are implicit, take many times as long."""

Rates = tuple[float, float, float]


def f64(*values: float, **keywords: bool) -> Tensor:
    return torch.tensor(values, dtype=F64, **keywords)


@dataclass(frozen=True)
class Problem:
    """y' = f(t, y), with `f` for tensors, and `numbers` the same for plain numbers.

    `times` are those of outputs; `level` is atol / rtol, below which entries count no more.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    numbers: Callable[[float, Sequence[float]], list[float]]
    y0: tuple[float, ...]
    times: tuple[float, ...]
    level: float
    stiff: bool


def robertson(t: Tensor, y: Tensor, rates: Any = (0.04, 1e4, 3e7)) -> Tensor:
    a, b, c = y.unbind(-1)
    first, back, second = rates[0] * a, rates[1] * b * c, rates[2] * b * b
    net = first - back
    return torch.stack([-net, net - second, second], -1)


def robertson_numbers(t: float, y: Sequence[float], rates: Rates = (0.04, 1e4, 3e7)) -> list[float]:
    a, b, c = rates[0] * y[0], rates[1] * y[1] * y[2], rates[2] * y[1] ** 2
    return [b - a, a - b - c, c]


def hires(t: Any, y: Any, k: Any = 280) -> list[Any]:
    """High irradiance responses, after Hairer and Wanner; `k` is the fast rate."""
    product = k * y[5] * y[7]
    return [
        -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
        1.71 * y[0] - 8.75 * y[1],
        -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
        8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
        -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
        -product + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
        product - 1.81 * y[6],
        -product + 1.81 * y[6],
    ]


HIRES_SOURCE = f64(*hires(0, 8 * [0]))
HIRES_MATRIX = torch.stack([f64(*hires(0, unit, 0)) - HIRES_SOURCE for unit in torch.eye(8).tolist()])
HIRES_PRODUCT = f64(*5 * (0,), -280, 280, -280)


def hires_by_matrix(t: Tensor, y: Tensor) -> Tensor:
    """The same in a fraction of the operations."""
    return torch.addcmul(y @ HIRES_MATRIX + HIRES_SOURCE, HIRES_PRODUCT, y[5] * y[7])


def van_der_pol(t: Any, y: Any) -> list[Any]:
    x, v = y
    return [v, 100 * (1 - x * x) * v - x]


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    angle, speed = y.unbind()
    return torch.stack([speed, torch.cos(1.5 * t) - angle.sin() - 0.1 * speed])


def kepler(t: Any, y: Any) -> list[Any]:
    a, b, of_a, of_b = y
    pull = -((a * a + b * b) ** -1.5)
    return [of_a, of_b, a * pull, b * pull]


def stacked(numbers: Callable[[Any, Any], list[Any]]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.stack(numbers(t, y.unbind()))


PROBLEMS = {
    "Robertson": Problem(robertson, robertson_numbers, (1.0, 0.0, 0.0), (0.0, 1.0, 30.0, 1000.0), 1e-4, True),
    "HIRES": Problem(hires_by_matrix, hires, (1.0, *6 * (0.0,), 0.0057), (0.0, 5.0, 100.0, 321.8122), 1e-4, True),
    # A jump of the solution, near 81, lies between the outputs.
    "van der Pol": Problem(stacked(van_der_pol), van_der_pol, (2.0, 0.0), (0.0, 20.0, 60.0, 120.0), 1e-2, True),
    "pendulum": Problem(
        pendulum,
        lambda t, y: [y[1], -sin(y[0]) - 0.1 * y[1] + cos(1.5 * t)],
        (1.0, 0.5),
        (0.0, 3.0, 10.0, 20.0),
        1e-1,
        False,
    ),
    # Most of a period of an orbit of eccentricity 0.6, from the point next to the centre.
    "Kepler": Problem(stacked(kepler), kepler, (0.4, 0.0, 0.0, 2.0), (0.0, 1.0, 3.0, 5.5), 1.0, False),
}


@cache
def reference(name: str, times: tuple[float, ...] | None = None) -> np.ndarray:
    """The states at the outputs, of shape (n, d)."""
    problem = PROBLEMS[name]
    at = problem.times if times is None else times
    how = ("Radau", 1e-9, 1e-15) if problem.stiff else ("DOP853", 1e-12, 1e-14)
    found = solve_ivp(problem.numbers, (at[0], at[-1]), problem.y0, method=how[0], t_eval=at, rtol=how[1], atol=how[2])
    return found.y.T


def scipy_evaluations(name: str, rtol: float) -> int:
    """How many SciPy needs: BDF without those for Jacobians, or VODE's Adams methods."""
    problem = PROBLEMS[name]
    atol, times = rtol * problem.level, problem.times
    if problem.stiff:
        span = (times[0], times[-1])
        return solve_ivp(problem.numbers, span, problem.y0, method="BDF", rtol=rtol, atol=atol).nfev
    calls = 0

    def counted(t: float, y: np.ndarray) -> list[float]:
        nonlocal calls
        calls += 1
        return problem.numbers(t, y)

    vode = ode(counted).set_integrator("vode", method="adams", rtol=rtol, atol=atol, nsteps=100_000)
    vode.set_initial_value(problem.y0, times[0])
    for time in times[1:]:
        vode.integrate(time)
    return calls


def solve(
    f: Callable[..., Any],
    y0: Any,
    t: Any,
    method: str,
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    interface: Callable[..., Any] = torchdiffeq.odeint,
    **options: Any,
) -> Any:
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=F64)
    return interface(f, y0, times, method=method, rtol=rtol, atol=atol, options=options or None)


@cache
def solved(name: str, method: str, rtol: float) -> tuple[np.ndarray, SolveReport]:
    """The states at the outputs of a problem, of shape (n, d), and the report.

    With gradients, for else func is evaluated for Jacobians too.
    """
    problem, report = PROBLEMS[name], SolveReport()
    y = solve(problem.f, f64(*problem.y0), problem.times, method, rtol, rtol * problem.level, report=report)
    return y.numpy(), report


def error_of(name: str, method: str, rtol: float) -> float:
    """The largest error at an output, in terms of |y| + level."""
    exact = reference(name)
    return float((np.abs(solved(name, method, rtol)[0] - exact) / (np.abs(exact) + PROBLEMS[name].level)).max())


def decaying(t: Tensor, y: Tensor) -> Tensor:
    """With the solution e^{-t} (y_0 - 1) + cos t, of every entry."""
    return -y + torch.cos(t) - torch.sin(t)


def decayed(t: Tensor, start: float = 2.0) -> Tensor:
    return torch.exp(-t) * (start - 1) + torch.cos(t)


class Counted:
    """A function that notes the times at which it is called, and torchdiffeq's callbacks."""

    def __init__(self, f: Callable[[Tensor, Any], Any]) -> None:
        self._f = f
        self.times: list[float] = []
        self.log: list[tuple[str, float, Any, float]] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.times.append(float(t))
        return self._f(t, y)

    def _note(self, kind: str, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append((kind, float(t0), y0, float(dt)))

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self._note("step", t0, y0, dt)

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self._note("accept", t0, y0, dt)

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self._note("reject", t0, y0, dt)

    def count(self, kind: str) -> int:
        return sum(entry[0] == kind for entry in self.log)


def lengths(report: SolveReport) -> np.ndarray:
    return np.abs(np.diff(report.times))
