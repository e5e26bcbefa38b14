"""What it takes to go on from a node of the forward pass, and to run its steps again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from torchdiffeq_lmm.forward.step_evaluator import EvaluateAt, StepEvaluator
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.recurrence import Recurrence

from .evaluation import Recorder
from .rng_state import ForwardContext, RngState


class Snapshot(NamedTuple):
    """What it takes to go on from a node.

    Attributes:
        state: the number of its state.
        history: what the next row knows of the past.
        rng: the state of the random generators.
    """

    state: int
    history: History
    rng: RngState


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
        return Snapshot(state, history.copy(), RngState.now(self._device))


@dataclass(frozen=True)
class Rerun:
    """What it takes to run a solve again.

    Attributes:
        recurrence: its rows.
        steps: from what evaluates f at a state to what `march` needs.
        recorder: evaluates f.
        context: of the forward pass.
        keeps_values: whether the states and slopes are needed besides the graphs.
    """

    recurrence: Recurrence
    steps: Callable[[EvaluateAt], StepEvaluator]
    recorder: Recorder
    context: ForwardContext
    keeps_values: bool

    def snapshots(self, start: Snapshot, stride: int) -> list[Snapshot]:
        """Run all steps once more, for snapshots alone."""
        snapshots = Snapshots(stride, None, start.history.x.device)
        history = start.history.copy()
        with self.context.restored(start.rng), torch.no_grad():
            snapshots.pass_by(start.state, history)
            steps = self.steps(lambda _, time, x: self.recorder.evaluate(time, x))
            rows = self.recurrence.rows
            for state, _ in march(history, rows, steps, steps.solve_implicit):
                if rows[state - 1].is_node and snapshots.pass_by(state, history):
                    steps.restart()
        return snapshots.taken
