"""Where the steps of a solve come from: from a grid, or in equal lengths without an end.

A source has the rows of the recurrence and the times at which they evaluate f.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.periodic_recurrence import PeriodicRecurrence
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .autograd_state import refuse_tangents
from .grid import Grid
from .stepping import Evaluate, History, SolveImplicit, march
from .vector_field import VectorField


@dataclass(frozen=True)
class Sides:
    """From which side of its time a state sees f.

    Attributes:
        vector_field: f.
        perturb: whether f is seen a hair beside every node, from that side of it where the step is.
        jumps: whether f jumps at the first node, and at the last one, where it is seen from inside then.
    """

    vector_field: VectorField
    perturb: bool
    jumps: tuple[bool, bool] = (False, False)

    def user_times(self, times: Tensor, recurrence: Recurrence, first: int = 0) -> Tensor:
        """What the user's function is given for the times of the states from the first one on."""
        if not self._is_beside:
            return self.vector_field.beside(times)
        directions = [self._direction(recurrence, state) for state in range(first, first + len(times))]
        return self.vector_field.beside(times, directions)

    def user_time(self, time: Tensor, recurrence: Recurrence, state: int) -> Tensor:
        """The same for one state."""
        return self.vector_field.beside(time, self._direction(recurrence, state) if self._is_beside else 0)

    def at_end(self, time: Tensor, node: int, last: int) -> Tensor:
        """The same for an evaluation of f at a node, outside the recurrence: at the end of a step, or of the first one.

        Args:
            time: the node's.
            node: its number.
            last: that of the last node; -1 where there is none.
        """
        is_beside = self.perturb or (self.jumps[node > 0] and node in (0, last))
        return self.vector_field.beside(time, (-1 if node else 1) if is_beside else 0)

    @property
    def _is_beside(self) -> bool:
        return self.perturb or any(self.jumps)

    def _direction(self, recurrence: Recurrence, state: int) -> int:
        """1 for the right side, -1 for the left one, 0 for neither."""
        position = recurrence.positions[state]
        if not self.perturb:
            if position == 0:
                return int(self.jumps[0])
            return -int(self.jumps[1] and position == recurrence.positions[-1])
        if position % 1:
            return 0
        row = recurrence.rows[state - 1] if state else None
        return 1 if row is None or (row.is_node and row.implicit is None) else -1


@dataclass(frozen=True)
class Made:
    """The steps of a solve that has ended.

    Attributes:
        recurrence: the rows that have been carried out.
        lengths: h, as numbers. A start may reach beyond these steps.
        steps: h, with its graph where it has one.
        user_times: what func is given for the times of the states, with its graph; None where it has none.
    """

    recurrence: Recurrence
    lengths: list[float]
    steps: Sequence[Weight]
    user_times: Tensor | None


