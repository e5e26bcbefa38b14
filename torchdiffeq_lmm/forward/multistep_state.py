"""How a solve goes on where another has ended: what of the past its steps need, as tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Layout, Recurrence
from torchdiffeq_lmm.schemes.unrolling import memory, start_length, unroll

from .stepping import History

Past = tuple[Tensor, ...]
"""The latest steps, the latest one first, of shape (k,), float64; increments (i, *y.shape) and slopes (s, *y.shape) at
nodes, likewise. Empty where there is none."""


class Resumed(NamedTuple):
    """A solve that goes on.

    Attributes:
        recurrence: its rows, with some before its beginning, which are not carried out.
        history: what the rows to come know of the past.
        node: the node at which it begins.
    """

    recurrence: Recurrence
    history: History
    node: int


def past_of(method: MultistepMethod, recurrence: Recurrence, steps: Tensor, history: History) -> Past:
    """What the steps after the last node need; empty where there have been fewer steps than the method reaches over.

    Args:
        method: the method.
        recurrence: the rows that have been carried out.
        steps: h of all rows, of shape (N,).
        history: the past at the last node.
    """
    needed = memory(method)
    reach = _reach(method)
    if len(steps) < reach:
        return ()
    nodes = recurrence.nodes[-needed.slopes - 1 :]
    slopes = dict(zip(_evaluated(recurrence, len(recurrence.rows)), history.slopes, strict=False))
    kept = [slopes[state] for state in reversed(nodes) if state in slopes][: _known(method)]
    like = history.x.new_empty((0, *history.x.shape))
    return (
        steps[-reach:].flip(0),
        torch.stack(history.increments[: needed.increments]) if needed.increments else like,
        torch.stack(kept) if kept else like,
    )


def resume(method: MultistepMethod, past: Past, steps: Tensor, x: Tensor) -> Resumed:
    """A solve that goes on from a state with its past; from the state alone, where there is none.

    Args:
        method: the method.
        past: from `past_of`.
        steps: h, of shape (N,), float64 on the CPU.
        x: the state.

    Raises:
        ValueError: the past is not of this method and state; or the method has constant coefficients, and the steps
            are not those of the past.
    """
    if len(past) == 0:
        return Resumed(unroll(method, steps), History(x), 0)
    needed, reach = memory(method), _reach(method)
    known = _known(method)
    shapes = [(reach,), (needed.increments, *x.shape), (known, *x.shape)]
    if [tuple(tensor.shape) for tensor in past] != shapes:
        raise ValueError(
            f"extra_solver_state must be what a solve by the same method with extra=True has returned, for "
            f"{method.name!r} tensors of shapes {shapes}, got {[tuple(tensor.shape) for tensor in past]}; leave it out "
            f"to start anew"
        )
    lengths, increments, slopes = past
    # Before the steps that are known, which are all that matter, come others on which rows can begin.
    count = start_length(method) + reach
    behind = lengths.to("cpu", torch.float64).flip(0)
    before = torch.cat([behind[:1].expand(count - reach), behind])
    recurrence = unroll(method, torch.cat([before, steps]))
    first = recurrence.nodes[count]
    at_nodes = {recurrence.nodes[count - j - (not method.is_implicit)]: slopes[j] for j in range(known)}
    evaluated = _evaluated(recurrence, first)
    # Slopes between the nodes are of no use any more.
    in_order = [at_nodes.get(state, x) for state in evaluated]
    keeps = max((i for i, state in enumerate(evaluated) if state in at_nodes), default=-1) + 1
    return Resumed(recurrence, History(x, None, list(increments.unbind()), in_order[:keeps]), count)


def _reach(method: MultistepMethod) -> int:
    return max(method.steps, memory(method).slopes, start_length(method))


def _known(method: MultistepMethod) -> int:
    # An explicit method evaluates f at the last node in its next step.
    return memory(method).slopes - (not method.is_implicit)


def _evaluated(recurrence: Recurrence, row: int) -> list[int]:
    """The states at which f has been evaluated before a row, the latest one first."""
    layout = Layout(recurrence.rows[:row])
    return layout.evaluated[::-1]
