"""A continuous normalising flow with its trace inside func: which method trains it?

z' = f(t, z) carries points of the plane from data, at t = 0, to a normal distribution, at t = 1. Beside z the state
has the integral of the trace of ∂f/∂z, which is worked out inside func by auto-differentiation, and which the
likelihood needs. The flow is trained on two moons through each method, with about as many evaluations per solve. Its
likelihood of other points, as the method reports it, is compared with that of a fine solve of the same flow.

    python examples/normalising_flow.py
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm

FINE = {"method": "dopri8", "rtol": 1e-5, "atol": 1e-5}


class Way(NamedTuple):
    """How a flow is solved."""

    solve: Callable[..., Any]
    settings: dict[str, Any]


def fixed(name: str, steps: int, **more: Any) -> Way:
    """Equal steps of a method of either package."""
    return Way(torchdiffeq_lmm.odeint, {"method": name, "options": {"step_size": 1 / steps}, **more})


def adaptive(name: str, tol: float) -> Way:
    """Steps to a tolerance."""
    return Way(torchdiffeq.odeint, {"method": name, "rtol": tol, "atol": tol})


WAYS = {
    "dopri5": adaptive("dopri5", 3e-2),
    "adams": adaptive("adams", 1e-2),
    "rk4": fixed("rk4", 4),
    "midpoint": fixed("midpoint", 8),
    "leapfrog": fixed("leapfrog", 16),
    "leapfrog, filtered": fixed("leapfrog", 16, grad_filter=torchdiffeq_lmm.CostateFilter("trapezoid")),
    "ab2": fixed("ab2", 16),
    "ab4": fixed("ab4", 12),
    "abm4": fixed("abm4", 6),
}


class Flow(nn.Module):
    """func for the state (z, the integral of the trace), of shapes (n, 2) and (n,); it counts its evaluations."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.last = nn.Linear(width, 2)
        self.count = 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The velocity, and its divergence."""
        self.count += 1
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            velocity = self.last(self.layers(torch.cat([z, t.expand(len(z), 1)], dim=1)))
            rows = [torch.autograd.grad(velocity[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return velocity, rows[0] + rows[1]


def points(count: int, seed: int) -> Tensor:
    """Two moons, about of the size of the normal distribution."""
    x, _ = make_moons(count, noise=0.06, random_state=seed)
    return (torch.tensor(x, dtype=torch.float32) - torch.tensor([0.5, 0.25])) * 1.5


def log_likelihood(flow: Flow, x: Tensor, way: Way) -> Tensor:
    """log p of points of shape (n, 2)."""
    times = torch.tensor([0.0, 1.0], dtype=x.dtype)
    z, trace = (of[-1] for of in way.solve(flow, (x, torch.zeros_like(x[:, 0])), times, **way.settings))
    return trace - z.square().sum(1) / 2 - math.log(2 * math.pi)


def train(way: Way, data: Tensor, iterations: int, size: int, seed: int, name: str) -> tuple[Flow, float, float]:
    """A flow, trained on batches of some size; evaluations of its last solve; seconds of CPU time per iteration."""
    torch.manual_seed(seed)
    flow = Flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    start = time.process_time()
    for _ in tqdm(range(iterations), desc=name):
        flow.count = 0
        loss = -log_likelihood(flow, data[torch.randint(0, len(data), (size,))], way).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow.requires_grad_(False), flow.count, (time.process_time() - start) / iterations


def main() -> None:
    """Train by every method, and write the table and the picture."""
    args = arguments(__doc__, quick="train for few iterations", seed=0)
    iterations, size, count = (2, 16, 16) if args.quick else (150, 256, 1000)
    data, other = points(4000, args.seed), points(count, args.seed + 1)
    results: dict[str, dict[str, float]] = {}
    rows = []
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, way in WAYS.items():
        flow, evaluations, seconds = train(way, data, iterations, size, args.seed, name)
        with torch.no_grad():
            reported = log_likelihood(flow, other, way)
            exact = log_likelihood(flow, other, Way(torchdiffeq.odeint, FINE))
        found = {
            "evaluations": evaluations,
            "seconds": seconds,
            "reported": reported.mean().item(),
            "exact": exact.mean().item(),
            "error": (reported - exact).square().mean().sqrt().item(),
        }
        results[name] = found
        values = [f"{found[key]:.3f}" for key in ("reported", "exact", "error")]
        rows.append([name, evaluations, *values, f"{1000 * seconds:.0f}"])
        if name == "ab2":
            draw_density(panels[:2], flow, other, 8 if args.quick else 100)
    print(f"\nMean log-likelihood of {count} other points\n")
    header = ["trained through", "evaluations", "reported", "exact", "RMS difference of a point", "ms per iteration"]
    print(table(header, rows))
    panels[2].barh(list(results), [found["error"] for found in results.values()], color=COLORS["filtered"])
    panels[2].set(title="error of a log-likelihood", xscale="log")
    panels[2].invert_yaxis()
    write(args.output, "normalising_flow", results, {"normalising_flow": figure})


def draw_density(panels: Any, flow: Flow, data: Tensor, size: int) -> None:
    """The data, and the density that a flow has learned."""
    axis = torch.linspace(-3, 3, size)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        density = log_likelihood(flow, x, Way(torchdiffeq.odeint, FINE)).exp().reshape(size, size)
    panels[0].plot(*data.T.numpy(), ".", markersize=2, color=COLORS["truth"])
    panels[0].set(title="data", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    panels[1].imshow(density.numpy(), extent=(-3, 3, -3, 3), origin="lower", cmap="viridis")
    panels[1].set(title="density, trained through ab2")


if __name__ == "__main__":
    main()
