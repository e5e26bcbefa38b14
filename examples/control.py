"""Optimal control to the order of the method: how accurate is a control that is trained with a filter of higher order?

Prey x and predators y, x' = x (1 - y - A u), y' = -y (1 - x + B u), are to be brought to their equilibrium (1, 1) by
fishing u(t), or by stocking where u is negative, with a value of its own at every node. The running cost is one more
component of the state. The gradient in function space is the filtered gradient divided by the steps, and L-BFGS goes on
until it vanishes; it begins with the control of the coarser grid. The control that it ends at is compared with the one
that satisfies Pontryagin's conditions, a boundary value problem that SciPy solves.

The control is as accurate as the gradient: second order by the filter's default, third with order=3, fourth by ab4 with
order="method". Without a filter ab4's cost has no minimum to be found, for it counts two nodes negatively; ab3's has
one, and it is off by O(h).

    python examples/control.py
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from scipy.integrate import solve_bvp
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import CostateFilter, GridParameter, odeint

# How much a unit of fishing takes of either, as in the test problem of Sager and others.
A, B = 0.4, 0.2
BEGIN = (0.5, 0.7)
HORIZON = 3.0
WEIGHT = 0.5
"""Of ½ u² in the running cost ½ (x - 1)² + ½ (y - 1)² + ½ WEIGHT u²."""
FINAL = 2.0
"""Of ½ (x - 1)² + ½ (y - 1)² at the end."""

GROWTH = {"equal": 1.0, "growing": 3.0}
"""The last step over the first one, about."""

TOLERANCE = 1e-10
"""Where the gradient in function space is smaller everywhere, the training is done."""
MOST_ITERATIONS = 60
UNIT = 1e-4
"""In which L-BFGS measures: torch's learns nothing from changes that are small in absolute terms."""


class Way(NamedTuple):
    """A method and a filter, and the colour of its curve."""

    method: str
    grad_filter: CostateFilter | None
    color: str


WAYS = {
    "ab4, no filter": Way("ab4", None, COLORS["auto-differentiation"]),
    "ab3, no filter": Way("ab3", None, COLORS["odeint_adjoint"]),
    "ab4, order 2": Way("ab4", CostateFilter(), COLORS["filtered"]),
    "ab4, order 3": Way("ab4", CostateFilter(order=3), COLORS["smooth"]),
    "ab4, the method's order": Way("ab4", CostateFilter(order="method"), COLORS["midpoint"]),
}


