"""Adaptive methods: error at the end against evaluations and wall time, beside SciPy's, torchdiffeq's and diffrax's.

An error is the root mean square over the components, relative to |y| + atol / rtol, so that it is to be compared with
rtol. Evaluations are those of func; SciPy counts those for Jacobians apart, ours are among them, and in diffrax a
Jacobian counts as one.

Implicit methods of torchdiffeq have no tolerance: they make equal steps, more of them for each smaller tolerance of the
others. Most of them belong to torchdiffeq's main branch: with a release they are left out.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torchdiffeq
from batches import Stiff, hires, oregonator, robertson, van_der_pol
from peers import MOST_STEPS, diffrax_adaptive
from problems import kepler
from report import absences, failures, markdown
from scipy.integrate import solve_ivp
from timing import failure, seconds
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_lmm

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)

# Of the air pollution model in Verwer, "Gauss–Seidel iteration for stiff ODEs from chemical kinetics" (1994).
POLLUTION_RATES = (
    *(0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88),
    *(1.63e4, 4.8e6, 3.5e-4, 0.0175, 1e8, 4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12),
)


@dataclass(frozen=True)
class Problem:
    """y' = field(xp, t, y), with torch, numpy or jax.numpy for xp.

    Args:
        name: the problem's name.
        field: its right-hand side.
        start: y(0).
        end: of the interval, which begins at 0.
        is_stiff: whether explicit methods are left out.
        atol: relative to rtol.
    """

    name: str
    field: Callable[[Any, Any, Any], Any]
    start: tuple[float, ...]
    end: float
    is_stiff: bool
    atol: float = 1.0

    @cache  # noqa: B019
    def reference(self) -> np.ndarray:
        """y at the end, by SciPy."""
        method = "Radau" if self.is_stiff else "DOP853"
        solution = solve_ivp(
            lambda t, y: self.field(np, t, y), (0, self.end), self.start, method, rtol=1e-12, atol=1e-12 * self.atol
        )
        return solution.y[:, -1]

    def error(self, end: np.ndarray) -> float:
        """The error of an end."""
        reference = self.reference()
        return float(np.sqrt(np.mean(((end - reference) / (np.abs(reference) + self.atol)) ** 2)))


def of_sample(stiff: Stiff, *parameters: float) -> Callable[[Any, Any, Any], Any]:
    """The field of one sample of a batch, by default of the first one."""
    p = parameters or stiff.parameters[0]
    return lambda xp, t, y: xp.stack(stiff.field(xp, y, p))


def e5(xp: Any, t: Any, y: Any) -> Any:
    """E5, a pyrolysis."""
    a, ab, bc, d = 7.89e-10 * y[0], 1.1e7 * y[0] * y[2], 1.13e9 * y[1] * y[2], 1.13e3 * y[3]
    return xp.stack([-a - ab, a - bc, a - ab + d - bc, ab - d])


def pollution(xp: Any, t: Any, y: Any) -> Any:
    """20 species of polluted air."""
    k = POLLUTION_RATES
    # The species that react, by number, in the order of the rates.
    pairs = (
        *((0,), (1, 3), (4, 1), (6,), (6,), (6, 5), (8,), (8, 5), (10, 1), (10, 0), (12,), (9, 1), (13,)),
        *((0, 5), (2,), (3,), (3,), (15,), (15,), (16, 5), (18,), (18,), (0, 3), (18, 0), (19,)),
    )
    r = [k[i] * y[pair[0]] * (y[pair[1]] if len(pair) > 1 else 1.0) for i, pair in enumerate(pairs)]
    change = [
        -r[0] - r[9] - r[13] - r[22] - r[23] + r[1] + r[2] + r[8] + r[10] + r[11] + r[21] + r[24],
        -r[1] - r[2] - r[8] - r[11] + r[0] + r[20],
        -r[14] + r[0] + r[16] + r[18] + r[21],
        -r[1] - r[15] - r[16] - r[22] + r[14],
        -r[2] + 2 * r[3] + r[5] + r[6] + r[12] + r[19],
        -r[5] - r[7] - r[13] - r[19] + r[2] + 2 * r[17],
        -r[3] - r[4] - r[5] + r[12],
        r[3] + r[4] + r[5] + r[6],
        -r[6] - r[7],
        -r[11] + r[6] + r[8],
        -r[8] - r[9] + r[7] + r[10],
        r[8],
        -r[10] + r[9],
        -r[12] + r[11],
        r[13],
        -r[17] - r[18] + r[15],
        -r[19],
        r[19],
        -r[20] - r[21] - r[23] + r[22] + r[24],
        -r[24] + r[23],
    ]
    return xp.stack(change)


def pendulum(xp: Any, t: Any, y: Any) -> Any:
    """A damped pendulum with a periodic force."""
    return xp.stack([y[1], 0.5 * xp.cos(t) - 0.1 * y[1] - xp.sin(y[0])])


def lorenz(xp: Any, t: Any, y: Any) -> Any:
    """Lorenz's system."""
    return xp.stack([10.0 * (y[1] - y[0]), y[0] * (28.0 - y[2]) - y[1], y[0] * y[1] - 8.0 / 3.0 * y[2]])


