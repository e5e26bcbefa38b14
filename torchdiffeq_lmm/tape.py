"""A solve as one node of autograd, so that its backward can tell the parameter path from the state path.

While the solver steps, every evaluation of f is recorded on detached copies of its arguments: a small graph of its own
that leads to the parameters, whatever they are and wherever f finds them. Afterwards one node attaches the trajectory
to autograd; its inputs are y0 and all values of f. Its backward runs the discrete adjoint for the states and returns
the filtered cotangents for the values of f; autograd's engine carries those to the parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .adjoint import discrete_adjoint, weight_gradients
from .combination import linear_combination
from .methods import Recurrence, Row
from .vector_field import VectorField


@dataclass(frozen=True)
class Trajectory:
    """The states x_n and the values of f that the outputs of a solve are made of, by node.

    Attributes:
        states: x_n.
        slopes: f_n of the recurrence.
        end_slopes: f at the right end of a step where the recurrence has no value for it: at the last node, and with
            `perturb` from the left.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    slopes: dict[int, Tensor] = field(default_factory=dict)
    end_slopes: dict[int, Tensor] = field(default_factory=dict)

    def end_slope(self, node: int) -> Tensor:
        """f at the right end of the step that ends at `node`."""
        return self.end_slopes[node] if node in self.end_slopes else self.slopes[node]


class Tape:
    """Records the evaluations of f in one solve.

    Args:
        vector_field: f.
        differentiate_times: whether gradients with respect to the times of the nodes are needed.
    """

    def __init__(self, vector_field: VectorField, differentiate_times: bool) -> None:
        self._vector_field = vector_field
        self._differentiate_times = differentiate_times
        self._anchor = torch.zeros((), requires_grad=True)
        self._evaluations: list[_Evaluation] = []
        self._end_evaluations: list[_Evaluation] = []

    def evaluate(self, node: int, user_time: Tensor, x: Tensor, end: bool = False) -> Tensor:
        """Evaluate f, record it, and return its value without a graph.

        Args:
            node: n.
            user_time: what func is given for t_n.
            x: x_n, without a graph.
            end: whether it is evaluated for the end of a step alone, outside the recurrence.
        """
        # Detached, for x_n itself becomes an output of the node, and a graph that holds it would hold the node.
        time, state = user_time.detach(), _cut_off(x.detach(), self._anchor)
        if self._differentiate_times:
            time = _cut_off(time, self._anchor)
        slope = self._vector_field(time, state)
        _refuse_tangents(user_time, slope)
        graph = handle = None
        if slope.requires_grad:
            arguments = (state, time) if self._differentiate_times else (state,)
            graph = _Graph(get_gradient_edge(slope), tuple(get_gradient_edge(argument) for argument in arguments))
            handle = _Handle.apply(slope)  # type: ignore[no-untyped-call]
        # The gradient of the steps' lengths needs the values, and func may return the same memory again and again.
        values = (x.detach(), slope.detach().clone()) if self._differentiate_times and not end else None
        (self._end_evaluations if end else self._evaluations).append(_Evaluation(node, graph, handle, values))
        return slope.detach()

    def attach(
        self, trajectory: Trajectory, user_times: Tensor, recurrence: Recurrence, window_weights: Tensor
    ) -> Trajectory:
        """Attach a recorded trajectory to autograd.

        Args:
            trajectory: what `evaluate` and the recurrence have led to; its x_0 with the graph of y0.
            user_times: what func is given for t_0, ..., t_N, of shape (N + 1,), with its graph.
            recurrence: the method's weights on the grid, with their graph.
            window_weights: the filter, of shape (N, 2): see `LeapfrogFilter.window_weights`.

        Returns:
            The trajectory, with the graph that plain stepping would have given it but for the filter.
        """
        y0 = trajectory.states[0]
        _refuse_tangents(y0)
        evaluations = self._evaluations + self._end_evaluations
        # As with plain stepping, what depends on nothing that requires a gradient requires none.
        if not (
            y0.requires_grad
            or user_times.requires_grad
            or recurrence.requires_grad
            or any(_depends_on_more(evaluation.graph, self._anchor) for evaluation in evaluations)
        ):
            return trajectory
        nodes = [node for node in trajectory.states if node > 0]
        end_evaluations = {end.node: len(self._evaluations) + i for i, end in enumerate(self._end_evaluations)}
        solve = _Solve(
            rows=recurrence.rows(),
            window_weights=window_weights.tolist(),
            nodes=[evaluation.node for evaluation in evaluations],
            graphs=[evaluation.graph for evaluation in evaluations],
            state_outputs=nodes,
            slope_outputs=[*trajectory.slopes, *(end_evaluations[node] for node in trajectory.end_slopes)],
        )
        outputs: Iterator[Tensor] = iter(
            _AttachedSolve.apply(  # type: ignore[no-untyped-call]
                solve,
                [evaluation.values for evaluation in self._evaluations] if recurrence.requires_grad else None,
                [
                    *(trajectory.states[node] for node in nodes),
                    *trajectory.slopes.values(),
                    *trajectory.end_slopes.values(),
                ],
                y0,
                user_times,
                recurrence.increment_weights,
                recurrence.slope_weights,
                *(evaluation.handle for evaluation in evaluations),
            )
        )
        return Trajectory(
            states={0: y0, **{node: next(outputs) for node in nodes}},
            slopes={node: next(outputs) for node in trajectory.slopes},
            end_slopes={node: next(outputs) for node in trajectory.end_slopes},
        )


class _Graph(NamedTuple):
    """Where the graph of an evaluation ends, at f_n, and begins, at x_n and, where it is differentiated, t_n."""

    slope: GradientEdge
    arguments: tuple[GradientEdge, ...]