def optimal_control() -> Callable[[np.ndarray], np.ndarray]:
    """From times, of shape (n,), to the control that satisfies Pontryagin's conditions, of the same shape."""

    def control(z: np.ndarray) -> np.ndarray:
        x, y, p, q = z
        return (A * x * p + B * y * q) / WEIGHT

    def conditions(t: np.ndarray, z: np.ndarray) -> np.ndarray:  # noqa: ARG001
        x, y, p, q = z
        u = control(z)
        of_x, of_y = 1 - y - A * u, x - 1 - B * u
        return np.stack([x * of_x, y * of_y, 1 - x - p * of_x - q * y, 1 - y + p * x - q * of_y])

    def ends(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.concatenate([first[:2] - BEGIN, last[2:] - FINAL * (last[:2] - 1)])

    times = np.linspace(0, HORIZON, 101)
    guess = np.concatenate([np.ones((2, 101)), np.zeros((2, 101))])
    solved = solve_bvp(conditions, ends, times, guess, tol=1e-10, max_nodes=100_000)
    if not solved.success:
        raise RuntimeError(solved.message)
    return lambda times: control(solved.sol(times))


def grid(steps: int, growth: float) -> Tensor:
    """The nodes, of shape (steps + 1,): equal steps, or steps in geometric progression."""
    parts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return HORIZON * (parts if growth == 1 else (growth**parts - 1) / (growth - 1))


def cost(control: GridParameter, way: Way) -> Tensor:
    """The cost of a control, 0-d, as the method computes it with the control's steps."""
    nodes = control.nodes

    def func(t: Tensor, z: Tensor) -> Tensor:
        (x, y, _), u = z.unbind(), control(t)
        dx, dy = x - 1, y - 1
        running = 0.5 * (dx * dx + dy * dy + WEIGHT * u * u)
        return torch.stack([-x * (dy + A * u), y * (dx - B * u), running])

    begin = torch.tensor([*BEGIN, 0.0], dtype=torch.float64)
    on_nodes = {"grid_constructor": lambda func, y0, t: nodes}  # noqa: ARG005
    solution = odeint(func, begin, nodes[[0, -1]], method=way.method, options=on_nodes, grad_filter=way.grad_filter)
    x, y, running = solution[-1].unbind()
    return running + 0.5 * FINAL * ((x - 1) ** 2 + (y - 1) ** 2)


class Learned(NamedTuple):
    """What the training ends at.

    Attributes:
        times, values: of the control at the nodes where steps begin.
        error: its largest difference from the optimal one; None where the training has not converged.
        iterations: how many.
        density: the largest entry of the gradient in function space at the end; None if it is not finite.
    """

    times: list[float]
    values: list[float]
    error: float | None
    iterations: int
    density: float | None


def learn(way: Way, control: GridParameter, optimum: Callable[[np.ndarray], np.ndarray]) -> Learned:
    """Train a control, from what it is, until the gradient in function space vanishes."""
    nodes = control.nodes
    steps = nodes.diff()
    # In these unknowns the norm is that of the function and the second derivative is about 1, whatever the steps.
    scale = (WEIGHT * steps).sqrt() / UNIT
    unknowns = (scale * control.values.detach()).requires_grad_()
    trainer = torch.optim.LBFGS(
        [unknowns], lr=1.0, max_iter=1, history_size=20, tolerance_grad=0.0, tolerance_change=0.0
    )
    density, iterations = math.inf, 0

    def closure() -> Tensor:
        nonlocal density
        with torch.no_grad():
            control.values.copy_(unknowns / scale)
        control.zero_grad()
        found = cost(control, way)
        found.backward()
        assert control.values.grad is not None
        in_function_space = control.values.grad / steps
        unknowns.grad = scale * in_function_space / WEIGHT
        density = float(in_function_space.abs().max())
        return found.detach()

    for iterations in range(1, MOST_ITERATIONS + 1):  # noqa: B007
        # It evaluates the gradient at what the iteration before has led to, and goes on from there.
        trainer.step(closure)
        if density < TOLERANCE or not math.isfinite(density):
            break
    times, values = nodes[:-1].numpy(), control.values.detach().numpy()
    return Learned(
        times=times.tolist(),
        values=values.tolist(),
        error=float(np.abs(values - optimum(times)).max()) if density < TOLERANCE else None,
        iterations=iterations,
        density=density if math.isfinite(density) else None,
    )


def learn_on(
    grids: tuple[int, ...], way: Way, growth: float, optimum: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Learned]:
    """Train the control on one grid after the other, from that of the coarser grid or, if there is none, from u = 0."""
    learned = None
    for n in grids:
        nodes = grid(n, growth)
        control = GridParameter(torch.zeros_like(nodes[:-1]), nodes)
        if learned is not None and learned.error is not None:
            coarse = GridParameter(torch.tensor(learned.values, dtype=torch.float64), [*learned.times, HORIZON])
            control = coarse.regrid(nodes)
        learned = learn(way, control, optimum)
        yield learned


def least_curvature(way: Way, nodes: Tensor, optimum: Callable[[np.ndarray], np.ndarray]) -> float:
    """The least eigenvalue of the second derivative of the computed cost at the optimal control, in `learn`'s unknowns.

    Where it is negative there is no minimum nearby.
    """
    steps = nodes.diff()
    control = GridParameter(torch.from_numpy(optimum(nodes[:-1].numpy())), nodes)
    (first,) = torch.autograd.grad(cost(control, way), control.values, create_graph=True)
    second = torch.stack([torch.autograd.grad(entry, control.values, retain_graph=True)[0] for entry in first])
    scale = (WEIGHT * steps).sqrt()
    return float(torch.linalg.eigvalsh(second / scale / scale[:, None])[0])


def order(grids: tuple[int, ...], errors: list[float | None]) -> float | None:
    """The slope of the error over the step, both logarithmic, over the last three grids; None where one is missing."""
    last = [error for error in errors[-3:] if error is not None]
    if len(last) < len(errors[-3:]):
        return None
    return float(-np.polyfit(np.log(grids[-3:]), np.log(last), 1)[0])


def report(grids: tuple[int, ...], found: dict) -> str:
    """The results as a table."""
    rows = []
    for kind, by_way in found.items():
        for name, learned in by_way.items():
            errors = [of["error"] for of in learned]
            reached = order(grids, errors)
            iterations = [of["iterations"] for of in learned if of["error"] is not None]
            rows.append(
                (
                    kind,
                    name,
                    *("runs off" if error is None else f"{error:.1e}" for error in errors),
                    "–" if reached is None else f"{reached:.2f}",
                    f"{min(iterations)} to {max(iterations)}" if iterations else "–",
                )
            )
    return table(("steps", "trained with", *(f"N = {n}" for n in grids), "order", "iterations"), rows)


def draw(grids: tuple[int, ...], found: dict, optimum: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """The learned control with the fewest steps, and its error against their number."""
    figure = Figure(figsize=(4 * (1 + len(found)), 3.9), layout="constrained")
    controls, *panels = figure.subplots(1, 1 + len(found))
    fine = np.linspace(0, HORIZON, 401)
    controls.plot(fine, optimum(fine), color=COLORS["truth"], lw=1.2, label="optimal")
    kind, by_way = next(iter(found.items()))
    for name, style in (("ab3, no filter", {"lw": 0.8, "marker": "."}), ("ab4, order 2", {"ls": "", "marker": "o"})):
        learned = by_way[name][0]
        controls.plot(learned["times"], learned["values"], ms=5, color=WAYS[name].color, label=name, **style)
    controls.set(title=f"{kind} steps, N = {grids[0]}", xlabel="time", ylabel="control")
    for axes, (kind, by_way) in zip(panels, found.items(), strict=True):
        for name, learned in by_way.items():
            errors = np.array([of["error"] for of in learned], dtype=float)
            if np.isnan(errors).all():
                continue
            axes.loglog(grids, errors, "o-", ms=4, lw=1, color=WAYS[name].color, label=name)
        axes.set(title=f"{kind} steps", xlabel="steps", ylabel="largest error of the control")
        axes.set_xticks(grids, [str(n) for n in grids])
        axes.minorticks_off()
    for axes in (controls, panels[0]):
        axes.legend(frameon=False, fontsize=8)
    for axes in (controls, *panels):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    args = arguments(__doc__, "two coarse grids, growing steps only")
    grids, kinds = ((15, 30), ("growing",)) if args.quick else ((20, 40, 80, 160), tuple(GROWTH))

    optimum = optimal_control()
    found: dict = {kind: {name: [] for name in WAYS} for kind in kinds}
    with tqdm(total=len(kinds) * len(WAYS) * len(grids), unit="control") as progress:
        for kind in kinds:
            for name, way in WAYS.items():
                for learned in learn_on(grids, way, GROWTH[kind], optimum):
                    found[kind][name].append(learned._asdict())
                    progress.update()
    plain = [name for name, way in WAYS.items() if way.grad_filter is None]
    curvatures = {
        kind: {name: least_curvature(WAYS[name], grid(grids[0], GROWTH[kind]), optimum) for name in plain}
        for kind in kinds
    }

    print(report(grids, found))
    print(f"\nLeast eigenvalue of the second derivative of the cost at the optimal control, N = {grids[0]}:")
    for kind, by_way in curvatures.items():
        print(f"{kind} steps: " + ", ".join(f"{name} {value:.3f}" for name, value in by_way.items()))
    results = {"steps": grids, "learned": found, "least curvature": curvatures}
    write(args.output, "control", results, {"control": draw(grids, found, optimum)})


if __name__ == "__main__":
    main()
