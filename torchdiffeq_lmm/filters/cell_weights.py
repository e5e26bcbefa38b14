"""What each evaluation of f owns of the time: the weights ω that make a costate the cotangent of its slope."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from torchdiffeq_lmm.schemes.polynomials import integration_weights

CellWeights = Literal["step", "trapezoid"]

_PATTERNS = 4096
"""Of so many patterns of times the weights are remembered."""

_DIGITS = 12
"""Times that differ by rounding have the same pattern."""


def cell_widths(times: Sequence[float], end: float, weights: CellWeights) -> list[float]:
    """What each evaluation owns of the time from 0 to `end`.

    Args:
        times: of the evaluations, not decreasing. Where two are equal, the first belongs to the step before and the
            second to the step after; they share in proportion to these.
        end: of the solve.
        weights: "step": up to the next time; the last one up to the end, or if it is there, as much as the one before.
            "trapezoid": half-way to the times on either side, and all up to the ends.
    """
    distinct = sorted(set(times))
    gaps = [after - before for before, after in pairwise(distinct)]
    if weights == "step":
        rest = end - distinct[-1]
        widths = [*gaps, rest if rest > 0 else gaps[-1] if gaps else end]
    else:
        bounds = [0.0, *((before + after) / 2 for before, after in pairwise(distinct)), end]
        widths = [after - before for before, after in pairwise(bounds)]
    shared, repeated = [], Counter(times)
    for i, width in enumerate(widths):
        if repeated[distinct[i]] == 2:
            left = gaps[i - 1] / (gaps[i - 1] + gaps[i])
            shared += [left * width, (1 - left) * width]
        else:
            shared.append(width)
    return shared


class Shares(NamedTuple):
    """What an evaluation owns of the time before it and of the time after it."""

    before: float
    after: float


def interpolatory_shares(times: Sequence[float], breaks: Sequence[float], end: float, order: int) -> list[Shares]:
    """The weights of a quadrature of higher order over each piece of time, as the costate is smooth between breaks.

    Each gap between evaluations, and that to the end of a piece, is integrated by the polynomial through those of the
    piece that are nearest.

    Args:
        times: of the evaluations, increasing, from 0 to `end`.
        breaks: where the costate jumps, increasing, between 0 and `end`.
        end: of the solve.
        order: of the quadrature where a piece has as many evaluations; with fewer it is their number.
    """
    before, after = [0.0] * len(times), [0.0] * len(times)
    for low, high in pairwise([0.0, *breaks, end]):
        inside = range(bisect_left(times, low), bisect_right(times, high))
        if not inside:
            # No evaluation belongs to the piece; the one before takes it, as a step's does.
            after[max(0, inside.start - 1)] += high - low
            continue
        count = min(order, len(inside))
        ends = sorted({low, *(times[i] for i in inside), high})
        place = 0
        for start, stop in pairwise(ends):
            # As many on either side of the gap, as far as there are.
            while place < len(inside) and times[inside[place]] <= start:
                place += 1
            first = min(max(0, place - (count + 1) // 2), len(inside) - count)
            chosen = inside[first : first + count]
            scale = stop - start
            pattern = tuple(round((times[i] - start) / scale, _DIGITS) for i in chosen)
            for i, weight in zip(chosen, _over_unit(pattern), strict=True):
                (after if times[i] == low else before)[i] += scale * weight
    return [Shares(*pair) for pair in zip(before, after, strict=True)]


@lru_cache(_PATTERNS)
def _over_unit(nodes: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(weight) for weight in integration_weights(nodes, 0.0, 1.0))
