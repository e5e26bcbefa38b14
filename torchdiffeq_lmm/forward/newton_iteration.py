"""One implicit step for many samples: where each of them is on its way to the solution.

All decisions of an iteration take one read by the host.
"""

import numpy as np
import torch
from torch import Tensor

from .implicit_equation import (
    CAUTION,
    NEAR,
    SHORTEST,
    SLOW,
    Equations,
    Flags,
    Numbers,
    Point,
    Rows,
    all_of,
    any_of,
    excess_of,
    is_rounding,
    is_substituted,
    largest_in,
    levels_of,
    size_of,
)
from .newton_memory import Iterate, Memory, Outcome

_SUBSTITUTION, _FIRST, _NEWTON, _SOLVED, _FAILED = range(5)
"""What is being done with a sample: substitution; Newton's method, at its starting point or on its way; or no more."""

_UPDATED = 1e-3
"""Above this rate of convergence a Jacobian is updated by what the last step has shown of it."""

_SECANT = 0.5
"""By no more than this part of itself may a correction go on along the last step, for an update to be trusted."""

_FEW = 2
"""So many iterations are few for one step, and more where a Jacobian takes many products."""

_PRODUCTS = 4
"""So many products with the Jacobian cost as much as an iteration."""

_REMEMBERED = 4
"""For so many steps."""


