"""What a piece of a solve is solved for: outputs at given times, or an event."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor

from torchdiffeq_lmm.filters.smoothed_observation import observed
from torchdiffeq_lmm.forward.events import EventSign
from torchdiffeq_lmm.forward.grid import Placement
from torchdiffeq_lmm.forward.outputs import OutputRule, Trajectory
from torchdiffeq_lmm.forward.step_source import FixedSteps, StepSource
from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .piece import Slopes


class NodeSlopes(Protocol):
    """What of `piece.Slopes` outputs at given times use."""

    @property
    def kept(self) -> dict[int, Tensor]:
        """See there."""

    def at_end(self, node: int, state: int, x: Tensor) -> Tensor:
        """See there."""


class Outputs:
    """Outputs at given times; see `piece.Goal`.

    Args:
        source: the steps of the piece.
        placements: where the outputs are among them.
        rule: how they are made.
        smooth: whether states at nodes are to be smoothed, which takes the nodes before them and the slopes.

    Attributes:
        slopes, is_reached: see `Goal`.
        nodes: those whose states the outputs are made of, and the last one.
        states: the same, and what smoothing them takes besides.
    """

    def __init__(self, source: FixedSteps, placements: Sequence[Placement], rule: OutputRule, smooth: bool) -> None:
        at_node = source.recurrence.nodes
        evaluated = [source.recurrence.evaluated[state] for state in at_node]
        wanted = rule.wanted([*placements, Placement(source.count)], evaluated)
        self.nodes = sorted(wanted.states)
        if smooth:
            wanted.add_neighbours(evaluated)
        self.slopes: Mapping[int, int] | None = {at_node[node]: node for node in wanted.slopes}
        self.states = sorted(wanted.states)
        self._wanted = wanted
        self._trajectory = Trajectory()
        self.is_reached = None

    @property
    def slope_nodes(self) -> set[int]:
        """The nodes whose slopes the outputs are made of."""
        return self._wanted.slopes | self._wanted.end_slopes

    def pass_by(self, node: int, state: int, x: Tensor, slopes: NodeSlopes) -> None:
        """See `Goal`."""
        if node in self._wanted.states:
            self._trajectory.states[node] = x
        if node in self._wanted.end_slopes:
            self._trajectory.end_slopes[node] = slopes.at_end(node, state, x)

    def trajectory(self, slopes: NodeSlopes) -> Trajectory:
        """See `Goal`."""
        return Trajectory(self._trajectory.states, slopes.kept, self._trajectory.end_slopes)


class Search(NamedTuple):
    """For an event.

    Attributes:
        sign: of the event function.
        before: what it is at the beginning of the solve.
        tolerance: for the time of the event.
        max_steps: after how many steps it is given up.
        step_size: their length, for messages.
    """

    sign: EventSign
    before: float
    tolerance: float
    max_steps: int
    step_size: float


class _Node(NamedTuple):
    node: int
    state: int
    x: Tensor


class UntilEvent:
    """The states around an event, or at the end of a piece where there is none; see `piece.Goal`.

    Args:
        source: the steps of the piece.
        search: for the event.
        made: how many steps have been made before this piece.
        is_cubic: whether the state at the event needs the slopes around it.
        smooth: whether the states at the end of any piece do, to be smoothed.
        left_slopes: see `OutputRule`.

    Attributes:
        is_event: whether it was found.
        node: the last one before the event, or before the end.
    """

    def __init__(
        self, source: StepSource, search: Search, made: int, is_cubic: bool, smooth: bool, left_slopes: bool
    ) -> None:
        self.slopes: Mapping[int, int] | None = None if is_cubic else {}
        self.is_event = False
        self._source = source
        self._search = search
        self._made = made
        self._is_cubic = is_cubic
        self._smooth = smooth
        self._left_slopes = left_slopes
        self._latest: list[_Node] = []

    @property
    def node(self) -> int:
        """See above."""
        return self._latest[-2].node

    def is_reached(self, node: int, x: Tensor) -> bool:
        """See `Goal`."""
        self.is_event = node > 0 and self._search.sign(self._source.time_of(node), x) != self._search.before
        return self.is_event

    def pass_by(self, node: int, state: int, x: Tensor, slopes: Slopes) -> None:
        """See `Goal`.

        Raises:
            RuntimeError: there have been too many steps.
        """
        if not self.is_event and self._made + node >= self._search.max_steps:
            raise RuntimeError(
                f"event_fn did not change its sign within {self._search.max_steps} steps of step_size "
                f"{self._search.step_size}, the most that are made; if there is an event later, use a larger step_size"
            )
        if self._latest:
            slopes.forget(self._latest[-1].state)
        self._latest = [*self._latest[-2:], _Node(node, state, x)]

    def trajectory(self, slopes: Slopes) -> Trajectory:
        """See `Goal`."""
        found = Trajectory({node: x for node, _, x in self._latest})
        needs_slopes = self._smooth or (self._is_cubic and self.is_event)
        for node, state, x in self._latest[-2:] if needs_slopes else ():
            is_end = node == self._latest[-1].node
            if slopes.is_kept(state) and not (self._left_slopes and is_end):
                found.slopes[node] = slopes.kept[state]
            else:
                found.end_slopes[node] = slopes.at_end(node, state, x)
        return found


def smoothed(trajectory: Trajectory, nodes: Iterable[int], steps: Sequence[Weight]) -> Trajectory:
    """A trajectory whose states at some nodes are smoothed observations, with the lengths of all steps."""
    states = dict(trajectory.states)
    for node in nodes:
        if node > 0:
            of_node = trajectory.states[node], trajectory.states[node - 1], trajectory.start_slope(node)
            states[node] = observed(*of_node, steps[node - 1])
    return replace(trajectory, states=states)
