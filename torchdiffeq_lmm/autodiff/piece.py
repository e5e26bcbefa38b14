"""One piece of a solve, from one jump of f to the next: its steps, what outputs need of them, their graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.filter_plan import FilterPlan, plan_filter, step_to_end
from torchdiffeq_lmm.filters.grad_filter import CostateFilter
from torchdiffeq_lmm.forward.outputs import Trajectory
from torchdiffeq_lmm.forward.samples import Systems
from torchdiffeq_lmm.forward.step_evaluator import SolvesSteps, StepEvaluator
from torchdiffeq_lmm.forward.step_source import FixedSteps, GridSteps, Made, StepSource
from torchdiffeq_lmm.forward.stepping import History
from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.schemes.methods import Method, MultistepMethod
from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily
from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .autograd_function import Keeper
from .solve_recorder import Parameters, SolveRecorder
from .stored_evaluations import BackwardMode


class Goal(Protocol):
    """What a piece is solved for, and when it ends.

    Attributes:
        slopes: the states whose slopes are kept, with their nodes; None for all, by state.
    """

    slopes: Mapping[int, int] | None

    @property
    def is_reached(self) -> Callable[[int, Tensor], bool] | None:
        """From a node and its state to whether the piece ends there; None where only its steps end it."""

    def pass_by(self, node: int, state: int, x: Tensor, slopes: "Slopes") -> None:
        """Take what is needed of a node, whose state has a number."""

    def trajectory(self, slopes: "Slopes") -> Trajectory:
        """What has been taken, at the end."""


class Piece(NamedTuple):
    """What has become of a piece.

    Attributes:
        trajectory: what its goal has asked for, with a graph where there is one.
        steps: that have been made.
        keeper: keeps the graph: see `autograd_function.stack`.
    """

    trajectory: Trajectory
    steps: Made
    keeper: Keeper | None


@dataclass(frozen=True)
class PieceSolver:
    """Solves the pieces of one solve.

    Attributes:
        vector_field: f.
        method: the method.
        mode: how the backward pass finds the evaluations of f.
        parameters: see `SolveRecorder`.
        costate_filter: the filter; None for the gradient of auto-differentiation.
        implicit: makes what solves implicit rows.
        systems: into which implicit equations fall.
        callback_step: ``callback_step(t, x, step)``, called before every step; or None.
        max_steps: of a piece whose steps have no end.
        tolerance: from a state to by how much its entries may differ where steps are made again; None for rounding.
    """

    vector_field: VectorField
    method: Method
    mode: BackwardMode
    parameters: Parameters | None
    costate_filter: CostateFilter | None
    implicit: Callable[[], SolvesSteps]
    systems: Systems
    callback_step: Callable[[Tensor, Tensor, Tensor], object] | None
    max_steps: int
    tolerance: Callable[[Tensor], Tensor] | None = None

    def solve(
        self, source: StepSource, y0: Tensor, goal: Goal, before: FixedSteps | None, after: GridSteps | None
    ) -> Piece:
        """Solve one piece.

        Args:
            source: its steps.
            y0: the state at its beginning.
            goal: what it is solved for.
            before, after: the steps of the pieces before and after it.
        """
        recorder = self._recorder(source, y0)
        slopes = Slopes(self, source, recorder, goal.slopes)
        history = History(y0 if recorder is None else y0.detach())
        node, is_reached = 0, False
        time, is_node, ends_at, pass_by = source.time_of, source.is_node, goal.is_reached, goal.pass_by
        steps = source.states(history, slopes, slopes.solve_implicit, differentiable=recorder is None)
        for state, x in chain([(0, history.x)], steps):
            if not is_node(state):
                continue
            is_reached = ends_at is not None and ends_at(node, x)
            is_last = is_reached or node == source.count
            if recorder is not None and not is_last:
                recorder.pass_by(state, history, slopes.steps)
            pass_by(node, state, x, slopes)
            if is_last:
                break
            if self.callback_step is not None:
                self.callback_step(time(node), x, time(node + 1) - time(node))
            node += 1
        trajectory = goal.trajectory(slopes)
        trajectory.states[0] = y0
        made = source.until(state, node)
        if recorder is None:
            return Piece(trajectory, made, None)
        plan = self._plan(made, before, None if is_reached else after)
        attached = recorder.attach(trajectory, made.user_times, made.recurrence, plan, history, slopes.again)
        return Piece(attached[0], made, attached[1])

    def _recorder(self, source: StepSource, y0: Tensor) -> SolveRecorder | None:
        is_plain = self.costate_filter is None and not self.mode.evaluates_again and not self.method.is_implicit
        if is_plain or not torch.is_grad_enabled():
            return None
        steps = self.max_steps if source.count is None else source.count
        field = self.vector_field
        return SolveRecorder(
            field,
            field.precision,
            self.systems,
            y0,
            source.requires_grad,
            self.mode,
            self.parameters,
            steps,
            self.tolerance,
        )

    def _plan(self, steps: Made, before: FixedSteps | None, after: GridSteps | None) -> FilterPlan | None:
        if self.costate_filter is None:
            return None
        method = self.method if isinstance(self.method, MultistepMethod | VariableOrderFamily) else None
        step_before = None if before is None else step_to_end(before.recurrence, before.lengths, method)
        step_after = None if after is None else after.first_step
        wanted = self.costate_filter
        return plan_filter(
            wanted.weights,
            steps.recurrence,
            steps.lengths,
            method,
            step_before,
            step_after,
            wanted.highest_order,
        )


class Slopes:
    """f at the states of one piece, and what is kept of it for outputs.

    Args:
        solver: of the piece.
        source: its steps.
        recorder: what records the evaluations, or None.
        wanted: see `Goal`.

    Attributes:
        kept: the slopes that are kept.
        steps: f as the stepping loop asks for it.
        again: makes the same for another time, from what evaluates f: see `Rerun`.
    """

    def __init__(
        self,
        solver: PieceSolver,
        source: StepSource,
        recorder: SolveRecorder | None,
        wanted: Mapping[int, int] | None,
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._vector_field = field = solver.vector_field
        self._recorder = recorder
        self._user_time = source.user_time
        self._user_time_at_end = source.user_time_at_end
        self._wanted = wanted
        self._evaluate = _evaluation_of(field, recorder, wanted or {})
        self.again = partial(StepEvaluator, field, solver.implicit, solver.method.name, source.user_time)
        self.steps = self.again(self._evaluate, records=recorder is not None)

    def __call__(self, state: int, x: Tensor) -> Tensor:
        """F at a state."""
        slope = self._evaluate(state, self._user_time(state), x)
        if self._wanted is None or state in self._wanted:
            self._keep(state, slope)
        return slope

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `StepEvaluator`."""
        increment, slope = self.steps.solve_implicit(state, x, known, weight, guess)
        self._keep(state, slope)
        return increment, slope

    def at_end(self, node: int, state: int, x: Tensor) -> Tensor:
        """f at a node, outside the recurrence."""
        user_time = self._user_time_at_end(node, state)
        if self._recorder is not None:
            return self._recorder.evaluate_end(node, user_time, x).clone()
        return self._vector_field(user_time, x).clone()

    def is_kept(self, state: int) -> bool:
        """Whether a slope that was not asked for beforehand is kept, with its evaluation."""
        return state in self.kept and (self._recorder is None or self._recorder.keeps)

    def forget(self, state: int) -> None:
        """Drop the slopes before a state."""
        for earlier in [kept for kept in self.kept if kept < state]:
            del self.kept[earlier]

    def _keep(self, state: int, slope: Tensor) -> None:
        key = state if self._wanted is None else self._wanted.get(state)
        if key is not None:
            # func may return the same memory again and again.
            self.kept[key] = slope.clone()


def _evaluation_of(
    vector_field: VectorField, recorder: SolveRecorder | None, wanted: Mapping[int, int]
) -> Callable[[int, Tensor, Tensor], Tensor]:
    if recorder is None:
        return lambda _, user_time, x: vector_field(user_time, x)
    return lambda state, user_time, x: recorder.evaluate(state, user_time, x, keep=state in wanted)