class _Evaluation(NamedTuple):
    """f at a node.

    Attributes:
        node: n.
        graph: from f_n to its arguments; None where f_n depends on nothing.
        handle: what leads autograd's engine to the graph, instead of f_n itself.
        values: x_n and f_n, where the gradient of the recurrence's weights needs them.
    """

    node: int
    graph: _Graph | None
    handle: Tensor | None
    values: tuple[Tensor, Tensor] | None


def _refuse_tangents(*tensors: Tensor) -> None:
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "grad_filter does not support forward-mode automatic differentiation, for it filters cotangents. Solve "
            "without grad_filter for tangents"
        )


class _CutOff(torch.autograd.Function):
    """The identity, whose output asks for a gradient and whose backward passes none on."""

    @staticmethod
    def forward(ctx: Any, argument: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return argument.view_as(argument)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def _cut_off(argument: Tensor, anchor: Tensor) -> Tensor:
    # A leaf would do, but would keep the state, and a gradient that nobody asks for, alive as long as the graph is.
    cut: Tensor = _CutOff.apply(argument, anchor)  # type: ignore[no-untyped-call]
    # Before torch 2.10 a GradientEdge keeps a node of C++ alive, as the view's is, but not one of Python.
    return cut.view_as(cut)


class _Handle(torch.autograd.Function):
    """The identity in shape and gradient, whose output holds no memory."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor) -> Tensor:  # noqa: ARG004
        return slope.new_empty(()).expand(slope.shape)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # noqa: ARG004
        return cotangent


def _depends_on_more(graph: _Graph | None, anchor: Tensor) -> bool:
    """Whether a graph leads to a tensor that requires a gradient and is not cut off."""
    if graph is None:
        return False
    pending, seen = [graph.slope.node], {graph.slope.node}
    while pending:
        node = pending.pop()
        if getattr(node, "variable", anchor) is not anchor:
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        pending.extend(parents)
    return False


@dataclass(frozen=True)
class _Solve:
    """What the node knows of its solve beside its inputs and outputs.

    Evaluations are counted from 0: those of the recurrence, of which the n-th is at node n, then those of ends.

    Attributes:
        rows: the weights of the recurrence as numbers.
        window_weights: those of the filter.
        nodes: the node of each evaluation.
        graphs: the graph of each evaluation.
        state_outputs: the nodes whose states the autograd node returns.
        slope_outputs: the evaluations whose values it returns after them.
    """

    rows: list[Row]
    window_weights: list[list[float]]
    nodes: list[int]
    graphs: list[_Graph | None]
    state_outputs: list[int]
    slope_outputs: list[int]


class _AttachedSolve(torch.autograd.Function):
    """(y0, times, e, b, f_0, f_1, ...) -> the states and values of f that are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: _Solve,
        history: list[tuple[Tensor, Tensor]] | None,
        outputs: list[Tensor],
        y0: Tensor,  # noqa: ARG004
        user_times: Tensor,
        increment_weights: Tensor,  # noqa: ARG004
        slope_weights: Tensor,  # noqa: ARG004
        *handles: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.solve = solve
        ctx.times_need_grad = user_times.requires_grad
        if history is not None:
            states, slopes = zip(*history, strict=True)
            ctx.save_for_backward(*states, *slopes)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grad_filter does not support create_graph=True: the filtered gradient is no derivative of the loss, "
                "so it has no second derivative to give. Solve without grad_filter for second derivatives"
            )
        seen = next((cotangent for cotangent in cotangents if cotangent is not None), None)
        if seen is None:
            return (None,) * len(ctx.needs_input_grad)
        zero = torch.zeros_like(seen)
        solve: _Solve = ctx.solve
        count = len(solve.rows)
        node_cotangents: list[Tensor | None] = [None] * (count + 1)
        direct: list[Tensor | None] = [None] * len(solve.graphs)
        for node, cotangent in zip(solve.state_outputs, cotangents, strict=False):
            node_cotangents[node] = cotangent
        for evaluation, cotangent in zip(solve.slope_outputs, cotangents[len(solve.state_outputs) :], strict=True):
            direct[evaluation] = cotangent
        end_evaluations = {node: count + i for i, node in enumerate(solve.nodes[count:])}
        time_grads = zero.new_zeros(count + 1, dtype=zero.dtype.to_real()) if ctx.times_need_grad else None

        def vector_jacobian(evaluation: int, cotangent: Tensor | None) -> Tensor | None:
            graph = solve.graphs[evaluation]
            if graph is None or cotangent is None:
                return None
            grads = torch.autograd.grad(graph.slope, graph.arguments, cotangent, retain_graph=True, allow_unused=True)
            if time_grads is not None and grads[1] is not None:
                time_grads[solve.nodes[evaluation]] += grads[1]
            return grads[0]

        def pull_back(node: int, mu: Tensor | None) -> Tensor | None:
            pulled = None if mu is None else vector_jacobian(node, _add(mu, direct[node]))
            if node in end_evaluations:
                end = end_evaluations[node]
                pulled = _add(pulled, vector_jacobian(end, direct[end]))
            return pulled

        backwards = list(discrete_adjoint(solve.rows, node_cotangents, pull_back, zero))
        filtered = direct.copy()
        for n, _, window, next_window in backwards:
            costate = linear_combination(solve.window_weights[n], (window, next_window))
            filtered[n] = _add(costate, direct[n])
        weight_grads: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.saved_tensors:
            weight_grads = weight_gradients(
                backwards, ctx.saved_tensors[:count], ctx.saved_tensors[count:], *(len(w) for w in solve.rows[0])
            )
        return (
            None,
            None,
            None,
            backwards[-1].window,
            time_grads,
            *weight_grads,
            *(None if graph is None else cot for graph, cot in zip(solve.graphs, filtered, strict=True)),
        )


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
