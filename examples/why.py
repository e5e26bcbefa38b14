"""The pictures of WHY.md: what weights a method gives, what the gradient filter asks instead, and what its orders buy.

python examples/why.py
"""

from typing import NamedTuple

import numpy as np
import torch
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import CostateFilter, GridParameter, method_info, odeint

METHODS = {
    "leapfrog": "leapfrog: never dies out",
    "milne_simpson": "milne_simpson: never dies out",
    "ab4": "ab4: gone after 4 nodes",
    "bdf2": "bdf2: dies out, by thirds",
}

# x' = RATE x, by leapfrog, from x = 1.
RATE = 0.7
STEP = 0.1
STEPS = 16
QUICK_STEPS = 12
SHIFT = 0.5

# x' = x (θ(t) - y), y' = y (x - 1) from BEGIN, observed at four nodes: E is the sum of TARGETS' squared distances.
HORIZON = 4.0
BEGIN = (0.6, 0.8)
TARGETS = ((1.2, 0.7), (1.5, 1.2), (0.7, 1.4), (0.5, 0.9))
GRIDS = (20, 40, 80, 160, 320)
QUICK_GRIDS = (40, 80, 240)
ACCURATE = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}

FILTERS = {
    "AD": (None, COLORS["auto-differentiation"]),
    "order 2": (CostateFilter(), COLORS["filtered"]),
    "order 3": (CostateFilter(order=3), COLORS["smooth"]),
    "the method's order": (CostateFilter(order="method"), COLORS["midpoint"]),
}


class Case(NamedTuple):
    """A method, and the last step over the first one, about."""

    method: str
    growth: float


CASES = {"ab4, equal steps": Case("ab4", 1.0), "ab5, growing steps": Case("ab5", 4.0)}

ORANGE, BLUE, GREY = COLORS["auto-differentiation"], COLORS["filtered"], "#999999"


def leapfrog(start: float, forcing: Tensor, grad_filter: str | None = None) -> Tensor:
    """Solve x' = RATE x + θ(t).

    Args:
        start: x at t = 0.
        forcing: θ at the node where each step starts, of shape (N,).
        grad_filter: None for auto-differentiation, or "auto".

    Returns:
        The states at the nodes, of shape (N + 1,).
    """
    times = node_times(len(forcing))

    def f(t: Tensor, x: Tensor) -> Tensor:
        return RATE * x + forcing[round(float(t) / STEP)]

    x0 = torch.tensor(start, dtype=torch.float64)
    return odeint(f, x0, times, method="leapfrog", grad_filter=grad_filter)


def node_times(steps: int) -> Tensor:
    """Those of so many steps, of shape (N + 1,)."""
    return torch.arange(steps + 1, dtype=torch.float64) * STEP


def changed_solutions(steps: int) -> dict[str, list[float]]:
    """The states at the nodes: unchanged, with another slope at the middle node, with another past.

    Both changes are worth a shift of the middle node's state by `SHIFT`.
    """
    middle = steps // 2
    none = torch.zeros(steps, dtype=torch.float64)
    kick = none.clone()
    kick[middle] = SHIFT / STEP
    unchanged = leapfrog(1.0, none)
    return {
        "unchanged": unchanged.tolist(),
        "one slope": leapfrog(1.0, kick).tolist(),
        "whole past": leapfrog(1 + SHIFT / float(unchanged[middle]), none).tolist(),
    }


def densities(steps: int) -> dict[str, list[float]]:
    """The gradient of the last state with respect to θ, divided by the step: by both ways, and the costate."""
    results = {"costate": torch.exp(RATE * (steps * STEP - node_times(steps)[:-1])).tolist()}
    for gradient, grad_filter in (("auto-differentiation", None), ("filtered", "auto")):
        forcing = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(leapfrog(1.0, forcing, grad_filter)[-1], forcing)
        results[gradient] = (found / STEP).tolist()
    return results


def theta(times: np.ndarray) -> np.ndarray:
    """θ of the predators and their prey, of the shape of the times."""
    return 1 + 0.3 * np.sin(2 * times)


