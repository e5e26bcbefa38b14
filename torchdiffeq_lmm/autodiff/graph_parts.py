"""Parts of graphs of operations."""

from collections.abc import Callable, Iterable

from torch.fx import Graph, Node


def part_of(graph: Graph, inputs: Iterable[Node], given: Iterable[Node], results: Iterable[Node]) -> Graph:
    """The graph from inputs, and from values that are given as further ones, to results."""
    found, copies = Graph(), dict[Node, Node]()
    for node in inputs:
        copies[node] = found.node_copy(node)
    for number, node in enumerate(given):
        copies[node] = found.placeholder(f"kept_{number}")
        copies[node].meta = dict(node.meta)
    results = list(results)
    needed = reached(results, lambda node: () if node in copies else node.all_input_nodes)
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = found.node_copy(node, copies.__getitem__)
    found.output(tuple(copies[node] for node in results))
    return found


def reached(begin: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All nodes that a walk comes to, with those that it begins with."""
    pending = list(begin)
    found = set(pending)
    while pending:
        new = [node for node in following(pending.pop()) if node not in found]
        found.update(new)
        pending += new
    return found
