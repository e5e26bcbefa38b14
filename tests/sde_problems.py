"""SDEs of all kinds of noise, and Brownian paths on a fine grid, so that solves with different steps share them."""

import torch
from torch import Tensor

import torchdiffeq_lmm  # noqa: F401  registers the methods

NOISES = ("diagonal", "additive", "scalar", "general")


class Path:
    """A Brownian motion known on a fine uniform grid of [0, horizon], as torchsde's solvers ask for one.

    Args:
        batch, channels: its shape.
        steps: of the fine grid.
        horizon: the end.
        seed: of the paths.
    """

    dtype = torch.float64
    device = torch.device("cpu")
    levy_area_approximation = "none"

    def __init__(self, batch: int, channels: int, steps: int, horizon: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = (batch, channels)
        self.steps = steps
        self.horizon = horizon
        scale = (horizon / steps) ** 0.5
        self.increments = scale * torch.randn(steps, batch, channels, generator=generator, dtype=torch.float64)
        zero = torch.zeros(1, batch, channels, dtype=torch.float64)
        self.values = torch.cat([zero, self.increments.cumsum(0)])

    def __call__(self, start: float, end: float) -> Tensor:
        first, last = (round(float(time) / self.horizon * self.steps) for time in (start, end))
        return self.values[last] - self.values[first]


class Pendulum(torch.nn.Module):
    """A pendulum with noise; `scale` is a parameter of its diffusion, `pull` one of its drift."""

    def __init__(self, noise_type: str, epsilon: float = 1.0, sde_type: str = "ito") -> None:
        super().__init__()
        self.noise_type = noise_type
        self.sde_type = sde_type
        self.epsilon = epsilon
        self.pull = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor([0.7, 0.4], dtype=torch.float64))

    @property
    def channels(self) -> int:
        return {"scalar": 1, "general": 3}.get(self.noise_type, 2)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        angle, speed = y.unbind(1)
        return torch.stack([speed, t - 0.3 * speed - angle.sin() * self.pull], 1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        scale = self.epsilon * self.scale
        if self.noise_type == "diagonal":
            return scale * torch.cos(y)
        if self.noise_type == "scalar":
            return (scale * torch.cos(y)).unsqueeze(2)
        if self.noise_type == "general":
            return torch.stack([scale * torch.cos(y), scale * y, torch.ones_like(y) * scale.prod()], 2)
        return ((1 + t) * scale).diag().expand(len(y), 2, 2)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class FunctionsOnly:
    """The same SDE, of which only some of torchsde's functions are defined."""

    def __init__(self, sde: Pendulum, *names: str) -> None:
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        given = {
            "f": sde.f,
            "g": sde.g,
            "f_and_g": lambda t, y: (sde.f(t, y), sde.g(t, y)),
            "g_prod": lambda t, y, v: self._product(sde.g(t, y), v),
            "f_and_g_prod": lambda t, y, v: (sde.f(t, y), self._product(sde.g(t, y), v)),
        }
        for name in names:
            setattr(self, name, given[name])

    def _product(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v if self.noise_type == "diagonal" else torch.bmm(g, v.unsqueeze(-1)).squeeze(-1)


def initial(batch: int = 4) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