def grid(steps: int, growth: float) -> np.ndarray:
    """The nodes, of shape (steps + 1,): equal steps, or steps in geometric progression."""
    parts = np.linspace(0, 1, steps + 1)
    return HORIZON * (parts if growth == 1 else (growth**parts - 1) / (growth - 1))


def exact_density(nodes: np.ndarray) -> np.ndarray:
    """The gradient in function space, x p, where steps begin, of shape (steps,); observed nodes are every quarter.

    Where it jumps it is the mean of both limits, weighted by the steps on either side.
    """

    def forward(t: float, z: np.ndarray) -> np.ndarray:
        x, y = z
        return np.array([x * (theta(t) - y), y * (x - 1)])

    def backward(t: float, p: np.ndarray) -> np.ndarray:
        x, y = path(t)
        return -np.array([(theta(t) - y) * p[0] + y * p[1], -x * p[0] + (x - 1) * p[1]])

    count = len(nodes) - 1
    path = solve_ivp(forward, (0, HORIZON), BEGIN, dense_output=True, **ACCURATE).sol
    density, costate = np.zeros(count), np.zeros(2)
    for quarter in range(4, 0, -1):
        first, last = (quarter - 1) * count // 4, quarter * count // 4
        after = costate
        costate = costate + path(nodes[last]) - TARGETS[quarter - 1]
        if last < count:
            before, behind = np.diff(nodes)[last - 1 : last + 1]
            mean = (before * costate + behind * after) / (before + behind)
            density[last] = path(nodes[last])[0] * mean[0]
        times = nodes[first : last + 1][::-1]
        found = solve_ivp(backward, (times[0], times[-1]), costate, t_eval=times, **ACCURATE).y
        density[first:last] = path(times[1:])[0][::-1] * found[0, 1:][::-1]
        costate = found[:, -1]
    return density


