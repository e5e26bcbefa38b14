"""Optimal control with a known answer: which gradient finds the optimal control?

A control u(t), one value for every step of the solver, is trained so that an ODE does what it should at the least cost.
The running cost is one more component of the state. For a linear system with quadratic costs the optimal control is
known from the Riccati equation, for the swing-up of a pendulum from a boundary value problem, both solved by SciPy.

Leapfrog's auto-differentiation returns the exact gradient of what the solver computes, and descends to the optimum of
that. It is another control, for leapfrog's cost hardly sees every second node; the finer the grid, the worse. With a
filter the control converges at second order. So look at the true cost, that of the control with a fine solver, and not
at the one that the solver reports.

    python examples/optimal_control.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from scipy.integrate import solve_bvp, solve_ivp
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import GridParameter, odeint

ACCURATE = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-12, "dense_output": True}
DIVERGED = 20.0
"""Training whose control has a true cost of more than so many times the optimal one is called divergent."""


class Answer(NamedTuple):
    """The optimum of the continuous problem: from times, of shape (n,), to the control; and its cost."""

    control: Callable[[np.ndarray], np.ndarray]
    cost: float


@dataclass(frozen=True)
class Problem:
    """What is to be controlled.

    Attributes:
        name: for tables.
        horizon: the final time.
        x0: the initial state, of shape (2,).
        slope: from x, of shape (2,), and u, 0-d, to x'.
        running: from the same to the running cost.
        final: from x to the final cost.
        guess: of the control, to begin with.
        rate: of plain gradient descent in function space; twice as much diverges.
        answer: the optimum.
    """

    name: str
    horizon: float
    x0: tuple[float, float]
    slope: Callable[[Tensor, Tensor], Tensor]
    running: Callable[[Tensor, Tensor], Tensor]
    final: Callable[[Tensor], Tensor]
    guess: float
    rate: float
    answer: Answer

    def field(self, control: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The state with the cost so far as its last component."""

        def func(t: Tensor, y: Tensor) -> Tensor:
            x, u = y[:2], control(t)
            return torch.cat([self.slope(x, u), self.running(x, u).reshape(1)])

        return func

    def begin(self) -> Tensor:
        """The initial state of that, of shape (3,)."""
        return torch.tensor([*self.x0, 0.0], dtype=torch.float64)

    def cost(self, y: Tensor) -> Tensor:
        """The cost, 0-d, from the final state of that."""
        return y[2] + self.final(y[:2])


class Gradient(NamedTuple):
    """One way of solving the ODE and differentiating the cost.

    Attributes:
        solve: ``odeint`` with all but ``func, y0, t, options``.
        kind: of the control as a `GridParameter`.
        offset: which time of its step a value stands for, as a part of the step.
    """

    solve: Callable[..., Tensor]
    kind: str
    offset: float


def leapfrog(grad_filter: str | None) -> Callable[..., Tensor]:
    def solve(func: Callable, y0: Tensor, t: Tensor, options: dict, control: GridParameter) -> Tensor:  # noqa: ARG001
        return odeint(func, y0, t, method="leapfrog", options=options, grad_filter=grad_filter)

    return solve


def midpoint(func: Callable, y0: Tensor, t: Tensor, options: dict, control: GridParameter) -> Tensor:  # noqa: ARG001
    return torchdiffeq.odeint(func, y0, t, method="midpoint", options=options)


def adjoint(func: Callable, y0: Tensor, t: Tensor, options: dict, control: GridParameter) -> Tensor:
    return torchdiffeq.odeint_adjoint(func, y0, t, method="midpoint", options=options, adjoint_params=(control.values,))


GRADIENTS = {
    "auto-differentiation": Gradient(leapfrog(None), "step", 0.0),
    "filtered": Gradient(leapfrog("leapfrog"), "step", 0.0),
    "smooth": Gradient(leapfrog("smooth"), "linear", 0.0),
    "midpoint": Gradient(midpoint, "step", 0.5),
    "odeint_adjoint": Gradient(adjoint, "step", 0.5),
}
"""By name; the first three through leapfrog, the others through torchdiffeq's midpoint, with two evaluations a step."""


