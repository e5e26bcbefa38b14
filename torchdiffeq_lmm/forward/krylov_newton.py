"""The equation d = c + b* f(x + d) of one large state, by substitution, or by Newton's method.

Where the corrections of Newton's method come from is said in `correctors`. When it is solved is said in `implicit`.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for the Newton iterations; Deuflhard,
*Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .correctors import FAR, INEXACT, Corrector
from .implicit_equation import (
    CAUTION,
    NEAR,
    PROBE,
    ROUNDING,
    SHORTEST,
    SLOW,
    TRUSTED,
    Equation,
    Tolerances,
    excess_of,
    is_substituted,
    least,
    size_of,
)
from .linear import is_rounding, noise, to_real
from .newton_options import Newton


class KrylovNewton:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        precision: the relative precision of func's values.
        newton: how exactly, and with how much work.
        corrector: makes the corrections of Newton's method.
    """

    def __init__(
        self,
        rtol: float | Tensor,
        atol: float | Tensor,
        precision: float,
        newton: Newton,
        corrector: Corrector,
    ) -> None:
        self._rtol = rtol
        self._atol = atol
        self._precision = precision
        self._options = newton
        self._corrector = corrector
        self._uses_newton = False
        self._lipschitz = torch.inf
        self._tolerances = Tolerances(rtol, atol, newton.tolerance, precision)
        self._steps = 0

    @property
    def is_dear(self) -> bool:
        """Whether a matrix of the Jacobian would have cost less."""
        return self._corrector.is_dear

    def solve(self, equation: Equation, starts: list[Tensor], persists: bool) -> "Solution | Failure":
        """Solve one equation.

        Args:
            equation: see there.
            starts: first iterates d, in the order in which they are tried.
            persists: whether more is tried than Newton's method from the first of them.
        """
        found: Solution | Failure | None = None
        jacobian = self._corrector.jacobian
        if not self._uses_newton:
            found = self._substitute(equation, starts[0])
            if found is None:
                # One by the slope before a stiff step is far off, as a rule.
                starts = sorted(starts, key=equation.level)
        while not isinstance(found, Solution):
            self._uses_newton = True
            for beginning in starts if persists else starts[:1]:
                if not isinstance(found, Solution):
                    found = self._newton(equation, beginning)
            if isinstance(found, Failure):
                if found.entry is None or self.is_dear or not (persists and jacobian.is_exact):
                    break
                # What auto-differentiation does not see of func, differences do.
                jacobian.use_differences()
        return found

    def _substitute(self, equation: Equation, d: Tensor) -> "Solution | None":
        weight = equation.weight
        previous = torch.inf
        self._steps += 1
        for _ in range(self._options.max_iterations):
            f = equation.iterate(equation.x + d)
            following = equation.c + weight * f
            size = self._size(equation, d, following - d)
            # Small corrections may be rounding, which tells nothing of the rate.
            if NEAR * self._tolerances.rounding < previous < torch.inf:
                self._lipschitz = size / (previous * abs(weight))
            # What is left of the error is this correction times the rate, seen before if not now.
            rate = CAUTION * self._lipschitz * abs(weight)
            is_known = previous < torch.inf or self._steps % TRUSTED > 0
            if is_substituted(size, previous, rate if is_known else torch.inf):
                return Solution(following, f)
            if not size <= max(SLOW * previous, 1):
                is_near = previous <= NEAR and size <= NEAR and rate <= CAUTION * SLOW
                if is_near and self._is_rounding(equation, d, f, following - d):
                    return Solution(following, f)
                return None
            d, previous = following, size
        return None

    def _tolerance(self, equation: Equation, d: Tensor) -> Tensor:
        """Of each entry of a correction of d, its own tolerance or its own rounding, whichever is more."""
        level = torch.maximum(size_of(equation.x), size_of(equation.x + d))
        return self._tolerances.of(level, (d - equation.c).abs(), equation.x.dtype)

    def _size(self, equation: Equation, d: Tensor, correction: Tensor) -> float:
        """The largest entry of a correction of d in terms of its tolerance; infinite where one is not a number."""
        if correction.numel() == 0:
            return 0.0
        return float(_excess(correction, self._tolerance(equation, d)).max())

    def _newton(self, equation: Equation, d: Tensor) -> "Solution | Failure":
        x, corrector = equation.x, self._corrector
        # The same for all iterates, unlike the tolerance.
        scale = self._scale(equation, d)

        def correct(d: Tensor, f: Tensor) -> _Correction:
            residual = equation.residual(d, f)
            if not bool(torch.isfinite(residual).all()):
                return _Correction(residual, residual, torch.inf, torch.inf, torch.inf)
            value, left = corrector.correct(equation, d, f, residual, scale)
            size = self._size(equation, d, value)
            # By Jacobians of their own corrections cannot be compared.
            level = float(_excess(value if corrector.keeps else residual, scale).max())
            return _Correction(residual, value, size, level, left)

        def renewed(d: Tensor, f: Tensor) -> _Correction:
            corrector.renew(equation, d, f)
            return correct(d, f)

        f = equation.iterate(x + d)
        now = correct(d, f)
        if now.size == torch.inf and not corrector.is_of(d) and bool(torch.isfinite(now.residual).all()):
            now = renewed(d, f)
        if now.size <= 1 and self._size(equation, d, now.residual) <= 1:
            return _solution(equation, d + now.value)
        damping, is_new = 1.0, True
        for iteration in range(self._options.max_iterations + 1):
            if now.size == torch.inf or damping < SHORTEST or iteration == self._options.max_iterations:
                break
            trial = d + damping * now.value
            trial_f = equation.iterate(x + trial)
            after = correct(trial, trial_f)
            if damping == 1.0 and self._is_solved(equation, trial, trial_f, now.value, after):
                return _solution(equation, trial + after.value)
            if after.level < now.level:
                is_slow = after.level > corrector.stale * now.level
                d, f, now = trial, trial_f, after
                damping, is_new = min(1.0, 2 * damping), True
                if is_slow:
                    now = renewed(d, f)
            elif is_new and now.left <= 2 * FAR and self._is_rounding(equation, d, f, now.residual):
                equation.iterate(x + d)
                return _solution(equation, d + now.value)
            elif not corrector.is_of(d):
                now = renewed(d, f)
            else:
                damping, is_new = damping / 2, False
        corrector.forget()
        return self._failure(equation, d, now)._replace(has_run_out=iteration == self._options.max_iterations)

    def _is_solved(self, equation: Equation, d: Tensor, f: Tensor, before: Tensor, now: "_Correction") -> bool:
        """Whether a correction leaves nothing to correct, entry by entry; `before` is the full one before it."""
        if not (now.left <= 2 * INEXACT and now.size <= NEAR):
            return False
        tolerance = self._tolerance(equation, d)
        # Where nothing was corrected, or little, nothing is known.
        rate = (now.value.abs() / before.abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if not bool((_excess(now.value, tolerance) * torch.clamp(CAUTION * rate, max=1.0) <= 1).all()):
            return False
        # Some entries may converge while a Jacobian that does not fit others hides what they lack.
        is_known = (rate <= SLOW) | (_excess(now.residual, tolerance) <= 1)
        return bool(is_known.all()) or self._is_rounding(equation, d, f, now.residual, is_known)

    def _scale(self, equation: Equation, d: Tensor) -> Tensor:
        """Sizes by which corrections are compared, nowhere 0."""
        x = equation.x
        level = torch.maximum(size_of(x), size_of(x + d))
        rounding = torch.finfo(x.dtype).eps * torch.maximum(level, torch.maximum(d.abs(), equation.c.abs()))
        if not x.numel():
            return rounding
        scale = torch.maximum(self._atol + self._rtol * level, rounding)
        least = torch.finfo(x.dtype).eps * level.max()
        return torch.where(scale > 0, scale, torch.where(least > 0, least, 1.0))

    def _is_rounding(
        self, equation: Equation, d: Tensor, f: Tensor, residual: Tensor, but_for: Tensor | None = None
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
        own = own + least(x.dtype)
        residual = residual.abs() if but_for is None else residual.abs().where(~but_for, 0.0)

        def change(seed: int) -> Tensor:
            nearby = y + 2 * PROBE * self._precision * level * noise(level, seed)
            return ROUNDING * abs(weight) / PROBE * (equation.slope(nearby) - f).abs()

        return is_rounding(residual, ROUNDING * own, change)

    def _failure(self, equation: Equation, d: Tensor, now: "_Correction") -> "Failure":
        if not bool(torch.isfinite(now.residual).all()):
            return Failure(None, torch.nan, torch.nan, torch.inf)
        excess = _excess(now.value, self._tolerance(equation, d)).reshape(-1)
        worst = int(excess.argmax())
        value = (equation.x + d).reshape(-1)[worst].item()
        return Failure(
            worst, value, float(now.residual.reshape(-1)[worst].abs()), float(excess[worst]), to_real(now.value).numel()
        )


class Solution(NamedTuple):
    """d and f(x + d)."""

    d: Tensor
    f: Tensor


class Failure(NamedTuple):
    """Where Newton's method has ended.

    Attributes:
        entry: which entry of the flattened state is the worst; None where func is not finite.
        value: of the state there.
        residual: there.
        size: of the last correction there, in terms of the tolerance; infinite where the equation is singular.
        entries: how many real ones there are.
        has_run_out: whether there were no more iterations.
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
        left: what it leaves of the linear equation, relative to the residual.
    """

    residual: Tensor
    value: Tensor
    size: float
    level: float
    left: float


def _solution(equation: Equation, d: Tensor) -> Solution:
    """d, and the slope by the equation: f itself would amplify what is left of the error by the Jacobian."""
    return Solution(d, (d - equation.c) / equation.weight)


def _excess(correction: Tensor, tolerance: Tensor) -> Tensor:
    """As `excess_of`; infinite where it is not a number."""
    return excess_of(correction.abs(), tolerance).nan_to_num_(nan=torch.inf, posinf=torch.inf)
