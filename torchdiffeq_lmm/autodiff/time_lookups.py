"""Rows of stacked tensors that func looks up by the time alone: found in its graph, looked up for all times at once.

A block then has the rows that it needs for its inputs, and its adjoint their gradients, whatever number of rows the
stack has.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .graph_parts import part_of, reached
from .mutations import Changes


class Lookups(NamedTuple):
    """The lookups of a graph.

    Attributes:
        stacks: for each, the number of the input that it looks up.
        shapes: of what each leads to, of one dimension for the rows and those of a row.
        indices: a graph of the time and some inputs: which rows these are.
        tensors: the numbers of these inputs.
        others: the numbers of all inputs that are for lookups alone.
    """

    stacks: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    indices: GraphModule
    tensors: tuple[int, ...]
    others: frozenset[int]

    def rows_at(self, times: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The numbers of the rows at all times, for each lookup of shape (times, rows).

        Args:
            times: of shape (times,).
            tensors: the inputs of that name.
        """
        with torch.no_grad():
            found = torch.vmap(self.indices, in_dims=(0, *(None for _ in tensors)))(times.unsqueeze(1), *tensors)
        return list(found)


def split_lookups(
    module: GraphModule, changes: Changes, time: int | None, state: int | None
) -> tuple[GraphModule, Lookups | None]:
    """The graph without its lookups, whose results are its last inputs in place of what is for them; and the lookups.

    Args:
        module: the graph, as Dynamo captured it.
        changes: what it changes in place.
        time, state: the numbers of these inputs; None for none.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    of_state = set() if state is None else reached([inputs[state]], lambda node: node.users)
    stacks = [
        i
        for i, given in enumerate(inputs)
        if i not in (time, state)
        and given.users
        and all(_is_lookup(user, given, of_state, changes.touched) for user in given.users)
    ]
    if time is None or not stacks:
        return module, None
    found = [(i, user) for i in stacks for user in inputs[i].users]
    rest, taken = Graph(), dict[Node, Node]()
    for i, given in enumerate(inputs):
        if i not in stacks:
            taken[given] = rest.node_copy(given)
    for number, (_, lookup) in enumerate(found):
        taken[lookup] = rest.placeholder(f"rows_{number}")
    for node in module.graph.nodes:
        if node not in taken and node not in inputs:
            taken[node] = rest.node_copy(node, taken.__getitem__)
    kept = {taken[node] for node in changes.operations}
    rest.eliminate_dead_code(lambda node: node in kept or node.is_impure())
    wanted = [_index_of(lookup) for _, lookup in found]
    needed = reached(wanted, lambda node: node.all_input_nodes)
    tensors = [i for i, given in enumerate(inputs) if given in needed and i != time]
    alone = [i for i in tensors if not taken[inputs[i]].users]
    for i in alone:
        rest.erase_node(taken[inputs[i]])
    indices = part_of(module.graph, [inputs[i] for i in (time, *tensors)], (), wanted)
    return GraphModule(module, rest), Lookups(
        tuple(i for i, _ in found),
        tuple(lookup.meta["example_value"].shape for _, lookup in found),
        GraphModule(module, indices),
        tuple(tensors),
        frozenset((*stacks, *alone)),
    )


def _is_lookup(node: Node, stack: Node, of_state: set[Node], touched: frozenset[Node]) -> bool:
    """Whether a node takes rows of a stack of numbers, by an index that the state has no part in.

    It is left alone where it, or what it is made of, is changed in place.
    """
    is_call = (node.op, node.target) in (("call_method", "index_select"), ("call_function", torch.index_select))
    if not is_call or node.kwargs or len(node.args) != 3 or node.args[:2] != (stack, 0):
        return False
    value = stack.meta["example_value"]
    is_of_numbers = value.is_floating_point() or value.is_complex()
    return (
        is_of_numbers
        and node.args[2] not in of_state
        and touched.isdisjoint(reached([node], lambda node: node.all_input_nodes))
    )


def _index_of(lookup: Node) -> Node:
    index = lookup.args[2]
    assert isinstance(index, Node)
    return index
