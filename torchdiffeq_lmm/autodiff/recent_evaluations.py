"""The evaluations at the latest nodes, kept in the backward pass for a filter that needs those of several at once."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .checkpoint_segment import SegmentGraph
from .evaluation import Evaluation
from .stored_evaluations import StoredEvaluations


class RecentEvaluations:
    """Stored evaluations of which those at some nodes can be asked for once more.

    Args:
        stored: the evaluations.
        nodes: the state at each node.
        reach: at how many nodes after the latest one.
    """

    def __init__(self, stored: StoredEvaluations, nodes: Sequence[int], reach: int) -> None:
        self._stored = stored
        self._nodes = set(nodes)
        self._count = reach + 1
        self._kept: dict[int, Evaluation | None] = {}

    def evaluation(self, state: int) -> Evaluation | None:
        """See `StoredEvaluations`."""
        if state in self._kept:
            return self._kept[state]
        found = self._stored.evaluation(state)
        if state in self._nodes:
            self._kept[state] = found
            if len(self._kept) > self._count:
                del self._kept[max(self._kept)]
        return found

    def slope(self, state: int) -> Tensor:
        """See `StoredEvaluations`."""
        return self._stored.slope(state)

    def increment(self, node: int) -> Tensor:
        """See `StoredEvaluations`."""
        return self._stored.increment(node)

    def segment_graphs(self) -> Iterator[SegmentGraph] | None:
        """See `StoredEvaluations`."""
        return self._stored.segment_graphs()
