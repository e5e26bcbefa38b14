"""A block and its adjoint as two graphs, the second of which is given results that are dear to make again.

These are matrix products and convolutions, which take most of the time of a large func, and beside them functions such
as tanh; they are kept as eager auto-differentiation keeps them. All else is made again in the adjoint, and fused there
with what uses it. A func without products is made again as a whole, which takes less time than to keep anything.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from .graph_parts import part_of, reached

_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
}

_FUNCTIONS = {
    getattr(torch.ops.aten, name).default
    for name in ("tanh", "sigmoid", "exp", "erf", "sin", "cos", "log", "gelu", "silu", "mish", "elu", "softplus")
}

_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
"""What returns its argument."""


class Halves(NamedTuple):
    """The two graphs.

    Attributes:
        forward: returns the outputs of the block, and what is kept.
        adjoint: takes all inputs, and what is kept.
        kept: the values that were traced for what is kept.
    """

    forward: GraphModule
    adjoint: GraphModule
    kept: list[Any]


def halves(joint: GraphModule, known: int, outputs: int) -> Halves | None:
    """The block and its adjoint; None where there is nothing to keep, or a value is changed in place.

    Args:
        joint: the graph of both.
        known: how many of its first inputs are the block's.
        outputs: how many of its first outputs are.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    operators = [node.target for node in joint.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(operator._schema.is_mutable for operator in operators):
        return None
    # The filter evaluates func once more, at the same states.
    graph = fx_graph_cse(_without(joint.graph, _SAME))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    later = reached(inputs[known:], lambda node: node.users)
    products = {node for node in graph.nodes if node.target in _DEAR and node not in later}
    if not products:
        return None
    functions = {
        node for node in graph.nodes if node.target in _FUNCTIONS and node not in later and node.meta["val"].ndim
    }
    dear = products | functions
    needed = reached(results[outputs:], lambda node: () if node in dear else node.all_input_nodes)
    kept = [node for node in graph.nodes if node in needed and node in dear]
    forward = part_of(graph, inputs[:known], (), (*results[:outputs], *kept))
    adjoint = part_of(graph, inputs, kept, results[outputs:])
    return Halves(GraphModule(joint, forward), GraphModule(joint, adjoint), [node.meta["val"] for node in kept])


def adjoint_alone(joint: GraphModule, outputs: int) -> GraphModule:
    """The graph with all but its first outputs."""
    inputs = [node for node in joint.graph.nodes if node.op == "placeholder"]
    (results,) = (node.args[0] for node in joint.graph.nodes if node.op == "output")
    return GraphModule(joint, part_of(joint.graph, inputs, (), results[outputs:]))


def _without(graph: Graph, targets: Collection[Any]) -> Graph:
    found, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = copies[node.args[0]] if node.target in targets else found.node_copy(node, copies.__getitem__)
    return found