def pleiades(xp: Any, t: Any, y: Any) -> Any:
    """Seven stars in a plane, of masses 1 to 7."""
    acceleration_x, acceleration_y = [], []
    for i in range(7):
        terms = []
        for j in range(7):
            if i != j:
                dx, dy = y[j] - y[i], y[7 + j] - y[7 + i]
                terms.append(((j + 1.0) / (dx * dx + dy * dy) ** 1.5, dx, dy))
        acceleration_x.append(sum(weight * dx for weight, dx, _ in terms))
        acceleration_y.append(sum(weight * dy for weight, _, dy in terms))
    return xp.stack([*(y[14 + i] for i in range(14)), *acceleration_x, *acceleration_y])


POLLUTION_START = (0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, 0, 0, 0, 0, 0, 0, 0, 0.007, 0, 0, 0)
PLEIADES_START = (
    *(3, 3, -1, -3, 2, -2, 2, 3, -3, 2, 0, 0, -4, 4),
    *(0, 0, 0, 0, 0, 1.75, -1.5, 0, 0, 0, -1.25, 1, 0, 0),
)
PROBLEMS = (
    Problem(
        "Robertson",
        of_sample(robertson(1, is_unlike=False)),
        (1.0, 0.0, 0.0),
        1e5,
        is_stiff=True,
        atol=1e-4,
    ),
    Problem("HIRES", of_sample(hires(1), 280.0), (1.0, 0, 0, 0, 0, 0, 0, 0.0057), 321.8122, is_stiff=True, atol=1e-4),
    Problem("van der Pol, μ = 1000", of_sample(van_der_pol(1), 1000.0), (2.0, 0.0), 2000.0, is_stiff=True),
    Problem("Oregonator", of_sample(oregonator(1), 77.27), (1.0, 2.0, 3.0), 360.0, is_stiff=True, atol=1e-4),
    Problem("E5", e5, (1.76e-3, 0, 0, 0), 1e11, is_stiff=True, atol=1e-16),
    Problem("air pollution", pollution, POLLUTION_START, 60.0, is_stiff=True, atol=1e-4),
    Problem("forced pendulum", pendulum, (1.0, 0.0), 30.0, is_stiff=False),
    Problem("Kepler, e = 0.5", lambda xp, t, y: kepler(xp, y), (0.5, 0, 0, 3**0.5), 20.0, is_stiff=False),
    Problem("Pleiades", pleiades, PLEIADES_START, 3.0, is_stiff=False),
    Problem("Lorenz", lorenz, (-8.0, 8.0, 27.0), 5.0, is_stiff=False),
)

