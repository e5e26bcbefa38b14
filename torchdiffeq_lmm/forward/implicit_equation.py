"""The equation of an implicit step, d = c + b* f(x + d), and when it counts as solved.

Every entry has a tolerance of its own: a fraction of atol + rtol |y|, but no less than its own rounding. A correction
below it is no proof: a Jacobian that is no longer right makes small corrections of large residuals, and so does an
iteration that has stopped moving. So a correction counts where the one before it shows that the iteration contracts, or
where the residual itself is as small. Where rounding in func lets neither happen, the residual counts as 0 if it is no
larger than the differences that the last place of the state makes in func, entry by entry. All else is an error.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .jacobian import Slope
from .linear import is_rounding, noise

SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method, and an old Jacobian to a new one."""

NEAR = 30
"""By corrections of more tolerances than that no iteration ends, however fast it converges."""

CAUTION = 2
"""By so much the rate of convergence may have grown since it was seen."""

_TERM_ULPS = 8
"""So many units in the last place of the terms of the equation are rounding."""

_PROBE_WIDTH = 16
"""By so many times its rounding the state is changed for it, as the rounding of func has steps of its own."""


class Solution(NamedTuple):
    """d and f(x + d)."""

    d: Tensor
    f: Tensor


@dataclass(frozen=True)
class ImplicitEquation:
    """d = c + b* f(x + d): see `implicit.ImplicitSolver.solve`."""

    x: Tensor
    c: Tensor
    weight: float
    slope: Slope
    iterate: Slope

    def residual(self, d: Tensor, f: Tensor) -> Tensor:
        """By how much d misses the equation."""
        return self.c + self.weight * f - d

    def level(self, d: Tensor) -> float:
        """The largest entry of the residual; infinite where one is not a number."""
        residual = self.residual(d, self.slope(self.x + d)).abs()
        return float(residual.nan_to_num(nan=torch.inf).max()) if residual.numel() else 0.0

    def solution(self, d: Tensor) -> Solution:
        """d, and the slope by the equation: f itself would amplify what is left of the error by the Jacobian."""
        return Solution(d, (d - self.c) / self.weight)

    def sizes(self, d: Tensor, f: Tensor) -> Tensor:
        """What size the entries of a state and its corrections are of."""
        sizes = torch.maximum((self.x + d).abs(), d.abs())
        return torch.maximum(torch.maximum(sizes, self.c.abs()), abs(self.weight) * f.abs())


@dataclass(frozen=True)
class Acceptance:
    """What is small enough, entry by entry.

    Attributes:
        rtol, atol: numbers, or tensors that broadcast with the state.
        fraction: of atol + rtol |y|, to which equations are solved.
        precision: the relative precision of func's values, the unit in the last place of their dtype.
    """

    rtol: float | Tensor
    atol: float | Tensor
    fraction: float
    precision: float

    def tolerance(self, equation: ImplicitEquation, d: Tensor) -> Tensor:
        """Of each entry of a correction of d, its own tolerance or its own rounding, whichever is more."""
        x, change = equation.x, (d - equation.c).abs()
        level = _level(x, d)
        rounding = _TERM_ULPS * (torch.finfo(x.dtype).eps * level + self.precision * change + _least(x))
        return torch.maximum(self.fraction * (self.atol + self.rtol * level), rounding)

    def size(self, equation: ImplicitEquation, d: Tensor, correction: Tensor) -> float:
        """The largest entry of a correction of d in terms of its tolerance; infinite where one is not a number."""
        if correction.numel() == 0:
            return 0.0
        return float(excess(correction, self.tolerance(equation, d)).max())

    def scale(self, equation: ImplicitEquation, d: Tensor) -> Tensor:
        """Sizes by which corrections are compared, nowhere 0."""
        x = equation.x
        level = _level(x, d)
        rounding = torch.finfo(x.dtype).eps * torch.maximum(level, torch.maximum(d.abs(), equation.c.abs()))
        if not x.numel():
            return rounding
        scale = torch.maximum(self.atol + self.rtol * level, rounding)
        least = torch.finfo(x.dtype).eps * level.max()
        return torch.where(scale > 0, scale, torch.where(least > 0, least, 1.0))

    def is_rounding(
        self, equation: ImplicitEquation, d: Tensor, f: Tensor, residual: Tensor, but_for: Tensor | None = None
    ) -> bool:
        """Whether a residual is no larger than what rounding of the state, and of all that is added up, makes of it.

        Args:
            equation: the equation.
            d, f, residual: an iterate, f there and its residual.
            but_for: entries that are not looked at.
        """
        x, c, weight = equation.x, equation.c, equation.weight
        y = x + d
        level = torch.maximum(x.abs(), y.abs())
        own = torch.finfo(x.dtype).eps * (level + d.abs() + c.abs()) + self.precision * abs(weight) * f.abs()
        own = own + _least(x)
        residual = residual.abs() if but_for is None else residual.abs().where(~but_for, 0.0)

        def change(seed: int) -> Tensor:
            nearby = y + 2 * _PROBE_WIDTH * self.precision * level * noise(level, seed)
            return _TERM_ULPS * abs(weight) / _PROBE_WIDTH * (equation.slope(nearby) - f).abs()

        return is_rounding(residual, _TERM_ULPS * own, change)


def excess(correction: Tensor, tolerance: Tensor) -> Tensor:
    """A correction in terms of the tolerance; nothing to correct is no excess, even over a tolerance of 0."""
    found = (correction.abs() / tolerance).where(correction != 0, 0.0)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _level(x: Tensor, d: Tensor) -> Tensor:
    """|x| or |x + d|, in the precision of a norm, for a small state may underflow in its own."""
    return torch.maximum(x.abs(), (x + d).abs()).to(torch.promote_types(x.dtype.to_real(), torch.float32))


def _least(x: Tensor) -> float:
    """The distance of the smallest numbers of a dtype."""
    return torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
