"""A solve as one node of autograd, so that its backward can tell the parameter path from the state path.

While the solver steps, every evaluation of f is recorded on detached copies of its arguments: a small graph of its own
that leads to the parameters, whatever they are and wherever f finds them. Afterwards one node attaches the trajectory
to autograd; its inputs are y0 and all values of f. Its backward runs the discrete adjoint for the states, with one
linear equation for every implicit step, and returns the cotangents of the values of f, filtered or not; autograd's
engine carries those to the parameters.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .adjoint import AdjointState, discrete_adjoint, plus, weight_gradients
from .costate import filtered_cotangents
from .filter_plan import FilterPlan
from .implicit import solve_adjoint
from .recurrence import Recurrence
from .vector_field import VectorField


@dataclass(frozen=True)
class Trajectory:
    """The states x_n and the values of f that the outputs of a solve are made of, by node.

    Attributes:
        states: x_n.
        slopes: f_n of the recurrence.
        end_slopes: f where the recurrence has no value for it: at the last node, with `perturb` from the left of any,
            and at the first node for methods that do not evaluate it there.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    slopes: dict[int, Tensor] = field(default_factory=dict)
    end_slopes: dict[int, Tensor] = field(default_factory=dict)

    def start_slope(self, node: int) -> Tensor:
        """f at the left end of the step that starts at `node`."""
        return self.slopes[node] if node in self.slopes else self.end_slopes[node]

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
        self._evaluations: dict[int, _Evaluation] = {}
        self._end_evaluations: dict[int, _Evaluation] = {}

    def evaluate(self, state: int, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate f, record it, and return its value without a graph.

        Args:
            state: the number of the state in the recurrence; evaluated again, it is recorded anew.
            user_time: what func is given for its time.
            x: the state, without a graph.
        """
        slope, self._evaluations[state] = self._record(user_time, x, self._differentiate_times)
        return slope

    def evaluate_end(self, node: int, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate f at a node where the recurrence does not, and record it; as `evaluate`."""
        slope, self._end_evaluations[node] = self._record(user_time, x, False)
        return slope

    def _record(self, user_time: Tensor, x: Tensor, keeps_values: bool) -> "tuple[Tensor, _Evaluation]":
        # Detached, for x_n itself becomes an output of the node, and a graph that holds it would hold the node.
        with torch.enable_grad():
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
        values = (x.detach(), slope.detach().clone()) if keeps_values else None
        return slope.detach(), _Evaluation(graph, handle, values)

    def attach(
        self, trajectory: Trajectory, user_times: Tensor, recurrence: Recurrence, plan: FilterPlan | None
    ) -> Trajectory:
        """Attach a recorded trajectory to autograd.

        Args:
            trajectory: what `evaluate` and the recurrence have led to; its x_0 with the graph of y0.
            user_times: what func is given for the times of the states, with its graph.
            recurrence: the rows, with the graph of their weights.
            plan: the filter; None for the gradient of auto-differentiation.

        Returns:
            The trajectory, with the graph that plain stepping would have given it but for the filter.
        """
        y0 = trajectory.states[0]
        _refuse_tangents(y0)
        states = sorted(self._evaluations)
        evaluations = [*(self._evaluations[state] for state in states), *self._end_evaluations.values()]
        # As with plain stepping, what depends on nothing that requires a gradient requires none.
        if not (
            y0.requires_grad
            or user_times.requires_grad
            or recurrence.weights is not None
            or any(_depends_on_more(evaluation.graph, self._anchor) for evaluation in evaluations)
        ):
            return trajectory
        at_node = recurrence.nodes
        place = {state: i for i, state in enumerate(states)}
        end_place = {node: len(states) + i for i, node in enumerate(self._end_evaluations)}
        outputs = [node for node in trajectory.states if node > 0]
        history = None
        if recurrence.weights is not None:
            history = {state: self._evaluations[state].values for state in states}
        solve = _Solve(
            recurrence=recurrence,
            plan=plan,
            states=states,
            ends=list(self._end_evaluations),
            graphs=[evaluation.graph for evaluation in evaluations],
            state_outputs=outputs,
            slope_outputs=[
                *(place[at_node[node]] for node in trajectory.slopes),
                *(end_place[node] for node in trajectory.end_slopes),
            ],
        )
        attached: Iterator[Tensor] = iter(
            _AttachedSolve.apply(  # type: ignore[no-untyped-call]
                solve,
                history,
                [
                    *(trajectory.states[node] for node in outputs),
                    *trajectory.slopes.values(),
                    *trajectory.end_slopes.values(),
                ],
                y0,
                user_times,
                recurrence.weights,
                *(evaluation.handle for evaluation in evaluations),
            )
        )
        return Trajectory(
            states={0: y0, **{node: next(attached) for node in outputs}},
            slopes={node: next(attached) for node in trajectory.slopes},
            end_slopes={node: next(attached) for node in trajectory.end_slopes},
        )


class _Graph(NamedTuple):
    """Where the graph of an evaluation ends, at f(X), and begins, at X and, where it is differentiated, its time."""

    slope: GradientEdge
    arguments: tuple[GradientEdge, ...]


class _Evaluation(NamedTuple):
    """f at a state X.

    Attributes:
        graph: from f(X) to its arguments; None where f(X) depends on nothing.
        handle: what leads autograd's engine to the graph, instead of f(X) itself.
        values: X and f(X), where the gradient of the recurrence's weights needs them.
    """

    graph: _Graph | None
    handle: Tensor | None
    values: tuple[Tensor, Tensor] | None


def _refuse_tangents(*tensors: Tensor) -> None:
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "grad_filter does not support forward-mode automatic differentiation, nor do implicit methods: they work "
            "on cotangents. Solve with an explicit method and without grad_filter for tangents"
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

    Evaluations are counted from 0: those of the recurrence, in the order of the states, then those of ends.

    Attributes:
        recurrence: its rows.
        plan: the filter, if any.
        states: those at which the recurrence evaluates f.
        ends: the nodes at which f is evaluated besides.
        graphs: the graph of each evaluation.
        state_outputs: the nodes whose states the autograd node returns.
        slope_outputs: the evaluations whose values it returns after them.
    """

    recurrence: Recurrence
    plan: FilterPlan | None
    states: list[int]
    ends: list[int]
    graphs: list[_Graph | None]
    state_outputs: list[int]
    slope_outputs: list[int]


class _Linearisation:
    """The graphs of a solve as the transposed Jacobians that the adjoint needs.

    Args:
        solve: the solve.
        time_gradients: where to add the gradients with respect to the times of the states, None if they are not needed.
    """

    def __init__(self, solve: _Solve, time_gradients: Tensor | None) -> None:
        self._graphs = dict(zip(solve.states, solve.graphs, strict=False))
        self._time_gradients = time_gradients

    def product(self, state: int, vector: Tensor) -> Tensor | None:
        """The product of the transposed Jacobian with a vector."""
        return _vector_jacobian(self._graphs.get(state), vector, None, state)

    def expand(self, state: int, value: Tensor | None, slope: Tensor | None, step: float) -> Tensor | None:
        """V + Jᵀ S; with a step τ > 0, R (V + R Jᵀ (S - τ V)), R = (1 - τ Jᵀ)⁻¹."""
        if step > 0.0 and value is not None and self._graphs.get(state) is not None:
            slope = plus(slope, -step * value)
        pulled = None if slope is None else self.product(state, slope)
        if step == 0.0 or pulled is None:
            return plus(value, pulled)
        pulled = self._solve(state, step, pulled)
        return self._solve(state, step, pulled if value is None else value + pulled)

    def pull_back(self, state: int, cotangent: Tensor | None) -> Tensor | None:
        """The same for a cotangent, which has a gradient with respect to the time too."""
        return _vector_jacobian(self._graphs.get(state), cotangent, self._time_gradients, state)

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """The cotangent D of an implicit increment, (1 - b* Jᵀ) D = rhs."""
        if self._graphs.get(state) is None:
            return rhs
        solution = self._solve(state, weight, rhs)
        if self._time_gradients is not None:
            self.pull_back(state, weight * solution)
        return solution

    def _solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        def pull_back(vector: Tensor) -> Tensor:
            pulled = self.product(state, vector)
            return torch.zeros_like(vector) if pulled is None else pulled

        return solve_adjoint(pull_back, weight, rhs)


def _vector_jacobian(
    graph: _Graph | None, cotangent: Tensor | None, time_gradients: Tensor | None, state: int
) -> Tensor | None:
    if graph is None or cotangent is None:
        return None
    arguments = graph.arguments if time_gradients is not None else graph.arguments[:1]
    grads = torch.autograd.grad(graph.slope, arguments, cotangent, retain_graph=True, allow_unused=True)
    if time_gradients is not None and grads[1] is not None:
        time_gradients[state] += grads[1]
    return grads[0]


class _AttachedSolve(torch.autograd.Function):
    """(y0, times, weights, f_0, f_1, ...) -> the states and values of f that are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: _Solve,
        history: dict[int, tuple[Tensor, Tensor]] | None,
        outputs: list[Tensor],
        y0: Tensor,
        user_times: Tensor,
        weights: Tensor | None,  # noqa: ARG004
        *handles: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.solve = solve
        ctx.times_need_grad = user_times.requires_grad
        if history is not None:
            states, slopes = zip(*history.values(), strict=True)
            ctx.save_for_backward(y0, *states, *slopes)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        solve: _Solve = ctx.solve
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grad_filter does not support create_graph=True: the filtered gradient is no derivative of the loss, "
                "so it has no second derivative to give. Solve without grad_filter for second derivatives"
                if solve.plan is not None
                else "implicit methods do not support create_graph=True: their gradient comes from the implicit "
                "function theorem, once. Solve with an explicit method for second derivatives"
            )
        seen = next((cotangent for cotangent in cotangents if cotangent is not None), None)
        if seen is None:
            return (None,) * len(ctx.needs_input_grad)
        zero = torch.zeros_like(seen)
        rows, at_node = solve.recurrence.rows, solve.recurrence.nodes
        by_node: list[Tensor | None] = [None] * len(at_node)
        direct: list[Tensor | None] = [None] * len(solve.graphs)
        for node, cotangent in zip(solve.state_outputs, cotangents, strict=False):
            by_node[node] = cotangent
        for evaluation, cotangent in zip(solve.slope_outputs, cotangents[len(solve.state_outputs) :], strict=True):
            direct[evaluation] = plus(direct[evaluation], cotangent)

        time_grads = zero.new_zeros(len(rows) + 1, dtype=zero.dtype.to_real()) if ctx.times_need_grad else None
        node_of = {state: node for node, state in enumerate(at_node)}
        by_slopes: list[Tensor | None] = [None] * len(at_node)
        of_evaluations = [*(node_of.get(state, -1) for state in solve.states), *solve.ends]
        for node, graph, cotangent in zip(of_evaluations, solve.graphs, direct, strict=True):
            if cotangent is not None:
                pulled = _vector_jacobian(graph, cotangent, time_grads, at_node[node])
                by_slopes[node] = plus(by_slopes[node], pulled)
        linearisation = _Linearisation(solve, time_grads)
        total = [plus(node, slope) for node, slope in zip(by_node, by_slopes, strict=True)]
        backwards = discrete_adjoint(rows, total, linearisation, zero)

        saved = ctx.saved_tensors
        raw: dict[int, Tensor | None] = {}
        increments: list[Tensor | None] = [None] * (len(rows) + 1)
        window = zero

        def noted() -> Iterator[AdjointState]:
            nonlocal window
            for point in backwards:
                window = point.window
                if solve.plan is None:
                    raw[point.state] = point.mu
                if saved:
                    increments[point.state] = point.increment
                yield point

        cotangents_of: Mapping[int, Tensor | None] = raw
        if solve.plan is None:
            deque(noted(), maxlen=0)
        else:
            cotangents_of = filtered_cotangents(solve.plan, noted(), by_node, by_slopes, linearisation.expand, zero)
        weight_grads = None
        if saved:
            y0, *values = saved
            states = dict(zip(solve.states, values[: len(solve.states)], strict=True))
            slopes = dict(zip(solve.states, values[len(solve.states) :], strict=True))
            weight_grads = weight_gradients(rows, increments, {0: y0, **states}, slopes)
        of_handles = [*(cotangents_of.get(state) for state in solve.states), *(None for _ in solve.ends)]
        return (
            None,
            None,
            None,
            window,
            time_grads,
            weight_grads,
            *(
                None if graph is None else plus(cotangent, seen_directly)
                for graph, cotangent, seen_directly in zip(solve.graphs, of_handles, direct, strict=True)
            ),
        )
