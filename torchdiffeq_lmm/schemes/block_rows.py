"""The rows of a solve in blocks of equal structure, so that one compiled function serves all of them.

Of an explicit method all steps but the first few have rows of one structure: the same lags, with weights of their own.
A block is a number of such steps. The rows of the start, which have other structures, are a block by themselves; the
last block is filled up with rows that add nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .methods import MultistepMethod
from .recurrence import Keeps, Recurrence, Row
from .runge_kutta import TwoStageMethod
from .unrolling import start_length, unroll

ExplicitMethod = MultistepMethod | TwoStageMethod


class Pattern(NamedTuple):
    """The structure of some rows on end, and of the past that they begin and end with.

    Attributes:
        rows: the rows, all of whose weights are 0.
        begins: how many of the latest slopes and increments are known before them.
        ends: the same after them.
    """

    rows: tuple[Row, ...]
    begins: Keeps
    ends: Keeps

    @property
    def weights(self) -> int:
        """How many weights the rows have."""
        return sum(len(row.weights) for row in self.rows)

    @property
    def steps(self) -> int:
        """How many nodes the rows make."""
        return sum(row.is_node for row in self.rows)

    @property
    def reach(self) -> int:
        """So many rows after it may use the slope at a state, or the increment that leads to it."""
        period = max(1, len(self.rows) // max(1, self.steps))
        lags = [lag + 1 for row in self.rows for lag, _ in row.slopes]
        return max([*lags, period * (1 + max(self.begins.increments, self.ends.increments))])

    def with_weights(self, weights: Tensor) -> list[Row]:
        """The rows with weights, of shape (`weights`,)."""
        given = iter(weights.unbind())
        return [row.with_weights(given) for row in self.rows]


@dataclass(frozen=True)
class Block:
    """Some rows of a solve.

    Attributes:
        pattern: their structure.
        first: the number of the state that they begin with.
        rows: how many of the rows of the pattern are rows of the solve; those after them add nothing.
        node: the node of that state.
    """

    pattern: Pattern
    first: int
    rows: int
    node: int


def blocks_of(method: ExplicitMethod, recurrence: Recurrence, steps: int) -> list[Block]:
    """The rows of a solve in blocks of so many steps; none where there are only the rows of a start.

    Args:
        method: an explicit method.
        recurrence: its rows on a grid.
        steps: of a block.
    """
    period = _steady_rows(method)
    rows, at_node = recurrence.rows, recurrence.nodes
    count = len(period.rows)
    begin = len(rows)
    while begin >= count and all(map(_fits, rows[begin - count : begin], period.rows)):
        begin -= count
    is_node = set(at_node)
    # The last rows of a start may look like those of steps.
    while begin not in is_node:
        begin += count
    if begin >= len(rows):
        return []
    blocks, nothing = [], Keeps(0, 0)
    if begin:
        beginning = tuple(_without_weights(row) for row in rows[:begin])
        blocks.append(Block(Pattern(beginning, nothing, period.begins), 0, begin, 0))
    steady = _steady_block(method, steps)
    node = at_node.index(begin)
    return blocks + [
        Block(steady, first, min(count * steps, len(rows) - first), node + (first - begin) // count)
        for first in range(begin, len(rows), count * steps)
    ]


def weight_indices(recurrence: Recurrence, blocks: Sequence[Block]) -> list[list[int]]:
    """For each block, which of all weights of the recurrence its rows have; the number of these stands for a 0."""
    offsets, total = [], 0
    for row in recurrence.rows:
        offsets.append(total)
        total += len(row.weights)
    known: dict[tuple[int, Row], list[int]] = {}
    found = []
    for block in blocks:
        indices: list[int] = []
        for i, pattern in enumerate(block.pattern.rows):
            if i >= block.rows:
                indices += [total] * len(pattern.weights)
                continue
            row = recurrence.rows[block.first + i]
            key = (id(row), pattern)
            if key not in known:
                known[key] = _positions(row, pattern)
            offset = offsets[block.first + i]
            indices += [total if position < 0 else offset + position for position in known[key]]
        found.append(indices)
    return found


def all_weights(recurrence: Recurrence) -> Tensor:
    """All weights and, last, a 0: float64, on the CPU, with their graph where they have one."""
    weights = recurrence.weights
    if weights is None:
        numbers = [float(weight) for row in recurrence.rows for weight in row.weights]
        return torch.tensor([*numbers, 0.0], dtype=torch.float64, device="cpu")
    return torch.cat([weights, weights.new_zeros(1)])


@lru_cache(64)
def _steady_block(method: ExplicitMethod, steps: int) -> Pattern:
    period = _steady_rows(method)
    return Pattern(period.rows * steps, period.begins, period.begins)


@lru_cache(64)
def _steady_rows(method: ExplicitMethod) -> Pattern:
    """The structure of one step, wherever its neighbours' steps are."""
    if isinstance(method, TwoStageMethod):
        rows = method.unroll(torch.ones(1, dtype=torch.float64, device="cpu")).rows
        return Pattern(tuple(_without_weights(row) for row in rows), Keeps(0, 0), Keeps(0, 0))
    count = start_length(method) + 2 * (method.steps + method.order) + 2
    steps = torch.ones(count, dtype=torch.float64, device="cpu")
    # The last step may be made by another formula.
    steps[-1] = 0.5
    recurrence = unroll(method, steps)
    period = recurrence.nodes[-1] - recurrence.nodes[-2]
    last = [recurrence.rows[-2 * period : -period], recurrence.rows[-period:]]
    merged = [_merged(pair) for pair in zip(*last, strict=True)]
    # Before its first row a step knows of slopes without its own.
    slopes = max(lag - i for i, row in enumerate(merged) for lag, _ in row.slopes)
    increments = max((lag + 1 for row in merged for lag, _ in row.increments), default=0)
    keeps = Keeps(max(0, slopes), increments)
    rows = [row._replace(keeps=keeps if row.is_node else None) for row in merged]
    return Pattern(tuple(rows), keeps, keeps)


def _merged(rows: Iterable[Row]) -> Row:
    first, *_ = rows = list(rows)
    increments = sorted({lag for row in rows for lag, _ in row.increments})
    slopes = sorted({lag for row in rows for lag, _ in row.slopes})
    return first._replace(
        increments=tuple((lag, 0.0) for lag in increments), slopes=tuple((lag, 0.0) for lag in slopes)
    )


def _without_weights(row: Row) -> Row:
    return row._replace(
        increments=tuple((lag, 0.0) for lag, _ in row.increments), slopes=tuple((lag, 0.0) for lag, _ in row.slopes)
    )


def _fits(row: Row, pattern: Row) -> bool:
    is_alike = (row.evaluates, row.is_node, row.implicit) == (pattern.evaluates, pattern.is_node, pattern.implicit)
    return (
        is_alike and _lags(row.increments) <= _lags(pattern.increments) and _lags(row.slopes) <= _lags(pattern.slopes)
    )


def _lags(terms: Iterable[tuple[int, object]]) -> set[int]:
    return {lag for lag, _ in terms}


def _positions(row: Row, pattern: Row) -> list[int]:
    """Where the weights of a pattern are among those of a row; -1 for those that it has not."""
    return [
        *_found([lag for lag, _ in row.increments], pattern.increments, 0),
        *_found([lag for lag, _ in row.slopes], pattern.slopes, len(row.increments)),
    ]


def _found(lags: list[int], terms: Iterable[tuple[int, object]], offset: int) -> Iterator[int]:
    for lag, _ in terms:
        yield offset + lags.index(lag) if lag in lags else -1