# Of the processor time of one solve, in seconds, and what is said of a longer one.
LIMIT = 30.0
TOO_LONG = f"TimeoutError: not done in {LIMIT:g} s"

# From the tolerance to the end and the evaluations, None where they are counted by a run of their own.
Solve = Callable[[Problem, float], tuple[np.ndarray, int | None]]


def with_torch(method: str, steps: Callable[[float], int] | None = None) -> Solve:
    """A method through `torchdiffeq.odeint`; for one of equal steps, how many for a tolerance."""

    def solve(problem: Problem, rtol: float) -> tuple[np.ndarray, int]:
        count, latest = 0, time.process_time() + LIMIT

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if time.process_time() > latest:
                raise TimeoutError(TOO_LONG.partition(": ")[2])
            # A method that cannot repeat a step has no way back from here.
            if steps is not None and not bool(y.isfinite().all()):
                raise FloatingPointError("not finite")
            return problem.field(torch, t, y)

        y0 = torch.tensor(problem.start, dtype=torch.float64)
        t = torch.tensor([0.0, problem.end], dtype=torch.float64)
        options = None if steps is None else {"step_size": problem.end / steps(rtol)}
        end = torchdiffeq.odeint(func, y0, t, method=method, rtol=rtol, atol=rtol * problem.atol, options=options)[-1]
        if not bool(end.isfinite().all()):
            raise FloatingPointError("not finite")
        return end.detach().numpy(), count

    return solve


def with_scipy(method: str) -> Solve:
    """A method of `scipy.integrate.solve_ivp`."""

    def solve(problem: Problem, rtol: float) -> tuple[np.ndarray, int]:
        span = (0.0, problem.end)
        found = solve_ivp(
            lambda t, y: problem.field(np, t, y), span, problem.start, method, rtol=rtol, atol=rtol * problem.atol
        )
        if not found.success:
            raise RuntimeError(found.message)
        return found.y[:, -1], int(found.nfev)

    return solve


def with_diffrax(solver: str) -> Solve:
    """A solver of diffrax, jitted."""

    def solve(problem: Problem, rtol: float) -> tuple[np.ndarray, None]:
        run, _ = diffrax_adaptive(problem.field, problem.start, problem.end, solver)
        end = np.asarray(run(rtol, rtol * problem.atol))
        if not np.isfinite(end).all():
            raise RuntimeError(f"not done in {MOST_STEPS:,} steps")
        return end, None

    return solve


def diffrax_evaluations(solver: str, problem: Problem, rtol: float) -> int:
    """How many a solve by diffrax takes."""
    _, evaluations = diffrax_adaptive(problem.field, problem.start, problem.end, solver)
    return evaluations(rtol, rtol * problem.atol)


def equal_steps(rtol: float) -> int:
    """So many for a tolerance: 20 to 640."""
    return 20 * 2 ** TOLERANCES.index(rtol)


