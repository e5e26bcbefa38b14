"""Some states of the forward pass are kept; the evaluations between them are made again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.recurrence import Layout, Recurrence

from .checkpoint_segment import Stretch, connect
from .evaluation import Evaluation, Recorder
from .rng_state import Circumstances, RandomState


class Snapshot(NamedTuple):
    """What it takes to go on from a node.

    Attributes:
        state: the number of its state.
        history: what the next row knows of the past.
        random: the state of the random generators.
    """

    state: int
    history: History
    random: RandomState


class Snapshots:
    """Takes a snapshot at every so many nodes.

    Args:
        stride: the number of steps from one to the next.
        also: a node at which one is taken in any case.
        device: of the solve.
    """

    def __init__(self, stride: int, also: int | None, device: torch.device) -> None:
        self.taken: list[Snapshot] = []
        self._stride = stride
        self._also = also
        self._device = device
        self._node = 0

    def pass_by(self, state: int, history: History) -> bool:
        """Take a snapshot at the next node, if one is due; tell whether it was."""
        due = self._node % self._stride == 0 or self._node == self._also
        self._node += 1
        if due:
            self.taken.append(self.at(state, history))
        return due

    def at(self, state: int, history: History) -> Snapshot:
        """A snapshot in any case."""
        return Snapshot(state, history.copy(), RandomState.now(self._device))


class Steps(Protocol):
    """Evaluates f and solves implicit rows, as `march` needs it."""

    def __call__(self, state: int, x: Tensor) -> Tensor:
        """F at a state."""

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: float | Tensor, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The increment and the slope of an implicit row."""

    def restart(self) -> None:
        """Forget what implicit rows have learned from those before."""


@dataclass(frozen=True)
class Rerun:
    """What it takes to run a solve again.

    Attributes:
        recurrence: its rows.
        steps: from what evaluates f at a state, given its number, its time and itself, to what `march` needs.
        recorder: evaluates f.
        circumstances: of the forward pass.
        keeps_values: whether the states and slopes are needed besides the graphs.
    """

    recurrence: Recurrence
    steps: Callable[[Callable[[int, Tensor, Tensor], Tensor]], Steps]
    recorder: Recorder
    circumstances: Circumstances
    keeps_values: bool

    def snapshots(self, start: Snapshot, stride: int) -> list[Snapshot]:
        """Run all steps once more, for snapshots alone."""
        snapshots = Snapshots(stride, None, start.history.x.device)
        history = start.history.copy()
        with self.circumstances.restored(start.random), torch.no_grad():
            snapshots.pass_by(start.state, history)
            steps = self.steps(lambda _, time, x: self.recorder.evaluate(time, x))
            rows = self.recurrence.rows
            for state, _ in march(history, rows, steps, steps.solve_implicit):
                if rows[state - 1].is_node and snapshots.pass_by(state, history):
                    steps.restart()
        return snapshots.taken


class Segment(NamedTuple):
    """Some steps on end, to be made again.

    Attributes:
        begin: what they begin with.
        end: the number of the state that they lead to.
        x: that state, as it is known.
    """

    begin: Snapshot
    end: int
    x: Tensor


def between(snapshots: Sequence[Snapshot], end: int, x: Tensor) -> Iterator[Segment]:
    """The segments from one snapshot to the next, the last one first.

    Args:
        snapshots: from the first state on.
        end: the number of the last state.
        x: the last state.
    """
    for snapshot in reversed(snapshots):
        yield Segment(snapshot, end, x)
        end, x = snapshot.state, snapshot.history.x


