"""The gradient for time-varying parameters through leapfrog: it oscillates, and the filter removes the oscillation.

The state x' = f(x, θ(t)) is solved by leapfrog with parameters of its own for every step. The gradient of a loss at the
final time, divided by the length of the step, should converge to the density of the gradient in function space,
(∂f/∂θ)ᵀ p, with the costate p. That of auto-differentiation does not: it oscillates around the density from node to
node, by an amount that does not shrink with the step. With ``grad_filter="leapfrog"`` it converges at second order.

    python examples/oscillations.py
"""

from collections.abc import Callable

import numpy as np
import torch
from harness import COLORS, arguments, write
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_lmm import odeint

HORIZON = 2.0
X0 = (1.0, 0.5)
TARGET = (0.3, -0.2)

# Multiples of 20, for the random grid.
STEPS = (20, 40, 80, 160, 320)
QUICK_STEPS = (20, 40, 80)
SHOWN_STEPS = 40
SHOWN_COMPONENT = 0

# The two gradients, by what odeint is given as grad_filter.
GRADIENTS: dict[str, str | None] = {"auto-differentiation": None, "filtered": "leapfrog"}


class PerStep:
    """Parameters of which each step has its own.

    Args:
        values: θ, of shape (N, ...); row m belongs to the step that starts at node m.
        nodes: t_0 < ... < t_N, of shape (N + 1,).
    """

    def __init__(self, values: Tensor, nodes: Tensor) -> None:
        self.values = values
        # Between the starts of the steps: a time that is rounded still finds the nearest start.
        self.borders = (nodes[:-2] + nodes[1:-1]) / 2

    def __call__(self, t: Tensor) -> Tensor:
        """The row of the step that starts at t."""
        return self.values[torch.searchsorted(self.borders, t)]


def theta(t: np.ndarray) -> np.ndarray:
    """θ(t), of shape (2, ...)."""
    return np.stack([1 + 0.5 * np.sin(3 * t), 1.5 + t])


