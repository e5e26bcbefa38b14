"""A solve by compiled blocks as one node of autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .block_schedule import ScheduledRun
from .block_values import BlockNumbers
from .compiled_solve import CompiledSolve, Kept


def solve_compiled(
    solve: CompiledSolve,
    y0: Tensor,
    weights: Tensor | None,
    times: Tensor | None,
    tensors: Sequence[Tensor],
    looked_up: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The states at the observed nodes, of shape (n, *y0.shape), with their graph; and the same for slopes there.

    Args:
        solve: the solve.
        y0: the initial state.
        weights, times: of all rows, where they have a gradient.
        tensors: what func depends on.
        looked_up: for each of its lookups the rows, for all rows of all blocks.
    """
    # Of marks of conjugation compiled functions know nothing.
    y0, *tensors = (given.resolve_conj().resolve_neg() for given in (y0, *tensors))
    looked_up = [_dense(of_rows) for of_rows in looked_up]
    needs_graph = y0.requires_grad or solve.wanted or solve.lookups or solve.differentiate_times
    records = bool(torch.is_grad_enabled() and needs_graph)
    runs = solve.runs(y0, records=records)
    if not records:
        with torch.no_grad():
            found, _ = solve.forward(runs, y0, _numbers(runs, weights, times, looked_up), tensors)
            return found, found
    outputs = _CompiledSolve.apply(  # type: ignore[no-untyped-call]
        solve, runs, len(tensors), y0, weights, times, *tensors, *looked_up
    )
    return outputs[0], outputs[-1]


def _numbers(
    runs: Sequence[ScheduledRun], weights: Tensor | None, times: Tensor | None, looked_up: Sequence[Tensor]
) -> list[BlockNumbers]:
    """Those of each run."""
    found = []
    on_device = None if weights is None or times is None else weights.to(times.device)
    for run in runs:
        numbers = run.numbers
        if numbers is None:
            assert on_device is not None
            assert times is not None
            numbers = run.numbers_of(on_device, times)
        found.append(numbers)
    return _with_looked_up(runs, found, looked_up) if looked_up else found


class _CompiledSolve(torch.autograd.Function):
    """(y0, weights, times, tensors, looked_up) -> the states at the observed nodes, and again for slopes there."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: CompiledSolve,
        runs: Sequence[ScheduledRun],
        count: int,
        y0: Tensor,
        weights: Tensor | None,
        times: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors, looked_up = tensors[:count], tensors[count:]
        numbers = _numbers(runs, weights, times, looked_up)
        is_reversible = solve.reversible is not None
        states, kept = solve.forward(
            runs, y0, numbers, tensors, keeps_anchors=is_reversible, keeps_all=not is_reversible
        )
        ctx.solve, ctx.runs, ctx.numbers = solve, runs, [given._replace(looked_up=()) for given in numbers]
        ctx.sizes = [tuple(map(len, of_run)) for of_run in kept]
        ctx.like = None if weights is None or times is None else (weights.shape, weights.device, times.shape)
        parts = (tensor for of_run in kept for part in of_run for tensor in part)
        ctx.save_for_backward(*tensors, *looked_up, *parts)
        ctx.counts = len(tensors), len(looked_up)
        return (states, states.clone()) if solve.slopes else (states,)

    @staticmethod
    def backward(ctx: Any, of_states: Tensor, *of_slopes: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        functorch = torch._C._functorch
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compile does not support create_graph=True: the gradient is worked out once. For second derivatives "
                "solve without compile"
            )
        if functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(of_states):
            raise RuntimeError(
                "compile does not support is_grads_batched=True, vectorize=True, nor torch.func transforms of the "
                "gradient; ask for one gradient after the other, or solve without compile"
            )
        solve, runs, (count, lookups) = ctx.solve, ctx.runs, ctx.counts
        tensors, looked_up, rest = saved[:count], saved[count : count + lookups], iter(saved[count + lookups :])
        kept = [Kept(*(tuple(next(rest) for _ in range(size)) for size in sizes)) for sizes in ctx.sizes]
        seen = states = _dense(of_states)
        for cotangent in of_slopes:
            seen = states + _dense(cotangent)
        numbers = _with_looked_up(runs, ctx.numbers, looked_up)
        of_y0, by_run, sums = solve.backward(
            runs, seen, states if of_slopes else None, kept, numbers, tensors, looked_up
        )
        of_weights = of_times = None
        if solve.differentiate_times:
            weights_shape, weights_device, times_shape = ctx.like
            of_weights = torch.zeros(weights_shape, dtype=torch.float64, device=seen.device)
            of_times = by_run[0][1].new_zeros(times_shape)
            for run, (of_rows, of_row_times, *_) in zip(runs, by_run, strict=True):
                of_weights.index_add_(0, run.weights.reshape(-1), of_rows.reshape(-1))
                of_times.index_add_(0, run.times.reshape(-1), of_row_times.reshape(-1))
            of_weights = of_weights.to(weights_device)
        of_tensors: list[Tensor | None] = [None] * (count + lookups)
        for i, total in zip(solve.wanted, sums, strict=True):
            of_tensors[i] = total
        first = 2 * solve.differentiate_times
        for place, i in enumerate(solve.lookups, start=first):
            of_tensors[count + i] = torch.cat([of_run[place].flatten(0, 1) for of_run in by_run])
        return None, None, None, of_y0, of_weights, of_times, *of_tensors


def _with_looked_up(
    runs: Sequence[ScheduledRun], numbers: Sequence[BlockNumbers], looked_up: Sequence[Tensor]
) -> list[BlockNumbers]:
    found = []
    for run, given in zip(runs, numbers, strict=True):
        first, shape = run.first_row, given.times.shape
        rows = (of_rows[first : first + shape.numel()].unflatten(0, shape) for of_rows in looked_up)
        found.append(given._replace(looked_up=tuple(rows)))
    return found


def _dense(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()
