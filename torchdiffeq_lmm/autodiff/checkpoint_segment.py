"""The steps from one checkpoint to the next as one graph, through which autograd's engine goes in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import Evaluate, History, SolveImplicit, march
from torchdiffeq_lmm.schemes.recurrence import Row

from .vjp import vector_jacobian


class SegmentGraph(NamedTuple):
    """Some explicit steps on end.

    Attributes:
        begin: what the steps know of the past, as leaves.
        states: the states that they make, by number.
        end: what is known of the past after them, tensor by tensor as the steps after these begin with it.
    """

    begin: tuple[Tensor, ...]
    states: Mapping[int, Tensor]
    end: tuple[Tensor, ...]


def segment_graph(
    history: History, rows: Iterable[Row], evaluate: Evaluate, solve_implicit: SolveImplicit, first: int
) -> SegmentGraph:
    """Make the states of some explicit rows, with their graph.

    Args:
        history: what the rows begin with.
        rows: how each state is made.
        evaluate: f at a state, with its graph.
        solve_implicit: for `march`; not asked for anything.
        first: the number of the state of `history`.
    """
    begin = tuple(tensor.detach().requires_grad_() for tensor in _tensors(history))
    leaves = iter(begin)
    history = History(
        next(leaves),
        None if history.previous is None else next(leaves),
        [next(leaves) for _ in _increments_of(history)],
        list(leaves),
    )
    with torch.enable_grad():
        states = dict(march(history, rows, evaluate, solve_implicit, first))
        return SegmentGraph(begin, states, tuple(_tensors(history)))


def segment_vjp(
    segment: SegmentGraph, carried: Sequence[Tensor | None], seen: Mapping[int, Tensor], sources: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """From the cotangents of the states of a segment to those of what they depend on.

    Args:
        segment: the steps.
        carried: the cotangents of its end by all that comes after it.
        seen: the cotangents of states by what E sees of them, by number.
        sources: parameters.

    Returns:
        The cotangents of its beginning and the gradients of the sources; None is 0.
    """
    ends = zip(segment.end, carried, strict=True)
    observed = ((x, seen.get(state)) for state, x in segment.states.items())
    roots = [(x, g) for x, g in (*ends, *observed) if g is not None and x.requires_grad]
    if not roots:
        return [None] * len(segment.begin), [None] * len(sources)
    outputs, cotangents = zip(*roots, strict=True)
    grads = vector_jacobian(outputs, cotangents, (*segment.begin, *sources))
    return grads[: len(segment.begin)], grads[len(segment.begin) :]


def _tensors(history: History) -> Iterator[Tensor]:
    yield history.x
    if history.previous is not None:
        yield history.previous
    yield from _increments_of(history)
    yield from history.slopes


def _increments_of(history: History) -> list[Tensor]:
    # One side of a checkpoint may have made the increment that the other makes when it needs it.
    if history.previous is None or history.increments:
        return history.increments
    return [history.x - history.previous]