def linear_quadratic() -> Problem:
    """x' = A x + B u with quadratic costs, and its Riccati solution."""
    horizon, x0, weight = 2.0, (1.0, 0.0), 0.1
    a, b = np.array([[0.0, 1.0], [-1.0, 0.1]]), np.array([0.0, 1.0])
    q = np.diag([1.0, 0.2])

    def riccati(t: float, flat: np.ndarray) -> np.ndarray:  # noqa: ARG001
        p = flat.reshape(2, 2)
        return -(a.T @ p + p @ a - np.outer(p @ b, b @ p) / weight + q).ravel()

    p = solve_ivp(riccati, (horizon, 0.0), np.eye(2).ravel(), **ACCURATE).sol

    def feedback(t: float, x: np.ndarray) -> np.ndarray:
        return -(b @ p(t).reshape(2, 2) @ x) / weight

    x = solve_ivp(lambda t, x: a @ x + b * feedback(t, x), (0.0, horizon), x0, **ACCURATE).sol
    answer = Answer(
        lambda times: np.array([feedback(t, x(t)) for t in times]),
        float(0.5 * np.array(x0) @ p(0.0).reshape(2, 2) @ x0),
    )
    return Problem(
        name="linear–quadratic",
        horizon=horizon,
        x0=x0,
        slope=lambda x, u: torch.stack([x[1], 0.1 * x[1] - x[0] + u]),
        running=lambda x, u: 0.5 * (x[0] ** 2 + 0.2 * x[1] ** 2 + weight * u**2),
        final=lambda x: 0.5 * x.square().sum(),
        guess=0.0,
        rate=0.4,
        answer=answer,
    )


