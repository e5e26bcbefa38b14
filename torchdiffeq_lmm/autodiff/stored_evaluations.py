"""How the backward pass finds the evaluations of the forward pass again: what a backward mode is; all of them kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History
from torchdiffeq_lmm.schemes.methods import Method

from .checkpoint_segment import SegmentGraph
from .evaluation import Evaluation
from .rerun import Rerun, Snapshots


class StoredEvaluations(Protocol):
    """The evaluations of a recurrence, asked for from the last one to the first."""

    def evaluation(self, state: int) -> Evaluation | None:
        """The evaluation at a state; None where there is none, or where f depends on nothing."""

    def slope(self, state: int) -> Tensor:
        """f there. Only where gradients with respect to the times are needed."""

    def increment(self, node: int) -> Tensor:
        """x_n - x_{n-1}. Only where gradients with respect to the times are needed."""

    def segment_graphs(self) -> Iterator[SegmentGraph] | None:
        """All explicit steps as graphs instead, the last ones first; None where they cannot be had."""


Gradients = tuple[Tensor | None, ...]
WithEvaluations = Callable[[Callable[[StoredEvaluations], Gradients]], Gradients]
"""Works out gradients, given how, with the evaluations."""


@dataclass(frozen=True)
class Record:
    """What a forward pass has left for the backward pass.

    Attributes:
        evaluations: those that have been kept, by state.
        states, slopes: X and f(X) by state, where all evaluations are kept and gradients with respect to the times are
            needed.
        rerun: what it takes to run the solve again.
        snapshots: on the way.
        history: the past, at the end.
    """

    evaluations: Mapping[int, Evaluation | None]
    states: Mapping[int, Tensor]
    slopes: Mapping[int, Tensor]
    rerun: Rerun
    snapshots: Snapshots | None
    history: History


class BackwardMode(Protocol):
    """A way to find the evaluations again, which users can ask for."""

    def check(self, method: Method, given: object) -> None:
        """Raise a ValueError where it is not for the method; `given` is what the user has asked for."""

    def snapshots(self, steps: int, device: torch.device) -> Snapshots | None:
        """What takes the snapshots of a solve of at most so many steps; None where every evaluation is kept instead."""

    def evaluations(self, record: Record) -> WithEvaluations:
        """What the backward pass begins with."""

    @property
    def evaluates_again(self) -> bool:
        """Whether func is evaluated in the backward pass, so that it must be known beforehand what it depends on."""


@dataclass(frozen=True)
class Autograd:
    """Keep all evaluations with their graphs, as auto-differentiation does."""

    @property
    def evaluates_again(self) -> bool:
        """See `BackwardMode`."""
        return False

    def check(self, method: Method, given: object) -> None:
        """See `BackwardMode`."""

    def snapshots(self, steps: int, device: torch.device) -> None:  # noqa: ARG002
        """See `BackwardMode`."""
        return

    def evaluations(self, record: Record) -> WithEvaluations:
        """See `BackwardMode`."""
        # Not the record, which leads to func, and so perhaps back to the outputs.
        kept = Kept(record.evaluations, record.states, record.slopes, record.rerun.recurrence.nodes)
        return lambda gradients: gradients(kept)


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
        """See `StoredEvaluations`."""
        return self._evaluations.get(state)

    def slope(self, state: int) -> Tensor:
        """See `StoredEvaluations`."""
        return self._slopes[state]

    def increment(self, node: int) -> Tensor:
        """See `StoredEvaluations`."""
        return self._states[self._at_node[node]] - self._states[self._at_node[node - 1]]

    def segment_graphs(self) -> None:
        """See `StoredEvaluations`."""
        return
