"""A solve as one node of autograd, so that its backward can tell the parameter path from the state path.

While the solver steps, every evaluation of f is recorded on detached copies of its arguments: a small graph of its own
that leads to the parameters, whatever they are and wherever f finds them. Or it is not, and will be made again in the
backward pass. Afterwards one node attaches the trajectory to autograd; its inputs are y0, the times and the parameters.
Its backward runs the discrete adjoint for the states, with one linear equation for every implicit step, and returns the
gradients of the parameters, from the cotangents of the values of f, filtered or not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.costate import filtered_cotangents
from torchdiffeq_lmm.filters.filter_plan import FilterPlan
from torchdiffeq_lmm.forward.autograd_state import refuse_tangents
from torchdiffeq_lmm.forward.stepping import History
from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, discrete_adjoint, weight_gradients
from torchdiffeq_lmm.schemes.recurrence import Layout, Recurrence

from .autograd_function import Keeper, attach
from .backward_modes import Checkpoint, Reversible
from .checkpoint_segment import pull_back
from .checkpoints import Checkpoints, Rerun, Snapshot, Snapshots, Steps, between
from .evaluation import Evaluation, Recorder
from .reversal import DriftError, Reversal
from .rng_state import Circumstances, RandomState
from .stored_evaluations import Kept, Recollection
from .vjp import Linearisation, ParameterGradients


@dataclass(frozen=True)
class Trajectory:
    """The states x_n and the values of f that the outputs of a solve are made of, by node.

    Attributes:
        states: x_n.
        slopes: f_n of the recurrence.
        end_slopes: f where the recurrence has no value for it: at the last node, with `perturb` from the left of any,
            and at the first node for methods that do not evaluate it there.
        keeper: of the solve that they have the graph of; None where there is none.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    slopes: dict[int, Tensor] = field(default_factory=dict)
    end_slopes: dict[int, Tensor] = field(default_factory=dict)
    keeper: Keeper | None = None

    def start_slope(self, node: int) -> Tensor:
        """f at the left end of the step that starts at `node`."""
        return self.slopes[node] if node in self.slopes else self.end_slopes[node]

    def end_slope(self, node: int) -> Tensor:
        """f at the right end of the step that ends at `node`."""
        return self.end_slopes[node] if node in self.end_slopes else self.slopes[node]


class Parameters(NamedTuple):
    """The tensors whose gradients are wanted, for a backward pass that evaluates f again.

    Attributes:
        tensors: leaves or not, all of which require a gradient.
        are_all: whether func must not depend on others.
    """

    tensors: tuple[Tensor, ...]
    are_all: bool


