"""The gradient for time-varying parameters through every method, by auto-differentiation and filtered.

The problem is that of oscillations.py, with parameters of their own for every node, or in midpoint's case every half
step, and a loss that observes the state half-way and at the end. For every method, the gradient divided by the length
of its cell of the time is compared with the density in function space, (∂f/∂θ)ᵀ p, whose costate p jumps at the
observation.

    python examples/method_gallery.py
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from harness import arguments, table, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oscillations import HORIZON, SHOWN_COMPONENT, TARGET, X0, theta
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import method_info, odeint

OBSERVED = (HORIZON / 2, HORIZON)

# How many cells of equal length share the time from 0 to the end; multiples of 4.
CELLS = (40, 80, 160, 320)
QUICK_CELLS = (40, 80)
QUICK_ORDER = 2
SHOWN_CELLS = 40

# One row of the picture each; the column is the number of values that the formula combines.
FAMILIES: dict[str, tuple[str | None, ...]] = {
    "two-step and\none-step": ("leapfrog", "nystrom3", "milne_simpson", "midpoint", "heun2"),
    "Adams–Bashforth": ("ab1", "ab2", "ab3", "ab4", "ab5"),
    "Adams–Bashforth–\nMoulton": (None, "abm2", "abm3", "abm4", "abm5"),
    "Adams–Moulton": (None, "am2", "am3", "am4", "am5"),
    "BDF": ("bdf1", "bdf2", "bdf3", "bdf4", "bdf5", "bdf6"),
}
METHODS = tuple(method for family in FAMILIES.values() for method in family if method is not None)
COLUMNS = max(map(len, FAMILIES.values()))

# torchdiffeq's own methods of two stages, all of second order.
ONE_STEP = ("midpoint", "heun2")

# The two gradients, by what odeint is given as grad_filter.
GRADIENTS: dict[str, str | None] = {"auto-differentiation": None, "filtered": "auto"}
COLORS = {"forward": "black", **{name: harness.COLORS[name] for name in ("auto-differentiation", "filtered")}}


class Solve(NamedTuple):
    """One forward and backward solve.

    Attributes:
        times: at which the method evaluates f, of shape (n,).
        density: the gradient with respect to the parameters there, divided by the length of a cell; of shape (n, 2).
        states: the observed ones, of shape (2, 2).
        evaluations: how often func was called in the forward solve, per step.
    """

    times: Tensor
    density: Tensor
    states: Tensor
    evaluations: float


class Truth(NamedTuple):
    """The continuous problem, solved to near rounding.

    Attributes:
        states: the observed ones, of shape (2, 2).
        limits: from times, of shape (n,), to the limits of (∂f/∂θ)ᵀ p at them from the left and the right, of shape
            (2, n, 2). They differ half-way, where p jumps.
    """

    states: Tensor
    limits: Callable[[Tensor], Tensor]

    def density(self, times: Tensor) -> Tensor:
        """The mean of both limits, of shape (n, 2)."""
        return self.limits(times).mean(0)


def true_solution() -> Truth:
    """Solve the continuous problem and its adjoint by another method."""
    accurate = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}

    def f(t: float, x: np.ndarray) -> np.ndarray:
        a, b = theta(t)
        return np.array([a * x[1], -b * np.sin(x[0]) - 0.3 * x[1]])

    x = solve_ivp(f, (0.0, HORIZON), X0, **accurate).sol

    def costate_slope(t: float, p: np.ndarray) -> np.ndarray:
        a, b = theta(t)
        return np.array([b * np.cos(x(t)[0]) * p[1], -a * p[0] + 0.3 * p[1]])

    middle, end = OBSERVED
    late = solve_ivp(costate_slope, (end, middle), x(end) - TARGET, **accurate).sol
    early = solve_ivp(costate_slope, (middle, 0.0), late(middle) + x(middle) - TARGET, **accurate).sol

    def limits(t: Tensor) -> Tensor:
        times = t.numpy()
        x1, x2 = x(times)
        sides = []
        for is_early in (times <= middle, times < middle):
            p1, p2 = np.where(is_early, early(times), late(times))
            sides.append(np.stack([x2 * p1, -np.sin(x1) * p2], axis=1))
        return torch.tensor(np.stack(sides))

    return Truth(torch.tensor(x(np.array(OBSERVED)).T), limits)


@cache
def solve(method: str, cells: int, grad_filter: str | None) -> Solve:
    """Solve forward and backward on equal steps.

    Args:
        method: the method.
        cells: how many steps; of midpoint, how many half steps, so that it has as many parameters as the others.
        grad_filter: None for auto-differentiation, or "auto".
    """
    # The last cell begins at the end of the time, for the methods that evaluate f there.
    times = torch.arange(cells + 1, dtype=torch.float64) * HORIZON / cells
    borders = (times[:-1] + times[1:]) / 2
    nodes = times[::2] if method == "midpoint" else times
    values = torch.tensor(theta(times.numpy()).T).requires_grad_()
    rows = values.unbind()
    calls = torch.zeros(cells + 1, dtype=torch.long)

    def f(t: Tensor, x: Tensor) -> Tensor:
        cell = int(torch.searchsorted(borders, t))
        calls[cell] += 1
        a, b = rows[cell]
        return torch.stack([a * x[1], -b * torch.sin(x[0]) - 0.3 * x[1]])

    x = odeint(
        f,
        torch.tensor(X0, dtype=torch.float64),
        torch.tensor([0.0, *OBSERVED], dtype=torch.float64),
        method=method,
        options={"grid_constructor": lambda _f, _x0, _t: nodes},
        grad_filter=grad_filter,
    )
    evaluations = int(calls.sum()) / (len(nodes) - 1)
    # BDF methods evaluate f at the beginning for a first guess alone.
    used = calls > 0
    used[0] &= not method.startswith("bdf")
    loss = 0.5 * (x[1:] - torch.tensor(TARGET, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(loss, values)
    return Solve(times[used], gradient[used] / (HORIZON / cells), x[1:].detach(), evaluations)


def theoretical_order(method: str) -> int:
    """The order of convergence of the states."""
    return 2 if method in ONE_STEP else method_info(method).order


def measure(methods: Iterable[str], cells: tuple[int, ...], truth: Truth) -> dict[str, dict[str, Any]]:
    """The errors of the states and of both gradients, for every method and number of cells, and their orders.

    Returns:
        ``{method: {"order": ..., "evaluations per step": ..., "errors": {what: [...]}, "orders": {what: ...}}}``, with
        "forward", "auto-differentiation" and "filtered" for what. Errors are those of the worst component at the worst
        time, orders those between the last two numbers of cells. Where the costate jumps, the filter promises the mean
        of both limits; of auto-differentiation anything between them is right.
    """
    results: dict[str, dict[str, Any]] = {
        method: {"order": theoretical_order(method), "errors": {what: [] for what in COLORS}} for method in methods
    }
    with tqdm(total=len(results) * len(cells) * len(GRADIENTS), unit="gradient") as progress:
        for method, figures in results.items():
            for n in cells:
                for gradient, grad_filter in GRADIENTS.items():
                    solved = solve(method, n, grad_filter)
                    limits = truth.limits(solved.times)
                    if grad_filter is None:
                        figures["errors"]["forward"].append(distance(solved.states, truth.states, truth.states))
                        figures["evaluations per step"] = round(solved.evaluations, 2)
                    else:
                        limits = limits.mean(0, keepdim=True)
                    figures["errors"][gradient].append(distance(solved.density, limits.amin(0), limits.amax(0)))
                    progress.update()
            figures["orders"] = {what: last_order(cells, errors) for what, errors in figures["errors"].items()}
    return results


def distance(values: Tensor, low: Tensor, high: Tensor) -> float:
    """How far the worst value is from the interval that it should be in."""
    return float(torch.maximum(low - values, values - high).max())


def last_order(cells: tuple[int, ...], errors: list[float]) -> float:
    """The order between the last two numbers of cells, to two decimals."""
    order = math.log(errors[-2] / errors[-1]) / math.log(cells[-1] / cells[-2])
    # The sum turns -0.0 into 0.0.
    return round(order, 2) + 0.0


def report(cells: tuple[int, ...], results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    header = ("method", "order", "measured", "evaluations per step", "AD error", "filtered error", "its order")
    rows = []
    for method, figures in results.items():
        errors, orders = figures["errors"], figures["orders"]
        row = (
            method,
            figures["order"],
            f"{orders['forward']:.2f}",
            f"{figures['evaluations per step']:.2f}",
            f"{errors['auto-differentiation'][-1]:.2g}",
            f"{errors['filtered'][-1]:.1e}",
            f"{orders['filtered']:.2f}",
        )
        rows.append(row)
    lines = [
        table(header, rows),
        "",
        f"Evaluations, and errors of the gradient's density at the worst time, for N = {cells[-1]} steps (of midpoint",
        f"half steps); orders from N = {cells[-2]} to {cells[-1]}. By auto-differentiation (AD) the error stays,",
        "but for the Euler methods ab1 and bdf1. That of heun2 and am2 is at both ends: a slope there counts for half",
        "a step.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], truth: Truth) -> Figure:
    """A panel for every method: both gradients over time, and the orders."""
    figure = Figure(figsize=(12.5, 9.5), layout="constrained")
    rows = figure.subplots(len(FAMILIES), COLUMNS, sharex=True, sharey="row")
    for (family, methods), panels in zip(FAMILIES.items(), rows, strict=True):
        for axes, method in zip(panels, (*methods, *[None] * (COLUMNS - len(methods))), strict=True):
            if method not in results:
                axes.spines[:].set_visible(False)
                axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
            else:
                axes.spines[["top", "right"]].set_visible(False)
                draw_panel(axes, method, results[method]["orders"], truth)
        panels[sum(method is None for method in methods)].tick_params(labelleft=True)
        panels[0].set_ylabel(family, fontsize=10)

    corner = rows[0, -1]
    curves = [
        corner.plot([], [], color="black", lw=1.5, label="truth")[0],
        corner.plot([], [], color=COLORS["auto-differentiation"], lw=0.8, marker=".", ms=5, label="by AD")[0],
        corner.plot([], [], color=COLORS["filtered"], ls="", marker="o", ms=3, label="filtered")[0],
    ]
    corner.legend(handles=curves, loc="upper left", frameon=False, fontsize=10)
    note = "over each panel: the orders\nof states and gradients"
    corner.text(0.06, 0.42, note, fontsize=9, va="top", transform=corner.transAxes)
    for axes in rows[-1]:
        axes.set_xlabel("time")
    figure.suptitle(
        rf"Density of the gradient for $\theta_{SHOWN_COMPONENT + 1}$ over time: {SHOWN_CELLS} cells, the state is "
        "observed half-way and at the end",
        fontsize=12,
    )
    return figure


def draw_panel(axes: Axes, method: str, orders: dict[str, float], truth: Truth) -> None:
    """Both gradients of one method over time."""
    times = torch.linspace(0, HORIZON, 401, dtype=torch.float64)
    axes.plot(times, truth.density(times)[:, SHOWN_COMPONENT], color="black", lw=1.5)
    styles = {
        "auto-differentiation": {"lw": 0.8, "marker": ".", "ms": 3},
        "filtered": {"ls": "", "marker": "o", "ms": 2.2},
    }
    for gradient, grad_filter in GRADIENTS.items():
        solved = solve(method, SHOWN_CELLS, grad_filter)
        axes.plot(solved.times, solved.density[:, SHOWN_COMPONENT], color=COLORS[gradient], **styles[gradient])
    axes.set_title(method, fontsize=10.5, pad=15)
    labels = {"forward": "states", "auto-differentiation": "AD", "filtered": "filtered"}
    places = ((0.0, "left"), (0.47, "center"), (1.0, "right"))
    for (what, label), (place, alignment) in zip(labels.items(), places, strict=True):
        # The sum turns -0.0 into 0.0.
        text = f"{label} {round(orders[what], 1) + 0.0:.1f}"
        axes.text(place, 1.03, text, color=COLORS[what], fontsize=8.5, ha=alignment, transform=axes.transAxes)


def main() -> None:
    args = arguments(__doc__, "only up to 80 steps, and methods up to second order")
    cells = QUICK_CELLS if args.quick else CELLS
    # Those of higher order take most of the time.
    methods = [method for method in METHODS if theoretical_order(method) <= QUICK_ORDER or not args.quick]

    truth = true_solution()
    results = measure(methods, cells, truth)
    print(report(cells, results))
    write(args.output, "method_gallery", {"cells": cells, "methods": results}, {"method_gallery": draw(results, truth)})


if __name__ == "__main__":
    main()
