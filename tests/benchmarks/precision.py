"""Work against precision: the error at the end against wall time and against evaluations of func, forward only."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torchdiffeq
from peers import diffrax_solves, mali_solve, torchdyn_solve
from problems import Problem, problems
from report import absences, markdown
from timing import failure, seconds
from torch import Tensor, nn

import torchdiffeq_lmm

# From the number of steps, or the tolerance, to the final state and the evaluations made.
Solve = Callable[[float], tuple[np.ndarray, int]]

BUDGETS = (128, 256, 512, 1024, 2048, 4096)
TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
WANTED = (1e-2, 1e-4, 1e-6)

# A solve that takes longer than this ends its method's curve: an implicit method with far too long steps may.
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Solver:
    """One curve.

    Args:
        name: its name, which begins with that of a peer where it is one.
        prepare: from a problem to its solve.
        evaluations: of func per step, roughly, so that all curves span the same work; 0 for an adaptive method, which
            is given tolerances.
    """

    name: str
    prepare: Callable[[Problem], Solve]
    evaluations: int

    @property
    def camp(self) -> str:
        """Ours, a peer on torch, or diffrax, which compiles the whole solve."""
        if self.name.startswith("diffrax"):
            return "diffrax"
        return "torch peer" if self.name.startswith(("torchdiffeq", "torchdyn", "TorchDiffEqPack")) else "ours"

    @property
    def is_compiled(self) -> bool:
        """Whether it compiles a solve by Inductor, which takes longer than all other curves."""
        return self.name.endswith(", compiled")

    def settings(self, *, quick: bool) -> tuple[float, ...]:
        """Numbers of steps, or tolerances, from little work to much."""
        if not self.evaluations:
            return TOLERANCES[: 3 if quick else None]
        return tuple(budget // self.evaluations for budget in BUDGETS[: 3 if quick else None])


class Field(nn.Module):
    """A problem's right-hand side for torch, counting its evaluations."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.field = problem.field
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return self.field(torch, y)


def _counted(problem: Problem, solve: Callable[[Field, Tensor, float], Tensor]) -> Solve:
    def run(setting: float) -> tuple[np.ndarray, int]:
        func = Field(problem)
        with torch.no_grad():
            end = solve(func, torch.tensor(problem.start), setting)
        return end.numpy(), func.evaluations

    return run


def fixed(method: str, **options: Any) -> Callable[[Problem], Solve]:
    """A fixed-step method through `torchdiffeq.odeint`."""

    def prepare(problem: Problem) -> Solve:
        t = torch.tensor([0.0, problem.horizon], dtype=torch.float64)

        def solve(func: Field, y0: Tensor, steps: float) -> Tensor:
            step = {"step_size": problem.horizon / steps, **options}
            return torchdiffeq.odeint(func, y0, t, method=method, options=step)[-1]

        return _counted(problem, solve)

    return prepare


def compiled(method: str) -> Callable[[Problem], Solve]:
    """A fixed-step method of this package, compiled; its evaluations are those of the eager solve."""

    def prepare(problem: Problem) -> Solve:
        t = torch.tensor([0.0, problem.horizon], dtype=torch.float64)
        counted, counts = fixed(method)(problem), dict[float, int]()

        def func(t: Tensor, y: Tensor) -> Tensor:
            slope: Tensor = problem.field(torch, y)
            return slope

        def run(steps: float) -> tuple[np.ndarray, int]:
            if steps not in counts:
                counts[steps] = counted(steps)[1]
            step = {"step_size": problem.horizon / steps}
            with torch.no_grad():
                y0 = torch.tensor(problem.start)
                end = torchdiffeq_lmm.odeint(func, y0, t, method=method, options=step, compile=True)[-1]
            return end.numpy(), counts[steps]

        return run

    return prepare


def adaptive(method: str) -> Callable[[Problem], Solve]:
    """An adaptive method through `torchdiffeq.odeint`."""

    def prepare(problem: Problem) -> Solve:
        t = torch.tensor([0.0, problem.horizon], dtype=torch.float64)
        return _counted(
            problem, lambda func, y0, tol: torchdiffeq.odeint(func, y0, t, method=method, rtol=tol, atol=tol)[-1]
        )

    return prepare


def torchdyn(method: str) -> Callable[[Problem], Solve]:
    """A fixed-step method of torchdyn."""
    return lambda problem: _counted(
        problem, lambda func, y0, steps: torchdyn_solve(func, y0, problem.horizon, int(steps), method)
    )


def mali(problem: Problem) -> Solve:
    """TorchDiffEqPack's asynchronous leapfrog."""
    return _counted(problem, lambda func, y0, steps: mali_solve(func, y0, problem.horizon, int(steps)))


def diffrax_leapfrog(problem: Problem) -> Solve:
    """diffrax's LeapfrogMidpoint, one evaluation per step."""
    leapfrog, _ = diffrax_solves(problem.field, problem.start, problem.horizon)

    def run(steps: float) -> tuple[np.ndarray, int]:
        end, made = leapfrog(problem.horizon / steps)
        return np.asarray(end), int(made)

    return run


def diffrax_tsit5(problem: Problem) -> Solve:
    """diffrax's Tsit5, six evaluations per step, rejected ones as well, and two to begin with."""
    _, tsit5 = diffrax_solves(problem.field, problem.start, problem.horizon)

    def run(tolerance: float) -> tuple[np.ndarray, int]:
        end, made = tsit5(tolerance)
        return np.asarray(end), 6 * int(made) + 2

    return run


