"""func as a graph without Python, with the tensors that it depends on, captured by Dynamo.

Dynamo watches what the graph was made under: attributes, modes, closures, shapes. Every solve asks it once; where
anything has changed it captures func anew. So the graph is never an old one, and what func depends on is known: inputs
of the graph beside the time and the state, whether parameters, buffers, or tensors from anywhere else.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.vector_field import HostedFunction

from . import tensor_indices
from .mutations import Changes, changes_of
from .tensor_indices import SelectByTensor
from .time_lookups import Lookups, split_lookups

Role = str | tuple[int, ...]
"""Of an input of the graph: "time", "state", "tensor", "lookup", or the dimension of the state whose size it is."""

_ADVICE = (
    "Write func in PyTorch operations whose course does not depend on values: torch.where instead of if, a "
    "GridParameter or a GridModule instead of a list indexed by the time, torch.func.grad or vjp instead of "
    "torch.autograd.grad; or solve without compile"
)


_READS = ("item", "tolist")

_INDEXED = "Could not extract specialized integer"
"""What PyTorch says where a tensor is an index, among others."""

_MINE = (__file__, tensor_indices.__file__, str(Path(torch.__file__).parent))
"""Files whose lines are not func's."""


class Dependencies(NamedTuple):
    """What func depends on in one solve.

    Attributes:
        func: the captured function, the same one as long as nothing has changed but values of tensors.
        tensors: what its graph takes beside the time, the state and what is looked up.
        stacks: for each lookup of rows by the time, what they are rows of: see `time_lookups`.
        of_lookups: what these depend on.
    """

    func: "CapturedFunc"
    tensors: tuple[Tensor, ...]
    stacks: tuple[Tensor, ...]
    of_lookups: tuple[Tensor, ...]

    def looked_up(self, stacks: Sequence[Tensor], times: Tensor, numbers: Tensor) -> list[Tensor]:
        """What func looks up, for each lookup of shape (rows, ...).

        Args:
            stacks: as above, or without a graph.
            times: what func is given for times, of shape (times,).
            numbers: of these, for every row.
        """
        if self.func.lookups is None:
            return []
        rows_of_stacks = self.func.lookups.rows_at(times, self.of_lookups)
        return [
            stack.index_select(0, rows[numbers].reshape(-1)).reshape(len(numbers), *shape)
            for stack, rows, shape in zip(stacks, rows_of_stacks, self.func.lookups.shapes, strict=True)
        ]