def swing_up() -> Problem:
    """A pendulum that hangs and is to stand, and its optimality system as a boundary value problem."""
    horizon, weight, height, speed, damping = 3.0, 0.1, 2.0, 1.0, 0.1

    def optimality(t: np.ndarray, z: np.ndarray) -> np.ndarray:  # noqa: ARG001
        angle, velocity, p, q, _ = z
        u = -q / weight
        slopes = (velocity, -np.sin(angle) - damping * velocity + u, q * np.cos(angle), -p + damping * q)
        return np.stack([*slopes, 0.5 * weight * u**2])

    def ends(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        p, q = last[2] + height * np.sin(last[0]), last[3] - speed * last[1]
        return np.array([first[0], first[1], p, q, first[4]])

    times = np.linspace(0, horizon, 101)
    guess = np.zeros((5, 101))
    guess[0], guess[1] = np.pi * times / horizon, np.pi / horizon
    solved = solve_bvp(optimality, ends, times, guess, tol=1e-10, max_nodes=100_000)
    if not solved.success:
        raise RuntimeError(solved.message)
    angle, velocity, _, _, running = solved.sol(horizon)
    answer = Answer(
        lambda times: -solved.sol(times)[3] / weight,
        float(running + height * (1 + np.cos(angle)) + 0.5 * speed * velocity**2),
    )
    return Problem(
        name="swing-up",
        horizon=horizon,
        x0=(0.0, 0.0),
        slope=lambda x, u: torch.stack([x[1], -torch.sin(x[0]) - damping * x[1] + u]),
        running=lambda x, u: 0.5 * weight * u**2,  # noqa: ARG005
        final=lambda x: height * (1 + torch.cos(x[0])) + 0.5 * speed * x[1] ** 2,
        guess=1.0,
        rate=0.05,
        answer=answer,
    )


class Optimiser(NamedTuple):
    """How the control is trained.

    Attributes:
        make: from the control and the rate of descent, divided by the step, to the optimiser.
        iterations: how many.
    """

    make: Callable[[GridParameter, float], torch.optim.Optimizer]
    iterations: int


def descent(control: GridParameter, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(control.parameters(), lr=rate)


def adam(control: GridParameter, rate: float) -> torch.optim.Optimizer:  # noqa: ARG001
    return torch.optim.Adam(control.parameters(), lr=0.05)


def lbfgs(line_search: str | None) -> Callable[[GridParameter, float], torch.optim.Optimizer]:
    settings = {"history_size": 20, "tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": line_search}

    def make(control: GridParameter, rate: float) -> torch.optim.Optimizer:  # noqa: ARG001
        return torch.optim.LBFGS(control.parameters(), lr=1.0, max_iter=1, max_eval=25, **settings)

    return make


class Extent(NamedTuple):
    """How much is tried.

    Attributes:
        grids: with how many steps.
        optimisers: by name.
        fine_steps: of the solver that finds the true cost.
    """

    grids: tuple[int, ...]
    optimisers: dict[str, Optimiser]
    fine_steps: int


EVERYTHING = Extent(
    (20, 40, 80),
    {
        "descent": Optimiser(descent, 600),
        "Adam": Optimiser(adam, 600),
        "L-BFGS": Optimiser(lbfgs(None), 60),
        "L-BFGS, line search": Optimiser(lbfgs("strong_wolfe"), 60),
    },
    2000,
)
QUICK = Extent(
    (10, 20), {"L-BFGS": Optimiser(lbfgs(None), 20), "L-BFGS, line search": Optimiser(lbfgs("strong_wolfe"), 4)}, 100
)


class Learned(NamedTuple):
    """A learned control.

    Attributes:
        times, values: of the control.
        error: its largest difference from the optimal one, at these times.
        variation: the sum of its changes.
        reported: its cost by the solver that it was trained with.
        true: its cost, interpolated linearly, by a fine solver.
        iterations: after how many it stayed within 1 % of the largest optimal control from where it ended.
        evaluations: of the cost and its gradient until then.
    """

    times: list[float]
    values: list[float]
    error: float
    variation: float
    reported: float
    true: float
    iterations: int
    evaluations: int


def learn(problem: Problem, gradient: Gradient, optimiser: Optimiser, steps: int, fine_steps: int) -> Learned:
    """Train the control on a grid of equal steps."""
    nodes = torch.linspace(0, problem.horizon, steps + 1, dtype=torch.float64)
    rows = steps + (gradient.kind == "linear")
    control = GridParameter(torch.full((rows,), problem.guess, dtype=torch.float64), nodes, gradient.kind)
    step = problem.horizon / steps
    # The gradient in function space is the one per step divided by the step.
    trainer = optimiser.make(control, problem.rate / step)
    func, y0, ends = problem.field(control), problem.begin(), nodes[[0, -1]]
    evaluations = 0

    def cost() -> Tensor:
        return problem.cost(gradient.solve(func, y0, ends, {"step_size": step}, control)[-1])

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        trainer.zero_grad()
        loss = cost()
        loss.backward()
        return float(loss.detach())

    history, counts = [], []
    for _ in range(optimiser.iterations):
        trainer.step(closure)
        history.append(control.values.detach().numpy().copy())
        counts.append(evaluations)
    times = nodes.numpy()[:rows] + gradient.offset * step
    optimum, values = problem.answer.control(times), history[-1]
    settled = np.abs(np.array(history) - values).max(axis=1) < 0.01 * np.abs(optimum).max()
    # The last one is settled by definition.
    iterations = int(np.flatnonzero(~settled).max(initial=-1)) + 1
    with torch.no_grad():
        reported = float(cost())
    return Learned(
        times=times.tolist(),
        values=values.tolist(),
        error=float(np.abs(values - optimum).max()),
        variation=float(np.abs(np.diff(values)).sum()),
        reported=reported,
        true=true_cost(problem, times, values, fine_steps),
        iterations=iterations + 1,
        evaluations=counts[iterations],
    )


def true_cost(problem: Problem, times: np.ndarray, values: np.ndarray, fine_steps: int) -> float:
    """The cost of a control, interpolated linearly and constant beyond its ends, by a fine solver."""
    control = GridParameter(torch.tensor(values), torch.tensor(times), "linear")
    ends = torch.tensor([0.0, problem.horizon], dtype=torch.float64)
    options = {"step_size": problem.horizon / fine_steps}
    with torch.no_grad():
        y = torchdiffeq.odeint(problem.field(control), problem.begin(), ends, method="rk4", options=options)
        return float(problem.cost(y[-1]))


def measure(problem: Problem, extent: Extent) -> dict:
    """Every gradient with every optimiser on every grid: ``{steps: {gradient: {optimiser: Learned as a dict}}}``."""
    cases = [(n, gradient, name) for n in extent.grids for gradient in GRADIENTS for name in extent.optimisers]
    found: dict = {n: {gradient: {} for gradient in GRADIENTS} for n in extent.grids}
    for n, gradient, name in tqdm(cases, desc=problem.name, unit="control"):
        learned = learn(problem, GRADIENTS[gradient], extent.optimisers[name], n, extent.fine_steps)
        found[n][gradient][name] = learned._asdict()
    return found


def report(problem: Problem, extent: Extent, found: dict) -> str:
    """The results as a table."""
    times = np.linspace(0, problem.horizon, 2001)
    variation = np.abs(np.diff(problem.answer.control(times))).sum()
    header = ("N", "gradient", "optimiser", "error", "variation", "reported", "true cost", "iterations", "evaluations")
    rows = []
    for n, by_gradient in found.items():
        for gradient, by_optimiser in by_gradient.items():
            for optimiser, learned in by_optimiser.items():
                figures = [f"{learned[key]:.3g}" for key in ("error", "variation")]
                costs = [f"{learned[key]:.4g}" for key in ("reported", "true")]
                settled = learned["iterations"] < extent.optimisers[optimiser].iterations
                counts = [learned[key] if settled else "–" for key in ("iterations", "evaluations")]
                rows.append((n, gradient, optimiser, *figures, *costs, *counts))
    return (
        f"{problem.name}: optimal cost {problem.answer.cost:.4f}, variation of the optimal control {variation:.2f}\n\n"
        f"{table(header, rows)}\n"
    )


def draw_controls(problems: dict[str, tuple[Problem, dict]], optimiser: str) -> Figure:
    """The learned controls as the grid is refined, a row for every problem."""
    columns = max(len(found) for _, found in problems.values())
    figure = Figure(figsize=(3.6 * columns, 3.1 * len(problems)), layout="constrained")
    panels = figure.subplots(len(problems), columns, squeeze=False, sharey="row")
    for row, (problem, found) in zip(panels, problems.values(), strict=True):
        fine = np.linspace(0, problem.horizon, 401)
        for axes, (n, by_gradient) in zip(row, found.items(), strict=True):
            styles = {
                "auto-differentiation": {"lw": 0.8, "marker": ".", "ms": 4},
                "filtered": {"ls": "", "marker": "o"},
            }
            for gradient, style in styles.items():
                learned = by_gradient[gradient][optimiser]
                label = f"{gradient}, true cost {learned['true']:.3f}"
                axes.plot(
                    learned["times"], learned["values"], color=COLORS[gradient], label=label, **{"ms": 4, **style}
                )
            label = f"optimal, cost {problem.answer.cost:.3f}"
            axes.plot(fine, problem.answer.control(fine), color=COLORS["truth"], lw=1.2, label=label)
            axes.set_title(f"{problem.name}, {n} steps", fontsize=10.5)
            axes.legend(frameon=False, fontsize=7.5, loc="upper center")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("control")
        low, high = row[0].get_ylim()
        # Room for the legends.
        row[0].set_ylim(low, high + 0.45 * (high - low))
    for axes in panels[-1]:
        axes.set_xlabel("time")
    return figure


def draw_costs(problems: dict[str, tuple[Problem, dict]], optimiser: str) -> Figure:
    """Errors of the control, and its reported and true cost, against the number of steps."""
    figure = Figure(figsize=(4.2 * len(problems) + 1, 6.2), layout="constrained")
    panels = figure.subplots(2, len(problems), squeeze=False, sharex="col")
    for (errors, costs), (problem, found) in zip(panels.T, problems.values(), strict=True):
        grids = np.array(list(found))
        errors.set_yscale("log")
        for gradient in GRADIENTS:
            learned = [found[n][gradient][optimiser] for n in grids.tolist()]
            error, true, reported = (np.array([of[key] for of in learned]) for key in ("error", "true", "reported"))
            diverged = ~(true <= DIVERGED * problem.answer.cost)
            error[diverged] = true[diverged] = reported[diverged] = np.nan
            style = {"color": COLORS[gradient], "marker": "o", "ms": 4, "lw": 1}
            errors.plot(grids, error, label=gradient, **style)
            costs.plot(grids, true, **style)
            costs.plot(grids, reported, ls=":", mfc="none", **style)
            for axes in (errors, costs):
                # At the edge, for on the scale they would hide all others.
                edge = {"color": COLORS[gradient], "transform": axes.get_xaxis_transform()}
                axes.plot(grids[diverged], np.full(diverged.sum(), 0.97), "^", ms=6, **edge)
                for n in grids[diverged]:
                    axes.text(n, 0.94, "diverged", ha="center", va="top", fontsize=8, **edge)
        costs.axhline(problem.answer.cost, color=COLORS["truth"], lw=0.8)
        errors.set_title(problem.name)
        costs.set(xlabel="steps", xscale="log", xticks=grids, xticklabels=grids)
        costs.minorticks_off()
        for axes in (errors, costs):
            axes.margins(x=0.12, y=0.16)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("largest error of the control")
    panels[1, 0].set_ylabel("cost: true (solid), reported (dotted)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def main() -> None:
    args = arguments(__doc__, "only the linear–quadratic problem, two coarse grids, L-BFGS, few iterations")
    chosen = [linear_quadratic()] if args.quick else [linear_quadratic(), swing_up()]
    extent = QUICK if args.quick else EVERYTHING

    problems = {problem.name: (problem, measure(problem, extent)) for problem in chosen}
    for problem, found in problems.values():
        print(report(problem, extent, found))

    results = {
        name: {"optimal cost": problem.answer.cost, "learned": found} for name, (problem, found) in problems.items()
    }
    figures = {
        "optimal_control": draw_controls(problems, "L-BFGS"),
        "optimal_control_costs": draw_costs(problems, "L-BFGS"),
    }
    write(args.output, "optimal_control", results, figures)


if __name__ == "__main__":
    main()
