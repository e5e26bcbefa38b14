"""Checkpoints: some states of the forward pass are kept, and the evaluations between them made again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import march
from torchdiffeq_lmm.schemes.methods import Method
from torchdiffeq_lmm.schemes.recurrence import Layout

from .checkpoint_segment import SegmentGraph, segment_graph
from .evaluation import Evaluation
from .rerun import Rerun, Snapshot, Snapshots, accepted_difference, check_tolerance, relative_difference
from .stored_evaluations import Record, WithEvaluations


@dataclass(frozen=True)
class Checkpoint:
    """Keep some states of the forward pass, and run the steps from one to the next again in the backward pass.

    For every method. The gradient is that of auto-differentiation, for one more forward pass; where func draws from
    PyTorch's default random generators, as dropout does, it draws the same numbers again. func must otherwise be
    deterministic: where the steps, run again, end up elsewhere, the backward pass raises a RuntimeError. It must not
    keep what it computes from parameters, for the forward pass is without a graph.

    Args:
        count: how many states are kept. By default √N for N steps, which makes the memory least: that of √N states and
            of √N evaluations of func.
        tolerance: by how much the states may differ that the steps, run again, lead to, relative to their entries. By
            default √ε, ε being that of the state's dtype: 1.5e-8 for float64, 3.5e-4 for float32. More may be needed
            where func adds up in an order of its own each time, as some functions do on a GPU.

    Raises:
        TypeError: `count` is not an int, or `tolerance` not a real number.
        ValueError: `count` is not positive, or `tolerance` is negative.

    Source: Griewank, *Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation* (1992), with one level.
    """

    count: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        if self.count is None:
            return
        if not isinstance(self.count, int) or isinstance(self.count, bool):
            raise TypeError(f"count must be an int or None, got {self.count!r}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    def stride(self, steps: int) -> int:
        """The number of steps from one kept state to the next."""
        return math.ceil(steps / (self.count or math.ceil(math.sqrt(steps))))

    @property
    def evaluates_again(self) -> bool:
        """See `BackwardMode`."""
        return True

    def check(self, method: Method, given: object) -> None:
        """See `BackwardMode`."""

    def snapshots(self, steps: int, device: torch.device) -> Snapshots:
        """See `BackwardMode`."""
        return Snapshots(self.stride(steps), None, device)

    def evaluations(self, record: Record) -> WithEvaluations:
        """See `BackwardMode`."""
        assert record.snapshots is not None
        rerun, end, x = record.rerun, record.rerun.recurrence.nodes[-1], record.history.x
        taken = record.snapshots.taken
        return lambda gradients: gradients(Checkpoints(rerun, between(taken, end, x), self.tolerance))


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
        tolerance: see `Checkpoint`.
    """

    def __init__(self, rerun: Rerun, segments: Iterator[Segment], tolerance: float | None = None) -> None:
        self._rerun = rerun
        self._tolerance = tolerance
        self._rows = rerun.recurrence.rows
        self._layout = Layout(self._rows)
        self._segments = segments
        self._begin: Snapshot | None = None
        self._evaluations: dict[int, Evaluation | None] = {}
        self._states: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}

    def segment_graphs(self) -> Iterator[SegmentGraph] | None:
        """See `StoredEvaluations`."""
        if any(row.implicit is not None for row in self._rows):
            return None
        return self._segment_graphs()

    def _segment_graphs(self) -> Iterator[SegmentGraph]:
        for segment in self._segments:
            first, _, rng = segment.begin
            rows = self._rows[first : segment.end]
            with self._rerun.context.restored(rng):
                steps = self._rerun.steps(self._rerun.recorder.connect)
                graph = segment_graph(segment.begin.history, rows, steps, steps.solve_implicit, first)
            self._check_same(graph.end[0].detach(), segment.x)
            self._rerun.recorder.check(graph.end, graph.begin)
            yield graph

    def evaluation(self, state: int) -> Evaluation | None:
        """See `StoredEvaluations`.

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
        """See `StoredEvaluations`."""
        if state in self._slopes:
            return self._slopes[state]
        assert self._begin is not None
        first, history, _ = self._begin
        # The first row of the segment may have evaluated one more.
        newer = int(self._rows[first].evaluates)
        known = (self._layout.slope(first, lag + newer) for lag in range(len(history.slopes)))
        return dict(zip(known, history.slopes, strict=True))[state]

    def increment(self, node: int) -> Tensor:
        """See `StoredEvaluations`."""
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
        first, history, rng = segment.begin
        self._states, self._slopes = {first: history.x}, {}

        def evaluate(state: int, user_time: Tensor, x: Tensor) -> Tensor:
            slope, self._evaluations[state] = self._rerun.recorder.record(user_time, x)
            if self._rerun.keeps_values:
                # func may return the same memory again and again.
                self._slopes[state] = slope.detach().clone()
            return slope.detach()

        history = history.copy()
        with self._rerun.context.restored(rng), torch.no_grad():
            steps = self._rerun.steps(evaluate)
            for state, x in march(history, self._rows[first : segment.end], steps, steps.solve_implicit, first):
                if self._rerun.keeps_values:
                    self._states[state] = x
        self._check_same(history.x, segment.x)

    def _check_same(self, reached: Tensor, known: Tensor) -> None:
        difference = relative_difference(reached, known)
        # Where the solution is not a number, the gradient is none either, and says so itself.
        tolerance = self._rerun.tolerance
        if tolerance is not None and bool(((reached - known).abs() <= tolerance(known)).all()):
            return
        if difference > accepted_difference(self._tolerance, known.dtype):
            raise RuntimeError(
                "func gave other values when it was evaluated again for the backward pass: the states differ by up to "
                f"{difference:.3g}, relative to their entries. With backward='checkpoint' it must be deterministic but "
                "for PyTorch's default random generators, and nothing that it uses may change in between; where func "
                "adds up in an order of its own each time, give Checkpoint a larger tolerance"
            )
