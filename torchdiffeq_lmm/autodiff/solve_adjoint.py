"""The backward pass of a solve: from the cotangents of its outputs to the gradients of all that it depends on.

It runs the discrete adjoint for the states, with one linear equation for every implicit step and the noise where there
is any, and returns the gradients of the parameters, from the cotangents of the values of f, filtered or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.costate import filtered_cotangents
from torchdiffeq_lmm.filters.filter_plan import FilterPlan
from torchdiffeq_lmm.forward.samples import Systems
from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, discrete_adjoint, weight_gradients
from torchdiffeq_lmm.schemes.recurrence import Layout, Recurrence

from .checkpoint_segment import SegmentGraph, segment_vjp
from .evaluation import Evaluation
from .noise_adjoint import NoiseAdjoint, NoiseRecord
from .recent_evaluations import RecentEvaluations
from .recorded_jacobians import RecordedJacobians
from .stored_evaluations import StoredEvaluations, WithEvaluations
from .vjp import ParameterGradients


@dataclass(frozen=True)
class SolveAdjoint:
    """What the node knows of its solve beside its inputs and outputs.

    Attributes:
        recurrence: its rows.
        plan: the filter, if any.
        with_evaluations: works out the gradients with the evaluations of f.
        state_outputs: the nodes whose states the autograd node returns.
        slope_outputs: the nodes at which it returns values of f after them, and the evaluations.
        sources, handles: its inputs after y0, the times and the weights.
        precision: the unit in the last place of func's values.
        systems: into which implicit equations fall.
        noise: its record; None for an ordinary differential equation.
        versions: tensors that must not change before the backward pass, with their versions.
    """

    recurrence: Recurrence
    plan: FilterPlan | None
    with_evaluations: WithEvaluations
    state_outputs: list[int]
    slope_outputs: list[tuple[int, Evaluation | None]]
    sources: tuple[Tensor, ...]
    handles: tuple[Tensor, ...]
    precision: float
    systems: Systems
    noise: NoiseRecord | None
    versions: list[tuple[Tensor, int]]

    def backward(self, cotangents: Sequence[Tensor | None], times_need_grad: bool) -> tuple[Tensor | None, ...]:
        """See `autograd_function.Solve`."""
        self._check_versions()
        return self.with_evaluations(lambda stored: self.gradients(cotangents, times_need_grad, stored))

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
        self, cotangents: Sequence[Tensor | None], times_need_grad: bool, stored: StoredEvaluations
    ) -> tuple[Tensor | None, ...]:
        """The gradients with respect to y0, the times, the weights, the sources and the handles."""
        reach = 0 if self.plan is None else self.plan.reach
        if reach:
            stored = RecentEvaluations(stored, self.recurrence.nodes, reach)
        zero = torch.zeros_like(next(cotangent for cotangent in cotangents if cotangent is not None))
        rows, at_node = self.recurrence.rows, self.recurrence.nodes
        time_grads = zero.new_zeros(len(rows) + 1, dtype=zero.dtype.to_real()) if times_need_grad else None
        parameters = ParameterGradients()
        jacobians = RecordedJacobians(stored, parameters, self.plan is None, time_grads, self.precision, self.systems)
        noise = None if self.noise is None else NoiseAdjoint(self.noise, parameters, self.precision, self.systems)

        by_node: list[Tensor | None] = [None] * len(at_node)
        by_slopes: list[Tensor | None] = [None] * len(at_node)
        for node, cotangent in zip(self.state_outputs, cotangents, strict=False):
            by_node[node] = cotangent
        for (node, evaluation), cotangent in zip(
            self.slope_outputs, cotangents[len(self.state_outputs) :], strict=True
        ):
            if evaluation is not None and cotangent is not None:
                pulled = jacobians.vjp_seen(evaluation, at_node[node], cotangent)
                by_slopes[node] = _plus(by_slopes[node], pulled)
        total = [_plus(node, slope) for node, slope in zip(by_node, by_slopes, strict=True)]

        is_plain = self.plan is None and self.recurrence.weights is None and not times_need_grad
        if is_plain and (graphs := stored.segment_graphs()) is not None:
            window = self._through(graphs, total, parameters)
            return window, None, None, *map(parameters.of, self.sources)

        window = zero
        weight_grads: list[list[Tensor]] = []

        def followed() -> Iterator[AdjointState]:
            nonlocal window
            differentiated = _WeightGradients(self.recurrence, stored)
            for point in discrete_adjoint(rows, total, jacobians, zero, None if noise is None else noise.vjp):
                if self.recurrence.weights is not None:
                    weight_grads.extend(differentiated.at(point))
                if noise is not None:
                    noise.pass_by(point)
                window = point.window
                if reach and point.node is not None:
                    # The filter may need it when others have been asked for.
                    stored.evaluation(point.state)
                yield point

        if self.plan is None:
            for _ in followed():
                pass
        else:
            for state, weight, costate in filtered_cotangents(self.plan, followed(), by_node, total, jacobians, zero):
                evaluation = stored.evaluation(state)
                if evaluation is not None:
                    parameters.collect(evaluation, costate, weight)
        parameters.flush()
        flat = [grad for of_row in reversed(weight_grads) for grad in of_row]
        return (
            window,
            time_grads,
            torch.stack(flat).cpu() if flat else None,
            *map(parameters.of, self.sources),
            *map(parameters.of_handle, self.handles),
        )

    def _through(
        self, graphs: Iterator[SegmentGraph], cotangents: Sequence[Tensor | None], parameters: ParameterGradients
    ) -> Tensor | None:
        """Auto-differentiation through explicit steps, from one checkpoint to the one before; returns ∂E/∂x_0."""
        seen = {state: g for state, g in zip(self.recurrence.nodes, cotangents, strict=True) if g is not None}
        carried: Sequence[Tensor | None] | None = None
        for graph in graphs:
            after = [None] * len(graph.end) if carried is None else carried
            carried, grads = segment_vjp(graph, after, seen, self.sources)
            parameters.add(self.sources, grads, 1.0)
        assert carried is not None
        return _plus(cotangents[0], carried[0])


class _WeightGradients:
    """The gradients with respect to the weights of each row, as soon as its slopes are at hand."""

    def __init__(self, recurrence: Recurrence, stored: StoredEvaluations) -> None:
        self._rows = recurrence.rows
        self._layout = Layout(recurrence.rows)
        self._stored = stored
        self._increment: Tensor | None = None

    def at(self, point: AdjointState) -> Iterator[list[Tensor]]:
        """Those of the row that made the state, if it is implicit, and else of the row after it."""
        state = point.state
        # Where nothing was pulled back, no evaluation has been made again yet.
        self._stored.evaluation(state)
        if state < len(self._rows) and self._rows[state].implicit is None:
            yield self._of(state, self._increment)
        if state and self._rows[state - 1].implicit is not None:
            yield self._of(state - 1, point.increment)
        self._increment = point.increment

    def _of(self, i: int, increment: Tensor | None) -> list[Tensor]:
        def difference(lag: int) -> Tensor:
            return self._stored.increment(self._layout.node_before[i] - lag)

        def slope(lag: int) -> Tensor:
            return self._stored.slope(i + 1 if lag < 0 else self._layout.slope(i, lag))

        return weight_gradients(self._rows[i], increment, difference, slope)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
