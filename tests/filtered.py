"""A field and filtered solves of it on a grid of unequal steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import torchdiffeq_lmm

NODES = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.8, 1.0], dtype=torch.float64)
OBSERVED = torch.tensor([0.0, 0.3, 0.72, 1.0], dtype=torch.float64)
ON_NODES = {"grid_constructor": lambda func, y0, t: NODES.to(t)}
DIM = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(
    func: Callable, y0: Tensor, t: Tensor = OBSERVED, grad_filter: object = "leapfrog", **options: object
) -> Tensor:
    options = {**ON_NODES, **options}
    return torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, grad_filter=grad_filter)


def loss(states: Tensor) -> Tensor:
    return (states * draw(*states.shape, seed=9).to(states)).sum()


class Tanh(nn.Module):
    """A module with shared weights, a parameter that it does not use, and time in its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, 5, dtype=torch.float64)
        self.outer = nn.Linear(5, DIM, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)) * torch.cos(3 * t))


def index_of(t: Tensor) -> int:
    return int((NODES - t).abs().argmin())


class DataParallelModel(nn.Module):
    """A model whose forward pass is a filtered solve."""

    def __init__(self) -> None:
        super().__init__()
        self.func = Tanh()
        del self.func.unused

    def forward(self, y0: Tensor) -> Tensor:
        return solve(self.func, y0)[-1]


def train_in_process(rank: int, path: str, batch: Tensor, results: str) -> None:
    # The processes meet in a file, so that no port is needed.
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(DataParallelModel())
    model(batch.chunk(2)[rank]).square().mean().backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{results}.{rank}")
    torch.distributed.destroy_process_group()
