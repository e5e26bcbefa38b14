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

from .adjoint import discrete_adjoint
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


class Evaluation(NamedTuple):
    """f at a node, on arguments that are cut off from the graph they came with.

    Attributes:
        node: n.
        time: what func was given for t_n.
        state: x_n.
        slope: f_n, with the graph that leads to its arguments and to the parameters.
    """

    node: int
    time: Tensor
    state: Tensor
    slope: Tensor


class Tape:
    """Records the evaluations of f in one solve.

    Args:
        vector_field: f.
        differentiate_times: whether gradients with respect to the times at which f is evaluated are needed.
    """

    def __init__(self, vector_field: VectorField, differentiate_times: bool) -> None:
        self._vector_field = vector_field
        self._differentiate_times = differentiate_times
        self._anchor = torch.zeros((), requires_grad=True)
        self._evaluations: list[Evaluation] = []
        self._end_evaluations: list[Evaluation] = []

    def evaluate(self, node: int, user_time: Tensor, x: Tensor, end: bool = False) -> Tensor:
        """Evaluate f, record it, and return its value without a graph.

        Args:
            node: n.
            user_time: what func is given for t_n.
            x: x_n.
            end: whether it is evaluated for the end of a step alone, outside the recurrence.
        """
        time = user_time.detach()
        if self._differentiate_times:
            time = _cut_off(time, self._anchor)
        state = _cut_off(x.detach(), self._anchor)
        # Func may return the same memory again and again.
        slope = self._vector_field(time, state).clone()
        _refuse_tangents(user_time, slope)
        (self._end_evaluations if end else self._evaluations).append(Evaluation(node, time, state, slope))
        return slope.detach()

    def attach(
        self, trajectory: Trajectory, user_times: Tensor, recurrence: Recurrence, window_weights: Tensor
    ) -> Trajectory:
        """Attach a recorded trajectory to autograd.

        Args:
            trajectory: what `evaluate` and the recurrence have led to; its x_0 with the graph of y0.
            user_times: what func is given for t_0, ..., t_N, of shape (N + 1,), with its graph.
            recurrence: the method's weights on the grid, with their graph.
            window_weights: the filter, of shape (N, 2): see `GradFilter.window_weights`.

        Returns:
            The trajectory, with the graph that plain stepping would have given it but for the filter.
        """
        y0 = trajectory.states[0]
        _refuse_tangents(y0)
        evaluations = self._evaluations + self._end_evaluations
        if not (
            y0.requires_grad
            or user_times.requires_grad
            or recurrence.requires_grad
            or any(_depends_on_more(evaluation.slope, self._anchor) for evaluation in evaluations)
        ):
            return trajectory
        nodes = [node for node in trajectory.states if node > 0]
        solve = _Solve(
            rows=recurrence.rows(),
            window_weights=window_weights.tolist(),
            end_nodes=[evaluation.node for evaluation in self._end_evaluations],
            state_outputs=nodes,
            slope_outputs=list(trajectory.slopes),
            end_slope_outputs=list(trajectory.end_slopes),
            graphs=[_graph_of(evaluation) for evaluation in evaluations],
        )
        values = [
            *(trajectory.states[node] for node in nodes),
            *trajectory.slopes.values(),
            *trajectory.end_slopes.values(),
        ]
        outputs: Iterator[Tensor] = iter(
            _AttachedSolve.apply(  # type: ignore[no-untyped-call]
                solve,
                [evaluation.state for evaluation in evaluations],
                values,
                y0,
                user_times,
                recurrence.increment_weights,
                recurrence.slope_weights,
                *(evaluation.slope for evaluation in evaluations),
            )
        )
        return Trajectory(
            states={0: y0, **{node: next(outputs) for node in nodes}},
            slopes={node: next(outputs) for node in trajectory.slopes},
            end_slopes={node: next(outputs) for node in trajectory.end_slopes},
        )


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


def _depends_on_more(value: Tensor, anchor: Tensor) -> bool:
    """Whether `value` depends on a tensor that requires a gradient and is not cut off."""
    if not value.requires_grad:
        return False
    root = get_gradient_edge(value).node
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        if getattr(node, "variable", anchor) is not anchor:
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        pending.extend(parents)
    return False


class _Graph(NamedTuple):
    """Where the graph of an evaluation begins and ends."""

    slope: GradientEdge
    arguments: tuple[GradientEdge, ...]


def _graph_of(evaluation: Evaluation) -> _Graph | None:
    """The graph from f_n to x_n and, where it is differentiated, to t_n; None where f_n depends on nothing."""
    _, time, state, slope = evaluation
    if not slope.requires_grad:
        return None
    arguments = (state, time) if time.requires_grad else (state,)
    return _Graph(get_gradient_edge(slope), tuple(get_gradient_edge(argument) for argument in arguments))