SOLVERS = (
    Solver("leapfrog", fixed("leapfrog"), 1),
    Solver("ab2", fixed("ab2"), 1),
    Solver("ab3", fixed("ab3"), 1),
    Solver("ab4", fixed("ab4"), 1),
    Solver("ab5", fixed("ab5"), 1),
    Solver("abm4", fixed("abm4"), 2),
    Solver("am4", fixed("am4"), 2),
    Solver("leapfrog, compiled", compiled("leapfrog"), 1),
    Solver("ab4, compiled", compiled("ab4"), 1),
    Solver("torchdiffeq midpoint", fixed("midpoint"), 2),
    Solver("torchdiffeq rk4", fixed("rk4"), 4),
    Solver("torchdiffeq explicit_adams (order 4)", fixed("explicit_adams", max_order=5), 1),
    Solver("torchdiffeq explicit_adams (default)", fixed("explicit_adams"), 1),
    Solver("torchdiffeq dopri5", adaptive("dopri5"), 0),
    Solver("torchdyn rk4", torchdyn("rk4"), 4),
    Solver("TorchDiffEqPack MALI", mali, 1),
    Solver("diffrax LeapfrogMidpoint, jitted", diffrax_leapfrog, 1),
    Solver("diffrax Tsit5, jitted", diffrax_tsit5, 0),
)


def point(solve: Solve, setting: float, problem: Problem, repeats: int) -> dict[str, float]:
    """Work and error of one solve, the time being the median of some."""
    made: list[tuple[np.ndarray, int]] = []
    times = [seconds(lambda: made.append(solve(setting))) for _ in range(repeats)]
    end, evaluations = made[-1]
    return {
        "setting": setting,
        "evaluations": evaluations,
        "ms": 1e3 * float(np.median(times)),
        "error": problem.error(end),
    }


def curve(solver: Solver, problem: Problem, *, quick: bool) -> tuple[list[dict[str, float]], dict[str, str]]:
    """The points of one curve, but for those where the method is unstable, and the settings at which it fails."""
    prepared: list[Solve] = []
    settings = solver.settings(quick=quick)
    middle = settings[len(settings) // 2]
    # Not with the longest steps to warm up: an implicit method may fail there, and serve with shorter ones.
    if (why := failure(lambda: (prepared.append(solver.prepare(problem)), prepared[0](middle)))) is not None:
        return [], {"": why}
    points, failed = [], {}
    for setting in settings:
        made: list[dict[str, float]] = []
        why = failure(lambda setting=setting: made.append(point(prepared[0], setting, problem, 1 if quick else 3)))
        if why is not None:
            failed[f" at {setting:g}"] = why
            continue
        points += [one for one in made if one["error"] < 1]
        if made[0]["ms"] > 1e3 * PATIENCE_S:
            break
    return points, failed


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every curve on every problem; in haste on Kepler's and the wave equation alone."""
    torchdiffeq_lmm.register()
    results: dict[str, Any] = {"problems": {}, "absent": {}}
    for problem in problems()[2 if quick else 0 :]:
        curves = results["problems"].setdefault(problem.name, {})
        for solver in SOLVERS:
            if quick and solver.is_compiled:
                continue
            curves[solver.name], failed = curve(solver, problem, quick=quick)
            results["absent"] |= {f"{solver.name}, {problem.name}{where}": why for where, why in failed.items()}
    return results


def work(points: list[dict[str, float]], what: str, error: float) -> float | None:
    """The least work that an error takes: that of a point that is accurate enough, or on the straight line, all
    logarithmic, between one that is not and the next that is.

    Returns:
        The work, or None where no point is accurate enough.
    """
    enough = [after[what] for after in points if after["error"] <= error]
    for before, after in pairwise(points):
        if after["error"] <= error < before["error"]:
            share = np.log(before["error"] / error) / np.log(before["error"] / after["error"])
            enough.append(float(before[what] * (after[what] / before[what]) ** share))
    return min(enough, default=None)


def best(curves: dict[str, Any], what: str, error: float, camp: str) -> tuple[str, float] | None:
    """The solver of a camp that needs the least work."""
    found = [
        (solver.name, amount)
        for solver in SOLVERS
        if solver.camp == camp and (amount := work(curves.get(solver.name, []), what, error)) is not None
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def contest(results: dict[str, Any], wanted: tuple[float, ...]) -> str:
    """Who needs the least work, for each problem and error."""
    camps = ("ours", "torch peer", "diffrax")
    rows = []
    for problem, curves in results["problems"].items():
        for error in wanted:
            for what in ("evaluations", "ms"):
                found = {camp: best(curves, what, error, camp) for camp in camps}
                amounts = {camp: one[1] for camp, one in found.items() if one is not None}
                cells = ("" if one is None else f"{one[0]}: {one[1]:,.3g}" for one in found.values())
                rows.append((problem, f"{error:.0e}", what, *cells, min(amounts, key=amounts.__getitem__, default="")))
    return markdown(("problem", "error", "work", "best of ours", "best torch peer", "best of diffrax", "winner"), rows)


def table(results: dict[str, Any]) -> str:
    """For each problem, the work that every solver needs for three errors; and who is best."""
    parts = []
    header = ("method", *(f"{what} for {error:.0e}" for error in WANTED for what in ("evaluations", "ms")))
    for problem, curves in results["problems"].items():
        rows = []
        for name, points in curves.items():
            cells = []
            for error in WANTED:
                evaluations, ms = (work(points, what, error) for what in ("evaluations", "ms"))
                cells += ["" if evaluations is None else f"{evaluations:,.0f}", "" if ms is None else f"{ms:.1f}"]
            rows.append((name, *cells))
        parts.append(f"{problem}\n\n{markdown(header, rows)}")
    parts.append(contest(results, WANTED))
    return "\n\n".join(parts) + absences(results["absent"])
