"""The pictures of WHY.md: what weights a method gives to its slopes, and what the gradient filter asks instead.

python examples/why.py
"""

import numpy as np
import torch
from harness import COLORS, arguments, write
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import method_info, odeint

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


def main() -> None:
    args = arguments(__doc__, f"only {QUICK_STEPS} steps")
    steps = QUICK_STEPS if args.quick else STEPS

    weights = {method: [float(w) for w in method_info(method).weights] for method in tqdm(METHODS, unit="method")}
    solutions, gradients = changed_solutions(steps), densities(steps)
    for method, values in weights.items():
        print(f"{method:<14}" + "".join(f"{value:>8.3f}" for value in values) + "  ...")
    print("\nWeights of the slopes 0, 1, ... nodes before an observation, in steps; the costate is 1.")
    results = {"step": STEP, "weights": weights, "solutions": solutions, "gradients": gradients}
    figures = {"why_weights": draw_weights(weights), "why_shift": draw_shift(solutions, gradients)}
    write(args.output, "why", results, figures)


if __name__ == "__main__":
    main()
