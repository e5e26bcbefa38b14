"""The equations d = c + b* f(x + d) of an implicit step, their tolerances, and what of a residual is rounding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .jacobian import Slope
from .linear import noise

Rows = Tensor
"""Of shape (S, D): a row for each sample."""

RowsFunction = Callable[[Rows], Rows]

Point = tuple[Rows, Rows]
"""Iterates d, and f there."""

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]

SLOW = 0.3
"""Above this rate of convergence substitution gives way to Newton's method, and an old Jacobian to a new one."""

NEAR = 30
"""By corrections of more tolerances than that no iteration ends, however fast it converges."""

CAUTION = 2
"""By so much the rate of convergence may have grown since it was seen."""

TRUSTED = 16
"""For so many steps a rate of convergence is trusted; it is seen again by a second iterate."""

SHORTEST = 1e-4
"""A Newton correction that has to be damped by more leads nowhere."""

ROUNDING = 8
"""So many units in the last place are rounding."""

PROBE = 16
"""By so many times its rounding the state is changed for it, as the rounding of func has steps of its own."""

PROBES = 8
"""So often, at most, rounding is looked for."""


@dataclass(frozen=True)
class _Given:
    """What is given of d = c + b* f(x + d); see `Equation` and `Equations`."""

    x: Tensor
    c: Tensor
    weight: float

    def sizes(self, d: Tensor, f: Tensor) -> Tensor:
        """What size the entries of a state and its corrections are of; f is that at x + d."""
        sizes = torch.maximum((self.x + d).abs(), d.abs())
        return torch.maximum(torch.maximum(sizes, self.c.abs()), abs(self.weight) * f.abs())


@dataclass(frozen=True)
class Equation(_Given):
    """d = c + b* f(x + d), of a whole state.

    Attributes:
        x: the state that d is added to.
        c: what is known of d.
        weight: b*.
        slope: f.
        iterate: f again, called once at every iterate; the last one is the solution, up to the tolerance.
        time: what func is given for it; needed where something is known of the Jacobian, or func is compiled.
        records: whether `iterate` does more than to return f.
    """

    slope: Slope
    iterate: Slope
    time: Tensor | None = None
    records: bool = True

    def residual(self, d: Tensor, f: Tensor) -> Tensor:
        """By how much d misses the equation."""
        return self.c + self.weight * f - d

    def level(self, d: Tensor) -> float:
        """The largest entry of the residual; infinite where one is not a number."""
        residual = self.residual(d, self.slope(self.x + d)).abs()
        return float(residual.nan_to_num(nan=torch.inf).max()) if residual.numel() else 0.0


@dataclass(frozen=True)
class Equations(_Given):
    """d = c + b* f(x + d), for each sample.

    Attributes:
        x: the states that d is added to, of shape (S, D).
        c: what is known of d.
        weight: b*.
        slope: f.
        iterate: f again, called at every iterate; the last call is at the solution, up to the tolerance.
        time, records: as those of `Equation`.
    """

    slope: RowsFunction
    iterate: RowsFunction
    time: Tensor | None = None
    records: bool = True


