"""A neural ODE whose steps share all parameters: the control experiment, in which a filter has nothing to repair.

The field of a spiral x' = A x³ is learned from short pieces of noisy trajectories. The oscillation of the gradients per
step cancels in their sum, so that auto-differentiation is right to the order of the method. With trapezoid weights a
filter changes the sum by O(h²); with step weights it makes it first order.

    python examples/spiral.py
"""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_lmm import CostateFilter, odeint

MATRIX = ((-0.1, 2.0), (-2.0, -0.1))
BEGIN = (2.0, 0.0)
HORIZON = 25.0
TIMES = 1000
NOISE = 0.02

# For the error of the gradient.
PIECE = 0.25

# Times of a piece, pieces of a batch.
LENGTH = 11
BATCH = 20


class Way(NamedTuple):
    """How a piece is solved, and the colour of its curve."""

    solve: Callable[..., Tensor]
    settings: dict
    color: str


WAYS = {
    "auto-differentiation": Way(odeint, {"method": "leapfrog"}, COLORS["auto-differentiation"]),
    "filter, trapezoid weights": Way(
        odeint, {"method": "leapfrog", "grad_filter": CostateFilter("trapezoid")}, COLORS["filtered"]
    ),
    "filter, step weights": Way(odeint, {"method": "leapfrog", "grad_filter": CostateFilter("step")}, "#56B4E9"),
    "smooth": Way(odeint, {"method": "leapfrog", "grad_filter": "smooth"}, COLORS["smooth"]),
    "ab3, auto-differentiation": Way(odeint, {"method": "ab3"}, "#777777"),
    "torchdiffeq midpoint": Way(torchdiffeq.odeint, {"method": "midpoint"}, COLORS["midpoint"]),
}


class Field(nn.Module):
    """The network of torchdiffeq's own demonstration, on the cubes of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """x', of the shape of x, (..., 2)."""
        return self.net(x**3)


def truth(begin: Tensor, times: Tensor) -> Tensor:
    """The spiral from some states, of shape (..., 2), at some times, of shape (n,): (n, ..., 2), float64."""
    matrix = torch.tensor(MATRIX, dtype=torch.float64)

    def func(t: Tensor, x: Tensor) -> Tensor:  # noqa: ARG001
        return x**3 @ matrix

    return torchdiffeq.odeint(func, begin.double(), times.double(), method="dopri8", rtol=1e-9, atol=1e-10)


