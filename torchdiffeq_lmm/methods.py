"""What a linear multistep method is: its coefficients on any grid, and its order. No states, no functions.

Every consistent method can be written in increments ``d_{n+1} := x_{n+1} - x_n``, because ρ(1) = 0:

    d_{n+1} = Σ_i e[n, i] d_{n-i} + Σ_i b[n, i] f_{n-i},      x_{n+1} = x_n + d_{n+1}.

This form is used throughout. It keeps its accuracy where a tiny step precedes a large one, and its adjoint carries the
running sum P that the gradient filters need (see grad_filter.py) as the cotangent of x_n.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .combination import Weight

Row = tuple[tuple[Weight, ...], tuple[Weight, ...]]


@dataclass(frozen=True)
class Recurrence:
    """The weights of a method on one grid of N steps.

    Attributes:
        increment_weights: e, of shape (N, k - 1), float64 on the CPU; dimensionless.
        slope_weights: b, of shape (N, k), float64 on the CPU; in the unit of time, the step size included.
    """

    increment_weights: Tensor
    slope_weights: Tensor

    @property
    def requires_grad(self) -> bool:
        """Whether the weights carry a gradient to the grid."""
        return self.increment_weights.requires_grad or self.slope_weights.requires_grad

    def rows(self) -> list[Row]:
        """The weights of each step as numbers."""
        increments, slopes = self.increment_weights.tolist(), self.slope_weights.tolist()
        return [(tuple(e), tuple(b)) for e, b in zip(increments, slopes, strict=True)]

    def differentiable_rows(self) -> list[Row]:
        """The weights of each step as 0-d tensors that carry the gradient to the grid."""
        increments, slopes = self.increment_weights.unbind(), self.slope_weights.unbind()
        return [(e.unbind(), b.unbind()) for e, b in zip(increments, slopes, strict=True)]


@dataclass(frozen=True)
class MultistepMethod:
    """A linear multistep method.

    Attributes:
        name: the name under which torchdiffeq knows it.
        order: its order of convergence.
        steps: k, over how many steps its formula reaches; from the k-th on, the weights on a uniform grid repeat.
        recurrence: from the steps h, of shape (N,), float64, to the weights on that grid. Differentiable.
    """

    name: str
    order: int
    steps: int
    recurrence: Callable[[Tensor], Recurrence]


def leapfrog_recurrence(steps: Tensor) -> Recurrence:
    """Variable-step leapfrog, started by an Euler step.

    With ``r_n = h_n / h_{n-1}`` the formula ``d_{n+1} = -r_n² d_n + h_n (1 + r_n) f_n`` is the one of its form that is
    exact for quadratic polynomials. On a uniform grid it is ``x_{n+1} = x_{n-1} + 2 h f_n``.

    Args:
        steps: h, of shape (N,), N ≥ 1, positive.

    Source: for the uniform grid Shampine, *Stability of the leapfrog/midpoint method* (2009).
    """
    ratio = steps[1:] / steps[:-1]
    increments = torch.cat([torch.zeros_like(steps[:1]), -ratio.square()])
    slopes = torch.cat([steps[:1], steps[1:] * (1 + ratio)])
    return Recurrence(increments[:, None], slopes[:, None])


LEAPFROG = MultistepMethod(name="leapfrog", order=2, steps=2, recurrence=leapfrog_recurrence)
