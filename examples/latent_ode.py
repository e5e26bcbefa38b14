"""A latent ODE for series with irregular times: which method trains it?

Spirals, clockwise or not, are seen at times that are drawn at random, each at times of its own. A recurrent network
goes over what was seen, from the last time to the first, and gives a normal distribution of the latent state at t =
0. From there a neural ODE goes through all times, and a decoder makes points of the states. It is trained on the
evidence lower bound through each method, with about as many evaluations in a solve. What has been learned is judged
by a fine solve: by the bound, and by the error at points that were not seen.

    python examples/latent_ode.py
"""

import math
import time
from typing import Any, NamedTuple

import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm

LATENT = 4
NOISE = 0.1
SEEN = 0.4
"""The part of all times at which a series is seen."""
HORIZON = 3.0
FINE = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}


def fixed(name: str, steps: int, interp: str = "cubic") -> dict[str, Any]:
    """Equal steps, and interpolation at the times between them."""
    return {"method": name, "options": {"step_size": HORIZON / steps, "interp": interp}}


WAYS = {
    "dopri5": {"method": "dopri5", "rtol": 1e-1, "atol": 1e-1},
    "adams": {"method": "adams", "rtol": 1e-2, "atol": 1e-2},
    "rk4": fixed("rk4", 6, "linear"),
    "rk4, cubic": fixed("rk4", 6),  # torchdiffeq evaluates once more for every time.
    "midpoint": fixed("midpoint", 12, "linear"),
    "leapfrog": fixed("leapfrog", 24),
    "ab2": fixed("ab2", 24),
    "ab4": fixed("ab4", 20),
    "abm4": fixed("abm4", 10),
}


class Series(NamedTuple):
    """Series, which have their times in common, but are not seen at all of them.

    Attributes:
        times: of shape (m,), from 0 to HORIZON.
        points: without noise, of shape (m, n, 2).
        seen: with noise, of the same shape.
        mask: 1 where a series is seen, else 0; of shape (m, n, 1).
    """

    times: Tensor
    points: Tensor
    seen: Tensor
    mask: Tensor


class Field(nn.Module):
    """The latent ODE; it counts its evaluations."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LATENT, width), nn.ELU(), nn.Linear(width, LATENT))
        self.count = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """z', of the shape of z, (n, LATENT)."""
        self.count += 1
        return self.layers(z)