class NewtonIteration:
    """One step of `BlockNewton`: where each sample is on its way.

    Attributes:
        way: of each sample.
        at: d where f is evaluated next.
        first, other: the starting points of each sample, the one that was taken first and the other one.
    """

    def __init__(self, solver: Memory, equations: Equations, starts: list[Rows], skipped: Flags) -> None:
        self.solver = solver
        self.equations = equations
        self.first, self.other = starts[0], starts[-1]
        self._two_starts = len(starts) > 1
        count = len(skipped)
        self.way = np.where(skipped, _SOLVED, np.where(solver.uses_newton, _FIRST, _SUBSTITUTION)).astype(np.int8)
        self.at = self._y = starts[0]
        self._x_size = size_of(equations.x)
        self._one = self._x_size.new_ones(())
        # Of samples that are not done they mean nothing.
        self._d, self._f, self._residual, self._excess = starts[0], starts[0], starts[0], self._x_size
        # Of substitution: the last size, the residual at the first start, and how many iterations serve.
        self._previous: Numbers = np.full(count, np.inf)
        self._first_residual: Rows | None = None
        self._few = _FEW + starts[0].shape[1] * (1 + starts[0].is_complex()) // _PRODUCTS
        self._most = starts[0].shape[1] * (1 + starts[0].is_complex()) + 3
        self._diverging: Flags = np.zeros(count, bool)
        self._iterations = np.zeros(count, int)
        # Of Newton's method: the last iterate that was accepted, f, its residual and correction.
        self._base, self._base_f, self._base_residual, self._base_value = (starts[0],) * 4
        self._seen = self._x_size
        self._has_begun = False
        self._base_level: Numbers = np.full(count, np.inf)
        self._damping: Numbers = np.ones(count)
        self._is_new: Flags = np.ones(count, bool)
        self._unclear: Flags = np.zeros(count, bool)
        self._was_unclear: Flags = np.zeros(count, bool)
        self._is_fresh: Flags = np.zeros(count, bool)
        # Whose Jacobians are to be made anew by the next evaluation.
        self._wanted: Flags = (solver.slow > 0) & solver.is_due
        self._ran_out: Flags = np.zeros(count, bool)
        self._scale = self._x_size
        # What rounding makes of f, as far as it has been looked for.
        self._rounding: Rows | None = None
        self._is_current = True

    @property
    def failed(self) -> Flags:
        """Which samples have failed."""
        return np.asarray(self.way == _FAILED)

    def begin_again(self, start: Rows, samples: Flags) -> None:
        """Begin Newton's method for some samples from another point."""
        self.way[samples] = _FIRST
        self._iterations[samples] = 0
        self.at = self._rows(samples, start, self.at)

    def run(self) -> None:
        """Iterate until every sample is solved or has failed."""
        # What is not finite is dealt with.
        with np.errstate(invalid="ignore", divide="ignore"):
            while any_of(self.way < _SOLVED):
                self._iterate()

    def outcome(self) -> Outcome:
        """What has become of the equations."""
        if not self._is_current:
            self.equations.iterate(self.equations.x + self.at)
        solver = self.solver
        is_slow = (self._iterations > self._few) | self._was_unclear
        if solver.is_due:
            # Not after one step, which may have had a poor guess.
            solver.uses_newton |= is_slow & (solver.slow == _REMEMBERED)
        solver.slow = np.where(is_slow, _REMEMBERED, np.maximum(solver.slow - 1, 0))
        return Outcome(self._d, self._f, self.failed, self.failed & self._ran_out, self._residual, self._excess)

    def _iterate(self) -> None:
        substitutes, first, newton = (self.way == way for way in (_SUBSTITUTION, _FIRST, _NEWTON))
        renewed = (first & ~self.solver.has_block()) | (self._wanted & (first | newton))
        self._y = self.equations.x + self.at
        f, residual = self._evaluate(renewed)
        now = self._measured(f, residual, first, newton, renewed)
        self._iterations += self.way < _SOLVED
        solved = np.zeros(len(now.size), bool)
        if any_of(substitutes):
            solved, slow = self._substituted(substitutes, now)
        if any_of(first):
            solved |= first & (now.size <= 1) & (now.residual_size <= 1)
        if any_of(newton):
            solved |= self._converged(newton, now)
        self._take(solved, now.f, now.value, substitutes)
        self.way[solved] = _SOLVED
        if any_of(first | newton):
            self._advance(first & ~solved, newton & ~solved, renewed, now)
        going_on = substitutes & ~solved
        if any_of(going_on):
            self.at = self._rows(going_on, self.at + residual, self.at)
            if any_of(slow):
                self._switch(slow)

    def _evaluate(self, renewed: Flags) -> tuple[Rows, Rows]:
        """f and the residual; the Jacobians of some samples are made anew, where f is finite."""
        equations, solver, y = self.equations, self.solver, self._y
        f = solver.evaluate(equations, y, renewed) if any_of(renewed) else None
        self._is_current = f is None
        if f is None:
            f = equations.iterate(y)
        residual = (equations.c + equations.weight * f).sub_(self.at)
        if self._is_current and any_of(renewed):
            renewed = renewed & torch.isfinite(residual).all(1).cpu().numpy()
            if any_of(renewed):
                solver.refresh(equations, self.at, f, renewed)
        self._wanted &= ~renewed
        if not self._has_begun:
            # Of all samples, for a Jacobian by differences starts from f at all of them.
            self._base, self._base_f, self._has_begun = self.at, f, True
        return f, residual

    def _measured(self, f: Rows, residual: Rows, first: Flags, newton: Flags, renewed: Flags) -> Iterate:
        equations, solver = self.equations, self.solver
        level = torch.maximum(self._x_size, size_of(self._y))
        tolerance = solver.tolerances.of(level, (self.at - equations.c).abs(), residual.dtype)
        value = direction = residual
        excess = known = excess_of(residual.abs(), tolerance)
        sizes, seen = [excess], self._seen
        if any_of(first):
            self._scale = self._rows(first, solver.tolerances.scale(level, self.at, equations.c), self._scale)
        if any_of(first | newton):
            value = solver.correct(residual, first | newton)
            if any_of(newton):
                value, direction = self._accelerated(value, newton & (self._damping == 1.0) & ~renewed)
            size = value.abs()
            excess_of_residual, excess = excess, excess_of(size, tolerance)
            sizes = [excess, excess_of_residual, size / self._scale]
            if any_of(newton):
                # Where nothing was corrected, or little, nothing is known.
                rate = size / self._base_value.abs()
                small = excess * torch.fmin(CAUTION * rate, self._one)
                # Some entries may converge while a Jacobian that does not fit others hides what they lack.
                seen = torch.fmin(rate, self._seen)
                known = torch.fmin(seen / SLOW, excess_of_residual)
                sizes += [small, known]
        largest = torch.stack(sizes).amax(2) if len(sizes) > 1 else excess.amax(1)[None]
        read = largest.nan_to_num_(nan=torch.inf, posinf=torch.inf).cpu().numpy().astype(np.float64)
        return Iterate(f, residual, value, direction, excess, known, seen, *read, *[read[0]] * (5 - len(read)))

    def _accelerated(self, value: Rows, samples: Flags) -> tuple[Rows, Tensor]:
        """Corrections by the Jacobians that the last step of some samples updates, and its directions: see `update`.

        Source: Deuflhard, *Newton Methods for Nonlinear Problems*, 2.1.4, for the error-oriented quasi-Newton method.
        """
        step = self._base_value / self._scale
        length = step.abs().square().sum(1, keepdim=True)
        along = ((value / self._scale) * step.conj()).real.sum(1, keepdim=True) / length
        trusted = along.abs() <= _SECANT
        if not all_of(samples):
            trusted &= self._mask(samples)
        untrusted = trusted.logical_not_()
        direction = (step / (self._scale * length)).masked_fill_(untrusted, 0.0)
        return (value / (1 - along.masked_fill_(untrusted, 0.0))).to(value.dtype), direction

    def _converged(self, newton: Flags, now: Iterate) -> Flags:
        """Which samples are solved by Newton's method."""
        near = newton & (self._damping == 1.0) & (now.size <= NEAR) & (now.small <= 1)
        solved = near & (now.is_known <= 1)
        unclear = near & ~solved
        if any_of(unclear):
            # Another iteration may tell; rounding is looked for by evaluations where the one before has not.
            here, there = (self.at, now.f), (self._base, self._base_f)
            solved |= self._is_rounding(unclear, here, there, now.residual, now.known <= 1, unclear & self._unclear)
        self._unclear = unclear
        self._was_unclear |= unclear
        return np.asarray(solved)

    def _advance(self, first: Flags, newton: Flags, renewed: Flags, now: Iterate) -> None:
        """Go on with those that are not solved."""
        solver, lost = self.solver, now.size == np.inf
        begins, accepted = first & ~lost, newton & ~lost & (now.level < self._base_level)
        unlike = newton & renewed & ~lost & ~accepted
        if any_of(unlike):
            # By the Jacobian before, the last correction may have been small for another reason.
            accepted |= unlike & (now.level < largest_in(solver.correct(self._base_residual, unlike), self._scale))
        worse = newton & ~accepted
        lost &= first
        forgets, refreshed = begins, np.zeros(len(lost), bool)
        if any_of(accepted):
            rate = now.level / self._base_level
            slow = accepted & (rate > SLOW)
            # What a Jacobian has shown, another may not.
            forgets = begins | slow
            if solver.is_exact:
                # The next one, which is in proportion to the correction where the Jacobian is of this iterate.
                rate = np.where(renewed, rate * rate, rate)
                slow |= accepted & (np.log(CAUTION * now.size) > -self._few * np.log(rate))
                self._wanted[accepted] = slow[accepted]
            else:
                refreshed |= slow
            updated = accepted & ~slow & ~renewed & (self._damping == 1.0) & (now.level > _UPDATED * self._base_level)
            if any_of(updated):
                solver.update(now.residual, now.value, now.direction, updated, self.equations.weight)
            self._damping[accepted] = np.minimum(1.0, 2 * self._damping[accepted])
        advanced = begins | accepted
        if any_of(advanced):
            # What is kept of samples that are done is of no use.
            latest = [self.at, now.f, now.residual, now.value, now.seen]
            if any_of(worse):
                mask = self._mask(advanced)
                before = self._base, self._base_f, self._base_residual, self._base_value, self._seen
                latest = [torch.where(mask, new, old) for new, old in zip(latest, before, strict=True)]
            self._base, self._base_f, self._base_residual, self._base_value, self._seen = latest
            if any_of(forgets):
                self._seen = self._rows(forgets, torch.full_like(self._seen, torch.inf), self._seen)
            self._base_level[advanced] = now.level[advanced]
            self._damping[begins], self._is_new[advanced] = 1.0, True
            self._is_fresh[advanced] = renewed[advanced]
            self.way[begins] = _NEWTON
        if any_of(worse):
            worse &= ~self._ended_at_rounding(worse & self._is_new, now)
            self._wanted[worse] = False
            shorter = worse & self._is_fresh & ~renewed
            self._damping[shorter] /= 2
            self._is_new[shorter] = False
            refreshed |= worse & ~shorter
        if any_of(refreshed):
            lost |= self._refresh(refreshed)
        trying = self.way == _NEWTON
        self._ran_out = trying & (self._iterations > solver.max_iterations) | self._ran_out & ~trying
        lost |= trying & ((self._damping < SHORTEST) | self._ran_out)
        if any_of(lost):
            self._lose(lost, now)
        trying &= ~lost
        if any_of(trying):
            step = self._base_value
            if any_of(self._damping[trying] < 1.0):
                step = step * torch.from_numpy(self._damping).to(step.device, step.dtype.to_real())[:, None]
            self.at = self._rows(trying, self._base + step, self.at)

    def _refresh(self, samples: Flags) -> Flags:
        """Make the Jacobians of some samples anew at the last iterate accepted; which corrections are not finite."""
        self.solver.refresh(self.equations, self._base, self._base_f, samples)
        value = self.solver.correct(self._base_residual, samples)
        self._base_value = self._rows(samples, value, self._base_value)
        level = largest_in(value, self._scale)
        self._seen = self._rows(samples, torch.full_like(self._seen, torch.inf), self._seen)
        self._base_level[samples] = level[samples]
        self._is_fresh[samples] = True
        return np.asarray(samples & (level == np.inf))

    def _ended_at_rounding(self, samples: Flags, now: Iterate) -> Flags:
        """Which samples are solved at the last iterate accepted, as its residual is rounding."""
        if any_of(samples):
            here, there = (self._base, self._base_f), (self.at, now.f)
            samples = self._is_rounding(samples, here, there, self._base_residual, None, samples)
            if any_of(samples):
                self.at = self._rows(samples, self._base, self.at)
                self._is_current = False
                self._take(samples, self._base_f, self._base_value, np.zeros_like(samples))
                self.way[samples] = _SOLVED
        return samples

    def _substituted(self, samples: Flags, now: Iterate) -> tuple[Flags, Flags]:
        """Which samples are solved by substitution, and which it does not serve."""
        size, previous, weight, solver = now.size, self._previous, abs(self.equations.weight), self.solver
        if self._first_residual is None:
            self._first_residual = now.residual
        # Small corrections may be rounding, which tells nothing of the rate.
        telling = samples & (previous > NEAR * solver.tolerances.rounding) & (previous < np.inf)
        solver.lipschitz[telling] = size[telling] / (previous[telling] * weight)
        # What is left of the error is this correction times the rate, seen before if not now.
        rate = CAUTION * solver.lipschitz * weight
        is_known = (previous < np.inf) | (not solver.is_rate_due)
        solved = is_substituted(size, previous, np.where(is_known, rate, np.inf))
        slow = ~(size <= np.maximum(SLOW * previous, 1)) | (self._iterations >= self.solver.max_iterations)
        if solver.is_due and any_of(telling):
            # More iterations are to come than there should be.
            slow |= telling & (np.log(size) > (self._most - self._iterations) * np.log(previous / size))
        solved &= samples
        slow &= samples & ~solved
        near = slow & (previous <= NEAR) & (size <= NEAR) & (rate <= CAUTION * SLOW)
        if any_of(near):
            at_rounding = self._is_rounding(
                near, (self.at, now.f), (self._base, self._base_f), now.residual, None, near
            )
            solved |= at_rounding
            slow &= ~at_rounding
        self._diverging = slow & ~(size < previous)
        if any_of(slow):
            # In terms of a tolerance that grows with the iterates, a divergence looks like standing still.
            levels = levels_of(now.residual, self._first_residual)
            self._diverging |= slow & ~(levels[0] < levels[1])
        self._previous = np.where(samples, size, previous)
        return solved, slow

    def _switch(self, samples: Flags) -> None:
        """Begin Newton's method for some samples, where substitution diverges from the better starting point."""
        equations = self.equations
        self.solver.uses_newton |= samples
        self.way[samples] = _FIRST
        self._iterations[samples] = 0
        if not any_of(self._diverging):
            return
        diverging = self._diverging
        if self._two_starts:
            # One by the slope before a stiff step is far off, as a rule.
            there = self._rows(diverging, self.other, self.at)
            missed = equations.c + equations.weight * equations.slope(equations.x + there) - there
            assert self._first_residual is not None
            levels = levels_of(missed, self._first_residual)
            swapped = diverging & (levels[0] < levels[1])
            first, other = self.first, self.other
            self.first, self.other = self._rows(swapped, other, first), self._rows(swapped, first, other)
        self.at = self._rows(diverging, self.first, self.at)

    def _take(self, samples: Flags, f: Rows, value: Rows, substitutes: Flags) -> None:
        """Take what samples have come to for their solution."""
        if not any_of(samples):
            return
        d = self.at + value
        slope = f
        if not all_of(substitutes):
            # By the equation: f itself would amplify what is left of the error by the Jacobian.
            slope = self._rows(substitutes, f, (d - self.equations.c).div_(self.equations.weight))
        self._d, self._f = self._rows(samples, d, self._d), self._rows(samples, slope, self._f)

    def _lose(self, samples: Flags, now: Iterate) -> None:
        self.way[samples] = _FAILED
        self.solver.forget(samples)
        self._d = self._rows(samples, self.at, self._d)
        self._residual = self._rows(samples, now.residual, self._residual)
        self._excess = self._rows(samples, now.excess.nan_to_num(nan=torch.inf, posinf=torch.inf), self._excess)
        # Where f is finite, for it is evaluated there along with the others.
        self.at = self._rows(samples, self.equations.c * 0, self.at)

    def _mask(self, samples: Flags) -> Tensor:
        return torch.from_numpy(samples).to(self.at.device).unsqueeze(1)

    def _rows(self, samples: Flags, new: Rows, old: Rows) -> Rows:
        """Rows of `new` for some samples, of `old` for the others."""
        if all_of(samples):
            return new
        return torch.where(self._mask(samples), new, old) if any_of(samples) else old

    def _is_rounding(
        self, samples: Flags, here: Point, there: Point, residual: Rows, but_for: Tensor | None, probed: Flags
    ) -> Flags:
        here = self._rows(samples, here[0], self.at), here[1]
        found, self._rounding = is_rounding(
            self.equations, self.solver.tolerances, samples, here, there, residual, but_for, probed, self._rounding
        )
        return found