def found_density(case: Case, nodes: np.ndarray, grad_filter: CostateFilter | None) -> tuple[np.ndarray, int]:
    """The gradient by θ where steps begin, divided by the steps, of shape (steps,); and how often f was evaluated."""
    times = torch.from_numpy(nodes)
    parameter = GridParameter(torch.from_numpy(theta(nodes[:-1])), times)
    evaluations = 0

    def f(t: Tensor, z: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        x, y = z.unbind()
        return torch.stack([x * (parameter(t) - y), y * (x - 1)])

    observed = times[:: (len(nodes) - 1) // 4]
    on_nodes = {"grid_constructor": lambda func, y0, t: times}  # noqa: ARG005
    begin = torch.tensor(BEGIN, dtype=torch.float64)
    states = odeint(f, begin, observed, method=case.method, options=on_nodes, grad_filter=grad_filter)
    (0.5 * (states[1:] - torch.tensor(TARGETS, dtype=torch.float64)).square().sum()).backward()
    assert parameter.values.grad is not None
    return (parameter.values.grad / times.diff()).numpy(), evaluations


def filter_orders(grids: tuple[int, ...]) -> dict[str, dict]:
    """The relative error of the gradient at the worst node: ``{case: {"evaluations": [...], filter: [...]}}``."""
    results = {}
    for name, case in CASES.items():
        of_case: dict[str, list] = {"evaluations": [], **{gradient: [] for gradient in FILTERS}}
        for steps in tqdm(grids, desc=name, unit="grid"):
            nodes = grid(steps, case.growth)
            exact = exact_density(nodes)
            for gradient, (grad_filter, _) in FILTERS.items():
                found, evaluations = found_density(case, nodes, grad_filter)
                of_case[gradient].append(float(np.abs(found - exact).max() / np.abs(exact).max()))
            of_case["evaluations"].append(evaluations)
        results[name] = of_case
    return results


def draw_weights(weights: dict[str, list[float]]) -> Figure:
    """The weights of the slopes before an observation, a panel for every method."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(weights), sharey=True)
    for axes, (method, values) in zip(panels, weights.items(), strict=True):
        before = -np.arange(len(values))
        axes.axhline(1, color="black", lw=1.2, label="exact costate")
        axes.vlines(before, 0, values, color=ORANGE, lw=1.5)
        axes.plot(before, values, color=ORANGE, ls="", marker="o", ms=5, label="weight of the slope")
        axes.axhline(0, color=GREY, lw=0.6)
        axes.set_title(METHODS[method], fontsize=10)
        axes.set_xticks(before, [str(-i) for i in before])
        axes.set_xlabel("nodes before the observation")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("in steps")
    panels[-1].legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def draw_shift(solutions: dict[str, list[float]], gradients: dict[str, list[float]]) -> Figure:
    """The two questions, and the two answers."""
    steps = len(gradients["costate"])
    times, fine = node_times(steps).numpy(), np.linspace(0, steps * STEP, 200)
    middle = float(times[steps // 2])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    kick, shift, answers = figure.subplots(1, 3)

    titles = ("AD: change one slope", "filter: shift the whole past")
    for axes, change, color, title in zip(
        (kick, shift), ("one slope", "whole past"), (ORANGE, BLUE), titles, strict=True
    ):
        moved = fine[fine >= middle] if change == "one slope" else fine
        axes.plot(fine, np.exp(RATE * fine), color=GREY, lw=1, label="flow")
        shifted = np.exp(RATE * moved) + SHIFT * np.exp(RATE * (moved - middle))
        axes.plot(moved, shifted, color="black", lw=1, ls="--", label="flow, shifted")
        axes.plot(times, solutions["unchanged"], color=GREY, ls="", marker="o", ms=3)
        axes.plot(times, solutions[change], color=color, lw=0.8, marker="o", ms=4.5, label="leapfrog, changed")
        axes.axvline(middle, color=GREY, lw=0.8, ls=":")
        axes.set(title=title, xlabel="time", ylabel="x")
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    shift.sharey(kick)

    answers.plot(times[:-1], gradients["costate"], color="black", label="costate")
    answers.plot(times[:-1], gradients["auto-differentiation"], color=ORANGE, lw=0.8, marker=".", ms=6, label="AD")
    answers.plot(times[:-1], gradients["filtered"], color=BLUE, ls="", marker="o", ms=4.5, label="filtered")
    answers.set(title="gradient of the last state, by step", xlabel="time")
    answers.set_ylim(top=1.45 * max(gradients["auto-differentiation"]))
    answers.legend(frameon=False, fontsize=9, loc="upper right", ncols=3)

    for axes in (kick, shift, answers):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_orders(orders: dict[str, dict]) -> Figure:
    """The error of the gradient against evaluations of f, a panel for every case."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(orders), sharey=True)
    for axes, (name, of_case) in zip(panels, orders.items(), strict=True):
        for gradient, (_, color) in FILTERS.items():
            axes.loglog(of_case["evaluations"], of_case[gradient], "o-", ms=4, lw=1, color=color, label=gradient)
        axes.set(title=name, xlabel="evaluations of f")
        axes.set_xticks(of_case["evaluations"], [str(count) for count in of_case["evaluations"]])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("error of the gradient at the worst node")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def main() -> None:
    args = arguments(__doc__, f"only {QUICK_STEPS} steps, and fewer grids")
    steps, grids = (QUICK_STEPS, QUICK_GRIDS) if args.quick else (STEPS, GRIDS)

    weights = {method: [float(w) for w in method_info(method).weights] for method in tqdm(METHODS, unit="method")}
    solutions, gradients = changed_solutions(steps), densities(steps)
    orders = filter_orders(grids)
    for method, values in weights.items():
        print(f"{method:<14}" + "".join(f"{value:>8.3f}" for value in values) + "  ...")
    print("\nWeights of the slopes 0, 1, ... nodes before an observation, in steps; the costate is 1.")
    print("Error of the gradient at the worst node, relative to its largest value:\n")
    rows = [
        (name, gradient, *(f"{error:.1e}" for error in of_case[gradient]))
        for name, of_case in orders.items()
        for gradient in FILTERS
    ]
    print(table(("method", "gradient", *(f"N = {n}" for n in grids)), rows))
    results = {
        "step": STEP,
        "weights": weights,
        "solutions": solutions,
        "gradients": gradients,
        "steps": grids,
        "orders": orders,
    }
    figures = {
        "why_weights": draw_weights(weights),
        "why_shift": draw_shift(solutions, gradients),
        "why_orders": draw_orders(orders),
    }
    write(args.output, "why", results, figures)


if __name__ == "__main__":
    main()