class Model(nn.Module):
    """Encoder, latent ODE and decoder."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.encoder, self.begin = nn.GRUCell(4, hidden), nn.Linear(hidden, 2 * LATENT)
        self.field = Field()
        self.decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, 2))

    def encode(self, series: Series) -> tuple[Tensor, Tensor]:
        """Mean and logarithmic variance of the latent state at t = 0, both of shape (n, LATENT)."""
        hidden = series.seen.new_zeros(series.seen.shape[1], self.encoder.hidden_size)
        gaps = torch.diff(series.times, append=series.times[-1:])
        waited = torch.zeros_like(series.mask[0])
        for point, mask, gap in zip(series.seen.flip(0), series.mask.flip(0), gaps.flip(0), strict=True):
            waited = waited + gap
            new = self.encoder(torch.cat([point * mask, mask, waited], dim=1), hidden)
            hidden, waited = torch.where(mask > 0, new, hidden), torch.where(mask > 0, 0.0, waited)
        mean, log_variance = self.begin(hidden).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor, times: Tensor, settings: dict[str, Any]) -> Tensor:
        """Points at all times, of shape (m, n, 2)."""
        return self.decoder(torchdiffeq.odeint(self.field, z, times, **settings))

    def loss(self, series: Series, settings: dict[str, Any], noise: Tensor) -> Tensor:
        """The negative evidence lower bound, per point that was seen."""
        mean, log_variance = self.encode(series)
        guess = self.decode(mean + noise * (log_variance / 2).exp(), series.times, settings)
        misfit = (((guess - series.seen) / NOISE).square() + math.log(2 * math.pi * NOISE**2)) / 2
        divergence = (log_variance.exp() + mean.square() - 1 - log_variance) / 2
        return ((misfit * series.mask).sum() + divergence.sum()) / series.mask.sum()


def spirals(count: int, length: int, seed: int) -> Series:
    """Spirals around the origin that grow, from random angles and radii."""
    torch.manual_seed(seed)
    times = torch.cat([torch.zeros(1), HORIZON * torch.rand(length - 2).sort().values, torch.full((1,), HORIZON)])
    turn = 1 - 2 * (torch.arange(count) % 2)
    angles = 2 * math.pi * torch.rand(count) + turn * 2 * times[:, None]
    radii = 0.5 + 0.5 * torch.rand(count) + 0.2 * times[:, None]
    points = radii[..., None] * torch.stack([angles.cos(), angles.sin()], dim=-1)
    mask = (torch.rand(length, count, 1) < SEEN).float()
    return Series(times, points, points + NOISE * torch.randn_like(points), mask)


def train(series: Series, settings: dict[str, Any], iterations: int, name: str) -> tuple[Model, dict[str, float]]:
    """A model that was trained; evaluations of its last solve, its loss over the last tenth, seconds of CPU time."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    start, losses = time.process_time(), []
    for _ in tqdm(range(iterations), desc=name):
        model.field.count = 0
        loss = model.loss(series, settings, torch.randn(series.seen.shape[1], LATENT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, iterations // 10) :]
    seconds = (time.process_time() - start) / iterations
    return model, {"evaluations": model.field.count, "loss": sum(last) / len(last), "seconds": seconds}


def judge(model: Model, series: Series, settings: dict[str, Any]) -> dict[str, float]:
    """By other series: the loss by the method and by a fine solve, and errors at what was not seen."""
    noise = torch.randn(series.seen.shape[1], LATENT, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, _ = model.encode(series)
        exact = model.decode(mean, series.times, FINE)
        own = model.decode(mean, series.times, settings)
        misses = (exact - series.points).square()[series.mask.squeeze(-1) == 0]
        return {
            "reported": model.loss(series, settings, noise).item(),
            "exact": model.loss(series, FINE, noise).item(),
            "error": misses.mean().sqrt().item(),
            "of the method": (own - exact).square().mean().sqrt().item(),
        }


def main() -> None:
    """Train by every method, and write the table and the picture."""
    args = arguments(__doc__, quick="train for few iterations on few series", seed=0)
    torchdiffeq_lmm.register()
    iterations, count, length = (3, 8, 12) if args.quick else (200, 400, 40)
    series, other = spirals(count, length, args.seed), spirals(count, length, args.seed + 1)
    results: dict[str, dict[str, float]] = {}
    rows = []
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, settings in WAYS.items():
        model, found = train(series, settings, iterations, name)
        found |= judge(model, other, settings)
        results[name] = found
        values = [f"{found[key]:.3f}" for key in ("loss", "reported", "exact", "error", "of the method")]
        rows.append([name, f"{found['evaluations']:.0f}", *values, f"{1000 * found['seconds']:.0f}"])
        if name == "ab2":
            draw(panels[:2], model, other)
    print(f"\nThe negative bound, per point that was seen, and errors of points, for {count} series\n")
    header = ["trained through", "evaluations", "training", "others", "the same, exact", "error at what was not seen"]
    print(table([*header, "error of the solve", "ms per iteration"], rows))
    panels[2].barh(list(results), [found["of the method"] for found in results.values()], color=COLORS["filtered"])
    panels[2].set(title="error of the solve", xscale="log")
    panels[2].invert_yaxis()
    write(args.output, "latent_ode", results, {"latent_ode": figure})


def draw(panels: Any, model: Model, series: Series) -> None:
    """What was seen of two series, and what the model makes of it."""
    fine = torch.linspace(0, HORIZON, 100)
    with torch.no_grad():
        mean, _ = model.encode(series)
        curves = model.decode(mean, fine, FINE)
    for i, axes in enumerate(panels):
        seen = series.seen[series.mask[:, i, 0] > 0, i]
        axes.plot(*series.points[:, i].T.numpy(), color=COLORS["truth"], linewidth=0.8, label="truth")
        axes.plot(*seen.T.numpy(), ".", color=COLORS["auto-differentiation"], label="seen")
        axes.plot(*curves[:, i].T.numpy(), color=COLORS["filtered"], label="by ab2")
        axes.set(title=("anticlockwise", "clockwise")[i], aspect="equal")
        axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