def leapfrog_density(nodes: Tensor, grad_filter: str | None) -> Tensor:
    """The gradient with respect to the parameters of each step, divided by the length of the step.

    Args:
        nodes: of shape (N + 1,).
        grad_filter: None for auto-differentiation, or "leapfrog".

    Returns:
        A tensor of shape (N, 2).
    """
    values = torch.tensor(theta(nodes[:-1].numpy()).T).requires_grad_()
    theta_at = PerStep(values, nodes)

    def f(t: Tensor, x: Tensor) -> Tensor:
        a, b = theta_at(t)
        return torch.stack([a * x[1], -b * torch.sin(x[0]) - 0.3 * x[1]])

    x0 = torch.tensor(X0, dtype=torch.float64)
    x = odeint(
        f,
        x0,
        nodes[[0, -1]],
        method="leapfrog",
        options={"grid_constructor": lambda _f, _x0, _t: nodes},
        grad_filter=grad_filter,
    )
    loss = 0.5 * (x[-1] - torch.tensor(TARGET, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(loss, values)
    return gradient / nodes.diff()[:, None]


def true_density() -> Callable[[Tensor], Tensor]:
    """Solve the continuous adjoint problem by another method, to near rounding.

    Returns:
        From times, of shape (n,), to (∂f/∂θ)ᵀ p at them, of shape (n, 2).
    """
    accurate = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}

    def f(t: float, x: np.ndarray) -> np.ndarray:
        a, b = theta(t)
        return np.array([a * x[1], -b * np.sin(x[0]) - 0.3 * x[1]])

    x = solve_ivp(f, (0.0, HORIZON), X0, **accurate).sol

    def costate_slope(t: float, p: np.ndarray) -> np.ndarray:
        a, b = theta(t)
        return np.array([b * np.cos(x(t)[0]) * p[1], -a * p[0] + 0.3 * p[1]])

    p = solve_ivp(costate_slope, (HORIZON, 0.0), x(HORIZON) - TARGET, **accurate).sol

    def density(t: Tensor) -> Tensor:
        (x1, x2), (p1, p2) = x(t.numpy()), p(t.numpy())
        return torch.tensor(np.stack([x2 * p1, -np.sin(x1) * p2], axis=1))

    return density


def uniform(n: int) -> Tensor:
    """All steps have the same length."""
    return torch.ones(n, dtype=torch.float64)


def truncated(n: int) -> Tensor:
    """The last step has 0.3 of the others' length."""
    return torch.cat([uniform(n - 1), 0.3 * uniform(1)])


def growing(n: int) -> Tensor:
    """The steps grow by the factor e^1.5 from the first to the last."""
    return torch.linspace(0, 1.5, n, dtype=torch.float64).exp()


def random(n: int) -> Tensor:
    """20 steps, ±20 % at random, each divided into n / 20 equal ones.

    Were all n steps drawn anew for every n, leapfrog itself would converge at an order of about 3/2 only, and with it
    the filtered gradient.
    """
    drawn = 0.8 + 0.4 * torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.repeat_interleave(n // 20)


def abrupt(n: int) -> Tensor:
    """The second half of the steps has a quarter of the first half's length."""
    return torch.cat([uniform(n // 2), uniform(n // 2) / 4])


# From the number of steps to their lengths, up to a common factor.
GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "last step 0.3 h": truncated,
    "growing by e^1.5": growing,
    "random ±20 %": random,
    "abrupt, h to h/4": abrupt,
}


def grid_nodes(grid: str, n: int) -> Tensor:
    """The n + 1 nodes of a grid from 0 to `HORIZON`."""
    ends = GRIDS[grid](n).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), ends / ends[-1] * HORIZON])


def fitted_order(steps: tuple[int, ...], errors: list[float]) -> float:
    """The slope of the error over the length of the steps, both logarithmic, by least squares; to two decimals."""
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # The sum turns -0.0 into 0.0.
    return round(float(order), 2) + 0.0


def measure(steps: tuple[int, ...], density: Callable[[Tensor], Tensor]) -> dict:
    """The error at the worst node, for every grid, gradient and number of steps, and its order.

    Returns:
        ``{grid: {gradient: {"errors": [...], "order": ...}}}``.
    """
    results: dict = {grid: {gradient: {"errors": []} for gradient in GRADIENTS} for grid in GRIDS}
    cases = [(grid, n, gradient) for grid in GRIDS for n in steps for gradient in GRADIENTS]
    for grid, n, gradient in tqdm(cases, unit="gradient"):
        nodes = grid_nodes(grid, n)
        error = (leapfrog_density(nodes, GRADIENTS[gradient]) - density(nodes[:-1])).abs().max()
        results[grid][gradient]["errors"].append(float(error))
    for grid in GRIDS:
        for figures in results[grid].values():
            figures["order"] = fitted_order(steps, figures["errors"])
    return results


def report(steps: tuple[int, ...], results: dict) -> str:
    """The results as text, with what to read from them."""
    width = max(map(len, GRIDS))
    header = f"{'grid':<{width}}  {'N':>5}" + "".join(f"  {gradient:>20}" for gradient in GRADIENTS)
    lines = ["Error of the gradient's density at the worst node, and its order", "", header, "-" * len(header)]
    for grid, by_gradient in results.items():
        for i, n in enumerate(steps):
            errors = "".join(f"  {figures['errors'][i]:>20.2e}" for figures in by_gradient.values())
            lines.append(f"{grid if i == 0 else '':<{width}}  {n:>5}{errors}")
        orders = "".join(f"  {figures['order']:>20.2f}" for figures in by_gradient.values())
        lines += [f"{'':<{width}}  {'order':>5}{orders}", ""]
    lines.append(
        "Read the orders: about 0, the error of auto-differentiation stays however small the steps;\n"
        'about 2, with grad_filter="leapfrog" it falls by four when the steps are halved.'
    )
    return "\n".join(lines)


def draw(steps: tuple[int, ...], results: dict, density: Callable[[Tensor], Tensor]) -> Figure:
    """Left the gradient over time, right the errors against the step."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    over_time, over_step = figure.subplots(1, 2)

    times = torch.linspace(0, HORIZON, 400, dtype=torch.float64)
    over_time.plot(times, density(times)[:, SHOWN_COMPONENT], color="black", label="truth")
    nodes = grid_nodes("uniform", SHOWN_STEPS)
    styles = {
        "auto-differentiation": {"lw": 0.8, "marker": ".", "ms": 4},
        "filtered": {"ls": "", "marker": "o", "ms": 4},
    }
    for gradient, grad_filter in GRADIENTS.items():
        values = leapfrog_density(nodes, grad_filter)[:, SHOWN_COMPONENT]
        over_time.plot(nodes[:-1], values, color=COLORS[gradient], label=gradient, **styles[gradient])
    over_time.set(xlabel="time", ylabel=rf"density of the gradient for $\theta_{SHOWN_COMPONENT + 1}$")
    over_time.set_title(f"Gradient over time, {SHOWN_STEPS} equal steps")
    over_time.legend(frameon=False, fontsize=9)

    lengths = HORIZON / np.array(steps)
    markers = {"uniform": "o", "last step 0.3 h": "^", "growing by e^1.5": "s"}
    for gradient, place in (("auto-differentiation", (0.02, 0.48)), ("filtered", "lower right")):
        curves, labels = [], []
        for grid, marker in markers.items():
            error, order = results[grid][gradient]["errors"], results[grid][gradient]["order"]
            curves += over_step.loglog(lengths, error, f"{marker}-", color=COLORS[gradient], lw=1, mfc="none", ms=5)
            labels.append(f"{grid}: order {order:.2f}")
        text = {"frameon": False, "fontsize": 9, "title_fontsize": 9, "alignment": "left"}
        over_step.add_artist(Legend(over_step, curves, labels, loc=place, title=gradient, **text))
    # Room for the legends.
    over_step.set_ylim(1e-5, 1e2)
    over_step.set(xlabel="mean step", ylabel="error at the worst node", title="Error against the step")

    for axes in (over_time, over_step):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    args = arguments(__doc__, "only grids of up to 80 steps")
    steps = QUICK_STEPS if args.quick else STEPS

    density = true_density()
    results = measure(steps, density)
    print(report(steps, results))
    figures = {"oscillations": draw(steps, results, density)}
    write(args.output, "oscillations", {"steps": steps, "grids": results}, figures)


if __name__ == "__main__":
    main()
