"""What of a graph changes tensors in place, and the same function without such operations.

Parts of a graph are taken out of it by what their results are made of. An operation in place has an effect beside its
result, which is not seen there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HIDDEN_UPDATES = {
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.cudnn_batch_norm.default,
    torch.ops.aten.miopen_batch_norm.default,
}
"""Operations that change running_mean and running_var when they train, and do not say so."""


class Changes(NamedTuple):
    """What a graph changes.

    Attributes:
        operations: the nodes that change tensors.
        touched: those whose values share memory with what is changed, at any time.
    """

    operations: frozenset[Node]
    touched: frozenset[Node]


def changes_of(graph: GraphModule, inputs: Sequence[Any]) -> Changes:
    """What a graph of any operations changes, as seen by running it.

    Args:
        graph: the graph.
        inputs: tensors without memory, and sizes.
    """
    watch = _Watch()
    run = _Run(graph, watch)
    # Sizes that are symbols must not become numbers by this.
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        given = [_without_symbols(value) for value in inputs]
        with watch:
            run.run(*given)
    touched = {node for node, memory in run.memory.items() if not memory.isdisjoint(watch.changed)}
    return Changes(frozenset(run.changing), frozenset(touched))


def _without_symbols(value: Any) -> Any:
    if isinstance(value, Tensor):
        size, stride = ([_number(given) for given in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
    return _number(value)


def _number(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def functional(graph: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """A graph of ATen operations as one without operations in place.

    Args:
        graph: the graph, which leaves its inputs as they are.
        inputs: as it has been traced with.
    """
    if not any(changed_by(node) for node in graph.graph.nodes):
        return graph
    return make_fx(torch.func.functionalize(graph, remove="mutations"))(*inputs)


def changed_by(node: Node) -> list[Any]:
    """The arguments that an ATen operation changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return _changed(node.target, node.args, node.kwargs)


def _changed(operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    if operation in _HIDDEN_UPDATES:
        return [given for given in args[3:5] if args[5] and given is not None]
    changed: list[Any] = []
    for number, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            changed += given if isinstance(given, list | tuple) else [given]
    return [given for given in changed if given is not None]


class _Watch(TorchDispatchMode):
    """Sees what operations change.

    Attributes:
        changed: the memory of that.
        count: of operations that have changed something.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed: set[int] = set()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changed = _changed(func, args, kwargs or {})
        self.changed |= _memory_of(changed)
        self.count += bool(changed)
        return func(*args, **(kwargs or {}))


class _Run(Interpreter):
    """Runs a graph.

    Attributes:
        memory: where the value of each node lies.
        changing: the nodes that have changed something.
    """

    def __init__(self, graph: GraphModule, watch: _Watch) -> None:
        # A value that is gone would leave its memory to others.
        super().__init__(graph, garbage_collect_values=False)
        self._watch = watch
        self.memory: dict[Node, set[int]] = {}
        self.changing: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        before = self._watch.count
        found = super().run_node(n)
        self.memory[n] = _memory_of(found)
        if self._watch.count > before:
            self.changing.add(n)
        return found


def _memory_of(values: Any) -> set[int]:
    functorch, found = torch._C._functorch, set[int]()
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            # Within torch.func it may be wrapped.
            while functorch.is_functorch_wrapped_tensor(value):
                value = functorch.get_unwrapped(value)
            found.add(value.untyped_storage()._cdata)
    return found
