"""Traces functions of a captured func: with values of no memory, for any times, values and batch sizes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .components import gains_apart, taken_apart
from .func_capture import CapturedFunc
from .kept_products import is_light
from .mutations import changed_by, functional
from .small_products import SMALL_PRODUCTS
from .state_layout import few_components, laid_out

if TYPE_CHECKING:
    # It brings SymPy, which takes as long to import as all of this package.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


class Shapes(NamedTuple):
    """Of what blocks are compiled for.

    Attributes:
        x: a state.
        time: what func is given for a time.
        tensors: what func depends on.
        looked_up: what it looks up by the time: see `time_lookups`.
        is_dynamic: whether the size of the first dimension of a state is a symbol.
        axis: the dimension of the components, counted from the end, where they are apart; else 0.
    """

    x: Tensor
    time: Tensor
    tensors: tuple[Tensor, ...]
    looked_up: tuple[Tensor, ...]
    is_dynamic: bool
    axis: int = 0


@dataclass(frozen=True)
class TracedBlock:
    """A block, or another function, that has been traced.

    Attributes:
        graph: of it.
        inputs: those that it was traced with.
        shapes: what was taken for granted of symbols.
        batch: the symbol of the first dimension of a state; None where it is a number.
        forward: of an adjoint, the block itself.
        keeps: how many tensors that keeps for it.
    """

    graph: torch.fx.GraphModule
    inputs: list[Any]
    shapes: "ShapeEnv"
    batch: Any
    forward: "TracedBlock | None" = None
    keeps: int = 0

    @cached_property
    def is_light(self) -> bool:
        """Whether it is without matrix products."""
        return is_light(self.graph)

    def check(self, size: int) -> None:
        """Raise a RuntimeError where it was not traced for a size of the batch."""
        if self.batch is None:
            return
        wanted = [guard.expr.subs({self.batch: size}) for guard in self.shapes.guards]
        fixed = self.shapes.replacements.get(self.batch, size)
        if not all(wanted) or fixed != size:
            raise RuntimeError(
                f"compile has made a function for batch sizes with {[str(g.expr) for g in self.shapes.guards]}, "
                f"got one of {size}, for func, or Inductor, takes sizes for special"
            )


def axis_apart(func: CapturedFunc, like: Shapes) -> int:
    """The dimension of the components, where a slope and its derivatives gain by taking them apart; else 0."""
    axis = few_components(like.x)
    if not axis:
        return 0
    fakes = Fakes(like._replace(axis=axis))

    def run(time: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [given.detach().requires_grad_(given.is_floating_point()) for given in (x, *tensors)]
            slope = func(time, leaves[0], leaves[1:])
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            grads = torch.autograd.grad(slope, asked, slope.detach(), allow_unused=True) if slope.requires_grad else ()
        slope, *states = (laid_out(given.detach(), x.ndim, axis) for given in (slope, *grads[:1]) if given is not None)
        return slope, *states, *(grad.contiguous() for grad in grads[1:] if grad is not None)

    inputs = [fakes.times(), fakes.states(), *fakes.tensors, *fakes.looked_up()]
    try:
        with fakes.mode:
            graph = functional(make_fx(run)(*inputs), inputs)
            return axis if gains_apart(graph, inputs[1], axis) else 0
    except Exception:
        # The block says what is wrong.
        return 0


def has_light_slope(func: CapturedFunc, like: Shapes) -> bool:
    """Whether a slope is made without matrix products, but small ones, on the CPU."""
    if like.x.device.type != "cpu":
        return False
    fakes = Fakes(like)

    def run(time: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (func(time, x, tensors),)

    inputs = [fakes.times(), fakes.states(), *fakes.tensors, *fakes.looked_up()]
    try:
        return fakes.traced(run, inputs).is_light
    except RuntimeError:
        # The block says what is wrong.
        return False


class Fakes:
    """Tensors without memory, to trace with.

    Args:
        like: their dtypes, devices and shapes.
    """

    def __init__(self, like: Shapes) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        context: StatelessSymbolicContext[Any, Any] | None = None
        if like.is_dynamic:
            static = [DimDynamic.STATIC] * (like.x.ndim - 1)
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *static])
        self._x = self.mode.from_tensor(
            torch.empty_like(like.x, memory_format=torch.contiguous_format),
            static_shapes=None if like.is_dynamic else True,
            symbolic_context=context,
            source=ConstantSource("x"),
        )
        self._time = like.time
        self._axis = like.axis
        self._looked_up = like.looked_up
        self.tensors = [self.mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in like.tensors]

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of a shape and a dtype."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self._x.device)

    def like(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Others of their shapes, for one tensor in two places is one input."""
        with self.mode:
            return [torch.empty_like(tensor) for tensor in tensors]

    def states(self, *count: int) -> Tensor:
        """States, of shape (*count, *x.shape)."""
        with self.mode:
            states = self.empty(*count, *self._x.shape, dtype=self._x.dtype)
            return laid_out(states, self._x.ndim, self._axis)

    def times(self, *count: int) -> Tensor:
        """What func is given for times, of shape (*count)."""
        return self.empty(*count, dtype=self._time.dtype)

    def looked_up(self, *times: int) -> tuple[Tensor, ...]:
        """What func looks up at so many times, each of shape (*times, ...)."""
        return tuple(self.empty(*times, *rows.shape, dtype=rows.dtype) for rows in self._looked_up)

    def traced(self, run: Callable[..., Any], inputs: list[Any]) -> TracedBlock:
        """A function of such tensors, traced.

        Raises:
            RuntimeError: it cannot be traced, draws random numbers or changes its inputs.
        """
        with _cannot_trace(), self.mode:
            found = make_fx(run, decomposition_table={} if self._axis else SMALL_PRODUCTS)(*inputs)
        # As it has been traced: what has no effect on a result is no longer in the others.
        _check(found)
        with _cannot_trace(), self.mode:
            graph = functional(found, inputs)
            if self._axis:
                graph = taken_apart(graph, self._x, self._axis)
        size = self._x.shape[0] if self._x.ndim else 0
        return TracedBlock(graph, inputs, self._shapes, size.node._expr if isinstance(size, torch.SymInt) else None)


@contextmanager
def _cannot_trace() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"compile cannot trace func and its derivative, {type(error).__name__}: {error}. Solve without compile"
        ) from error


def _check(graph: torch.fx.GraphModule) -> None:
    """Raise a RuntimeError where a graph does more than to compute its outputs."""
    inputs = {node for node in graph.graph.nodes if node.op == "placeholder"}
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _draws(node):
            raise RuntimeError(
                f"compile does not support a func that draws random numbers, got one that calls {node.target}: the "
                f"backward pass would draw others. Leave that out, with eval() perhaps, or solve without compile"
            )
        if any(_base(given) in inputs for given in changed_by(node)):
            raise RuntimeError(
                f"compile does not support a func that changes a buffer or another tensor in place, got one that calls "
                f"{node.target}; leave that out, with eval() perhaps, or solve without compile"
            )


def _draws(node: Any) -> bool:
    """Whether an operation draws random numbers; attention does not where nothing is dropped."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given.update(zip(given, node.args, strict=False))
    return {**given, **node.kwargs}.get("dropout_p") != 0.0


def _base(node: Any) -> Any:
    """What a chain of views begins with."""
    while isinstance(node, torch.fx.Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.args[0]
    return node


def parts_of(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """A sequence in parts of given sizes, and the rest."""
    parts, begin = [], 0
    for size in sizes:
        parts.append(tuple(flat[begin : begin + size]))
        begin += size
    return [*parts, tuple(flat[begin:])]
