"""The equation of an implicit step, d = c + b* f(x + d), and its adjoint.

Where the step is not stiff, substitution solves it. Where substitution is slow or diverges, Newton's method does. For
small states it uses a matrix for the Jacobian and keeps it, from step to step, for as long as it serves; for large ones
finite differences along the directions of a Krylov space.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for the simplified Newton iterations.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from .linear import DENSE_LIMIT, Product, from_real, gmres, matrix_of, solve, to_real

MAX_ITERATIONS = 50
"""Of one step, substitutions and Newton steps counted apart."""

SAFETY = 1e-4
"""The equation is solved to this fraction of atol + rtol |x|."""

_SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method, and an old Jacobian to a new one."""

_ROUNDING = 8
"""Corrections of so many units in the last place of the state are rounding."""

_INEXACT = 1e-3
"""Newton corrections of large systems are solved to this relative residual."""

Slope = Callable[[Tensor], Tensor]


class ImplicitSolver:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
    """

    def __init__(self, rtol: float | Tensor, atol: float | Tensor) -> None:
        self._rtol = rtol
        self._atol = atol
        self._uses_newton = False
        self._jacobian: Tensor | None = None

    def solve(
        self,
        x: Tensor,
        known: Tensor | None,
        weight: float,
        guess: Tensor | None,
        slope: Slope,
        iterate: Slope,
        where: Callable[[], str],
    ) -> tuple[Tensor, Tensor]:
        """Solve d = c + b* f(x + d).

        Args:
            x: the state that d is added to.
            known: c; None for 0.
            weight: b*.
            guess: for f(x + d); None for 0.
            slope: f.
            iterate: f again, called once at every iterate; the last one is the solution, up to the tolerance.
            where: returns the step in words, for messages.

        Returns:
            d and f(x + d), which satisfy the equation to rounding.

        Raises:
            RuntimeError: no iteration converges.
        """
        with torch.no_grad():
            c = torch.zeros_like(x) if known is None else known
            start = c if guess is None else c + weight * guess
            tolerance = (SAFETY * (self._atol + self._rtol * x.abs())).to(x.abs())
            largest = float(x.abs().max()) if x.numel() else 0.0
            tolerance = tolerance.clamp(min=_ROUNDING * torch.finfo(x.dtype).eps * largest)
            found, size = None, 0.0
            if not self._uses_newton:
                found, size = self._substitute(x, c, weight, start, iterate, tolerance)
            if found is None:
                self._uses_newton = True
                found, size = self._newton(x, c, weight, start, slope, iterate, tolerance)
        if found is None:
            raise RuntimeError(
                f"the implicit equation {where()} was not solved: the last of {MAX_ITERATIONS} Newton corrections at "
                f"most was {size:.3g} times the tolerance, {SAFETY:g} (atol + rtol |y|). Use smaller steps there, by "
                f"step_size or grid_constructor; or larger rtol and atol, if func is exact to no more digits"
            )
        return found

    @staticmethod
    def _substitute(
        x: Tensor, c: Tensor, weight: float, d: Tensor, iterate: Slope, tolerance: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, float]:
        previous = torch.inf
        for _ in range(MAX_ITERATIONS):
            f = iterate(x + d)
            following = c + weight * f
            size = _size(following - d, tolerance)
            if size <= 1:
                return (following, f), size
            if not size <= _SLOW * previous:
                break
            d, previous = following, size
        return None, size

    def _newton(
        self, x: Tensor, c: Tensor, weight: float, d: Tensor, slope: Slope, iterate: Slope, tolerance: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, float]:
        dense = to_real(x).numel() <= DENSE_LIMIT
        previous = torch.inf
        for _ in range(MAX_ITERATIONS):
            f = iterate(x + d)
            residual = to_real(c + weight * f - d)
            if not bool(torch.isfinite(residual).all()):
                return None, torch.inf
            if dense:
                if self._jacobian is None:
                    self._jacobian = _jacobian(slope, x + d)
                matrix = torch.eye(len(residual)).to(residual) - weight * self._jacobian
                correction = from_real(torch.linalg.solve(matrix, residual), x)
            elif _size(from_real(residual, x), tolerance) <= 1:
                correction = from_real(residual, x)
            else:
                correction = from_real(gmres(_derivative(slope, x + d, f, weight), residual, _INEXACT)[0], x)
            size = _size(correction, tolerance)
            d = d + correction
            if size <= 1:
                # The slope by the equation: f itself would amplify what is left of the error by the Jacobian.
                return (d, (d - c) / weight), size
            if not size <= _SLOW * previous:
                self._jacobian = None
            previous = size
        return None, size


def _jacobian(slope: Slope, x: Tensor) -> Tensor:
    """The Jacobian of f as a real matrix: by auto-differentiation, or by differences where f hides its graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        f = slope(leaf)
        rows = []
        if f.requires_grad:
            for unit in torch.eye(to_real(x).numel(), dtype=x.dtype.to_real(), device=x.device):
                (row,) = torch.autograd.grad(f, leaf, from_real(unit, x), retain_graph=True, allow_unused=True)
                if row is None:
                    break
                rows.append(to_real(row))
    if rows:
        return torch.stack(rows)
    return matrix_of(_derivative(slope, x, f.detach(), 1.0), to_real(x))


def _derivative(slope: Slope, x: Tensor, f: Tensor, weight: float) -> Product:
    """From v to b* J v, by differences along v."""
    relative = sqrt(torch.finfo(x.dtype).eps)

    def product(v: Tensor) -> Tensor:
        direction = from_real(v, x)
        length = float(direction.abs().max())
        if length == 0.0:
            return torch.zeros_like(v)
        # Where v is large, x may be smaller than elsewhere.
        local = float(x.abs()[direction.abs() >= 0.1 * length].max())
        epsilon = relative * max(local, 1e-3 * float(x.abs().max()), relative) / length
        return to_real(slope(x + epsilon * direction) - f) * (weight / epsilon)

    return product


def solve_adjoint(pull_back: Slope, weight: float, rhs: Tensor) -> Tensor:
    """Solve (1 - b* Jᵀ) z = r, the adjoint of an implicit step, to rounding.

    Args:
        pull_back: from a cotangent v to Jᵀ v.
        weight: b*.
        rhs: r, of the shape of a state.
    """
    return from_real(solve(lambda v: weight * to_real(pull_back(from_real(v, rhs))), to_real(rhs)), rhs)


def _size(correction: Tensor, tolerance: Tensor) -> float:
    """The largest component of a correction in terms of the tolerance; NaN where one is."""
    excess = correction.abs() / tolerance
    # Nothing to correct is no excess, even over a tolerance of 0.
    return float(excess.where(correction != 0, 0).max()) if correction.numel() else 0.0
