"""A recurrence on equal steps whose last rows are repeated for ever, as until an event ends it."""

from collections.abc import Iterator
from itertools import chain, cycle, islice

from .recurrence import Recurrence, Row


class PeriodicRecurrence:
    """The rows of a solve without an end, in equal steps: those of its beginning, then the last step's again and again.

    Args:
        beginning: the rows of so many steps that the last ones are as all after them.
    """

    def __init__(self, beginning: Recurrence) -> None:
        self._beginning = beginning
        self._period = beginning.nodes[-1] - beginning.nodes[-2]

    def rows(self) -> Iterator[Row]:
        """All rows."""
        return chain(self._beginning.rows, cycle(self._beginning.rows[-self._period :]))

    def position(self, state: int) -> float:
        """Where a state is, in steps."""
        earlier = self.counterpart(state)
        return self._beginning.positions[earlier] + (state - earlier) // self._period

    def is_node(self, state: int) -> bool:
        """Whether a state is at a node."""
        return self._beginning.rows[self.counterpart(state) - 1].is_node

    def counterpart(self, state: int) -> int:
        """The state of the beginning that is made in the same way."""
        beyond = max(0, -((len(self._beginning.rows) - state) // self._period))
        return state - beyond * self._period

    def until(self, state: int) -> Recurrence:
        """The recurrence that ends with a state."""
        positions = [self.position(earlier) for earlier in range(state + 1)]
        return Recurrence(list(islice(self.rows(), state)), positions, self._beginning.start, None)
