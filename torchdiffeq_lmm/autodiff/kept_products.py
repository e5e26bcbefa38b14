"""A block and its adjoint as two graphs, the second of which is given results that are dear to make again.

These are matrix products and convolutions, which take most of the time of a large func, and beside them functions such
as tanh; they are kept as eager auto-differentiation keeps them. All else is made again in the adjoint, and fused there
with what uses it. A func without products is made again as a whole, which takes less time than to keep anything.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .graph_parts import part_of, reached

PRODUCTS = {
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
        kept: values like those that were traced for what is kept.
    """

    forward: GraphModule
    adjoint: GraphModule
    kept: list[Tensor]


def halves(joint: GraphModule, known: int, outputs: int, keeps: bool) -> Halves:
    """The block and its adjoint.

    Args:
        joint: the graph of both, without operations in place.
        known: how many of its first inputs are the block's.
        outputs: how many of its first outputs are.
        keeps: whether anything is to be kept.
    """
    graph, kept = joint.graph, list[Node]()
    if keeps and any(node.target in PRODUCTS for node in graph.nodes):
        from torch._functorch.compile_utils import fx_graph_cse

        # The filter evaluates func once more, at the same states.
        common = fx_graph_cse(_without(graph, _SAME))
        kept = _kept(common, known, outputs)
        graph = common if kept else graph
    inputs, results = _ends(graph)
    forward = part_of(graph, inputs[:known], (), (*results[:outputs], *kept))
    adjoint = part_of(graph, inputs, kept, results[outputs:])
    # Tensors of their own, for one in two places is one input.
    values = [torch.empty_like(node.meta["val"]) for node in kept]
    return Halves(GraphModule(joint, forward), GraphModule(joint, adjoint), values)


def is_light(graph: GraphModule) -> bool:
    """Whether a graph is without matrix products and convolutions."""
    return all(node.target not in PRODUCTS for node in graph.graph.nodes)


def _kept(graph: Graph, known: int, outputs: int) -> list[Node]:
    """What is dear of what the adjoint needs of the block; nothing where there is no product."""
    inputs, results = _ends(graph)
    later = reached(inputs[known:], lambda node: node.users)
    products = {node for node in graph.nodes if node.target in PRODUCTS and node not in later}
    if not products:
        return []
    functions = {
        node for node in graph.nodes if node.target in _FUNCTIONS and node not in later and node.meta["val"].ndim
    }
    dear = products | functions
    needed = reached(results[outputs:], lambda node: () if node in dear else node.all_input_nodes)
    return [node for node in graph.nodes if node in needed and node in dear]


def _ends(graph: Graph) -> tuple[list[Node], Sequence[Node]]:
    """The inputs and the outputs."""
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return [node for node in graph.nodes if node.op == "placeholder"], results


def _without(graph: Graph, targets: Collection[Any]) -> Graph:
    found, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = copies[node.args[0]] if node.target in targets else found.node_copy(node, copies.__getitem__)
    return found
