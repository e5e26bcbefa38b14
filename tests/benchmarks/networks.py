"""The networks that are solved and trained."""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Linear–Tanh–Linear of one width, the same at all times.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


class StepwiseNetwork(nn.Module):
    """Linear–Tanh–Linear with weights of its own in every step, all in one tensor whose rows are the steps.

    Args:
        width: D.
        steps: N, over the times from 0 to 1.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width, self.steps = width, steps
        self.stack = nn.Parameter((2 * torch.rand(steps, 2 * (width + 1) * width) - 1) / width**0.5)
        self.rows: tuple[Tensor, ...] = ()

    def take_rows(self) -> None:
        """Cut the stack into its rows, once per solve: one gradient for the whole of it then, and not one per row."""
        self.rows = self.stack.unbind()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        row = self.rows[min(int(float(t) * self.steps + 0.5), self.steps - 1)]
        first, second = row.view(2, self.width + 1, self.width)
        return torch.addmm(second[-1], torch.tanh(torch.addmm(first[-1], y, first[:-1])), second[:-1])


class HamiltonianNetwork(nn.Module):
    """Linear–Tanh–Linear as a Hamiltonian's flow: y' = J ∇H(y), H(y) = Σ log cosh(W y + b); it has no dissipation.

    Args:
        width: D, even; the hidden layer has twice as many units.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2 * width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        position, momentum = (torch.tanh(self.layer(y)) @ self.layer.weight).chunk(2, dim=-1)
        return torch.cat([momentum, -position], dim=-1)
