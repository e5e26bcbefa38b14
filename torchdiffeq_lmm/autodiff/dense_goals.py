"""What a piece of adaptive steps is solved for: outputs at given times, or an event, by the steps' polynomials."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from torchdiffeq_lmm.forward.adaptive_steps import AdaptiveSteps
from torchdiffeq_lmm.forward.dense_output import Span, interpolated
from torchdiffeq_lmm.forward.events import EventSign
from torchdiffeq_lmm.forward.outputs import Trajectory

from .piece import Slopes


class _Dense:
    """The latest states, as many as a polynomial may go through.

    Args:
        source: the steps of the piece.

    Attributes:
        slopes: see `Goal`.
        span: the states of the polynomial of the last step.
    """

    def __init__(self, source: AdaptiveSteps) -> None:
        self.slopes: Mapping[int, int] | None = {}
        self.span = Span(0, 0)
        self._source = source
        self._latest: dict[int, Tensor] = {}

    def pass_by(self, node: int, state: int, x: Tensor, slopes: Slopes) -> None:  # noqa: ARG002
        """See `Goal`."""
        self._latest[node] = x
        self._latest.pop(node - self._source.memory, None)
        if node > 0:
            self.span = Span(node, self._source.reach(node))

    def _states(self) -> dict[int, Tensor]:
        """The states of the span."""
        return {node: self._latest[node] for node in self.span.nodes}


class DenseOutputs(_Dense):
    """Outputs at given times; see `piece.Goal`.

    Args:
        source: the steps of the piece.
        times: of the outputs, increasing numbers, after its first node.

    Attributes:
        is_reached: see `Goal`.
        spans: the states that each output is made of.
    """

    def __init__(self, source: AdaptiveSteps, times: Sequence[float]) -> None:
        super().__init__(source)
        self.is_reached = None
        self.spans: list[Span] = []
        self._times = times
        self._trajectory = Trajectory()

    def pass_by(self, node: int, state: int, x: Tensor, slopes: Slopes) -> None:
        """See `Goal`."""
        super().pass_by(node, state, x, slopes)
        if node == 0:
            return
        source, before = self._source, len(self.spans)
        while len(self.spans) < len(self._times) and self._times[len(self.spans)] <= source.times[node]:
            self.spans.append(self.span)
        if len(self.spans) > before:
            # torchdiffeq limits the steps from one output to the next.
            source.attempts = 0
        if len(self.spans) > before or node == source.count:
            self._trajectory.states.update(self._states())

    def trajectory(self, slopes: Slopes) -> Trajectory:  # noqa: ARG002
        """See `Goal`."""
        return self._trajectory

    def output(self, index: int, time: Tensor, trajectory: Trajectory) -> Tensor:
        """The output at one of the times, with the graph of the time where it has one."""
        return state_at(self._source, self.spans[index], time, trajectory)


class DenseUntilEvent(_Dense):
    """The states of the step in which an event is, or the last one where there is none; see `piece.Goal`.

    Args:
        source: the steps of the piece.
        sign: of the event function.
        before: what it is at the beginning of the solve.

    Attributes:
        is_event: whether it was found.
    """

    def __init__(self, source: AdaptiveSteps, sign: EventSign, before: float) -> None:
        super().__init__(source)
        self.is_event = False
        self._sign = sign
        self._before = before

    def is_reached(self, node: int, x: Tensor) -> bool:
        """See `Goal`."""
        self.is_event = node > 0 and self._sign(self._source.time_of(node), x) != self._before
        return self.is_event

    def trajectory(self, slopes: Slopes) -> Trajectory:  # noqa: ARG002
        """See `Goal`."""
        return Trajectory(self._states())


def state_at(source: AdaptiveSteps, span: Span, time: Tensor, trajectory: Trajectory) -> Tensor:
    """The state in the last step of a span, with the graph of the time and of the first node's, where they have one."""
    node = span.node
    step = source.times[node] - source.times[node - 1]
    if not (time.requires_grad or source.requires_grad):
        fraction = (float(time) - source.times[node]) / step
        return (
            trajectory.states[node] if fraction == 0 else interpolated(span, source.times, trajectory.states, fraction)
        )
    at = (time.double().cpu() - source.time_of(node).double().cpu()) / step
    state = interpolated(span, source.times, trajectory.states, at)
    # At a node exactly its state.
    return state if at != 0 else trajectory.states[node].detach() + (state - state.detach())
