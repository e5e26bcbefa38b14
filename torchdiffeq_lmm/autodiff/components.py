"""A traced block with the components of its states as tensors of their own, where states have few of them.

Inductor makes one loop of operations on end where each works on the same entries. A slope such as
``torch.stack([y[:, 1], -y[:, 0].sin()], -1)`` is made of other entries of the state than its own, and the next slope of
other entries of that. So every evaluation would be a loop, and its result a buffer, and to make these takes longer than
to compute. With the components apart all operations of a block work on the samples alone, and are one loop.

Sums over samples, which gradients of parameters are, are added before they are made: a block then has one sum for every
entry of a parameter, and not one for every evaluation as well.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .component_builder import Builder
from .component_rules import RULES
from .component_values import described


def taken_apart(traced: GraphModule, x: Tensor, axis: int) -> GraphModule:
    """The same function with the components of states apart; as it is where another tensor shares memory with one.

    Args:
        traced: the function, whose outputs are tensors.
        x: a state, as it has been traced with.
        axis: of its components, counted from the end.
    """
    builder = _rewritten(traced, x, axis)
    return traced if builder is None or not builder.fits else GraphModule(traced, builder.graph)


def gains_apart(traced: GraphModule, x: Tensor, axis: int) -> bool:
    """Whether components are made of others, and no operation needs them together: see `taken_apart`."""
    builder = _rewritten(traced, x, axis)
    return builder is not None and builder.fits and builder.mixes and not builder.joins


def _rewritten(traced: GraphModule, x: Tensor, axis: int) -> Builder | None:
    updates = {node: _returning(node) for node in traced.graph.nodes if _is_operation(node) and _changes(node)}
    if None in updates.values():
        return None
    builder = Builder(axis, described(x.shape))
    _rewrite(traced.graph, builder, updates)
    return builder


def _is_operation(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _changes(node: Any) -> bool:
    return bool(node.target._schema.is_mutable)


def _returning(node: Any) -> Any:
    """For an operation in place the one that returns its result; None where another tensor may share the memory."""
    name, changed = node.target._schema.name.removeprefix("aten::"), node.args[0]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    shares = [other for other in (changed, *changed.users) if _is_operation(other) and other.target.is_view]
    if shares or changed.op != "call_function" or not name.endswith("_") or packet is None:
        return None
    return getattr(packet, node.target._overloadname, None)


def _rewrite(graph: Graph, builder: Builder, updates: Mapping[Node, Any]) -> None:
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = (map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
            values[node] = _called(builder, updates.get(node, node.target), args, kwargs)
            if node in updates:
                values[node.args[0]] = values[node]
        elif node.op == "output":
            builder.graph.output(tuple(builder.returned(values[result], result) for result in node.args[0]))
        else:
            copy = values[node] = builder.graph.node_copy(node)
            if node.op == "placeholder" and _is_state(copy, builder):
                values[node] = builder.apart(copy, builder.axis)
    builder.graph.eliminate_dead_code()


def _is_state(node: Node, builder: Builder) -> bool:
    traced = node.meta["val"]
    return isinstance(traced, Tensor) and described(traced.shape) == builder.shape


def _called(builder: Builder, target: Any, args: Any, kwargs: Any) -> Any:
    if target in RULES:
        found = RULES[target](builder, *args, **kwargs)
        if found is not NotImplemented:
            return found
    elif _is_pointwise(target):
        return builder.pointwise(target, *args, **kwargs)
    return builder.emitted(target, *args, **kwargs)


def _is_pointwise(target: Any) -> bool:
    also = torch.ops.aten._to_copy.default
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target is also)
