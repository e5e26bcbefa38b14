"""A method on one grid as rows: which states are made, in which order, from which slopes. `unrolling` writes them.

Most states are those at the nodes, x_n. Others are means to an end: the sweeps that start a method, the states that a
predictor gives. Every state is the last node's plus an increment; f is evaluated at most once at each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from .weighted_sum import Weight

Terms = tuple[tuple[int, Weight], ...]
"""Weights by lag: 0 for the latest of its kind, 1 for the one before, ..."""


class Keeps(NamedTuple):
    """How many of the latest slopes, and increments, later rows may use."""

    slopes: int
    increments: int


class Row(NamedTuple):
    """How one state is made: X = x + Σ e d + Σ b f + b* f(X), with x the state of the last node.

    Attributes:
        evaluates: whether f is evaluated at the state before, which makes its slope the latest one.
        increments: e, of the increments d between nodes.
        slopes: b, of the slopes; in the unit of time.
        implicit: b*; None for an explicit row. Else f is evaluated at X, which makes its slope the latest one.
        guess: for an implicit row, the weights of the slopes in a guess for f(X).
        is_node: whether X is the state of the next node.
        keeps: what of the past the rows after this one may use; None for all of it.
        predictor: for an implicit row, the weights of the increments in a guess for its own, instead of `guess`.
    """

    evaluates: bool
    increments: Terms
    slopes: Terms
    implicit: Weight | None
    guess: Terms
    is_node: bool
    keeps: Keeps | None
    predictor: Terms = ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """e, b and b*, one after the other."""
        own = () if self.implicit is None else (self.implicit,)
        return (*(e for _, e in self.increments), *(b for _, b in self.slopes), *own)

    def with_weights(self, weights: Iterator[Tensor]) -> "Row":
        """The same row with the next of `weights` in place of its own."""
        return self._replace(
            increments=tuple((lag, next(weights)) for lag, _ in self.increments),
            slopes=tuple((lag, next(weights)) for lag, _ in self.slopes),
            implicit=None if self.implicit is None else next(weights),
        )


@dataclass(frozen=True)
class Recurrence:
    """The rows of a method on a grid of N steps.

    State 0 is x_0; row i makes state i + 1.

    Attributes:
        rows: with numbers for weights.
        positions: of each state, in steps: n at node n, n + c at the fraction c of the step after it.
        start: K, the number of steps that the start makes; 0 for one-step methods.
        weights: all weights e, b, b* of all rows, in their order, of shape (n,), float64 on the CPU, with their graph
            to the grid; None where the grid has none.
    """

    rows: list[Row]
    positions: list[float]
    start: int
    weights: Tensor | None

    @cached_property
    def nodes(self) -> list[int]:
        """The state at each node."""
        return [0, *(i + 1 for i, row in enumerate(self.rows) if row.is_node)]

    @cached_property
    def evaluated(self) -> list[bool]:
        """Of each state, whether f is evaluated at it."""
        flags = [False] * (len(self.rows) + 1)
        for i, row in enumerate(self.rows):
            flags[i] |= row.evaluates
            flags[i + 1] = row.implicit is not None
        return flags

    @property
    def sees_end(self) -> bool:
        """Whether f is evaluated at the time of the last node, be it at what a predictor gives."""
        last = self.positions[-1]
        states = range(len(self.positions) - 1, -1, -1)
        return any(self.evaluated[state] for state in takewhile(lambda state: self.positions[state] == last, states))

    @property
    def is_at_nodes(self) -> bool:
        """Whether all states are at nodes, as those of multistep methods are; else every step has one in its middle."""
        return all(position % 1 == 0 for position in self.positions[:2])

    def differentiable_rows(self) -> list[Row]:
        """The rows with 0-d tensors that carry the gradient to the grid, where it has one."""
        if self.weights is None:
            return self.rows
        weights = iter(self.weights.unbind())
        return [row.with_weights(weights) for row in self.rows]

    def times(self, nodes: Tensor) -> Tensor:
        """The times of the states, from those of the nodes, of shape (N + 1,). Differentiable."""
        if len(self.positions) == len(nodes) and len(self.nodes) == len(nodes):
            return nodes
        positions = torch.tensor(self.positions, dtype=torch.float64, device=nodes.device)
        before = positions.floor().long()
        rest = (positions - before).to(nodes)
        if not bool(rest.any()):
            return nodes[before]
        return (1 - rest) * nodes[before] + rest * nodes[(before + 1).clamp(max=len(nodes) - 1)]


class Layout:
    """Which slopes and increments the lags of rows mean.

    Attributes:
        node_before: for each state, the last node that is reached with it.
        evaluated: the states at which f is evaluated, in their order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.node_before = list(accumulate((row.is_node for row in rows), initial=0))
        self.evaluated: list[int] = []
        self._counts: list[int] = []
        for i, row in enumerate(rows):
            if row.evaluates:
                self.evaluated.append(i)
            self._counts.append(len(self.evaluated))
            if row.implicit is not None:
                self.evaluated.append(i + 1)

    def slope(self, row: int, lag: int) -> int:
        """The state whose slope a row means by a lag."""
        return self.evaluated[self._counts[row] - 1 - lag]