class Tolerances:
    """By how much d may be wrong, entry by entry.

    Args:
        rtol, atol: torchdiffeq's, numbers or of shape (S, D).
        fraction: to this part of atol + rtol |y| equations are solved.
        precision: the relative precision of func's values.

    Attributes:
        precision: as given.
        part_of_rtol, part_of_atol: the fractions of the tolerances.
        rounding: how much of a tolerance is rounding, at most.
    """

    def __init__(self, rtol: float | Tensor, atol: float | Tensor, fraction: float, precision: float) -> None:
        self._rtol, self._atol = rtol, atol
        self.part_of_rtol, self.part_of_atol = fraction * rtol, fraction * atol
        self.precision = precision
        part = fraction * float(rtol.min() if isinstance(rtol, Tensor) else rtol)
        self.rounding = min(1.0, ROUNDING * precision / part) if part > 0 else 1.0

    def of(self, level: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
        """Of each entry of a correction of d, its own tolerance or its own rounding, whichever is more.

        Args:
            level: max(|x|, |x + d|), from `level_of`.
            change: |d - c|.
            dtype: of the state.
        """
        return tolerance_of(self.part_of_rtol, self.part_of_atol, self.precision, level, change, dtype)

    def scale(self, level: Tensor, d: Rows, c: Rows) -> Tensor:
        """Sizes by which corrections of one sample are compared, nowhere 0; `level` as above."""
        eps = torch.finfo(d.dtype).eps
        rounding = eps * torch.maximum(level, torch.maximum(d.abs(), c.abs()))
        scale = torch.maximum(self._atol + self._rtol * level, rounding)
        floor = eps * level.amax(1, keepdim=True)
        return torch.where(scale > 0, scale, torch.where(floor > 0, floor, 1.0))


def tolerance_of(
    part_of_rtol: float | Tensor,
    part_of_atol: float | Tensor,
    precision: float,
    level: Tensor,
    change: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `Tolerances.of`."""
    rounding = (ROUNDING * torch.finfo(dtype).eps) * level
    rounding.add_((ROUNDING * precision) * change).add_(ROUNDING * least(dtype))
    return torch.maximum(part_of_rtol * level + part_of_atol, rounding)


def size_of(x: Rows) -> Tensor:
    """|x| in the precision of a norm, for a small state may underflow in its own."""
    return x.abs().to(torch.promote_types(x.dtype.to_real(), torch.float32))


def is_rounding(
    equations: Equations,
    tolerances: Tolerances,
    samples: Flags,
    here: Point,
    there: Point,
    residual: Rows,
    but_for: Tensor | None,
    probed: Flags,
    seen: Rows | None,
) -> tuple[Flags, Rows]:
    """Which samples' residuals are no larger than what rounding makes of them: of the state, and of all that is added.

    Beside them, what rounding of the state has been seen to make of f, entry by entry.

    Args:
        equations, tolerances: see there.
        samples: those asked for.
        here: the iterates.
        there: others; where the two are close, they tell what a change of the last place makes of f.
        residual: of the first ones.
        but_for: entries that are not looked at.
        probed: samples for which f may be evaluated nearby.
        seen: what was returned beside the flags before, of the same equations.
    """
    x, c, weight = equations.x, equations.c, equations.weight
    (d, f), (other, f_there) = here, there
    y = x + d
    level = torch.maximum(x.abs(), y.abs())
    precision = tolerances.precision
    own = own_rounding(level, d, c, abs(weight) * f.abs(), precision)
    sizes = residual.abs() if but_for is None else residual.abs().where(~but_for, 0.0)
    places = places_of(d - other, precision * level).amax(1, keepdim=True).clamp_(min=1.0)
    largest = rounding_of(f_there - f, places)
    if seen is not None:
        largest = torch.maximum(largest, seen)

    def left_of() -> Numbers:
        return np.asarray((~(sizes <= own + abs(weight) * largest)).sum(1).cpu().numpy())

    left = left_of()
    pending = samples & probed & (left > 0)
    found = samples & (left == 0)
    for seed in range(PROBES):
        if not any_of(pending):
            break
        nearby = y + 2 * PROBE * precision * level * noise(level[:1], seed)
        changed = ROUNDING / PROBE * (equations.slope(nearby) - f).abs()
        # Those that are along with them are to know nothing of it.
        largest = torch.where(torch.from_numpy(pending).to(f.device)[:, None], torch.maximum(largest, changed), largest)
        before, left = left, left_of()
        found |= pending & (left == 0)
        # Entries where it has cancelled get fewer with every draw; others stay.
        pending &= (left > 0) & ((2 * left <= before) if seed else True)
    return found, largest


def own_rounding(level: Tensor, d: Rows, c: Rows, part: Tensor, precision: float) -> Tensor:
    """The rounding of d = c + b* f(x + d) itself.

    Args:
        level: max(|x|, |x + d|).
        d, c: see `Equations`.
        part: |b* f|.
        precision: of f, relative.
    """
    own = torch.finfo(level.dtype).eps * (level + d.abs() + c.abs()) + precision * part
    return ROUNDING * (own + least(d.dtype))


def places_of(change: Tensor, place: Tensor) -> Tensor:
    """A change of the state in units of the last place."""
    places = change.abs() / place
    return torch.where(places > 0, places, 0.0)


def rounding_of(change: Tensor, places: Tensor) -> Tensor:
    """What a change of the last place of the state makes of f, as seen by a change of f.

    Args:
        change: of f; where it is not finite nothing is seen.
        places: by so many of them the state was changed, 1 at least.
    """
    seen = ROUNDING / places * change.abs()
    return torch.where(seen < torch.inf, seen, 0.0)


def is_substituted(size: Numbers | float, previous: Numbers | float, rate: Numbers | float) -> Flags:
    """Whether nothing is left after the last correction of a substitution.

    Args:
        size, previous: of this correction and the one before it, in terms of the tolerance; infinite where there is
            none.
        rate: of convergence; infinite where it is unknown.
    """
    contracts = (rate < 1) | (previous <= 1) | ((size <= SLOW * previous) & (previous < np.inf))
    return np.asarray((size == 0) | ((size <= 1) & contracts) | ((size <= NEAR) & (rate * size <= 1)))


def levels_of(*residuals: Rows) -> Numbers:
    """The largest entry of each sample in each of some residuals, of shape (n, S)."""
    levels = torch.stack(residuals).abs().amax(2).nan_to_num(nan=torch.inf)
    # In half precision NumPy does not know them.
    return np.asarray(levels.cpu().double().numpy())


def largest_in(value: Rows, scale: Tensor) -> Numbers:
    """The largest entry of each sample in terms of a scale; infinite where one is not a number."""
    level = (value.abs() / scale).amax(1).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    return np.asarray(level.cpu().numpy(), np.float64)


def any_of(flags: Flags) -> bool:
    """NumPy's own any, in a tenth of its time."""
    return 1 in flags.tobytes()


def all_of(flags: Flags) -> bool:
    """NumPy's own all, in a tenth of its time."""
    return 0 not in flags.tobytes()


def least(dtype: torch.dtype) -> float:
    """The distance of the smallest numbers of a dtype."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def excess_of(size: Tensor, tolerance: Tensor) -> Tensor:
    """The size of a correction in terms of the tolerance; nothing to correct is no excess, even over a tolerance of 0.

    Not a number where the correction is none.
    """
    return (size / tolerance).masked_fill_(size == 0, 0.0)
