"""One evaluation of f with a graph of its own, which can be differentiated apart from all others."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torchdiffeq_lmm.forward.autograd_state import refuse_tangents

_FEW_PARAMETERS = 32
"""Of so many known parameters it costs less to ask for all gradients than to find out which there are."""

_AS_IT_IS = nullcontext()

_NOT_LISTED = (
    "adjoint_params must be given where func depends on more than the parameters of the module that it is, got None, "
    "and func uses another tensor that requires a gradient; list all tensors whose gradients are wanted, or use "
    "backward='autograd', which needs no list"
)


class Evaluation(NamedTuple):
    """f at a state X.

    Attributes:
        slope: where its graph ends, at f(X).
        arguments: where its graph begins, at X and, where it is differentiated, its time.
        sources: the tensors that require a gradient and that the graph leads to besides: parameters.
        handle: None, or what leads autograd's engine through the graph to more than these: a tensor of the shape of
            f(X), whose cotangent is that of f(X).
    """

    slope: GradientEdge
    arguments: tuple[GradientEdge, ...]
    sources: tuple[Tensor, ...]
    handle: Tensor | None


class Recorder:
    """Evaluates f and keeps the graph of each evaluation.

    Args:
        vector_field: f.
        like: a state, for its dtype and device.
        differentiate_times: whether gradients with respect to the times of the evaluations are needed.
        parameters: the sources, leaves or not. None for all leaves, wherever func has them; where a graph leads to
            what was made before the evaluation, as weights that a hypernetwork made once, it then has a handle.
        are_all: whether a graph that leads to more than `parameters` is an error, else to be ignored.
    """

    def __init__(
        self,
        vector_field: Callable[[Tensor, Tensor], Tensor],
        like: Tensor,
        differentiate_times: bool,
        parameters: Sequence[Tensor] | None = None,
        are_all: bool = True,
    ) -> None:
        self._vector_field = vector_field
        self._differentiate_times = differentiate_times
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "grad_filter, backward and implicit methods do not support torch.func transforms of a solve, such as "
                "grad, vmap and jvp: their gradient is a node of autograd. Use torch.autograd, or an explicit method "
                "without grad_filter and backward"
            )
        minus_zero = complex(-0.0, -0.0) if like.is_complex() else -0.0
        self._zeros = {
            # Of the sign that leaves both zeros as they are.
            dtype: torch.full((), minus_zero, dtype=dtype, device=like.device, requires_grad=True)
            for dtype in (like.dtype, like.dtype.to_real())
        }
        self._leaf_type = type(get_gradient_edge(self._zeros[like.dtype]).node)
        self._device_type = like.device.type
        self._needs_graph = like.requires_grad or differentiate_times
        self._is_opaque = False
        # Kept, for else autograd would make their nodes' Python side anew at every evaluation.
        self._leaves: dict[Node | None, Tensor] = {}
        self._are_all = are_all
        self._parameters = tuple(parameters or ())
        self._known: dict[tuple[Node, int], Tensor] | None = None
        if parameters is not None:
            _refuse_inference(parameters)
            edges = map(get_gradient_edge, parameters)
            self._known = {(edge.node, edge.output_nr): p for edge, p in zip(edges, parameters, strict=True)}

    def record(self, user_time: Tensor, x: Tensor) -> tuple[Tensor, Evaluation | None]:
        """Evaluate f.

        Args:
            user_time: what func is given for the time.
            x: the state.

        Returns:
            The slope with its graph, and the evaluation; None where the slope depends on nothing.

        Raises:
            ValueError: func depends on a tensor that `parameters` should have and has not.
        """
        if self._is_opaque:
            return self._vector_field(user_time, x.detach()), None
        with _AS_IT_IS if torch.is_grad_enabled() else torch.enable_grad():
            state = self._cut_off(x.detach() if x.requires_grad else x)
            arguments: tuple[GradientEdge, ...] = (_edge(state),)
            time = user_time.detach() if user_time.requires_grad else user_time
            if self._differentiate_times:
                time = self._cut_off(time)
                arguments = (*arguments, _edge(time))
            (slope,) = self._values(lambda state, time: (self._vector_field(time, state),), (state, time), x, user_time)
            return self._recorded(slope, arguments)

    def record_parts(
        self, evaluate: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> list[tuple[Tensor, Evaluation | None]]:
        """Evaluate several functions of the state at once: as `record`, for each; their graphs may share parts."""
        if self._is_opaque:
            return [(value, None) for value in evaluate(x.detach())]
        with _AS_IT_IS if torch.is_grad_enabled() else torch.enable_grad():
            state = self._cut_off(x.detach())
            values = self._values(evaluate, (state,), x)
            return [self._recorded(value, (_edge(state),)) for value in values]

    def _values(
        self, evaluate: Callable[..., tuple[Tensor, ...]], arguments: tuple[Tensor, ...], *plain: Tensor
    ) -> tuple[Tensor, ...]:
        """Functions of arguments with a graph; or of the plain ones, if func takes no others and none are needed."""
        try:
            return evaluate(*arguments)
        except RuntimeError:
            # As func raises that uses NumPy or out=.
            if self._needs_graph:
                raise
            with suppress(RuntimeError):
                values = evaluate(*(argument.detach() for argument in plain))
                # After the first step any solver would give a func of parameters a state with a graph.
                if not any(value.requires_grad for value in values):
                    self._is_opaque = True
                    return values
            raise

    def evaluate(self, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate f and keep nothing but the value."""
        # What autocast caches without a graph would be without one for others, too.
        with_graph = torch.is_autocast_enabled(self._device_type)
        with _AS_IT_IS if torch.is_grad_enabled() == with_graph else torch.set_grad_enabled(with_graph):
            # Detached, for func may ask for the gradient of its argument.
            slope = self._vector_field(user_time, x.detach())
            refuse_tangents(slope)
            return slope.detach()

    def connect(self, state: int, user_time: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """Evaluate f with a graph that leads on to that of x."""
        slope = self._vector_field(user_time, x)
        refuse_tangents(slope)
        return slope

    def check(self, ends: Iterable[Tensor], begin: Iterable[Tensor]) -> None:
        """Raise a ValueError where a graph from its ends to its beginning leads to more than all parameters."""
        if not self._are_all or self._known is None:
            return
        known = self._known
        seen: set[Node | None] = {None, *(get_gradient_edge(leaf).node for leaf in begin)}
        pending = [end.grad_fn for end in ends]
        for node in pending:
            if node is None or node in seen:
                continue
            seen.add(node)
            if type(node) is self._leaf_type:
                raise ValueError(_NOT_LISTED)
            pending += [at for at, nr in node.next_functions if (at, nr) not in known and at not in seen]

    def _recorded(self, slope: Tensor, arguments: tuple[GradientEdge, ...]) -> tuple[Tensor, Evaluation | None]:
        refuse_tangents(slope)
        if not slope.requires_grad:
            return slope, None
        if isinstance(slope.grad_fn, BackwardCFunction):
            # Before torch 2.10 a GradientEdge keeps a node of C++ alive, as the view's is, but not one of Python.
            slope = slope.view_as(slope)
        edge = _edge(slope)
        if self._known is not None and not self._are_all and len(self._parameters) <= _FEW_PARAMETERS:
            return slope, Evaluation(edge, arguments, self._parameters, None)
        sources, leads_beyond = self._sources(edge, arguments)
        handle = None
        if leads_beyond and self._known is None:
            handle = _Handle.apply(slope)  # type: ignore[no-untyped-call]
        elif leads_beyond and self._are_all:
            raise ValueError(_NOT_LISTED)
        return slope, Evaluation(edge, arguments, sources, handle)

    def _cut_off(self, argument: Tensor) -> Tensor:
        # A leaf in its place would keep the state alive as long as the graph is; the node of a sum does not.
        return argument + self._zeros[argument.dtype]

    def _sources(self, slope: GradientEdge, arguments: tuple[GradientEdge, ...]) -> tuple[tuple[Tensor, ...], bool]:
        """The sources that a graph leads to, and whether it leads beyond."""
        known, leaf_type, leaves = self._known, self._leaf_type, self._leaves
        # Nodes are numbered as they are made.
        begin = arguments[0].node._sequence_nr() if known is None else 0
        found: dict[int, Tensor] = {}
        beyond = False
        seen: set[Node | None] = {None, *(argument.node for argument in arguments)}
        edges: tuple[tuple[Node | None, int], ...] = ((slope.node, slope.output_nr),)
        pending: list[Node] = []
        while True:
            for edge in edges:
                node = edge[0]
                if known and edge in known:
                    source = known[edge]
                    found[id(source)] = source
                elif node in seen:
                    continue
                elif node in leaves:
                    found[id(node)] = leaves[node]
                elif type(node) is leaf_type:
                    if known is None:
                        found[id(node)] = leaves[node] = node.variable  # type: ignore[attr-defined]
                    else:
                        beyond = True
                elif known is None and node._sequence_nr() < begin:  # type: ignore[union-attr]
                    beyond = True
                else:
                    pending.append(node)  # type: ignore[arg-type]
                    seen.add(node)
            if not pending:
                return tuple(found.values()), beyond
            edges = pending.pop().next_functions


class _Handle(torch.autograd.Function):
    """The identity in shape and gradient, whose output holds no memory."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor) -> Tensor:  # noqa: ARG004
        return slope.new_empty(()).expand(slope.shape)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # noqa: ARG004
        return cotangent


def _refuse_inference(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        if parameter.is_inference():
            raise ValueError(
                f"adjoint_params, by default the parameters of func, must not have been made in inference mode, got "
                f"one of shape {tuple(parameter.shape)} that was: autograd does not keep track of it. Make it outside, "
                f"or solve under torch.no_grad()"
            )


def _edge(tensor: Tensor) -> GradientEdge:
    node = tensor.grad_fn
    # Else what get_gradient_edge would give, in less time.
    return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)
