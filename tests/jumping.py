"""Right-hand sides that jump in time, and the ways to solve with them."""

import torch
from torch import Tensor, nn

from torchdiffeq_lmm import CostateFilter

TIGHT = {"rtol": 1e-12, "atol": 1e-13}
SOME = ["leapfrog", "ab4", "abm3", "am3", "bdf2"]


def f64(*values: float, **keywords: bool) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **keywords)


JUMPS = (0.4, 1.0)
END = 1.6


def rate(piece: int, t: Tensor, y: Tensor, lib: object = torch) -> Tensor:
    """The right-hand side before, between and after `JUMPS`."""
    a, b = y
    if piece == 0:
        return lib.stack([b, -lib.sin(a)])
    if piece == 1:
        return lib.stack([2 - b * a, a + lib.cos(3 * t)])
    return lib.stack([-b, a - 1])


def jumping(t: Tensor, y: Tensor) -> Tensor:
    return rate(sum(float(t) >= jump for jump in JUMPS), t, y)


class Switched(nn.Module):
    """y' = A tanh(y) before the switch, B tanh(y) after it; without one, by the matrix of a number."""

    def __init__(self, switch: float | None = None, number: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrices = nn.ParameterList(torch.randn(3, 3, generator=generator, dtype=dtype) for _ in range(2))
        self.switch = switch
        self.number = number

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        number = self.number if self.switch is None else int(t > self.switch)
        return self.matrices[number] @ torch.tanh(y)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.5, -0.3, 0.8], dtype=dtype, requires_grad=True)


WAYS: list[dict] = [
    {},
    {"grad_filter": CostateFilter("trapezoid")},
    {"backward": "checkpoint"},
    {"grad_filter": CostateFilter("trapezoid"), "backward": "checkpoint"},
]