class Checkpoints:
    """The evaluations of a solve, made again from one state that is known to the next.

    Args:
        rerun: how.
        segments: all steps, the last ones first.
    """

    def __init__(self, rerun: Rerun, segments: Iterator[Segment]) -> None:
        self._rerun = rerun
        self._rows = rerun.recurrence.rows
        self._layout = Layout(self._rows)
        self._segments = segments
        self._begin: Snapshot | None = None
        self._evaluations: dict[int, Evaluation | None] = {}
        self._states: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}

    def stretches(self) -> Iterator[Stretch]:
        """All steps as graphs, instead of one evaluation after the other, the last ones first."""
        for segment in self._segments:
            first, _, random = segment.begin
            rows = self._rows[first : segment.end]
            with self._rerun.circumstances.restored(random):
                steps = self._rerun.steps(self._rerun.recorder.connect)
                stretch = connect(segment.begin.history, rows, steps, steps.solve_implicit, first)
            _check_same(stretch.end[0].detach(), segment.x)
            self._rerun.recorder.check(stretch.end, stretch.begin)
            yield stretch

    def evaluation(self, state: int) -> Evaluation | None:
        """See `Recollection`.

        Raises:
            RuntimeError: the steps, run again, lead elsewhere than the first time.
        """
        if not self._rerun.recurrence.evaluated[state]:
            return None
        # An implicit row evaluates f at the state that it makes.
        row = state - 1 if state and self._rows[state - 1].implicit is not None else state
        while self._begin is None or row < self._begin.state:
            segment = next(self._segments)
            self._begin = segment.begin
            if row >= segment.begin.state:
                self._run(segment)
        return self._evaluations[state]

    def slope(self, state: int) -> Tensor:
        """See `Recollection`."""
        if state in self._slopes:
            return self._slopes[state]
        assert self._begin is not None
        first, history, _ = self._begin
        # The first row of the segment may have evaluated one more.
        newer = int(self._rows[first].evaluates)
        known = (self._layout.slope(first, lag + newer) for lag in range(len(history.slopes)))
        return dict(zip(known, history.slopes, strict=True))[state]

    def increment(self, node: int) -> Tensor:
        """See `Recollection`."""
        assert self._begin is not None
        first, history, _ = self._begin
        at_node = self._rerun.recurrence.nodes
        if at_node[node] > first:
            return self._states[at_node[node]] - self._states[at_node[node - 1]]
        if history.increments:
            return history.increments[self._layout.node_before[first] - node]
        assert history.previous is not None
        return history.x - history.previous

    def _run(self, segment: Segment) -> None:
        """Make the evaluations of a segment."""
        self._evaluations = {}
        first, history, random = segment.begin
        self._states, self._slopes = {first: history.x}, {}

        def evaluate(state: int, user_time: Tensor, x: Tensor) -> Tensor:
            slope, self._evaluations[state] = self._rerun.recorder.record(user_time, x)
            if self._rerun.keeps_values:
                # func may return the same memory again and again.
                self._slopes[state] = slope.detach().clone()
            return slope.detach()

        history = history.copy()
        with self._rerun.circumstances.restored(random), torch.no_grad():
            steps = self._rerun.steps(evaluate)
            for state, x in march(history, self._rows[first : segment.end], steps, steps.solve_implicit, first):
                if self._rerun.keeps_values:
                    self._states[state] = x
        _check_same(history.x, segment.x)


def relative_difference(reached: Tensor, known: Tensor) -> float:
    """The largest difference of two states, relative to the entries; NaN where one is not a number."""
    if not known.numel():
        return 0.0
    sizes, of_dtype = known.abs(), torch.finfo(known.dtype)
    # An entry may pass through 0, or be so small beside others that their rounding is all that it has.
    smallest = (of_dtype.eps**0.25 * sizes.max()).clamp_(min=of_dtype.tiny)
    return float((reached - known).abs().div_(torch.maximum(sizes, smallest)).max())


def _check_same(reached: Tensor, known: Tensor) -> None:
    difference = relative_difference(reached, known)
    # Where the solution is not a number, the gradient is none either, and says so itself.
    if difference > torch.finfo(known.dtype).eps ** 0.5:
        raise RuntimeError(
            "func gave other values when it was evaluated again for the backward pass: the states differ by up to "
            f"{difference:.3g}, relative to their entries. With backward='checkpoint' it must be deterministic but for "
            "PyTorch's default random generators, and nothing that it uses may change in between"
        )
