"""Many equations d = c + b* f(x + d) at once, one for each sample, by substitution or by Newton's method.

Every sample goes its own way: with a Jacobian of its own, kept from step to step for as long as it serves, with a
damping of its own, accepted by its own residuals and corrections. f is evaluated for all of them at once; a sample that
is done stays where it is. So what becomes of a sample does not depend on the others, as far as f does not.

When an equation is solved is said in `implicit`. All decisions of an iteration take one read by the host.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for simplified Newton iterations and their
rates; Deuflhard, *Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_jacobian import BlockJacobian, real_rows, rows_like
from .linear import noise

Rows = Tensor
"""Of shape (S, D): a row for each sample."""

RowsFunction = Callable[[Rows], Rows]

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]

SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method."""

STALE = 0.003
"""Above this rate of convergence for each entry, and at most the above, an old Jacobian gives way to a new one.

The more entries, the more products it takes.
"""

NEAR = 30
"""By corrections of more tolerances than that no iteration ends, however fast it converges."""

CAUTION = 2
"""By so much the rate of convergence may have grown since it was seen."""

SHORTEST = 1e-4
"""A Newton correction that has to be damped by more leads nowhere."""

ROUNDING = 8
"""So many units in the last place are rounding."""

PROBE = 16
"""By so many times its rounding the state is changed for it, as the rounding of func has steps of its own."""

PROBES = 8
"""So often, at most, rounding is looked for."""


_SUBSTITUTION, _FIRST, _NEWTON, _SOLVED, _FAILED = range(5)
"""What is being done with a sample: substitution; Newton's method, at its starting point or on its way; or no more."""


class CoupledError(Exception):
    """f does not act on samples independently."""


@dataclass(frozen=True)
class Equations:
    """d = c + b* f(x + d), for each sample.

    Attributes:
        x: the states that d is added to, of shape (S, D).
        c: what is known of d.
        weight: b*.
        slope: f.
        iterate: f again, called at every iterate; the last call is at the solution, up to the tolerance.
    """

    x: Rows
    c: Rows
    weight: float
    slope: RowsFunction
    iterate: RowsFunction


@dataclass(frozen=True)
class Tolerances:
    """By how much d may be wrong, entry by entry.

    Attributes:
        rtol, atol: torchdiffeq's, numbers or of shape (S, D).
        fraction: to this part of atol + rtol |y| equations are solved.
        precision: the relative precision of func's values.
    """

    rtol: float | Tensor
    atol: float | Tensor
    fraction: float
    precision: float

    def of(self, equations: Equations, d: Rows) -> Rows:
        """Of each entry of a correction of d, its own tolerance or its own rounding, whichever is more."""
        x, change = equations.x, (d - equations.c).abs()
        level = self._level(x, d)
        rounding = ROUNDING * (torch.finfo(x.dtype).eps * level + self.precision * change + least(x.dtype))
        return torch.maximum(self.fraction * (self.atol + self.rtol * level), rounding)

    def scale(self, equations: Equations, d: Rows) -> Rows:
        """Sizes by which corrections of one sample are compared, nowhere 0."""
        x = equations.x
        level = self._level(x, d)
        eps = torch.finfo(x.dtype).eps
        rounding = eps * torch.maximum(level, torch.maximum(d.abs(), equations.c.abs()))
        scale = torch.maximum(self.atol + self.rtol * level, rounding)
        floor = eps * level.amax(1, keepdim=True)
        return torch.where(scale > 0, scale, torch.where(floor > 0, floor, 1.0))

    def _level(self, x: Rows, d: Rows) -> Rows:
        # In the precision of a norm, for a small state may underflow in its own.
        return torch.maximum(x.abs(), (x + d).abs()).to(torch.promote_types(x.dtype.to_real(), torch.float32))


class Outcome(NamedTuple):
    """What has become of the equations.

    Attributes:
        d, f: the solutions, and the slopes by the equation; of failed samples what was reached.
        failed: which samples have failed, of shape (S,).
        residual, correction, excess: where these have ended, entry by entry; `excess` is the last correction in terms
            of the tolerance. Of solved samples they mean nothing.
    """

    d: Rows
    f: Rows
    failed: Flags
    residual: Rows
    excess: Rows