@dataclass(frozen=True)
class _Solve:
    """What the node knows of its solve beside its inputs and outputs.

    Attributes:
        rows: the weights of the recurrence as numbers.
        window_weights: those of the filter.
        end_nodes: the nodes of the evaluations that follow those of the recurrence.
        state_outputs, slope_outputs, end_slope_outputs: the nodes whose x_n, f_n and end slopes it returns.
        graphs: those of the evaluations.
    """

    rows: list[Row]
    window_weights: list[list[float]]
    end_nodes: list[int]
    state_outputs: list[int]
    slope_outputs: list[int]
    end_slope_outputs: list[int]
    graphs: list[_Graph | None]


class _AttachedSolve(torch.autograd.Function):
    """(y0, times, e, b, f_0, f_1, ...) -> x_n, f_n at the nodes asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: _Solve,
        states: list[Tensor],
        values: list[Tensor],
        y0: Tensor,  # noqa: ARG004
        user_times: Tensor,
        increment_weights: Tensor,
        slope_weights: Tensor,
        *slopes: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.solve = solve
        ctx.weights_need_grad = increment_weights.requires_grad or slope_weights.requires_grad
        ctx.times_need_grad = user_times.requires_grad
        if ctx.weights_need_grad:
            ctx.save_for_backward(*states, *slopes)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grad_filter does not support create_graph=True: the filtered gradient is no derivative of the loss, "
                "so it has no second derivative to give. Solve without grad_filter for second derivatives"
            )
        solve: _Solve = ctx.solve
        count, total = len(solve.rows), len(solve.graphs)
        seen = next((cotangent for cotangent in cotangents if cotangent is not None), None)
        if seen is None:
            return (None,) * len(ctx.needs_input_grad)
        zero = torch.zeros_like(seen)

        arrived = iter(cotangents)
        node_cotangents: list[Tensor | None] = [None] * (count + 1)
        direct: list[Tensor | None] = [None] * total
        for node in solve.state_outputs:
            node_cotangents[node] = next(arrived)
        for node in solve.slope_outputs:
            direct[node] = next(arrived)
        end_evaluations = {node: count + i for i, node in enumerate(solve.end_nodes)}
        for node in solve.end_slope_outputs:
            direct[end_evaluations[node]] = next(arrived)

        time_grads = zero.new_zeros(count + 1, dtype=zero.dtype.to_real()) if ctx.times_need_grad else None

        def vector_jacobian(node: int, evaluation: int, cotangent: Tensor | None) -> Tensor | None:
            graph = solve.graphs[evaluation]
            if graph is None or cotangent is None:
                return None
            grads = torch.autograd.grad(graph.slope, graph.arguments, cotangent, retain_graph=True, allow_unused=True)
            if time_grads is not None and len(grads) > 1 and grads[1] is not None:
                time_grads[node] += grads[1]
            return grads[0]

        def pull_back(node: int, mu: Tensor | None) -> Tensor | None:
            pulled = None if mu is None else vector_jacobian(node, node, _add(mu, direct[node]))
            if node in end_evaluations:
                evaluation = end_evaluations[node]
                pulled = _add(pulled, vector_jacobian(node, evaluation, direct[evaluation]))
            return pulled

        slope_cotangents = direct.copy()
        increment_grads: list[list[Tensor]] = []
        slope_grads: list[list[Tensor]] = []
        states, slopes = ctx.saved_tensors[:total], ctx.saved_tensors[total:]
        window = zero
        for step in discrete_adjoint(solve.rows, node_cotangents, pull_back, zero):
            n, window = step.n, step.window
            filtered = linear_combination(solve.window_weights[n], (window, step.next_window))
            slope_cotangents[n] = _add(filtered, direct[n])
            if ctx.weights_need_grad:
                history = range(n, max(n - len(solve.rows[n][1]), -1), -1)
                cotangent = step.increment_cotangent
                slope_grads.append([_inner(cotangent, slopes[i]) for i in history])
                increment_grads.append([_inner(cotangent, states[i] - states[i - 1]) for i in history if i > 0])

        return (
            None,
            None,
            None,
            window,
            time_grads,
            _matrix(increment_grads, len(solve.rows[0][0])) if ctx.weights_need_grad else None,
            _matrix(slope_grads, len(solve.rows[0][1])) if ctx.weights_need_grad else None,
            *slope_cotangents,
        )


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum().real


def _matrix(reversed_rows: list[list[Tensor]], width: int) -> Tensor:
    """Gradients with respect to the weights of the recurrence, from rows in reversed order, short ones padded by 0."""
    columns = []
    for i in range(width):
        zero = torch.zeros((), dtype=torch.float64)
        columns.append(torch.stack([row[i].to(zero) if i < len(row) else zero for row in reversed(reversed_rows)]))
    return torch.stack(columns, dim=1)
