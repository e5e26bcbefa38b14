"""The equation of an implicit step, d = c + b* f(x + d), and its adjoint.

Where the step is not stiff, substitution solves it. Where substitution is slow or diverges, Newton's method does. For
small states it uses a matrix for the Jacobian and keeps it, from step to step, for as long as it serves; for large ones
finite differences along the directions of a Krylov space.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for the simplified Newton iterations;
Deuflhard, *Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from .linear import Product, from_real, gmres, matrix_of, solve, to_real

JACOBIAN_LIMIT = 256
"""Newton's method keeps a matrix for the Jacobian of up to so many real unknowns."""

MAX_ITERATIONS = 50
"""Of substitution, and of Newton's method from one starting point."""

SAFETY = 1e-4
"""The equation is solved to this fraction of atol + rtol |x|."""

_SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method, and an old Jacobian to a new one."""

_NEAR = 30
"""By corrections of more tolerances than that substitution does not end, however fast it converges."""

_CAUTION = 2
"""By so much the rate of convergence may have grown since it was seen."""

_SHORTEST = 1e-4
"""A Newton correction that has to be damped by more leads nowhere."""

_STAGNANT = 1e-2 / SAFETY
"""Corrections of up to so many tolerances are accepted where none makes the next one smaller."""

_ROUNDING = 8
"""Corrections of so many units in the last place of the state are rounding."""

_INEXACT = 1e-3
"""Newton corrections of large systems are solved to this relative residual."""

Slope = Callable[[Tensor], Tensor]


class ImplicitSolver:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        precision: the relative precision of func's values, the unit in the last place of their dtype.
    """

    def __init__(self, rtol: float | Tensor, atol: float | Tensor, precision: float) -> None:
        self._rtol = rtol
        self._atol = atol
        self._precision = precision
        self._uses_newton = False
        self._jacobian: Tensor | None = None
        self._rate = torch.inf

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
            d and f(x + d), with d = c + b* f to rounding, and f to the tolerance.

        Raises:
            RuntimeError: no iteration converges, or func gives what is not finite.
        """
        with torch.no_grad():
            equation = _Equation(x, torch.zeros_like(x) if known is None else known, weight, slope, iterate, self._size)
            start = equation.c if guess is None else equation.c + weight * guess
            found = None if self._uses_newton else self._substitute(equation, start)
            size = residual = 0.0
            # A guess from a past of much smaller steps may be far off; then better none.
            for beginning in (start,) if guess is None else (start, equation.c):
                if found is None:
                    self._uses_newton = True
                    found, size, residual = self._newton(equation, beginning)
        if found is None and size == torch.inf:
            raise RuntimeError(
                f"the implicit equation {where()} was not solved, because func (an SDE's drift) returned NaN or "
                f"infinity there, or the equation is singular. Check func; or use smaller steps, by step_size or "
                f"grid_constructor (dt for an SDE)"
            )
        if found is None:
            raise RuntimeError(
                f"the implicit equation {where()} was not solved: its residual is {residual:.3g}, and the last Newton "
                f"correction {size:.3g} times the tolerance, {SAFETY:g} (atol + rtol |y|). Use smaller steps there, by "
                f"step_size or grid_constructor (dt for an SDE); a BDF method of lower order, if the problem is "
                f"stiff or the steps grow fast; or larger rtol and atol, if func is exact to no more digits"
            )
        return found

    def _substitute(self, equation: "_Equation", d: Tensor) -> tuple[Tensor, Tensor] | None:
        previous = torch.inf
        for _ in range(MAX_ITERATIONS):
            f = equation.iterate(equation.x + d)
            change = equation.weight * f
            following = equation.c + change
            size = equation.size(following - d, equation.x, d, change)
            if previous < torch.inf and previous > 0:
                self._rate = size / previous
            # What is left of the error is this correction times the rate, seen before if not now.
            if size <= 1 or (size <= _NEAR and _CAUTION * self._rate * size <= 1):
                return following, f
            if not size <= _SLOW * previous:
                return None
            d, previous = following, size
        return None

    def _size(self, correction: Tensor, x: Tensor, d: Tensor, change: Tensor) -> float:
        """The largest component of a correction in terms of the tolerance; NaN where one is.

        Args:
            correction: of d.
            x: the state that d is added to.
            d: the increment.
            change: d - c, which is b* f at the solution, and by whose rounding d is uncertain.
        """
        if correction.numel() == 0:
            return 0.0
        # In the precision of a norm, for a small state may underflow in its own.
        level = torch.maximum(x.abs(), (x + d).abs()).to(torch.promote_types(x.dtype.to_real(), torch.float32))
        rounding = _ROUNDING * torch.finfo(x.dtype).eps * level.max() + _ROUNDING * self._precision * change.abs().max()
        tolerance = torch.clamp(SAFETY * (self._atol + self._rtol * level), min=rounding)
        excess = correction.abs() / tolerance
        # Nothing to correct is no excess, even over a tolerance of 0.
        return float(excess.where(correction != 0, 0).max())

    def _newton(self, equation: "_Equation", d: Tensor) -> tuple[tuple[Tensor, Tensor] | None, float, float]:
        """The solution, or None; the size of the last correction, and the residual that it is for."""
        x, c, weight = equation.x, equation.c, equation.weight
        is_dense = to_real(x).numel() <= JACOBIAN_LIMIT
        # The same for all iterates, unlike the tolerance.
        sizes = x.abs().to(torch.promote_types(x.dtype.to_real(), torch.float32))
        scale = torch.clamp(self._atol + self._rtol * sizes, min=torch.finfo(x.dtype).eps * (1 + sizes.max()))

        def correct(d: Tensor, f: Tensor) -> tuple[Tensor, float, float]:
            """The correction, its size, and the level that it has to lower."""
            residual = c + weight * f - d
            if not bool(torch.isfinite(residual).all()):
                return residual, torch.inf, torch.inf
            if is_dense:
                if self._jacobian is None:
                    self._jacobian = _jacobian(equation.slope, x + d)
                matrix = torch.eye(len(self._jacobian), device=x.device).to(self._jacobian) - weight * self._jacobian
                # A singular matrix gives what is not finite, and is caught so.
                correction = from_real(torch.linalg.solve_ex(matrix, to_real(residual)).result, x)
            elif equation.size(residual, x, d, d - c) > 1:
                product = _derivative(equation.slope, x + d, f, weight)
                correction = from_real(gmres(product, to_real(residual), _INEXACT)[0], x)
            else:
                correction = residual
            size = equation.size(correction, x, d, d - c)
            size = size if size == size else torch.inf
            # By one matrix for all, corrections can be compared; by Jacobians of their own they cannot.
            level = float(((correction if is_dense else residual).abs() / scale).max())
            return correction, size, level if level == level else torch.inf

        is_fresh = not is_dense or self._jacobian is None
        f = equation.iterate(x + d)
        correction, size, level = correct(d, f)
        damping = 1.0
        for iteration in range(MAX_ITERATIONS + 1):
            if size <= 1:
                # The slope by the equation: f itself would amplify what is left of the error by the Jacobian.
                d = d + correction
                return (d, (d - c) / weight), size, 0.0
            if size == torch.inf or damping < _SHORTEST or iteration == MAX_ITERATIONS:
                break
            trial = d + damping * correction
            trial_f = equation.iterate(x + trial)
            next_correction, next_size, next_level = correct(trial, trial_f)
            if next_level < level:
                is_slow = next_level > _SLOW * level
                d, f, correction, size, level = trial, trial_f, next_correction, next_size, next_level
                damping = min(1.0, 2 * damping)
                is_fresh = not is_dense
            elif is_fresh:
                if size <= _STAGNANT:
                    break
                damping /= 2
                continue
            else:
                is_slow = True
                f = equation.iterate(x + d)
            if is_slow and not is_fresh:
                self._jacobian, is_fresh = None, True
                correction, size, level = correct(d, f)
        if size <= _STAGNANT:
            # Rounding forbids more, as where stiff terms cancel in single precision.
            equation.iterate(x + d)
            return (d, (d - c) / weight), size, 0.0
        self._jacobian = None
        return None, size, float((c + weight * f - d).abs().max())


@dataclass(frozen=True)
class _Equation:
    """d = c + b* f(x + d): see `ImplicitSolver.solve`, and `ImplicitSolver._size` for the size of a correction."""

    x: Tensor
    c: Tensor
    weight: float
    slope: Slope
    iterate: Slope
    size: Callable[[Tensor, Tensor, Tensor, Tensor], float]


def _jacobian(slope: Slope, x: Tensor) -> Tensor:
    """The Jacobian of f as a real matrix: by auto-differentiation, or by differences where f hides its graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        f = slope(leaf)
        rows = []
        if f.requires_grad:
            for unit in torch.eye(to_real(x).numel(), device=x.device).to(to_real(x)):
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
    sizes = x.abs()
    least = max(1e-3 * float(sizes.max()), relative)

    def product(v: Tensor) -> Tensor:
        direction = from_real(v, x)
        lengths = direction.abs()
        length = lengths.max()
        # Where v is large, x may be smaller than elsewhere; where v is 0, so is the product.
        local = sizes.where(lengths >= 0.1 * length, 0).max().clamp(min=least)
        epsilon = relative * local / length.clamp(min=torch.finfo(length.dtype).tiny)
        return to_real(slope(x + epsilon * direction) - f) * (weight / epsilon)

    return product


def solve_adjoint(pull_back: Slope, weight: float, rhs: Tensor) -> Tensor:
    """Solve (1 - b* Jᵀ) z = r, the adjoint of an implicit step, to rounding.

    Args:
        pull_back: from a cotangent v to Jᵀ v.
        weight: b*.
        rhs: r, of the shape of a state.

    Raises:
        RuntimeError: the equation is singular, or was not solved: see `linear.solve`.
    """
    eps = torch.finfo(rhs.dtype).eps
    return from_real(solve(lambda v: weight * to_real(pull_back(from_real(v, rhs))), to_real(rhs), eps), rhs)