class Tape:
    """Records the evaluations of f in one solve, or what it takes to make them again.

    Args:
        vector_field: f.
        y0: the initial state.
        differentiate_times: whether gradients with respect to the times of the nodes are needed.
        backward: how to make the evaluations again; None to keep them.
        parameters: what f depends on; None if the evaluations are kept.
        steps: how many steps there will be, or at most.
    """

    def __init__(
        self,
        vector_field: VectorField,
        y0: Tensor,
        differentiate_times: bool,
        backward: Checkpoint | Reversible | None,
        parameters: Parameters | None,
        steps: int,
    ) -> None:
        self._differentiate_times = differentiate_times
        self._backward = backward
        self._parameters = parameters
        self._recorder = Recorder(vector_field, y0, differentiate_times, *(parameters or ()))
        self._precision = vector_field.precision
        self._circumstances = Circumstances(y0.device)
        self._evaluations: dict[int, Evaluation | None] = {}
        self._end_evaluations: dict[int, Evaluation | None] = {}
        self._states: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}
        self._snapshots: Snapshots | None = None
        if backward is not None:
            # Run backwards, the last step may be ill-conditioned: what comes before it is kept.
            also = steps - 1 if isinstance(backward, Reversible) else None
            self._snapshots = Snapshots(backward.stride(steps), also, y0.device)

    @property
    def keeps(self) -> bool:
        """Whether all evaluations are kept."""
        return self._backward is None

    def evaluate(self, state: int, user_time: Tensor, x: Tensor, keep: bool = False) -> Tensor:
        """Evaluate f and return its value without a graph.

        Args:
            state: the number of the state in the recurrence; evaluated again, it is recorded anew.
            user_time: what func is given for its time.
            x: the state, without a graph.
            keep: whether the evaluation is kept in any case, for an output depends on it.
        """
        # The first one is for finding out what func depends on.
        if not (self.keeps or keep or state == 0):
            return self._recorder.evaluate(user_time, x)
        slope, evaluation = self._recorder.record(user_time, x)
        if self.keeps or keep:
            self._evaluations[state] = evaluation
        if self.keeps and self._differentiate_times:
            # func may return the same memory again and again.
            self._states[state], self._slopes[state] = x.detach(), slope.detach().clone()
        return slope.detach()

    def evaluate_end(self, node: int, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate f at a node where the recurrence does not, and keep it; as `evaluate`."""
        # Once more, the recurrence is to draw the same random numbers without it.
        random = None if self.keeps else RandomState.now(x.device)
        with self._circumstances.restored(random):
            slope, self._end_evaluations[node] = self._recorder.record(user_time, x)
        return slope.detach()

    def pass_by(self, state: int, history: History, steps: Steps) -> None:
        """Note that a node is reached, from which `steps` will go on."""
        if self._snapshots is not None and self._snapshots.pass_by(state, history):
            # So that what comes next does not depend on what came before.
            steps.restart()

    def attach(
        self,
        trajectory: Trajectory,
        user_times: Tensor | None,
        recurrence: Recurrence,
        plan: FilterPlan | None,
        history: History,
        steps: Callable[[Callable[[int, Tensor, Tensor], Tensor]], Steps],
    ) -> Trajectory:
        """Attach a recorded trajectory to autograd.

        Args:
            trajectory: what `evaluate` and the recurrence have led to; its x_0 with the graph of y0.
            user_times: what func is given for the times of the states, with its graph; None where it has none.
            recurrence: the rows, with the graph of their weights.
            plan: the filter; None for the gradient of auto-differentiation.
            history: the past, at the end.
            steps: see `Rerun`.

        Returns:
            The trajectory, with the graph that plain stepping would have given it but for the filter.

        Raises:
            RuntimeError: func draws random numbers, and the solve is to be run backwards.
        """
        y0 = trajectory.states[0]
        refuse_tangents(y0)
        evaluations = [e for e in (*self._evaluations.values(), *self._end_evaluations.values()) if e is not None]
        if self._parameters is None:
            sources = tuple({id(s): s for e in evaluations if e.handle is None for s in e.sources}.values())
        else:
            sources = self._parameters.tensors
        handles = tuple(e.handle for e in evaluations if e.handle is not None)
        # As with plain stepping, what depends on nothing that requires a gradient requires none.
        times_need_grad = user_times is not None and user_times.requires_grad
        if not (y0.requires_grad or times_need_grad or recurrence.weights is not None or sources or handles):
            return trajectory
        at_node = recurrence.nodes
        outputs = [node for node in trajectory.states if node > 0]
        solve = _Solve(
            recurrence=recurrence,
            plan=plan,
            recollect=self._recollections(y0, recurrence, history, steps),
            state_outputs=outputs,
            slope_outputs=[
                *((node, self._evaluations[at_node[node]]) for node in trajectory.slopes),
                *((node, self._end_evaluations[node]) for node in trajectory.end_slopes),
            ],
            sources=sources,
            handles=handles,
            precision=self._precision,
            versions=[(tensor, tensor._version) for tensor in (() if self.keeps else (y0, *sources))],
        )
        values = [
            *(trajectory.states[node] for node in outputs),
            *trajectory.slopes.values(),
            *trajectory.end_slopes.values(),
        ]
        # What the solve keeps of them must not get a graph that keeps the solve.
        values = [value.detach() for value in values]
        found = attach(solve, values, y0, user_times, recurrence.weights, *sources, *handles)
        attached = iter(found.values)
        return Trajectory(
            states={0: y0, **{node: next(attached) for node in outputs}},
            slopes={node: next(attached) for node in trajectory.slopes},
            end_slopes={node: next(attached) for node in trajectory.end_slopes},
            keeper=found.keeper,
        )

    def _recollections(
        self,
        y0: Tensor,
        recurrence: Recurrence,
        history: History,
        steps: Callable[[Callable[[int, Tensor, Tensor], Tensor]], Steps],
    ) -> "_Recollections":
        if self._backward is None or self._snapshots is None:
            kept = Kept(self._evaluations, {0: y0.detach(), **self._states}, self._slopes, recurrence.nodes)
            return lambda gradients: gradients(kept)
        rerun = Rerun(recurrence, steps, self._recorder, self._circumstances, self._differentiate_times)
        if isinstance(self._backward, Checkpoint):
            taken, end = self._snapshots.taken, recurrence.nodes[-1]
            return lambda gradients: gradients(Checkpoints(rerun, between(taken, end, history.x)))
        last = self._snapshots.at(recurrence.nodes[-1], history)
        return _Backwards(rerun, [*self._snapshots.taken, last], self._backward)


_Gradients = Callable[[Recollection], tuple[Tensor | None, ...]]
_Recollections = Callable[[_Gradients], tuple[Tensor | None, ...]]
"""Works out gradients with the evaluations recollected."""


class _Backwards:
    """Recollects by reversal, and what the drift makes of it.

    Raises:
        RuntimeError: func draws random numbers.
    """

    def __init__(self, rerun: Rerun, anchors: Sequence[Snapshot], backward: Reversible) -> None:
        if not anchors[0].random.equals(anchors[-1].random):
            raise RuntimeError(
                "backward='reversible' needs a deterministic func, got one that draws random numbers, as dropout does; "
                "use backward='checkpoint', which draws the same ones again"
            )
        self._rerun = rerun
        self._anchors = anchors
        self._backward = backward

    def __call__(self, gradients: _Gradients) -> tuple[Tensor | None, ...]:
        start = self._anchors[0]
        if len(self._rerun.recurrence.nodes) == 2:
            # A single step is not leapfrog's, and has nothing behind it to go back to.
            end = self._anchors[-1]
            found = gradients(Checkpoints(self._rerun, between([start], end.state, end.history.x)))
            if self._backward.report is not None:
                self._backward.report(0.0)
            return found
        tolerance = self._backward.tolerance
        if tolerance is None:
            tolerance = torch.finfo(start.history.x.dtype).eps ** 0.5
        reversal = Reversal(self._rerun, self._anchors, tolerance)
        try:
            found = gradients(reversal)
        except DriftError:
            if self._backward.on_drift == "raise":
                raise
            stride = Checkpoint().stride(len(self._rerun.recurrence.nodes) - 1)
            snapshots = self._rerun.snapshots(start, stride)
            end = self._anchors[-1]
            found = gradients(Checkpoints(self._rerun, between(snapshots, end.state, end.history.x)))
        finally:
            reversal.close()
            if self._backward.report is not None:
                self._backward.report(reversal.drift)
        return found


@dataclass(frozen=True)
class _Solve:
    """What the node knows of its solve beside its inputs and outputs.

    Attributes:
        recurrence: its rows.
        plan: the filter, if any.
        recollect: works out the gradients with the evaluations of f.
        state_outputs: the nodes whose states the autograd node returns.
        slope_outputs: the nodes at which it returns values of f after them, and the evaluations.
        sources, handles: its inputs after y0, the times and the weights.
        precision: the unit in the last place of func's values.
        versions: tensors that must not change before the backward pass, with their versions.
    """

    recurrence: Recurrence
    plan: FilterPlan | None
    recollect: _Recollections
    state_outputs: list[int]
    slope_outputs: list[tuple[int, Evaluation | None]]
    sources: tuple[Tensor, ...]
    handles: tuple[Tensor, ...]
    precision: float
    versions: list[tuple[Tensor, int]]

    def backward(self, cotangents: Sequence[Tensor | None], times_need_grad: bool) -> tuple[Tensor | None, ...]:
        """See `attachment.Solve`."""
        self._check_versions()
        return self.recollect(lambda recollection: self.gradients(cotangents, times_need_grad, recollection))

    def _check_versions(self) -> None:
        """Raise a RuntimeError where func would not be what it was."""
        for tensor, version in self.versions:
            if tensor is not self.versions[0][0] and not tensor.requires_grad:
                raise RuntimeError(
                    f"adjoint_params must require a gradient until the backward pass; one of shape "
                    f"{tuple(tensor.shape)} does not any more"
                )
            if tensor._version != version:
                raise RuntimeError(
                    f"y0 and adjoint_params must not be modified in place before the backward pass, which evaluates "
                    f"func again; one of shape {tuple(tensor.shape)} was"
                )

    def gradients(
        self, cotangents: Sequence[Tensor | None], times_need_grad: bool, recollection: Recollection
    ) -> tuple[Tensor | None, ...]:
        """The gradients with respect to y0, the times, the weights, the sources and the handles."""
        zero = torch.zeros_like(next(cotangent for cotangent in cotangents if cotangent is not None))
        rows, at_node = self.recurrence.rows, self.recurrence.nodes
        time_grads = zero.new_zeros(len(rows) + 1, dtype=zero.dtype.to_real()) if times_need_grad else None
        parameters = ParameterGradients()
        linearisation = Linearisation(recollection, parameters, self.plan is None, time_grads, self.precision)

        by_node: list[Tensor | None] = [None] * len(at_node)
        by_slopes: list[Tensor | None] = [None] * len(at_node)
        for node, cotangent in zip(self.state_outputs, cotangents, strict=False):
            by_node[node] = cotangent
        for (node, evaluation), cotangent in zip(
            self.slope_outputs, cotangents[len(self.state_outputs) :], strict=True
        ):
            if evaluation is not None and cotangent is not None:
                pulled = linearisation.pull_back_seen(evaluation, at_node[node], cotangent)
                by_slopes[node] = _sum(by_slopes[node], pulled)
        total = [_sum(node, slope) for node, slope in zip(by_node, by_slopes, strict=True)]

        is_plain = self.plan is None and self.recurrence.weights is None and not times_need_grad
        if is_plain and isinstance(recollection, Checkpoints) and all(row.implicit is None for row in rows):
            window = self._through(recollection, total, parameters)
            return window, None, None, *map(parameters.of, self.sources)

        window = zero
        weight_grads: list[list[Tensor]] = []

        def followed() -> Iterator[AdjointState]:
            nonlocal window
            differentiated = _WeightGradients(self.recurrence, recollection)
            for point in discrete_adjoint(rows, total, linearisation, zero):
                if self.recurrence.weights is not None:
                    weight_grads.extend(differentiated.at(point))
                window = point.window
                yield point

        if self.plan is None:
            for _ in followed():
                pass
        else:
            for state, weight, costate in filtered_cotangents(
                self.plan, followed(), by_node, total, linearisation.expand, zero
            ):
                evaluation = recollection.evaluation(state)
                if evaluation is not None:
                    parameters.give(evaluation, costate, weight)
        parameters.settle()
        flat = [grad for of_row in reversed(weight_grads) for grad in of_row]
        return (
            window,
            time_grads,
            torch.stack(flat).cpu() if flat else None,
            *map(parameters.of, self.sources),
            *map(parameters.of_handle, self.handles),
        )

    def _through(
        self, checkpoints: Checkpoints, cotangents: Sequence[Tensor | None], parameters: ParameterGradients
    ) -> Tensor | None:
        """Auto-differentiation through explicit steps, from one checkpoint to the one before; returns ∂E/∂x_0."""
        seen = {state: g for state, g in zip(self.recurrence.nodes, cotangents, strict=True) if g is not None}
        carried: Sequence[Tensor | None] | None = None
        for stretch in checkpoints.stretches():
            after = [None] * len(stretch.end) if carried is None else carried
            carried, grads = pull_back(stretch, after, seen, self.sources)
            parameters.add(self.sources, grads, 1.0)
        assert carried is not None
        return _sum(cotangents[0], carried[0])


class _WeightGradients:
    """The gradients with respect to the weights of each row, as soon as its slopes are at hand."""

    def __init__(self, recurrence: Recurrence, recollection: Recollection) -> None:
        self._rows = recurrence.rows
        self._layout = Layout(recurrence.rows)
        self._recollection = recollection
        self._increment: Tensor | None = None

    def at(self, point: AdjointState) -> Iterator[list[Tensor]]:
        """Those of the row that made the state, if it is implicit, and else of the row after it."""
        state = point.state
        # Where nothing was pulled back, nothing has been recollected yet.
        self._recollection.evaluation(state)
        if state < len(self._rows) and self._rows[state].implicit is None:
            yield self._of(state, self._increment)
        if state and self._rows[state - 1].implicit is not None:
            yield self._of(state - 1, point.increment)
        self._increment = point.increment

    def _of(self, i: int, increment: Tensor | None) -> list[Tensor]:
        def difference(lag: int) -> Tensor:
            return self._recollection.increment(self._layout.node_before[i] - lag)

        def slope(lag: int) -> Tensor:
            return self._recollection.slope(i + 1 if lag < 0 else self._layout.slope(i, lag))

        return weight_gradients(self._rows[i], increment, difference, slope)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