class StepSource(Protocol):
    """See `FixedSteps`, `UnboundedSteps` and `adaptive_steps.AdaptiveSteps`.

    Attributes:
        requires_grad: whether the times carry a gradient.
    """

    requires_grad: bool

    @property
    def count(self) -> int | None:
        """The number of steps; None where there is no end."""

    def states(
        self, history: History, evaluate: Evaluate, solve_implicit: SolveImplicit, differentiable: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Make the states by `stepping.march`; with the graph of the rows' weights, if that is asked for."""

    @property
    def is_node(self) -> Callable[[int], bool]:
        """From a state to whether it is at a node."""

    def time_of(self, node: int) -> Tensor:
        """The time of a node."""

    @property
    def user_time(self) -> Callable[[int], Tensor]:
        """From a state to what func is given for its time."""

    def user_time_at_end(self, node: int, state: int) -> Tensor:
        """What func is given for the time of a node outside the recurrence."""

    def until(self, state: int, node: int) -> Made:
        """The steps up to a node, whose state is the last one made."""


class FixedSteps:
    """The steps of a grid.

    Args:
        grid: the grid.
        recurrence: the rows on it.
        sides: from where f is seen.
        like: a time, for the dtype and device of times.

    Attributes:
        first_step: the length of the first step.
        time: from a state to its time.
        is_node, user_time: see `StepSource`.
        user_times: see `Made`; of all states.
    """

    def __init__(self, grid: Grid, recurrence: Recurrence, sides: Sides, like: Tensor) -> None:
        self.requires_grad = grid.requires_grad
        self.lengths: list[float] = grid.steps.tolist()
        self.steps: Sequence[Weight] = grid.steps.unbind() if grid.requires_grad else self.lengths
        self.count = len(self.lengths)
        self.first_step = self.lengths[0]
        self.recurrence = recurrence
        # A list's own method, for it is called at every step.
        self.is_node: Callable[[int], bool] = [True, *(row.is_node for row in recurrence.rows)].__getitem__
        self._sides = sides = replace(sides, jumps=grid.jumps)
        # No tensor that grows with the number of steps is held without need.
        times = recurrence.times(grid.nodes)
        self.user_times: Tensor | None = None
        if times.requires_grad:
            rounded = times.to(like)
            seen = times if any(grid.jumps) else rounded
            self.user_times = sides.user_times(seen, recurrence)
            # All at once, for the cost of their gradients would else be quadratic.
            self.time: Callable[[int], Tensor] = rounded.unbind().__getitem__
            self._seen: Callable[[int], Tensor] = seen.unbind().__getitem__
            self.user_time: Callable[[int], Tensor] = self.user_times.unbind().__getitem__
        else:
            refuse_tangents(times)
            numbers = times.tolist()
            time = _Blocks(numbers, lambda block, _: block.to(like, non_blocking=True))
            # In the dtype of t a jump may be on the other side of itself.
            seen_blocks = _Blocks(numbers, lambda block, _: block) if any(grid.jumps) else time

            # Without this object, which would be a cycle of references.
            def user_times_of(_: Tensor, first: int) -> Tensor:
                return sides.user_times(seen_blocks.block(first), recurrence, first)

            self.time, self._seen, self.user_time = time, seen_blocks, _Blocks(numbers, user_times_of)

    def states(
        self, history: History, evaluate: Evaluate, solve_implicit: SolveImplicit, differentiable: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """See `StepSource`."""
        rows = self.recurrence.differentiable_rows() if differentiable else self.recurrence.rows
        return march(history, rows, evaluate, solve_implicit)

    def every_user_time(self) -> Tensor:
        """What func is given for the times of all states, of shape (S,), on the device of the state."""
        if self.user_times is not None:
            return self.user_times
        assert isinstance(self.user_time, _Blocks)
        return self.user_time.all()

    def time_of(self, node: int) -> Tensor:
        """See `StepSource`."""
        return self.time(self.recurrence.nodes[node])

    def step(self, node: int) -> Weight:
        """See `StepSource`."""
        return self.steps[node]

    def user_time_at_end(self, node: int, state: int) -> Tensor:
        """See `StepSource`."""
        return self._sides.at_end(self._seen(state), node, len(self.lengths))

    def until(self, state: int, node: int) -> Made:
        """See `StepSource`."""
        user_times = None if self.user_times is None else self.user_times[: state + 1]
        recurrence = self.recurrence
        if state < len(recurrence.rows):
            rows, weights = recurrence.rows[:state], recurrence.weights
            if weights is not None:
                weights = weights[: sum(len(row.weights) for row in rows)]
            recurrence = Recurrence(rows, recurrence.positions[: state + 1], recurrence.start, weights)
        return Made(recurrence, self.lengths[:node], self.steps[:node], user_times)


class UnboundedSteps:
    """Equal steps without an end.

    Args:
        t0: the time of the first node, 0-d, in the dtype and on the device of times.
        h: the length of the steps.
        beginning: the rows of so many steps that the last ones are as all after them.
        sides: from where f is seen.

    Attributes:
        first_step: the length of the first step.
        recurrence: see `beginning`.
    """

    def __init__(self, t0: Tensor, h: float, beginning: Recurrence, sides: Sides) -> None:
        self.requires_grad = t0.requires_grad
        self.count = None
        self.first_step = h
        self.recurrence = beginning
        self._endless = PeriodicRecurrence(beginning)
        self._t0 = t0
        self._h = h
        self._sides = sides

    def states(
        self,
        history: History,
        evaluate: Evaluate,
        solve_implicit: SolveImplicit,
        differentiable: bool,  # noqa: ARG002
    ) -> Iterator[tuple[int, Tensor]]:
        """See `StepSource`."""
        return march(history, self._endless.rows(), evaluate, solve_implicit)

    def is_node(self, state: int) -> bool:
        """See `StepSource`."""
        return self._endless.is_node(state)

    def time_of(self, node: float) -> Tensor:
        """See `StepSource`."""
        return self._t0 + node * self._h

    def step(self, node: int) -> Weight:  # noqa: ARG002
        """See `StepSource`."""
        return self._h

    def user_time(self, state: int) -> Tensor:
        """See `StepSource`."""
        time = self.time_of(self._endless.position(state))
        return self._sides.user_time(time, self.recurrence, self._endless.counterpart(state))

    def user_time_at_end(self, node: int, state: int) -> Tensor:
        """See `StepSource`."""
        return self._sides.at_end(self.time_of(self._endless.position(state)), node, -1)

    def until(self, state: int, node: int) -> Made:
        """See `StepSource`."""
        recurrence = self._endless.until(state)
        positions = self._t0.new_tensor(recurrence.positions)
        user_times = self._sides.user_times(self._t0 + self._h * positions, recurrence)
        return Made(recurrence, [self._h] * node, [self._h] * node, user_times)


GridSteps = FixedSteps | UnboundedSteps
"""Steps that are known beforehand."""


class _Blocks:
    """The entries of a sequence of numbers as tensors: a block of them at a time, as the memory of all is not needed.

    Args:
        numbers: the sequence.
        tensor: from a block of it, and the number of its first entry, to a tensor.
    """

    _SIZE = 256

    def __init__(self, numbers: Sequence[float], tensor: Callable[[Tensor, int], Tensor]) -> None:
        self._numbers = numbers
        self._tensor = tensor
        self._first = -1
        self._block: Tensor
        self._entries: tuple[Tensor, ...]

    def block(self, first: int) -> Tensor:
        """The block from `first` on, a multiple of its size."""
        if first != self._first:
            numbers = torch.tensor(self._numbers[first : first + self._SIZE], dtype=torch.float64, device="cpu")
            self._first, self._block = first, self._tensor(numbers, first)
            # Cut once, for indexing a tensor costs as much as a small layer.
            self._entries = self._block.unbind()
        return self._block

    def all(self) -> Tensor:
        """All entries."""
        return torch.cat([self.block(first) for first in range(0, len(self._numbers), self._SIZE)])

    def __call__(self, index: int) -> Tensor:
        rest = index % self._SIZE
        if index - rest != self._first:
            self.block(index - rest)
        return self._entries[rest]
