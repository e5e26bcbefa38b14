"""A traced block with the components of its states as tensors of their own, where states have few of them.

Inductor makes one loop of operations on end where each works on the same entries. A slope such as
``torch.stack([y[:, 1], -y[:, 0].sin()], -1)`` is made of other entries of the state than its own, and the next slope of
other entries of that. So every evaluation would be a loop, and its result a buffer, and to make these takes longer than
to compute. With the components apart all operations of a block work on the samples alone, and are one loop.

Sums over samples, which gradients of parameters are, are added before they are made: a block then has one sum for every
entry of a parameter, and not one for every evaluation as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .component_builder import Builder
from .component_rules import RULES
from .component_values import described


def taken_apart(traced: GraphModule, x: Tensor, axis: int) -> GraphModule:
    """The same function with the components of states apart.

    Args:
        traced: the function, whose outputs are tensors, without operations in place.
        x: a state, as it has been traced with.
        axis: of its components, counted from the end.
    """
    builder = _rewritten(traced.graph, x, axis)
    return GraphModule(traced, builder.graph) if builder.fits else traced


def gains_apart(traced: GraphModule, x: Tensor, axis: int) -> bool:
    """Whether components are made of others, and no operation needs them together: see `taken_apart`."""
    builder = _rewritten(traced.graph, x, axis)
    return builder.fits and builder.mixes and not builder.joins


def _rewritten(graph: Graph, x: Tensor, axis: int) -> Builder:
    builder = Builder(axis, described(x.shape))
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = (map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
            values[node] = _called(builder, node.target, args, kwargs)
        elif node.op == "output":
            builder.graph.output(tuple(builder.returned(values[result], result) for result in node.args[0]))
        else:
            copy = values[node] = builder.graph.node_copy(node)
            if node.op == "placeholder" and _is_state(copy, builder):
                values[node] = builder.apart(copy, builder.axis)
    builder.graph.eliminate_dead_code()
    return builder


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
