"""Fields, solves and losses for the backward modes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchdiffeq_lmm

EXPLICIT = ["leapfrog", "nystrom3", "ab1", "ab4", "abm3"]
DIM = 3
STEPS = 19
AGAIN = ["checkpoint", "reversible"]
OBSERVED = (0.0, 0.4, 0.87, 1.0)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Time, shared weights, one weight per step, a frozen and an unused parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, 4, dtype=torch.float64)
        self.outer = nn.Linear(4, DIM, dtype=torch.float64)
        self.per_step = nn.ParameterList(torch.zeros(DIM, dtype=torch.float64) for _ in range(STEPS + 1))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(0.7, dtype=torch.float64))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.6 * draw(*parameter.shape, seed=seed))
        self.inner.bias.requires_grad_(False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        step = min(round(abs(float(t.detach())) * STEPS), STEPS)
        slope = self.outer(torch.tanh(self.inner(y)) * torch.cos(2 * t)) * self.scale
        return torch.addcmul(slope, y, self.per_step[step], value=-0.3)


class Plain(nn.Module):
    """A small network and nothing else."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, dtype=dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * torch.cos(t)


def solve(
    func: Callable[..., Any],
    y0: Any,
    backward: Any = "checkpoint",
    t: Sequence[float] | Tensor = (0.0, 1.0),
    steps: int = STEPS,
    method: str = "leapfrog",
    grad_filter: Any = None,
    params: Any = None,
    **options: Any,
) -> Any:
    like = y0[0] if isinstance(y0, tuple) else y0
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype.to_real(), device=like.device)
    if "grid_constructor" not in options:
        options = {"step_size": float(abs(t[-1] - t[0]).detach()) / steps} | options
    given = {} if backward == "autograd" else {"adjoint_params": params}
    return torchdiffeq_lmm.odeint(
        func, y0, t, method=method, options=options, grad_filter=grad_filter, backward=backward, **given, **TIGHT
    )


def loss(states: Tensor) -> Tensor:
    return (states * draw(*states.shape, seed=9).to(states)).sum().real


def assert_same(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float = 1e-11) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        if one is None or other is None:
            assert one is other or not bool((other if one is None else one).any())
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
