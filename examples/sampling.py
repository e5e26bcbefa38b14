"""Flow matching: which method gives the best samples for a budget of evaluations?

A velocity field is learned by flow matching: on a checkerboard in the plane, and on the digits of scikit-learn, 8 × 8
pixels. Samples are then drawn by different methods with the same starting points, and compared with those of a fine
solve of the same field: the root mean square of the difference, for budgets of 8 to 128 evaluations of the network.

Where `flow_matching` is installed, samples are drawn by its `ODESolver.sample`, which takes any method of torchdiffeq
by its name, and so ours; else by `torchdiffeq.odeint` in the same way.

    python examples/sampling.py
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torchdiffeq
from harness import arguments, table, write
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm

BUDGETS = (8, 16, 24, 32, 48, 64, 96, 128)
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4, "abm2": 2, "abm3": 2}
"""Of a step, where they are not 1."""
FIXED = ("euler", "midpoint", "rk4", "leapfrog", "ab2", "ab3", "ab4", "ab5", "abm3")
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)
ADAPTIVE = ("adams", "dopri5")
OURS = ("leapfrog", "ab2", "ab3", "ab4", "ab5", "abm3", "adams")


class Velocity(nn.Module):
    """A network for the velocity at (x, t), of the shape of x; it counts its evaluations."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        self.count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, for one time or for one of each sample."""
        self.count += 1
        t = t.expand(len(x))[:, None]
        known = torch.cat([x, t, torch.sin(2 * math.pi * t), torch.cos(2 * math.pi * t)], dim=1)
        velocity: Tensor = self.layers(known)
        return velocity


class Data(NamedTuple):
    """What is to be sampled.

    Attributes:
        name: of the data.
        draw: so many samples, of shape (n, size).
        size: of a sample.
        width: of the network.
    """

    name: str
    draw: Callable[[int], Tensor]
    size: int
    width: int


def checkerboard(count: int) -> Tensor:
    """Every second square of a board of 4 × 4 on [-2, 2]²."""
    x = torch.rand(count) * 4 - 2
    row = torch.randint(0, 2, (count,)) * 2 + (x.floor().long() % 2)
    return torch.stack([x, torch.rand(count) + row - 2], dim=1)


def digits() -> Callable[[int], Tensor]:
    """Images of 8 × 8 pixels, from -1 to 1."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    return lambda count: images[torch.randint(0, len(images), (count,))]


def learn(data: Data, steps: int) -> Velocity:
    """Flow matching along straight lines: E |v((1 - t) x_0 + t x_1, t) - (x_1 - x_0)|²."""
    velocity = Velocity(data.size, data.width)
    optimizer = torch.optim.Adam(velocity.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc=data.name):
        x1 = data.draw(256)
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        between = torch.lerp(x0, x1, t[:, None])
        loss = (velocity(between, t) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return velocity.requires_grad_(False)


def sampler(velocity: Velocity) -> Callable[..., Tensor]:
    """`ODESolver.sample` of flow_matching, or what does the same."""
    try:
        from flow_matching.solver import ODESolver
    except ImportError:

        def sample(x_init: Tensor, step_size: float | None, **keywords: Any) -> Tensor:
            options = {} if step_size is None else {"step_size": step_size}
            t = torch.tensor([0.0, 1.0], dtype=x_init.dtype)
            with torch.no_grad():
                return torchdiffeq.odeint(lambda t, x: velocity(x, t), x_init, t, options=options, **keywords)[-1]

        return sample
    return ODESolver(velocity).sample  # type: ignore[no-any-return]


def errors_of(velocity: Velocity, start: Tensor, every: int) -> dict[str, list[tuple[int, float]]]:
    """For every method the evaluations and the root mean square error, by increasing evaluations.

    Of the budgets and tolerances, every so many is taken.
    """
    velocity, start = velocity.double(), start.double()
    sample = sampler(velocity)
    exact = sample(start, None, method="dopri8", rtol=1e-11, atol=1e-11)
    found: dict[str, list[tuple[int, float]]] = {}
    settings = [
        (name, {"step_size": EVALUATIONS.get(name, 1) / budget}) for name in FIXED for budget in BUDGETS[::every]
    ]
    settings += [
        (name, {"step_size": None, "rtol": tol, "atol": tol}) for name in ADAPTIVE for tol in TOLERANCES[::every]
    ]
    for name, setting in settings:
        velocity.count = 0
        error = float((sample(start, method=name, **setting) - exact).square().mean().sqrt())
        found.setdefault(name, []).append((velocity.count, error))
    return {name: sorted(points) for name, points in found.items()}


def best_within(points: list[tuple[int, float]], budget: int) -> float | None:
    """The error of the most evaluations up to the budget, and one more for a start; None if there are none."""
    within = [point for point in points if budget / 2 < point[0] <= budget + 1]
    return max(within)[1] if within else None


def main() -> None:
    """Learn both fields, draw samples, and write the table and the picture."""
    args = arguments(__doc__, quick="learn for few steps, and draw few samples", seed=0)
    torch.manual_seed(args.seed)
    torchdiffeq_lmm.register()
    kinds = (Data("checkerboard", checkerboard, 2, 128), Data("digits", digits(), 64, 256))
    results: dict[str, dict[str, list[tuple[int, float]]]] = {}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for data, axes in zip(kinds, figure.subplots(1, 2), strict=True):
        velocity = learn(data, 40 if args.quick else 6000)
        every = 3 if args.quick else 1
        found = errors_of(velocity, torch.randn(16 if args.quick else 512, data.size), every)
        results[data.name] = found
        print(f"\n{data.name}: root mean square error of samples, for so many evaluations of the network\n")
        rows = []
        axes.set_prop_cycle(color=[*mpl.colormaps["tab10"].colors, "black"])
        for name, points in found.items():
            errors = [best_within(points, budget) for budget in BUDGETS[::every]]
            rows.append([f"`{name}`", *("" if error is None else f"{error:.1e}" for error in errors)])
            style = "--" if name in OURS else "-"
            axes.loglog(*zip(*points, strict=True), style, marker=".", label=name)
        print(table(["method", *map(str, BUDGETS[::every])], rows))
        axes.set(title=data.name, xlabel="evaluations of the network", ylabel="RMS error of samples", xlim=(6, 300))
        axes.legend(fontsize="small", ncols=2)
    write(args.output, "sampling", results, {"sampling": figure})


if __name__ == "__main__":
    main()