class BlockNewton:
    """Solves the equations of all samples, step after step.

    Args:
        count: S, the number of samples.
        tolerances: see there.
        jacobian: makes the Jacobians.
        max_iterations: of substitution, and of Newton's method from one starting point.
    """

    def __init__(self, count: int, tolerances: Tolerances, jacobian: BlockJacobian, max_iterations: int) -> None:
        self._tolerances = tolerances
        self._jacobian = jacobian
        self.max_iterations = max_iterations
        self._uses_newton: Flags = np.zeros(count, bool)
        self._lipschitz: Numbers = np.full(count, np.inf)
        self._has_block: Flags = np.zeros(count, bool)
        self._blocks: Tensor | None = None
        self._inverses: Tensor | None = None
        self._weights: Numbers = np.full(count, np.nan)

    def solve(self, equations: Equations, starts: list[Rows], skipped: Flags) -> Outcome:
        """Solve the equations.

        Args:
            equations: see there.
            starts: one or two first iterates d, in the order in which they are tried.
            skipped: samples that are left as they are.

        Raises:
            CoupledError: f does not act on the samples independently.
        """
        with torch.no_grad():
            self._reweigh(equations.weight)
            solving = _Solving(self, equations, starts, skipped)
            solving.run()
            if len(starts) > 1 and any_of(solving.failed):
                solving.begin_again(solving.other, solving.failed)
                solving.run()
            if self._jacobian.is_exact and any_of(solving.failed):
                # What auto-differentiation does not see of func, differences do.
                unsolved = solving.failed
                exact, self._jacobian = self._jacobian, self._jacobian.by_differences()
                for start in (solving.first, solving.other)[: len(starts)]:
                    if any_of(solving.failed):
                        solving.begin_again(start, solving.failed)
                        solving.run()
                if (solving.failed == unsolved).all():
                    self._jacobian = exact
            return solving.outcome()

    def correct(self, residual: Rows, newton: Flags) -> Rows:
        """The Newton correction for a residual, of some samples; of the others the residual itself."""
        if self._inverses is None or not any_of(newton):
            return residual
        solved = rows_like((self._inverses @ real_rows(residual).to(self._inverses.dtype)[..., None])[..., 0], residual)
        return solved if all_of(newton) else torch.where(self._mask(newton, residual), solved, residual)

    def refresh(self, equations: Equations, d: Rows, f: Rows, samples: Flags) -> None:
        """Make the Jacobians of some samples anew, at d."""
        sizes = torch.maximum(torch.maximum((equations.x + d).abs(), d.abs()), equations.c.abs())
        sizes = torch.maximum(sizes, abs(equations.weight) * f.abs())
        blocks = self._jacobian.blocks(equations.slope, equations.x + d, f, sizes, self._tolerances.precision)
        if blocks is None:
            raise CoupledError
        inverses = inverses_of(blocks, equations.weight)
        if self._blocks is None or self._inverses is None or all_of(samples):
            self._blocks, self._inverses = blocks, inverses
        else:
            mask = torch.from_numpy(samples).to(blocks.device)[:, None, None]
            self._blocks = torch.where(mask, blocks, self._blocks)
            self._inverses = torch.where(mask, inverses, self._inverses)
        self._has_block |= samples
        self._weights[samples] = equations.weight

    def forget(self, samples: Flags) -> None:
        """Forget the Jacobians of some samples."""
        self._has_block &= ~samples

    def has_block(self) -> Flags:
        """Which samples have a Jacobian."""
        return self._has_block

    def _reweigh(self, weight: float) -> None:
        stale = self._has_block & (self._weights != weight)
        if self._blocks is not None and any_of(stale):
            self._inverses = inverses_of(self._blocks, weight)
            self._weights[:] = weight

    @staticmethod
    def _mask(flags: Flags, like: Rows) -> Tensor:
        return torch.from_numpy(flags).to(like.device)[:, None]


