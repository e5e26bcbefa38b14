"""What the backward pass finds of the evaluations of the forward pass."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .evaluation import Evaluation


class Recollection(Protocol):
    """The evaluations of a recurrence, asked for from the last one to the first."""

    def evaluation(self, state: int) -> Evaluation | None:
        """The evaluation at a state; None where there is none, or where f depends on nothing."""

    def slope(self, state: int) -> Tensor:
        """f there. Only where gradients with respect to the times are needed."""

    def increment(self, node: int) -> Tensor:
        """x_n - x_{n-1}. Only where gradients with respect to the times are needed."""


class Kept:
    """All evaluations, with their graphs, since the forward pass.

    Args:
        evaluations: by state.
        states, slopes: X and f(X) by state, where gradients with respect to the times are needed.
        at_node: the state of each node.
    """

    def __init__(
        self,
        evaluations: Mapping[int, Evaluation | None],
        states: Mapping[int, Tensor],
        slopes: Mapping[int, Tensor],
        at_node: Sequence[int],
    ) -> None:
        self._evaluations = evaluations
        self._states = states
        self._slopes = slopes
        self._at_node = at_node

    def evaluation(self, state: int) -> Evaluation | None:
        """See `Recollection`."""
        return self._evaluations.get(state)

    def slope(self, state: int) -> Tensor:
        """See `Recollection`."""
        return self._slopes[state]

    def increment(self, node: int) -> Tensor:
        """See `Recollection`."""
        return self._states[self._at_node[node]] - self._states[self._at_node[node - 1]]
