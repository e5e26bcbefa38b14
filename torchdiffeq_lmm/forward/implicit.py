"""The equation of an implicit step, d = c + b* f(x + d), and its adjoint.

Where the step is not stiff, substitution solves it. Where substitution is slow or diverges, Newton's method does. For
small states it uses a matrix for the Jacobian and keeps it, from step to step, for as long as it serves; for large ones
products with it, along the directions of a Krylov space.

**When an equation is solved.** Every entry has a tolerance of its own: a fraction of atol + rtol |y|, but no less than
its own rounding. A correction below it is no proof: a Jacobian that is no longer right makes small corrections of large
residuals, and so does an iteration that has stopped moving. So a correction counts where the one before it shows that
the iteration contracts, or where the residual itself is as small. Where rounding in func lets neither happen, the
residual counts as 0 if it is no larger than the differences that the last place of the state makes in func, entry by
entry. All else is an error.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for the simplified Newton iterations;
Deuflhard, *Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .jacobian import Jacobian, Slope, to_real_sizes
from .linear import FALLBACK_LIMIT, FEW_RESTARTS, Counted, Factors, from_real, gmres, is_rounding, noise, to_real

JACOBIAN_LIMIT = 256
"""Newton's method keeps a matrix for the Jacobian of up to so many real unknowns."""

MAX_ITERATIONS = 50
"""Of substitution, and of Newton's method from one starting point."""

SAFETY = 1e-4
"""The equation is solved to this fraction of atol + rtol |x|."""

_SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method, and an old Jacobian to a new one."""

_NEAR = 30
"""By corrections of more tolerances than that no iteration ends, however fast it converges."""

_CAUTION = 2
"""By so much the rate of convergence may have grown since it was seen."""

_SHORTEST = 1e-4
"""A Newton correction that has to be damped by more leads nowhere."""

_ROUNDING = 8
"""So many units in the last place are rounding."""

_PROBE = 16
"""By so many times its rounding the state is changed for it, as the rounding of func has steps of its own."""

_INEXACT = 1e-3
"""Newton corrections of large systems are solved to this relative residual."""


class ImplicitSolver:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        precision: the relative precision of func's values, the unit in the last place of their dtype.
        entry: from the index of an entry of the flattened state to what it is called in messages.
        differentiable: whether func may be given states that require a gradient, for its Jacobian.
    """

    def __init__(
        self,
        rtol: float | Tensor,
        atol: float | Tensor,
        precision: float,
        entry: Callable[[int], str],
        differentiable: bool = True,
    ) -> None:
        self._rtol = rtol
        self._atol = atol
        self._precision = precision
        self._entry = entry
        self._jacobian = Jacobian(differentiable)
        self._matrix: Tensor | None = None
        self._factors: tuple[float, Factors] | None = None
        self._uses_newton = False
        self._uses_matrix = False
        self._lipschitz = torch.inf

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
            equation = _Equation(x, torch.zeros_like(x) if known is None else known, weight, slope, iterate)
            start = equation.c if guess is None else equation.c + weight * guess
            found: _Solution | _Failure | None = None
            # A guess from a past of much smaller steps may be far off; then better none.
            starts = [start] if guess is None else [start, equation.c]
            if not self._uses_newton:
                found = self._substitute(equation, start)
                if found is None:
                    # One by the slope before a stiff step is, as a rule.
                    starts.sort(key=equation.level)
            while not isinstance(found, _Solution):
                self._uses_newton = True
                for beginning in starts:
                    if not isinstance(found, _Solution):
                        found = self._newton(equation, beginning)
                if isinstance(found, _Failure) and (found.entry is None or not self._changes_way(x)):
                    break
        if isinstance(found, _Solution):
            return found
        raise RuntimeError(self._complaint(found, where()))

    def _changes_way(self, x: Tensor) -> bool:
        """Go on to the next way of making Newton corrections, where there is one left."""
        size = to_real(x).numel()
        if JACOBIAN_LIMIT < size <= FALLBACK_LIMIT and not self._uses_matrix:
            self._uses_matrix = True
        elif self._jacobian.is_exact and size <= FALLBACK_LIMIT:
            # What auto-differentiation does not see of func, differences do.
            self._jacobian.use_differences()
        else:
            return False
        return True

    def _complaint(self, failure: "_Failure", where: str) -> str:
        if failure.entry is None or failure.size == torch.inf:
            return (
                f"the implicit equation {where} was not solved, because func (an SDE's drift) returned NaN or "
                f"infinity there, or the equation is singular. Check func; or use smaller steps, by step_size or "
                f"grid_constructor (dt for an SDE)"
            )
        too_many = (
            f" The state has {failure.entries} entries; more than {FALLBACK_LIMIT} are too many for a matrix of the "
            f"Jacobian, so that stiff terms which couple many of them are hard."
            if failure.entries > FALLBACK_LIMIT
            else ""
        )
        return (
            f"the implicit equation {where} was not solved: the worst entry of the state is "
            f"{self._entry(failure.entry)} = {failure.value:.6g}; its residual is {failure.residual:.3g}, and the last "
            f"Newton correction {failure.size:.3g} times the tolerance, {SAFETY:g} (atol + rtol |y|). Use smaller "
            f"steps there, by step_size or grid_constructor (dt for an SDE); a BDF method of lower order, if the "
            f"problem is stiff or the steps grow fast; double precision; or larger rtol and atol, if func is exact to "
            f"no more digits.{too_many}"
        )

    def _substitute(self, equation: "_Equation", d: Tensor) -> "_Solution | None":
        weight = equation.weight
        previous = torch.inf
        for _ in range(MAX_ITERATIONS):
            f = equation.iterate(equation.x + d)
            following = equation.c + weight * f
            size = self._size(equation, d, following - d)
            # Small corrections may be rounding, which tells nothing of the rate.
            if _NEAR < previous < torch.inf:
                self._lipschitz = size / (previous * abs(weight))
            # What is left of the error is this correction times the rate, seen before if not now.
            rate = _CAUTION * self._lipschitz * abs(weight)
            is_solved = size == 0 or (size <= 1 and (rate < 1 or previous <= 1))
            if is_solved or (size <= _NEAR and rate * size <= 1):
                return _Solution(following, f)
            if not size <= max(_SLOW * previous, 1):
                is_near = previous <= _NEAR and size <= _NEAR and rate <= _CAUTION * _SLOW
                if is_near and self._is_rounding(equation, d, f, following - d):
                    return _Solution(following, f)
                return None
            d, previous = following, size
        return None

    def _tolerance(self, equation: "_Equation", d: Tensor) -> Tensor:
        """Of each entry of a correction of d, its own tolerance or its own rounding, whichever is more."""
        x, change = equation.x, (d - equation.c).abs()
        # In the precision of a norm, for a small state may underflow in its own.
        level = torch.maximum(x.abs(), (x + d).abs()).to(torch.promote_types(x.dtype.to_real(), torch.float32))
        rounding = _ROUNDING * (torch.finfo(x.dtype).eps * level + self._precision * change + _least(x))
        return torch.maximum(SAFETY * (self._atol + self._rtol * level), rounding)

    def _size(self, equation: "_Equation", d: Tensor, correction: Tensor) -> float:
        """The largest entry of a correction of d in terms of its tolerance; infinite where one is not a number."""
        if correction.numel() == 0:
            return 0.0
        return float(_excess(correction, self._tolerance(equation, d)).max())

    def _newton(self, equation: "_Equation", d: Tensor) -> "_Solution | _Failure":
        x = equation.x
        is_dense = self._uses_matrix or to_real(x).numel() <= JACOBIAN_LIMIT
        # The same for all iterates, unlike the tolerance.
        scale = self._scale(equation, d)

        def correct(d: Tensor, f: Tensor) -> _Correction:
            residual = equation.residual(d, f)
            if not bool(torch.isfinite(residual).all()):
                return _Correction(residual, residual, torch.inf, torch.inf, False)
            is_sure = True
            if is_dense:
                value = self._solve_by_factors(equation, d, f, residual)
            else:
                value, is_sure = self._solve_by_products(equation, d, f, residual, scale)
            size = self._size(equation, d, value)
            # By one matrix for all, corrections can be compared; by Jacobians of their own they cannot.
            level = float(_excess(value if is_dense else residual, scale).max())
            return _Correction(residual, value, size, level, is_sure and size < torch.inf)

        is_fresh = not is_dense or self._matrix is None
        f = equation.iterate(x + d)
        now = correct(d, f)
        if now.size <= 1 and self._size(equation, d, now.residual) <= 1:
            return equation.solution(d + now.value)
        damping, is_new = 1.0, True
        for iteration in range(MAX_ITERATIONS + 1):
            if now.size == torch.inf or damping < _SHORTEST or iteration == MAX_ITERATIONS:
                break
            trial = d + damping * now.value
            trial_f = equation.iterate(x + trial)
            after = correct(trial, trial_f)
            if damping == 1.0 and self._is_solved(equation, trial, trial_f, now.value, after):
                return equation.solution(trial + after.value)
            if after.level < now.level:
                is_slow = after.level > _SLOW * now.level
                d, f, now = trial, trial_f, after
                damping, is_new = min(1.0, 2 * damping), True
                is_fresh = not is_dense
            elif is_new and now.is_sure and self._is_rounding(equation, d, f, now.residual):
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
        return self._failure(equation, d, now)

    def _is_solved(self, equation: "_Equation", d: Tensor, f: Tensor, before: Tensor, now: "_Correction") -> bool:
        """Whether a correction leaves nothing to correct, entry by entry; `before` is the full one before it."""
        if not (now.is_sure and now.size <= _NEAR):
            return False
        tolerance = self._tolerance(equation, d)
        # Where nothing was corrected, or little, nothing is known.
        rate = (now.value.abs() / before.abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if not bool((_excess(now.value, tolerance) * torch.clamp(_CAUTION * rate, max=1.0) <= 1).all()):
            return False
        # Some entries may converge while a Jacobian that does not fit others hides what they lack.
        is_known = (rate <= _SLOW) | (_excess(now.residual, tolerance) <= 1)
        return bool(is_known.all()) or self._is_rounding(equation, d, f, now.residual, is_known)

    def _scale(self, equation: "_Equation", d: Tensor) -> Tensor:
        """Sizes by which corrections are compared, nowhere 0."""
        x = equation.x
        level = torch.maximum(x.abs(), (x + d).abs()).to(torch.promote_types(x.dtype.to_real(), torch.float32))
        rounding = torch.finfo(x.dtype).eps * torch.maximum(level, torch.maximum(d.abs(), equation.c.abs()))
        if not x.numel():
            return rounding
        scale = torch.maximum(self._atol + self._rtol * level, rounding)
        least = torch.finfo(x.dtype).eps * level.max()
        return torch.where(scale > 0, scale, torch.where(least > 0, least, 1.0))

    def _solve_by_factors(self, equation: "_Equation", d: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        x, weight = equation.x, equation.weight
        if self._matrix is None:
            self._matrix = self._jacobian.matrix(equation.slope, x + d, f, equation.sizes(d, f))
        if self._factors is None or self._factors[0] != weight:
            self._factors = weight, Factors(weight * self._matrix)
        return from_real(self._factors[1].solve(to_real(residual)), x)

    def _solve_by_products(
        self, equation: "_Equation", d: Tensor, f: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, bool]:
        """The correction, and whether it is what the Jacobian makes of the residual."""
        x = equation.x
        product = self._jacobian.product(equation.slope, x + d, f, equation.sizes(d, f))
        # In terms of their scale, no large entries hide small ones.
        sizes = to_real_sizes(scale, x)
        rhs = to_real(residual) / sizes

        scaled = Counted(lambda v: equation.weight * product(sizes * v) / sizes)
        found, left = gmres(scaled, rhs, _INEXACT, FEW_RESTARTS)
        if self._jacobian.is_exact and scaled.is_dear(rhs):
            self._uses_matrix = True
        return from_real(sizes * found, x), bool(left.norm() <= 2 * _INEXACT * rhs.norm())

    def _forget(self) -> None:
        self._matrix = self._factors = None

    def _is_rounding(
        self, equation: "_Equation", d: Tensor, f: Tensor, residual: Tensor, but_for: Tensor | None = None
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
        own = torch.finfo(x.dtype).eps * (level + d.abs() + c.abs()) + self._precision * abs(weight) * f.abs()
        own = own + _least(x)
        residual = residual.abs() if but_for is None else residual.abs().where(~but_for, 0.0)

        def change(seed: int) -> Tensor:
            nearby = y + 2 * _PROBE * self._precision * level * noise(level, seed)
            return _ROUNDING * abs(weight) / _PROBE * (equation.slope(nearby) - f).abs()

        return is_rounding(residual, _ROUNDING * own, change)

    def _failure(self, equation: "_Equation", d: Tensor, now: "_Correction") -> "_Failure":
        if not bool(torch.isfinite(now.residual).all()):
            return _Failure(None, torch.nan, torch.nan, torch.inf)
        excess = _excess(now.value, self._tolerance(equation, d)).reshape(-1)
        worst = int(excess.argmax())
        value = (equation.x + d).reshape(-1)[worst].item()
        return _Failure(
            worst, value, float(now.residual.reshape(-1)[worst].abs()), float(excess[worst]), to_real(now.value).numel()
        )


class _Solution(NamedTuple):
    """d and f(x + d)."""

    d: Tensor
    f: Tensor


class _Failure(NamedTuple):
    """Where Newton's method has ended.

    Attributes:
        entry: which entry of the flattened state is the worst; None where func is not finite.
        value: of the state there.
        residual: there.
        size: of the last correction there, in terms of the tolerance; infinite where the equation is singular.
        entries: how many real ones there are.
    """

    entry: int | None
    value: complex
    residual: float
    size: float
    entries: int = 0


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


@dataclass(frozen=True)
class _Equation:
    """d = c + b* f(x + d): see `ImplicitSolver.solve`."""

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

    def solution(self, d: Tensor) -> _Solution:
        """d, and the slope by the equation: f itself would amplify what is left of the error by the Jacobian."""
        return _Solution(d, (d - self.c) / self.weight)

    def sizes(self, d: Tensor, f: Tensor) -> Tensor:
        """What size the entries of a state and its corrections are of."""
        sizes = torch.maximum((self.x + d).abs(), d.abs())
        return torch.maximum(torch.maximum(sizes, self.c.abs()), abs(self.weight) * f.abs())


def _least(x: Tensor) -> float:
    """The distance of the smallest numbers of a dtype."""
    return torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps


def _excess(correction: Tensor, tolerance: Tensor) -> Tensor:
    """A correction in terms of the tolerance; nothing to correct is no excess, even over a tolerance of 0."""
    excess = (correction.abs() / tolerance).where(correction != 0, 0.0)
    return excess.nan_to_num(nan=torch.inf, posinf=torch.inf)
