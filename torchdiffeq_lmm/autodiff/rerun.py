"""What it takes to go on from a node of the forward pass, and to run its steps again."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        tolerance: from a state to by how much its entries may differ, where they are not made by the same iterations;
            None for rounding.
    """

    recurrence: Recurrence
    steps: Callable[[EvaluateAt], StepEvaluator]
    recorder: Recorder
    context: ForwardContext
    keeps_values: bool
    tolerance: Callable[[Tensor], Tensor] | None = None

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


def relative_difference(reached: Tensor, known: Tensor) -> float:
    """The largest difference of two states, relative to the entries; NaN where one is not a number."""
    return relative_differences(reached.unsqueeze(0), known.unsqueeze(0))


def relative_differences(reached: Tensor, known: Tensor) -> float:
    """The same of pairs of states, of shape (n, *x.shape)."""
    if not known.numel():
        return 0.0
    sizes, of_dtype = known.abs(), torch.finfo(known.dtype)
    # An entry may pass through 0, or be so small beside others that their rounding is all that it has.
    largest = sizes.amax(tuple(range(1, sizes.ndim)), keepdim=True) if sizes.ndim > 1 else sizes
    smallest = (of_dtype.eps**0.25 * largest).clamp_(min=of_dtype.tiny)
    return float((reached - known).abs().div_(torch.maximum(sizes, smallest)).max())


def accepted_difference(tolerance: float | None, dtype: torch.dtype) -> float:
    """By how much states that are made again may differ, relative to their entries: √ε of the dtype, if not given."""
    return torch.finfo(dtype).eps ** 0.5 if tolerance is None else tolerance


def check_tolerance(tolerance: Any) -> None:
    """Raise a TypeError or a ValueError unless `tolerance` is None or a number that is not negative."""
    if tolerance is None:
        return
    if not isinstance(tolerance, Real) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance must be a real number or None, got {tolerance!r}")
    if not float(tolerance) >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