class _Solving:
    """One step of `BlockNewton`: where each sample is on its way.

    Attributes:
        way: of each sample.
        at: d where f is evaluated next.
        first, other: the starting points of each sample, the one that was taken first and the other one.
    """

    def __init__(self, solver: BlockNewton, equations: Equations, starts: list[Rows], skipped: Flags) -> None:
        self.solver = solver
        self.equations = equations
        self.first, self.other = starts[0], starts[-1]
        self._two_starts = len(starts) > 1
        count = len(skipped)
        self.way = np.where(skipped, _SOLVED, np.where(solver._uses_newton, _FIRST, _SUBSTITUTION))
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
        self._base_level: Numbers = np.full(count, np.inf)
        self._damping: Numbers = np.ones(count)
        self._is_new: Flags = np.ones(count, bool)
        self._is_fresh: Flags = np.zeros(count, bool)
        self._scale = self._tolerances.scale(equations, starts[0])
        self._is_current = True
        self._stale = min(SLOW, STALE * starts[0].shape[1])

    @property
    def _tolerances(self) -> Tolerances:
        return self.solver._tolerances

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
        return Outcome(self._d, self._f, self.failed, self._residual, self._excess)

    def _iterate(self) -> None:
        equations, solver = self.equations, self.solver
        substitutes, first, newton = (self.way == way for way in (_SUBSTITUTION, _FIRST, _NEWTON))
        f = equations.iterate(equations.x + self.at)
        self._is_current = True
        residual = equations.c + equations.weight * f - self.at
        missing = first & ~solver.has_block()
        if any_of(missing):
            finite = torch.isfinite(residual).all(1).cpu().numpy()
            if any_of(missing & finite):
                solver.refresh(equations, self.at, f, missing & finite)
        self._is_fresh[first] = missing[first]
        value = solver.correct(residual, first | newton)
        tolerance = self._tolerances.of(equations, self.at)
        excess, excess_of_residual = _excess(value, tolerance), _excess(residual, tolerance)
        measured = [excess.amax(1), excess_of_residual.amax(1), _excess(value, self._scale).amax(1)]
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
            levels = _excess(self._base_value, self._scale).amax(1).double().cpu().numpy()
            self._base_level[refreshed] = levels[refreshed]
            self._is_fresh[refreshed] = True
            lost |= refreshed & (levels == np.inf)
        trying = self.way == _NEWTON
        lost |= trying & ((self._damping < SHORTEST) | (self._iterations > self.solver.max_iterations + 1))
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
        solver._lipschitz[telling] = size[telling] / (previous[telling] * weight)
        self._level_first = np.where(previous == np.inf, distance, self._level_first)
        # What is left of the error is this correction times the rate, seen before if not now.
        with np.errstate(invalid="ignore"):
            rate = CAUTION * solver._lipschitz * weight
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
        self.solver._uses_newton |= samples
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

    def _is_rounding(self, samples: Flags, d: Rows, f: Rows, residual: Rows, but_for: Tensor | None) -> Flags:
        """Which samples' residuals are no larger than what rounding makes of them.

        Of the state, and of all that is added up.

        Args:
            samples: those asked for.
            d, f, residual: iterates, f there and their residuals.
            but_for: entries that are not looked at.
        """
        x, c, weight = self.equations.x, self.equations.c, self.equations.weight
        d = self._rows(samples, d, self.at)
        y = x + d
        level = torch.maximum(x.abs(), y.abs())
        precision = self._tolerances.precision
        own = torch.finfo(x.dtype).eps * (level + d.abs() + c.abs()) + precision * abs(weight) * f.abs()
        own = ROUNDING * (own + least(x.dtype))
        sizes = residual.abs() if but_for is None else residual.abs().where(~but_for, 0.0)
        largest = torch.zeros_like(own)
        left = (~(sizes <= own)).sum(1).cpu().numpy()
        pending = samples & (left > 0)
        found = samples & (left == 0)
        for seed in range(PROBES):
            if not any_of(pending):
                break
            nearby = y + 2 * PROBE * precision * level * noise(level[:1], seed)
            changed = ROUNDING * abs(weight) / PROBE * (self.equations.slope(nearby) - f).abs()
            largest = torch.maximum(largest, changed)
            before, left = left, (~(sizes <= own + largest)).sum(1).cpu().numpy()
            found |= pending & (left == 0)
            # Entries where it has cancelled get fewer with every draw; others stay.
            pending &= (left > 0) & ((2 * left <= before) if seed else True)
        return np.asarray(found)

    def _mask(self, samples: Flags) -> Tensor:
        return torch.from_numpy(samples).to(self.at.device)[:, None]

    def _rows(self, samples: Flags, new: Rows, old: Rows) -> Rows:
        """Rows of `new` for some samples, of `old` for the others."""
        if all_of(samples):
            return new
        return torch.where(self._mask(samples), new, old) if any_of(samples) else old


def any_of(flags: Flags) -> bool:
    """NumPy's own any, in a tenth of its time."""
    return 1 in flags.tobytes()


def all_of(flags: Flags) -> bool:
    """NumPy's own all, in a tenth of its time."""
    return 0 not in flags.tobytes()


def least(dtype: torch.dtype) -> float:
    """The distance of the smallest numbers of a dtype."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def _excess(correction: Tensor, tolerance: Tensor) -> Tensor:
    """A correction in terms of the tolerance; nothing to correct is no excess, even over a tolerance of 0."""
    excess = (correction.abs() / tolerance).where(correction != 0, 0.0)
    return excess.nan_to_num(nan=torch.inf, posinf=torch.inf)


def inverses_of(blocks: Tensor, weight: float) -> Tensor:
    """(1 - b* J)⁻¹ of every block, in double precision where the device has it; not finite where it is singular."""
    dtype = blocks.dtype if blocks.device.type == "mps" else torch.float64
    unit = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
    inverses, info = torch.linalg.inv_ex(unit - weight * blocks.to(dtype))
    return torch.where((info == 0)[:, None, None], inverses, torch.nan)
