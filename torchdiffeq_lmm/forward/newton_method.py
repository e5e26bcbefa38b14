"""Newton's method for the equations of implicit steps, which are alike from one to the next.

For small states it uses a matrix for the Jacobian and keeps it, from step to step, for as long as it serves; for large
ones products with it, along the directions of a Krylov space.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for the simplified Newton iterations;
Deuflhard, *Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .implicit_equation import CAUTION, NEAR, SLOW, Acceptance, ImplicitEquation, Solution, excess
from .jacobian import Jacobian, to_real_sizes
from .linear import Counted, Factors, from_real, gmres, to_real
from .newton_options import Newton

_LEAST_DAMPING = 1e-4
"""A Newton correction that has to be damped by more leads nowhere."""

_INEXACT = 1e-3
"""Newton corrections of large systems are solved to this relative residual."""


class Failure(NamedTuple):
    """Where Newton's method has ended.

    Attributes:
        entry: which entry of the flattened state is the worst; None where func is not finite.
        value: of the state there.
        residual: there.
        size: of the last correction there, in terms of the tolerance; infinite where the equation is singular.
        entries: how many real ones there are.
        has_run_out: whether it was the number of iterations that ended it.
    """

    entry: int | None
    value: complex
    residual: float
    size: float
    entries: int = 0
    has_run_out: bool = False


class _Correction(NamedTuple):
    """A Newton correction at an iterate.

    Attributes:
        residual: that it is for.
        value: of the correction.
        size: its largest entry in terms of the tolerance; infinite where one is not finite.
        level: what it has to lower.
        is_sure: whether it is what the Jacobian makes of the residual.
    """

    residual: Tensor
    value: Tensor
    size: float
    level: float
    is_sure: bool


class NewtonMethod:
    """Solves one equation after the other, and keeps what serves for the next.

    Args:
        acceptance: when an equation counts as solved.
        options: the user's.
        differentiable: whether func may be given states that require a gradient, for its Jacobian.
    """

    def __init__(self, acceptance: Acceptance, options: Newton, differentiable: bool) -> None:
        self._acceptance = acceptance
        self._options = options
        self._jacobian = Jacobian(differentiable)
        self._matrix: Tensor | None = None
        self._factors: tuple[float, Factors] | None = None
        self._uses_matrix = False

    def changes_way(self, size: int) -> bool:
        """Go on to the next way of making corrections for so many real unknowns, where there is one left."""
        largest = self._options.largest_matrix
        if self._options.matrix_limit < size <= largest and not self._uses_matrix:
            self._uses_matrix = True
        elif self._jacobian.is_exact and size <= largest:
            # What auto-differentiation does not see of func, differences do.
            self._jacobian.use_differences()
        else:
            return False
        return True

    def solve(self, equation: ImplicitEquation, d: Tensor) -> Solution | Failure:
        """Solve an equation from a starting point d."""
        x, acceptance, max_iterations = equation.x, self._acceptance, self._options.max_iterations
        is_dense = self._uses_matrix or to_real(x).numel() <= self._options.matrix_limit
        # The same for all iterates, unlike the tolerance.
        scale = acceptance.scale(equation, d)

        def correct(d: Tensor, f: Tensor) -> _Correction:
            residual = equation.residual(d, f)
            if not bool(torch.isfinite(residual).all()):
                return _Correction(residual, residual, torch.inf, torch.inf, False)
            is_sure = True
            if is_dense:
                value = self._solve_by_factors(equation, d, f, residual)
            else:
                value, is_sure = self._solve_by_products(equation, d, f, residual, scale)
            size = acceptance.size(equation, d, value)
            # By one matrix for all, corrections can be compared; by Jacobians of their own they cannot.
            level = float(excess(value if is_dense else residual, scale).max())
            return _Correction(residual, value, size, level, is_sure and size < torch.inf)

        is_fresh = not is_dense or self._matrix is None
        f = equation.iterate(x + d)
        now = correct(d, f)
        if now.size <= 1 and acceptance.size(equation, d, now.residual) <= 1:
            return equation.solution(d + now.value)
        damping, is_new, has_run_out = 1.0, True, False
        for iteration in range(max_iterations + 1):
            has_run_out = iteration == max_iterations
            if now.size == torch.inf or damping < _LEAST_DAMPING or has_run_out:
                break
            trial = d + damping * now.value
            trial_f = equation.iterate(x + trial)
            after = correct(trial, trial_f)
            if damping == 1.0 and self._is_solved(equation, trial, trial_f, now.value, after):
                return equation.solution(trial + after.value)
            if after.level < now.level:
                is_slow = after.level > SLOW * now.level
                d, f, now = trial, trial_f, after
                damping, is_new = min(1.0, 2 * damping), True
                is_fresh = not is_dense
            elif is_new and now.is_sure and acceptance.is_rounding(equation, d, f, now.residual):
                equation.iterate(x + d)
                return equation.solution(d + now.value)
            elif is_fresh:
                damping, is_new = damping / 2, False
                continue
            else:
                is_slow = True
                f = equation.iterate(x + d)
            if is_slow and not is_fresh:
                self._forget()
                is_fresh = True
                now = correct(d, f)
        self._forget()
        return self._failure(equation, d, now, has_run_out)

    def _is_solved(self, equation: ImplicitEquation, d: Tensor, f: Tensor, before: Tensor, now: _Correction) -> bool:
        """Whether a correction leaves nothing to correct, entry by entry; `before` is the full one before it."""
        if not (now.is_sure and now.size <= NEAR):
            return False
        tolerance = self._acceptance.tolerance(equation, d)
        # Where nothing was corrected, or little, nothing is known.
        rate = (now.value.abs() / before.abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if not bool((excess(now.value, tolerance) * torch.clamp(CAUTION * rate, max=1.0) <= 1).all()):
            return False
        # Some entries may converge while a Jacobian that does not fit others hides what they lack.
        is_known = (rate <= SLOW) | (excess(now.residual, tolerance) <= 1)
        return bool(is_known.all()) or self._acceptance.is_rounding(equation, d, f, now.residual, is_known)

    def _solve_by_factors(self, equation: ImplicitEquation, d: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        x, weight = equation.x, equation.weight
        if self._matrix is None:
            self._matrix = self._jacobian.matrix(equation.slope, x + d, f, equation.sizes(d, f))
        if self._factors is None or self._factors[0] != weight:
            self._factors = weight, Factors(weight * self._matrix)
        return from_real(self._factors[1].solve(to_real(residual)), x)

    def _solve_by_products(
        self, equation: ImplicitEquation, d: Tensor, f: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, bool]:
        """The correction, and whether it is what the Jacobian makes of the residual."""
        x, options = equation.x, self._options
        product = self._jacobian.product(equation.slope, x + d, f, equation.sizes(d, f))
        # In terms of their scale, no large entries hide small ones.
        sizes = to_real_sizes(scale, x)
        rhs = to_real(residual) / sizes

        scaled = Counted(lambda v: equation.weight * product(sizes * v) / sizes)
        found, left = gmres(scaled, rhs, _INEXACT, options.krylov_dimension, options.max_restarts)
        if self._jacobian.is_exact and len(rhs) <= options.largest_matrix and scaled.is_dear(rhs):
            self._uses_matrix = True
        return from_real(sizes * found, x), bool(left.norm() <= 2 * _INEXACT * rhs.norm())

    def _forget(self) -> None:
        self._matrix = self._factors = None

    def _failure(self, equation: ImplicitEquation, d: Tensor, now: _Correction, has_run_out: bool) -> Failure:
        if not bool(torch.isfinite(now.residual).all()):
            return Failure(None, torch.nan, torch.nan, torch.inf)
        over = excess(now.value, self._acceptance.tolerance(equation, d)).reshape(-1)
        worst = int(over.argmax())
        value = (equation.x + d).reshape(-1)[worst].item()
        residual = float(now.residual.reshape(-1)[worst].abs())
        return Failure(worst, value, residual, float(over[worst]), to_real(now.value).numel(), has_run_out)