# In the order of their accuracy. All but the last belong to torchdiffeq's main branch.
IMPLICIT_METHODS = (
    *("implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "trbdf2", "radauIIA3", "gl4", "radauIIA5", "gl6"),
    "implicit_adams",
)
EQUAL_STEPS = {
    f"torchdiffeq {method}": with_torch(method, equal_steps) for method in IMPLICIT_METHODS if method in SOLVERS
}
DIFFRAX = {"diffrax Kvaerno5, jitted": "Kvaerno5", "diffrax Tsit5, jitted": "Tsit5"}

STIFF: dict[str, Solve] = {
    "bdf": with_torch("bdf"),
    "SciPy BDF": with_scipy("BDF"),
    "SciPy Radau": with_scipy("Radau"),
    "SciPy LSODA": with_scipy("LSODA"),
    "diffrax Kvaerno5, jitted": with_diffrax("Kvaerno5"),
    **EQUAL_STEPS,
}
SMOOTH: dict[str, Solve] = {
    "adams": with_torch("adams"),
    "SciPy LSODA": with_scipy("LSODA"),
    "SciPy DOP853": with_scipy("DOP853"),
    "torchdiffeq dopri5": with_torch("dopri5"),
    "torchdiffeq dopri8": with_torch("dopri8"),
    **({"torchdiffeq tsit5": with_torch("tsit5")} if "tsit5" in SOLVERS else {}),
    "diffrax Tsit5, jitted": with_diffrax("Tsit5"),
    **EQUAL_STEPS,
}


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every solver on every problem, at all tolerances; in haste on two problems, at three.

    Returns:
        "problems": for each problem and solver its points. One is "unsolved" where the solver warned that an equation
        of its steps was not solved. "absent": the runs without a result, and why. "lacking": the methods that this
        torchdiffeq does not have.
    """
    torchdiffeq_lmm.register()
    lacking = [method for method in (*IMPLICIT_METHODS, "tsit5") if method not in SOLVERS]
    results: dict[str, Any] = {"problems": {}, "absent": [], "lacking": lacking}
    for problem in (PROBLEMS[0], PROBLEMS[6]) if quick else PROBLEMS:
        curves = results["problems"].setdefault(problem.name, {})
        for name, solve in (STIFF if problem.is_stiff else SMOOTH).items():
            curves[name] = []
            found: dict[str, Any] | str = ""
            for rtol in TOLERANCES[:5:2] if quick else TOLERANCES:
                # What has taken too long would take longer.
                if found != TOO_LONG:
                    found = run_at(problem, name, solve, rtol, rounds=1 if quick else 3)
                if isinstance(found, str):
                    results["absent"].append({"problem": problem.name, "solver": name, "rtol": rtol, "why": found})
                else:
                    curves[name].append(found)
    return results


def run_at(problem: Problem, name: str, solve: Solve, rtol: float, rounds: int) -> dict[str, Any] | str:
    """What one solver does at one tolerance, or why it has no result."""
    made: list[tuple[np.ndarray, int | None]] = []

    def once() -> None:
        made.append(solve(problem, rtol))

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        start = time.perf_counter()
        why = failure(once)
        first = time.perf_counter() - start
    if why is not None:
        return why
    # Those of equal steps take long, and nothing is compiled before they start.
    times = [first] if name in EQUAL_STEPS else [seconds(once) for _ in range(rounds)]
    end, evaluations = made[-1]
    if evaluations is None:
        evaluations = diffrax_evaluations(DIFFRAX[name], problem, rtol)
    return {
        "rtol": rtol,
        "evaluations": evaluations,
        "ms": 1e3 * float(np.median(times)),
        "error": problem.error(end),
        "unsolved": any("did not converge" in str(each.message) for each in warned),
    }


def table(results: dict[str, Any]) -> str:
    """For each problem and solver: evaluations, milliseconds, and the error, at three tolerances."""
    parts = []
    for problem, curves in results["problems"].items():
        shown = sorted({point["rtol"] for points in curves.values() for point in points}, reverse=True)[1::2]
        header = (
            "method",
            *(f"{what} at {rtol:.0e}" for rtol in shown for what in ("evaluations", "ms", "error")),
        )
        rows = []
        for name, points in curves.items():
            at = {point["rtol"]: point for point in points}
            cells: list[str] = []
            for rtol in shown:
                point = at.get(rtol)
                if point is None:
                    cells += ["", "", ""]
                    continue
                cells += [f"{point['evaluations']:,}", f"{point['ms']:.0f}", f"{point['error']:.1e}"]
            if points:
                rows.append((name, *cells))
        parts.append(f"{problem}\n\n{markdown(header, rows)}")
    absent = {
        f"{problem}, {solver} at {', '.join(f'{rtol:g}' for rtol in tolerances)}": why
        for problem in results["problems"]
        for (solver, why), tolerances in failures(results, problem).items()
    }
    if results["lacking"]:
        absent[f"torchdiffeq {', '.join(results['lacking'])}"] = "this version does not have them"
    return "\n\n".join(parts) + absences(absent)
