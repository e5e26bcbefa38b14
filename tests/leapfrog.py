"""Leapfrog through torchdiffeq, and as a loop that knows nothing of this package."""

from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

INTERPS = ["linear", "cubic"]


def tensor(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def on(nodes: Tensor) -> Callable[..., Tensor]:
    """A grid_constructor for these nodes, cast to the dtype and device of t."""
    return lambda func, y0, t: nodes.to(t)


def solve(func: Callable[..., Any], y0: Any, t: Tensor, event_fn: Any = None, **options: Any) -> Any:
    return torchdiffeq.odeint(func, y0, t, method="leapfrog", options=options or None, event_fn=event_fn)


def loop(func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, nodes: Tensor) -> Tensor:
    """The reference: leapfrog in the form of states."""
    h = nodes.diff()
    slope = func(nodes[0], y0)
    x = [y0, y0 + h[0] * slope]
    if len(h) == 1:
        # A single step is Heun's.
        return torch.stack([y0, y0 + h[0] / 2 * (slope + func(nodes[1], x[1]))])
    for n in range(1, len(h)):
        r = h[n] / h[n - 1]
        x.append((1 - r**2) * x[n] + r**2 * x[n - 1] + h[n] * (1 + r) * func(nodes[n], x[n]))
    return torch.stack(x)


class Field(nn.Module):
    """A nonlinear, time-dependent field in three dimensions that counts its evaluations."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))
        self.times: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(t.item())
        return torch.tanh(y @ self.weight + t * self.bias) - 0.5 * y


NODES = {
    "uniform": torch.linspace(0, 1, 11, dtype=torch.float64),
    "truncated": tensor(0.0, 0.3, 0.6, 0.9, 1.0),
    "irregular": tensor(0.0, 0.01, 0.3, 0.31, 0.7, 0.75, 1.0),
    "mixed": tensor(0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.7, 0.8, 0.9, 1.0),
    "one step": tensor(0.0, 1.0),
    "two steps": tensor(0.0, 0.25, 1.0),
}


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -0.5 * y


def curved(func: Any, y0: Any, t: Tensor) -> Tensor:
    """A grid that moves with t, with steps that grow."""
    return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 7, dtype=t.dtype) ** 1.5
