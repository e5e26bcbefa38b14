"""Traces blocks of a captured func: see `tracing`."""

from dataclasses import replace

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.shifted_past import product_places
from torchdiffeq_lmm.schemes.block_rows import Pattern

from .block_functions import block_and_adjoint, forward_block, reversed_block
from .block_values import AROUND, AdjointKind, BlockNumbers, Cotangents, FilterNumbers
from .func_capture import CapturedFunc
from .kept_products import halves
from .tracing import Fakes, Shapes, TracedBlock, parts_of


def trace_forward(func: CapturedFunc, pattern: Pattern, like: Shapes) -> TracedBlock:
    """`forward_block`; all three raise a RuntimeError where func cannot be traced."""

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        window, numbers, tensors = parts_of(flat, (1 + sum(pattern.begins), _count(like)))
        end, nodes = forward_block(func, pattern, window, BlockNumbers.of(*numbers), tensors, like.axis)
        return (*end, nodes)

    fakes = Fakes(like)
    return fakes.traced(run, [*_window(fakes, pattern.begins), *_numbers(fakes, pattern).flat, *fakes.tensors])


def trace_backwards(func: CapturedFunc, pattern: Pattern, like: Shapes) -> TracedBlock:
    """`reversed_block`."""

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        window, numbers, tensors = parts_of(flat, (1 + sum(pattern.ends), _count(like)))
        return reversed_block(func, pattern, window, BlockNumbers.of(*numbers), tensors, like.axis)

    fakes = Fakes(like)
    return fakes.traced(run, [*_window(fakes, pattern.ends), *_numbers(fakes, pattern).flat, *fakes.tensors])


def trace_adjoint(func: CapturedFunc, pattern: Pattern, kind: AdjointKind, like: Shapes, keeps: bool) -> TracedBlock:
    """`block_and_adjoint`, without what the block itself returns; see `kept_products` for `keeps`."""
    sizes = (
        1 + sum(pattern.begins),
        _count(like),
        len(like.tensors),
        1 + sum(pattern.ends),
        1,
        kind.slopes,
        len(kind.wanted),
        kind.later,
    )

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        window, numbers, tensors, of_window, (seen,), states, sums, of_later, filters = parts_of(flat, sizes)
        end, nodes, found = block_and_adjoint(
            func,
            pattern,
            kind,
            window,
            BlockNumbers.of(*numbers),
            tensors,
            like.axis,
            Cotangents(of_window, seen, states, sums, of_later),
            FilterNumbers.of(*filters) if filters else None,
        )
        return (*end, nodes, *(tensor for part in found for tensor in part))

    fakes, rows = Fakes(like), len(pattern.rows)
    filters: list[Tensor] = []
    if kind.order:
        filters.append(fakes.empty(rows, AROUND + pattern.reach, dtype=torch.float64))
    if products := len(product_places(kind.order)):
        weights = fakes.empty(rows, products, pattern.reach + products, dtype=torch.float64)
        filters += [weights, fakes.states(rows), fakes.states(rows)]
    if kind.earlier:
        filters += [fakes.states(kind.earlier), fakes.times(kind.earlier)]
        filters += fakes.looked_up(kind.earlier)
    inputs = [
        *_window(fakes, pattern.begins),
        *_numbers(fakes, pattern).flat,
        *fakes.tensors,
        *_window(fakes, pattern.ends),
        fakes.states(pattern.steps),
        *(fakes.states(pattern.steps) for _ in range(kind.slopes)),
        *fakes.like(fakes.tensors[i] for i in kind.wanted),
        *(fakes.states() for _ in range(kind.later)),
        *filters,
    ]
    joint, known, outputs = fakes.traced(run, inputs), sum(sizes[:3]), 2 + sum(pattern.ends)
    parts = halves(joint.graph, known, outputs, keeps)
    forward = replace(joint, graph=parts.forward, inputs=inputs[:known])
    return replace(joint, graph=parts.adjoint, inputs=[*inputs, *parts.kept], forward=forward, keeps=len(parts.kept))


def _window(fakes: Fakes, known: tuple[int, int]) -> list[Tensor]:
    return [fakes.states() for _ in range(1 + sum(known))]


def _numbers(fakes: Fakes, pattern: Pattern) -> BlockNumbers:
    rows = len(pattern.rows)
    return BlockNumbers(
        fakes.empty(pattern.weights, dtype=torch.float64),
        fakes.times(rows),
        fakes.empty(rows, dtype=torch.bool),
        fakes.looked_up(rows),
    )


def _count(like: Shapes) -> int:
    """Of how many tensors `BlockNumbers` are."""
    return 3 + len(like.looked_up)