class CapturedFunc:
    """A graph of func.

    Args:
        graph: returns the slope alone; its last inputs are what is looked up, in place of what is for lookups alone.
        roles: of its inputs, and of these.
        lookups: of rows by the time.
        grad_mode: whether gradients were recorded when it was captured: what the graph does about that begins there.
        made: see below.

    Attributes:
        lookups: as given.
        is_dynamic: whether it is for states of any size in their first dimension.
        made: what others keep with it. Captures of one func that turn out to be the same share it.
    """

    def __init__(
        self,
        graph: Callable[..., Sequence[Tensor]],
        roles: Sequence[Role],
        lookups: Lookups | None,
        grad_mode: bool,
        made: dict[Any, Any],
    ) -> None:
        self._graph = graph
        self._grad_mode = grad_mode
        self._roles = roles
        self.lookups = lookups
        self.is_dynamic = any(isinstance(role, tuple) for role in roles)
        self.made = made

    def dependencies(self, inputs: Sequence[Any]) -> Dependencies:
        """Those of the inputs of func that are neither the time, the state, nor a size."""
        tensors = tuple(given for given, role in zip(inputs, self._roles, strict=True) if role == "tensor")
        if self.lookups is None:
            return Dependencies(self, tensors, (), ())
        stacks, of_lookups = (
            tuple(inputs[i] for i in numbers) for numbers in (self.lookups.stacks, self.lookups.tensors)
        )
        return Dependencies(self, tensors, stacks, of_lookups)

    def __call__(self, time: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The slope.

        Args:
            time, x: as func takes them.
            tensors: what it depends on, and the rows of all lookups.
        """
        others = iter(tensors)
        inputs: list[Any] = []
        for role in self._roles:
            if role == "time":
                inputs.append(_not_scalar(time))
            elif role == "state":
                inputs.append(_not_scalar(x))
            elif isinstance(role, tuple):
                inputs.append(x.shape[role[0]])
            elif role == "tensor":
                inputs.append(next(others))
        with torch.set_grad_enabled(self._grad_mode):
            return self._graph(*inputs, *others)[0]


class FuncCapture:
    """Captures one func, whatever object it is, and holds no reference to it.

    Attributes:
        captures: how often it has.
        is_inherited: whether it has captured another func, which is gone.
    """

    def __init__(self) -> None:
        self._begin_anew()
        self._given: tuple[Tensor, Tensor]
        self._found: Dependencies
        self._sizes: dict[Any, int] = {}
        self._one_size_each: set[Any] = set()
        self._selects = False
        self._made: dict[Any, dict[Any, Any]] = {}
        self.captures = 0
        self.is_inherited = False

    def _begin_anew(self) -> None:
        # Dynamo keeps what it has compiled with the code object, which must not be that of all.
        code = _slope_of.__code__.replace(co_name="func_of_solve")
        slope_of = FunctionType(code, _slope_of.__globals__)
        self._ask = torch.compile(slope_of, backend=self._capture, fullgraph=True, dynamic=False)

    def dependencies(self, func: HostedFunction, time: Tensor, x: Tensor, dynamic: bool) -> Dependencies:
        """What func depends on now.

        Args:
            func: the user's function.
            time, x: with whose dtypes and shapes it is called; the values do not matter.
            dynamic: whether, for a second size of the first dimension of x, it is captured for any; where it cannot be,
                it is captured for every size by itself.

        Raises:
            RuntimeError: func cannot be captured.
        """
        if dynamic and func.shapes is None and x.ndim and len(x) > 1 and self._is_another_size(x):
            import torch._dynamo as dynamo

            state = x.detach()
            dynamo.mark_dynamic(state, 0)
            try:
                return self._settled(func, time, state)
            except RuntimeError:
                # func has a tensor with a value for each sample, say. If it is anything else it is so below, too.
                self._one_size_each.add(_all_but_size(x))
        return self._settled(func, time, x.detach())

    def _is_another_size(self, x: Tensor) -> bool:
        key = _all_but_size(x)
        return key not in self._one_size_each and self._sizes.setdefault(key, len(x)) != len(x)

    def _settled(self, func: HostedFunction, time: Tensor, state: Tensor) -> Dependencies:
        before = self.captures
        found = self._asked(func, time, state)
        if self.captures > before:
            before = self.captures
            found = self._asked(func, time, state)
            if self.captures > before:
                raise RuntimeError(
                    "compile does not support a func that changes a Python value that it depends on, such as a "
                    "counter, whenever it is called; leave that out, or solve without compile"
                )
        return found

    def _asked(self, func: HostedFunction, time: Tensor, state: Tensor) -> Dependencies:
        import torch._dynamo as dynamo

        # Tensors that nobody else has.
        given = self._given = _not_scalar(time.detach()), _not_scalar(state)
        try:
            with dynamo.config.patch(
                capture_scalar_outputs=False, automatic_dynamic_shapes=False, specialize_float=True
            ):
                self._ask(func.call, func.shapes, func.reversed, state.ndim == 0, self._selects, *given)
        except dynamo.exc.FailOnRecompileLimitHit as error:
            if self.is_inherited:
                self.is_inherited = False
                self._begin_anew()
                return self._asked(func, time, state)
            raise RuntimeError(
                f"compile has been asked to trace one func in more than {dynamo.config.recompile_limit} ways, for "
                f"other shapes, modes, or values of attributes that it takes from Python; let those be tensors, or "
                f"raise torch._dynamo.config.recompile_limit, or solve without compile"
            ) from error
        except dynamo.exc.TorchDynamoException as error:
            if not self._selects and _INDEXED in str(error):
                # Only for a func that needs it, for it takes time to trace.
                self._selects = True
                return self._asked(func, time, state)
            raise RuntimeError(f"compile cannot trace func. {_reason(error)}\n{_ADVICE}") from error
        found = self._found
        del self._given, self._found
        return found

    def _capture(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        """See the backends of `torch.compile`."""
        self.captures += 1
        _without_checkpoints(graph)
        for given in inputs:
            if isinstance(given, Tensor) and given.layout != torch.strided:
                raise _RefusedError(f"It depends on a tensor of layout {given.layout}: use a dense one.")
        *placeholders, results = [node for node in graph.graph.nodes if node.op in ("placeholder", "output")]
        if len(results.args[0]) != 1:
            raise _RefusedError(
                "It stores tensors on the side, or returns them beside the slope: make them a part of the state, or "
                "evaluate func again where they are needed."
            )
        for node in graph.graph.nodes:
            if node.target in _READS:
                raise _RefusedError(f"It reads the value of a tensor, by .{node.target}(). {_place(node.stack_trace)}")
        values = [node.meta["example_value"] for node in placeholders]
        sizes = (size for value in values if isinstance(value, Tensor) for size in value.shape)
        if any(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None for size in sizes):
            raise _RefusedError("It takes the size of a batch for a number.")
        changes = changes_of(graph, values)
        captured: list[CapturedFunc] = []

        def run(*arguments: Any) -> tuple[Tensor]:
            if not captured:
                captured.append(self._captured(graph, changes, _roles(arguments, values, *self._given), arguments))
            (func,) = captured
            self._found = func.dependencies(arguments)
            return (self._given[1],)

        return run

    def _captured(self, graph: Any, changes: Changes, roles: Sequence[Role], arguments: Sequence[Any]) -> CapturedFunc:
        time, state = (roles.index(role) if role in roles else None for role in ("time", "state"))
        rest, lookups = split_lookups(graph, changes, time, state)
        shapes = () if lookups is None else lookups.shapes
        stacks = () if lookups is None else lookups.stacks
        others = () if lookups is None else lookups.others
        roles = ["lookup" if i in others else role for i, role in enumerate(roles)]
        made: dict[Any, Any] = {}
        # Of tensors that func makes.
        defaults = torch.get_default_dtype(), torch.get_default_device()
        # What has been made for the same graph, captured in another mode of gradients say: it takes its own derivatives
        # in the same mode, or is another graph.
        if not any(node.op in ("get_attr", "call_module") for node in rest.graph.nodes):
            tensors = (given for given, role in zip(arguments, roles, strict=True) if role == "tensor")
            of_tensors = tuple((given.shape, given.stride(), given.dtype, given.device) for given in tensors)
            of_stacks = tuple((arguments[i].dtype, shape) for i, shape in zip(stacks, shapes, strict=True))
            made = self._made.setdefault((rest.code, defaults, tuple(roles), of_tensors, of_stacks), {})
        return CapturedFunc(rest, roles, lookups, torch.is_grad_enabled(), made)


class _RefusedError(RuntimeError):
    """func can be captured, but not used."""


def _all_but_size(x: Tensor) -> Any:
    return x.shape[1:], x.dtype, x.device


def _without_checkpoints(graph: Any) -> None:
    """Evaluate what func has in `torch.utils.checkpoint` directly: blocks decide for themselves what is made again."""
    checkpoint = torch.ops.higher_order.tag_activation_checkpoint
    for part in [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]:
        nodes = part.graph.find_nodes(op="call_function", target=checkpoint, sort=False)
        for node in nodes:
            body, *inputs = node.args
            with part.graph.inserting_before(node):
                made = part.graph.call_module(body.target, tuple(inputs))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            part.graph.erase_node(node)
        if nodes:
            part.recompile()


def _not_scalar(tensor: Tensor) -> Tensor:
    # The value of an input of no dimension would become a constant where func reads it.
    return tensor if tensor.ndim else tensor.reshape(1)


def _slope_of(
    call: Callable[..., Any],
    shapes: tuple[torch.Size, ...] | None,
    is_reversed: bool,
    is_scalar: bool,
    selects: bool,
    times: Tensor,
    x: Tensor,
) -> Tensor:
    """As `VectorField.__call__`, without its checks and its count; see `_not_scalar`."""
    time, x = times[0], x[0] if is_scalar else x
    with SelectByTensor() if selects else nullcontext():
        if shapes is None:
            slope = call(time, x)
        else:
            parts = x.split([prod(shape) for shape in shapes])
            components = call(time, tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
            slope = torch.cat([component.reshape(-1) for component in components])
    # An operation in any case, for a graph without one would not be asked.
    given: Tensor = -slope if is_reversed else slope.clone()
    return given


def _roles(arguments: Sequence[Any], values: Sequence[Any], time: Tensor, state: Tensor) -> list[Role]:
    """What the inputs of a graph are.

    Args:
        arguments: what it is called with.
        values: the same as it was captured with, sizes as symbols.
        time, state: what func was called with.
    """
    of_state = next((value for value, given in zip(values, arguments, strict=True) if given is state), None)
    roles: list[Role] = []
    for value, given in zip(values, arguments, strict=True):
        if given is time:
            roles.append("time")
        elif given is state:
            roles.append("state")
        elif isinstance(given, Tensor):
            roles.append("tensor")
        else:
            assert of_state is not None
            roles.append((next(dim for dim, size in enumerate(of_state.shape) if str(size) == str(value)),))
    return roles


def _reason(error: Exception) -> str:
    """What Dynamo says of it, and the line of func; not its hints for developers."""
    refused = getattr(error, "inner_exception", None)
    if isinstance(refused, _RefusedError):
        return str(refused)
    said, _, where = str(error).partition("from user code:")
    for end in ("Hint:", "Developer debug context:", "For more information", "The branch condition", "User Stack"):
        said = said.partition(end)[0]
    return " ".join(part for part in (*said.split(), _place(where)) if part)


def _place(stack: str | None) -> str:
    """The innermost line of a stack that is not PyTorch's, nor this package's."""
    entries = [entry.split("\n") for entry in (stack or "").split("File ")[1:]]
    own = [entry for entry in entries if not any(mine in entry[0] for mine in _MINE)]
    if not own:
        return ""
    at, *code = own[-1]
    return f"In {at}: {code[0].strip()}" if code else f"In {at}"