@lru_cache(1)
def spiral() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times, states at them, those that a field is tested from, and where these should lead to."""
    times = torch.linspace(0, HORIZON, TIMES)
    states = truth(torch.tensor(BEGIN), times)
    test = states[::10]
    return times, states.float(), test.float(), truth(test, times[:LENGTH])[-1].float()


def gradient(field: Field, way: Way, begin: Tensor, target: Tensor, step: float) -> Tensor:
    """Of the squared distance at the end of a piece, with respect to all parameters, flat."""
    ends = torch.tensor([0.0, PIECE], dtype=begin.dtype)
    options = {"options": {"step_size": step}} if step else {}
    x = way.solve(field, begin, ends, **way.settings, **options)
    loss = (x[-1] - target).square().mean()
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, list(field.parameters()))])


def gradient_errors(field: Field, grids: tuple[int, ...]) -> dict[str, list[float]]:
    """The relative error of the total gradient over a piece, for every way and number of steps."""
    begin = truth(torch.tensor(BEGIN, dtype=torch.float64), torch.linspace(0, 10, 8, dtype=torch.float64))
    target = truth(begin, torch.tensor([0.0, PIECE]))[-1]
    fine = Way(torchdiffeq.odeint, {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12}, "")
    wanted = gradient(field, fine, begin, target, 0.0)
    cases = tqdm([(name, n) for name in WAYS for n in grids], desc="gradients", unit="gradient")
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for name, n in cases:
        error = gradient(field, WAYS[name], begin, target, PIECE / n) - wanted
        errors[name].append(float(error.norm() / wanted.norm()))
    return errors


def training(way: Way, seed: int) -> Iterator[Field]:
    """Learn the field from noisy pieces, without an end; yields it after every iteration."""
    torch.manual_seed(seed)
    times, states, _, _ = spiral()
    noisy = states + NOISE * torch.randn_like(states)
    field = Field()
    trainer = torch.optim.Adam(field.parameters(), lr=3e-3)
    while True:
        begins = torch.randint(TIMES - LENGTH, (BATCH,))
        target = torch.stack([noisy[begins + i] for i in range(LENGTH)])
        trainer.zero_grad()
        found = way.solve(field, noisy[begins], times[:LENGTH], **way.settings)
        (found - target).abs().mean().backward()
        trainer.step()
        yield field


def train(way: Way, iterations: int, seed: int) -> tuple[Field, list[float]]:
    """Learn the field; returns it, and its error on a grid of states every 20 iterations."""
    times, _, test, wanted = spiral()
    errors = []
    for iteration, field in zip(range(iterations), training(way, seed), strict=False):
        if iteration % 20 == 19:
            with torch.no_grad():
                reached = torchdiffeq.odeint(field, test, times[:LENGTH], method="rk4")[-1]
                errors.append(float((reached - wanted).abs().mean()))
    return field, errors


def milliseconds(iterations: int) -> dict[str, float]:
    """CPU time of an iteration, the median of so many; the ways take turns, so that a load slows all of them."""
    runs = {name: training(way, 0) for name, way in WAYS.items()}
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(iterations):
        for name, run in runs.items():
            begin = time.process_time()
            next(run)
            took[name].append(time.process_time() - begin)
    return {name: 1000 * float(np.median(each)) for name, each in took.items()}


def order(grids: tuple[int, ...], errors: list[float]) -> float:
    """The slope of the error over the step, both logarithmic, over the last three grids."""
    return float(-np.polyfit(np.log(grids[-3:]), np.log(errors[-3:]), 1)[0])


def draw(grids: tuple[int, ...], errors: dict, tests: dict) -> Figure:
    """Left the errors of the gradient, right those of the learned field."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    by_step, by_iteration = figure.subplots(1, 2)
    for name, way in WAYS.items():
        by_step.loglog([PIECE / n for n in grids], errors[name], "o-", ms=4, lw=1, color=way.color, label=name)
        curves = np.array(tests[name])
        iterations = 20 * np.arange(1, curves.shape[1] + 1)
        by_iteration.plot(iterations, curves.mean(0), lw=1, color=way.color, label=name)
        by_iteration.fill_between(iterations, curves.min(0), curves.max(0), color=way.color, alpha=0.1, lw=0)
    by_step.set(xlabel="step", ylabel="relative error", title="Gradient of the shared parameters")
    by_iteration.set(xlabel="iteration", ylabel="test error", title="Training, mean and range of the seeds")
    by_iteration.set_yscale("log")
    by_step.tick_params(axis="x", which="minor", labelbottom=False)
    for axes in (by_step, by_iteration):
        axes.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    args = arguments(__doc__, "three grids, one seed, few iterations", seed=0)
    grids, iterations, seeds = ((10, 20, 40), 20, 1) if args.quick else ((10, 20, 40, 80, 160), 600, 3)

    torch.manual_seed(args.seed)
    errors = gradient_errors(train(WAYS["torchdiffeq midpoint"], 60, args.seed)[0].double(), grids)
    cases = tqdm([(name, seed) for name in WAYS for seed in range(args.seed, args.seed + seeds)], unit="training")
    tests: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for name, seed in cases:
        tests[name].append(train(WAYS[name], iterations, seed)[1])
    took = milliseconds(iterations // 3)

    rows = [
        (
            name,
            *(f"{error:.1e}" for error in errors[name]),
            f"{order(grids, errors[name]):.2f}",
            f"{np.mean([run[-1] for run in tests[name]]):.4f} ± {np.std([run[-1] for run in tests[name]]):.4f}",
            f"{took[name]:.1f}",
        )
        for name in WAYS
    ]
    header = ("gradient", *(f"{n} steps" for n in grids), "order", "test error after training", "ms per iteration")
    print(table(header, rows))
    results = {"steps": grids, "gradient errors": errors, "test errors": tests, "ms per iteration": took}
    write(args.output, "spiral", results, {"spiral": draw(grids, errors, tests)})


if __name__ == "__main__":
    main()
