"""Compiled solves, for tests: fields, and a solve with its gradients, eager or compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Compile, GridParameter
from torchdiffeq_lmm.autodiff import compiled_functions

NEEDS_TORCH = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11),
    reason="compiled solves need PyTorch 2.11",
)

TRACED = Compile(block=5, backend="eager")
"""Traces and differentiates all, and leaves out the machine code."""

REGULAR: dict[str, Any] = {"step_size": 1 / 23}
INSIDE = torch.tensor([0.0, 0.31, 0.62, 1.0], dtype=torch.float64)
"""Outputs inside steps."""

UNEQUAL = torch.linspace(0, 1, 23, dtype=torch.float64) ** 1.1
"""A grid of unequal steps, with an output at every node."""


class Field(nn.Module):
    """A layer with a value of its own for every step, on 23 steps from 0 to 1.

    It has few operations, for each takes milliseconds to trace.

    Args:
        width: of the states.
    """

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(width, width, dtype=torch.float64))
        nodes = torch.linspace(0, 1, 24, dtype=torch.float64)
        self.theta = GridParameter(torch.randn(23, width, dtype=torch.float64), nodes)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight) * t.cos() + self.theta(t)


class Light(nn.Module):
    """A field with fewer operations still, for methods with a long start; its Jacobian is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -1.3], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(t, y.flip(-1), self.weight).tanh()


def start(batch: int = 3, width: int = 2) -> Tensor:
    """An initial state, of shape (batch, width)."""
    return torch.linspace(-1, 1, width * batch, dtype=torch.float64).reshape(batch, width)


def solved(func: nn.Module, y0: Tensor, t: Tensor, method: str, **keywords: Any) -> list[Tensor]:
    """The states, and the gradients of y0, of t where it requires one, and of all parameters."""
    y0, t = y0.detach().clone().requires_grad_(), t.detach().clone().requires_grad_(t.requires_grad)
    states = torchdiffeq_lmm.odeint(func, y0, t, method=method, **keywords)
    weights = torch.linspace(1, 2, states.numel(), dtype=torch.float64).reshape(states.shape).to(states.dtype)
    wanted = (y0, *((t,) if t.requires_grad else ()), *func.parameters())
    return [states.detach(), *torch.autograd.grad((weights * states).sum(), wanted)]


def assert_same(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-12) -> None:
    """All are the same, relative to the largest entry of each."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1e-3, float(b.abs().max())))


@contextmanager
def compiling(count: int) -> Iterator[None]:
    """Assert that so many functions are compiled within."""
    before = compiled_functions.compilations
    yield
    assert compiled_functions.compilations - before == count
