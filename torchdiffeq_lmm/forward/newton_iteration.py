"""One implicit step for many samples: where each of them is on its way to the solution.

All decisions of an iteration take one read by the host.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .implicit_equation import (
    CAUTION,
    NEAR,
    SHORTEST,
    SLOW,
    STALE,
    Equations,
    Flags,
    Numbers,
    Rows,
    Tolerances,
    all_of,
    any_of,
    excess_of,
    is_rounding,
)

_SUBSTITUTION, _FIRST, _NEWTON, _SOLVED, _FAILED = range(5)
"""What is being done with a sample: substitution; Newton's method, at its starting point or on its way; or no more."""


class Outcome(NamedTuple):
    """What has become of the equations.

    Attributes:
        d, f: the solutions, and the slopes by the equation; of failed samples what was reached.
        failed: which samples have failed, of shape (S,).
        ran_out: which of them because there were no more iterations.
        residual, correction, excess: where these have ended, entry by entry; `excess` is the last correction in terms
            of the tolerance. Of solved samples they mean nothing.
    """

    d: Rows
    f: Rows
    failed: Flags
    ran_out: Flags
    residual: Rows
    excess: Rows


class Memory(Protocol):
    """What is remembered of the samples from step to step; see `block_newton.BlockNewton`.

    Attributes:
        tolerances: see there.
        max_iterations: of substitution, and of Newton's method from one starting point.
        uses_newton: whether substitution has failed for a sample.
        lipschitz: of f, as seen by substitution.
    """

    tolerances: Tolerances
    max_iterations: int
    uses_newton: Flags
    lipschitz: Numbers

    def correct(self, residual: Rows, newton: Flags) -> Rows:
        """Return the Newton correction for a residual, of some samples; of the others the residual itself."""

    def refresh(self, equations: Equations, d: Rows, f: Rows, samples: Flags) -> None:
        """Make the Jacobians of some samples anew, at d."""

    def forget(self, samples: Flags) -> None:
        """Forget the Jacobians of some samples."""

    def has_block(self) -> Flags:
        """Return which samples have a Jacobian."""


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
        self.way = np.where(skipped, _SOLVED, np.where(solver.uses_newton, _FIRST, _SUBSTITUTION))
        self.at = starts[0]
        self._d, self._f = starts[0], torch.zeros_like(starts[0])
        self._residual = torch.zeros_like(starts[0])
        self._excess = torch.zeros_like(self._residual.abs())
        # Of substitution: the last size, and the residual's at the first start.
        self._previous: Numbers = np.full(count, np.inf)
        self._level_first: Numbers = np.full(count, np.inf)
        self._iterations = np.zeros(count, int)
        # Of Newton's method: the last iterate that was accepted, f, its residual and correction.
        self._base, self._base_f, self._base_residual, self._base_value = (starts[0],) * 4
        self._has_begun = False
        self._base_level: Numbers = np.full(count, np.inf)
        self._damping: Numbers = np.ones(count)
        self._is_new: Flags = np.ones(count, bool)
        self._is_fresh: Flags = np.zeros(count, bool)
        self._ran_out: Flags = np.zeros(count, bool)
        self._scale = self._tolerances.scale(equations, starts[0])
        self._is_current = True
        self._stale = min(SLOW, STALE * starts[0].shape[1])

    @property
    def _tolerances(self) -> Tolerances:
        return self.solver.tolerances

    @property
    def failed(self) -> Flags:
        """Which samples have failed."""
        return np.asarray(self.way == _FAILED)

    def begin_again(self, start: Rows, samples: Flags) -> None:
        """Begin Newton's method for some samples from another point."""
        self.way[samples] = _FIRST
        self._iterations[samples] = 0
        self.at = self._rows(samples, start, self.at)
        self._scale = self._rows(samples, self._tolerances.scale(self.equations, start), self._scale)

    def run(self) -> None:
        """Iterate until every sample is solved or has failed."""
        while any_of(self.way < _SOLVED):
            self._iterate()

    def outcome(self) -> Outcome:
        """What has become of the equations."""
        if not self._is_current:
            self.equations.iterate(self.equations.x + self.at)
        return Outcome(self._d, self._f, self.failed, self.failed & self._ran_out, self._residual, self._excess)

    def _iterate(self) -> None:
        equations, solver = self.equations, self.solver
        substitutes, first, newton = (self.way == way for way in (_SUBSTITUTION, _FIRST, _NEWTON))
        f = equations.iterate(equations.x + self.at)
        self._is_current = True
        if not self._has_begun:
            # Of all samples, for a Jacobian by differences starts from f at all of them.
            self._base, self._base_f, self._has_begun = self.at, f, True
        residual = equations.c + equations.weight * f - self.at
        missing = first & ~solver.has_block()
        if any_of(missing):
            finite = torch.isfinite(residual).all(1).cpu().numpy()
            if any_of(missing & finite):
                solver.refresh(equations, self.at, f, missing & finite)
        self._is_fresh[first] = missing[first]
        value = solver.correct(residual, first | newton)
        tolerance = self._tolerances.of(equations, self.at)
        excess, excess_of_residual = excess_of(value, tolerance), excess_of(residual, tolerance)
        measured = [excess.amax(1), excess_of_residual.amax(1), excess_of(value, self._scale).amax(1)]
        measured.append(residual.abs().amax(1).nan_to_num(nan=torch.inf))
        known: Tensor | None = None
        if any_of(newton):
            # Where nothing was corrected, or little, nothing is known.
            rate = (value.abs() / self._base_value.abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
            small = (excess * torch.clamp(CAUTION * rate, max=1.0) <= 1).all(1)
            # Some entries may converge while a Jacobian that does not fit others hides what they lack.
            known = (rate <= SLOW) | (excess_of_residual <= 1)
            measured += [small, known.all(1)]
        read = torch.stack([row.to(torch.float64) for row in measured]).cpu().numpy()
        size, residual_size, level, distance = read[:4]
        self._iterations += 1

        solved = np.zeros(len(size), bool)
        switches = np.zeros(len(size), bool)
        if any_of(substitutes):
            solved_now, switches = self._substituted(substitutes, size, distance, f, residual)
            solved |= solved_now
        solved |= first & (size <= 1) & (residual_size <= 1)
        lost = (first | newton) & (size == np.inf)
        if any_of(newton):
            assert known is not None
            is_small, is_known = read[4] > 0, read[5] > 0
            near = newton & (self._damping == 1.0) & (size <= NEAR) & is_small
            solved |= near & is_known
            unclear = near & ~is_known
            if any_of(unclear):
                solved |= self._is_rounding(unclear, self.at, f, residual, known)
        self._take(solved, f, value, substitutes)
        self.way[solved] = _SOLVED

        begins = first & ~solved & ~lost
        accepted = newton & ~solved & ~lost & (level < self._base_level)
        worse = newton & ~solved & ~accepted & ~lost
        worse |= newton & lost
        lost &= first
        refreshed = np.zeros(len(size), bool)
        if any_of(accepted):
            refreshed |= accepted & (level > self._stale * self._base_level)
            self._damping[accepted] = np.minimum(1.0, 2 * self._damping[accepted])
        advanced = begins | accepted
        if any_of(advanced):
            self._base = self._rows(advanced, self.at, self._base)
            self._base_f = self._rows(advanced, f, self._base_f)
            self._base_residual = self._rows(advanced, residual, self._base_residual)
            self._base_value = self._rows(advanced, value, self._base_value)
            self._base_level[advanced] = level[advanced]
            self._damping[begins], self._is_new[advanced] = 1.0, True
            self._is_fresh[accepted] = False
            self.way[begins] = _NEWTON
        if any_of(worse):
            at_rounding = worse & self._is_new
            if any_of(at_rounding):
                at_rounding = self._is_rounding(at_rounding, self._base, self._base_f, self._base_residual, None)
                if any_of(at_rounding):
                    self.at = self._rows(at_rounding, self._base, self.at)
                    self._is_current = False
                    self._take(at_rounding, self._base_f, self._base_value, np.zeros(len(size), bool))
                    self.way[at_rounding] = _SOLVED
            worse &= ~at_rounding
            shorter = worse & self._is_fresh
            self._damping[shorter] /= 2
            self._is_new[shorter] = False
            refreshed |= worse & ~self._is_fresh
        if any_of(refreshed):
            solver.refresh(equations, self._base, self._base_f, refreshed)
            self._base_value = self._rows(refreshed, solver.correct(self._base_residual, refreshed), self._base_value)
            levels = excess_of(self._base_value, self._scale).amax(1).double().cpu().numpy()
            self._base_level[refreshed] = levels[refreshed]
            self._is_fresh[refreshed] = True
            lost |= refreshed & (levels == np.inf)
        trying = self.way == _NEWTON
        self._ran_out = trying & (self._iterations > self.solver.max_iterations) | self._ran_out & ~trying
        lost |= trying & ((self._damping < SHORTEST) | self._ran_out)
        if any_of(lost):
            self._lose(lost, residual, excess)
        trying &= ~lost
        if any_of(trying):
            damped = torch.from_numpy(self._damping).to(self.at.device, self.at.dtype.to_real())[:, None]
            self.at = self._rows(trying, self._base + damped * self._base_value, self.at)
        substitutes &= ~solved & ~switches
        if any_of(substitutes):
            self.at = self._rows(substitutes, self.at + residual, self.at)
        if any_of(switches):
            self._switch(switches)

    def _substituted(
        self, samples: Flags, size: Numbers, distance: Numbers, f: Rows, residual: Rows
    ) -> tuple[Flags, Flags]:
        """Which samples are solved by substitution, and which it does not serve."""
        previous, weight, solver = self._previous, abs(self.equations.weight), self.solver
        # Small corrections may be rounding, which tells nothing of the rate.
        telling = samples & (previous > NEAR) & (previous < np.inf)
        solver.lipschitz[telling] = size[telling] / (previous[telling] * weight)
        self._level_first = np.where(previous == np.inf, distance, self._level_first)
        # What is left of the error is this correction times the rate, seen before if not now.
        with np.errstate(invalid="ignore"):
            rate = CAUTION * solver.lipschitz * weight
            solved = (size == 0) | ((size <= 1) & ((rate < 1) | (previous <= 1)))
            solved |= (size <= NEAR) & (rate * size <= 1)
            slow = ~(size <= np.maximum(SLOW * previous, 1)) | (self._iterations >= self.solver.max_iterations)
        solved &= samples
        slow &= samples & ~solved
        near = slow & (previous <= NEAR) & (size <= NEAR) & (rate <= CAUTION * SLOW)
        if any_of(near):
            at_rounding = self._is_rounding(near, self.at, f, residual, None)
            solved |= at_rounding
            slow &= ~at_rounding
        self._previous = np.where(samples, size, previous)
        return solved, slow

    def _switch(self, samples: Flags) -> None:
        """Begin Newton's method for some samples, from the better of their starting points."""
        equations = self.equations
        self.solver.uses_newton |= samples
        self.way[samples] = _FIRST
        self._iterations[samples] = 0
        start = self.first
        if self._two_starts:
            # One by the slope before a stiff step is far off, as a rule.
            there = self._rows(samples, self.other, self.at)
            missed = equations.c + equations.weight * equations.slope(equations.x + there) - there
            level = missed.abs().amax(1).nan_to_num(nan=torch.inf).double().cpu().numpy()
            swapped = self._mask(samples & (level < self._level_first))
            self.first, self.other = (
                torch.where(swapped, self.other, self.first),
                torch.where(swapped, self.first, self.other),
            )
            start = self.first
        self.at = self._rows(samples, start, self.at)
        self._scale = self._rows(samples, self._tolerances.scale(equations, start), self._scale)

    def _take(self, samples: Flags, f: Rows, value: Rows, substitutes: Flags) -> None:
        """Take what samples have come to for their solution."""
        if not any_of(samples):
            return
        d = self.at + value
        # By the equation: f itself would amplify what is left of the error by the Jacobian.
        slope = (d - self.equations.c) / self.equations.weight
        if any_of(substitutes):
            slope = self._rows(substitutes, f, slope)
        self._d, self._f = self._rows(samples, d, self._d), self._rows(samples, slope, self._f)

    def _lose(self, samples: Flags, residual: Rows, excess: Rows) -> None:
        self.way[samples] = _FAILED
        self.solver.forget(samples)
        self._d = self._rows(samples, self.at, self._d)
        self._residual = self._rows(samples, residual, self._residual)
        self._excess = self._rows(samples, excess, self._excess)
        # Where f is finite, for it is evaluated there along with the others.
        self.at = self._rows(samples, self.equations.c * 0, self.at)

    def _mask(self, samples: Flags) -> Tensor:
        return torch.from_numpy(samples).to(self.at.device)[:, None]

    def _rows(self, samples: Flags, new: Rows, old: Rows) -> Rows:
        """Rows of `new` for some samples, of `old` for the others."""
        if all_of(samples):
            return new
        return torch.where(self._mask(samples), new, old) if any_of(samples) else old

    def _is_rounding(self, samples: Flags, d: Rows, f: Rows, residual: Rows, but_for: Tensor | None) -> Flags:
        return is_rounding(
            self.equations, self._tolerances, samples, self._rows(samples, d, self.at), f, residual, but_for
        )
