"""A solve by compiled blocks as one node of autograd: it keeps the past at the beginning of blocks alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .block_schedule import FilteredBlock, Schedule, ScheduledBlock
from .block_values import AdjointKind, BlockNumbers, Cotangents, FilterNumbers
from .compiled_blocks import CompiledBlocks, RecordedBlock
from .compiled_reversal import CompiledReversal
from .reversal import DriftError, Reversible
from .state_layout import laid_out

Made = TypeVar("Made")


class Gradients(NamedTuple):
    """What a backward pass leads to.

    Attributes:
        y0: the gradient of the initial state.
        by_block: those of weights and times, if they are wanted, and of all wanted lookups, for each block.
        tensors: of the wanted ones.
    """

    y0: Tensor
    by_block: list[tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class CompiledSolve:
    """What is known of a solve beside its tensors.

    Attributes:
        schedule: its blocks.
        blocks: compiled.
        wanted: the numbers of the tensors whose gradients are wanted.
        differentiate_times: whether those of the weights and times are.
        slopes: whether the filter is told what E sees of slopes at observed nodes from what it sees of the states.
        lookups: the numbers of the lookups of func whose gradients are wanted: see `time_lookups`.
        reversible: how to run it backwards; None to keep the past before every block.
    """

    schedule: Schedule
    blocks: CompiledBlocks
    wanted: tuple[int, ...]
    differentiate_times: bool
    slopes: bool
    lookups: tuple[int, ...]
    reversible: Reversible | None

    def compile_adjoints(self) -> None:
        """Compile what the backward pass needs, so that what cannot be is known beforehand."""
        if self.reversible is not None:
            self._reversal(self.reversible).compile()
        recorded = self._recorded()
        for block in self.schedule.blocks:
            recorded(block)

    def forward(
        self,
        y0: Tensor,
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
        keeps: Callable[[int], bool] | None,
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The states at the observed nodes, of shape (n, *y0.shape), and what is kept of each block.

        That is the past before it and, where the filter needs any, the states of the latest nodes before it, with what
        is looked up there; and what adjoints need not make again.

        Args:
            y0: the initial state.
            numbers: of each block.
            tensors: what func depends on.
            keeps: of which blocks; None where there is no backward pass.
        """
        x = self._laid_out(y0, y0)
        window = (x, *_zeros(x, sum(self.schedule.blocks[0].block.pattern.begins)))
        kept, found = [], []
        nodes = x
        recorded = self._recorded()
        forwards = _once(
            lambda scheduled: (
                self.blocks.forward(scheduled.block.pattern) if keeps is None else recorded(scheduled).forward
            )
        )
        for i, (scheduled, given) in enumerate(zip(self.schedule.blocks, numbers, strict=True)):
            latest: tuple[Tensor, ...] = ()
            if scheduled.filtered is not None and scheduled.filtered.earlier is not None:
                rows = scheduled.filtered.earlier - self.schedule.blocks[i - 1].block.first
                of_nodes = (looked_up.index_select(0, rows) for looked_up in numbers[i - 1].looked_up)
                latest = nodes[-scheduled.earlier :].clone(), *of_nodes
            before = window
            window, nodes, products = forwards(scheduled)(window, given, tensors)
            kept.append((*before, *latest, *products) if keeps is not None and keeps(i) else ())
            if scheduled.seen is not None:
                found.append(nodes if len(scheduled.seen) == len(nodes) else nodes.index_select(0, scheduled.seen))
            if scheduled.sees_end:
                found.append(window[0].unsqueeze(0))
        return (found[0] if len(found) == 1 else torch.cat(found)).contiguous(), kept

    def backward(
        self,
        seen: Tensor,
        states: Tensor | None,
        kept: Sequence[Sequence[Tensor]],
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
    ) -> Gradients:
        """From the cotangents of the observed states to the gradients.

        Args:
            seen: the cotangents.
            states: the same without what E sees of the slopes there, for the filter; None where that is nothing.
            kept, numbers, tensors: see `forward`.

        Raises:
            DriftError: see `Reversible`.
        """
        mode = self.reversible
        if mode is None:
            return self._backward(seen, states, reversed(kept), numbers, tensors)
        reversal = self._reversal(mode)
        try:
            return self._backward(seen, states, reversal.pasts(kept, numbers, tensors), numbers, tensors)
        except DriftError:
            if mode.on_drift == "raise":
                raise
            _, kept = self.forward(kept[0][0], numbers, tensors, _every)
            return self._backward(seen, states, reversed(kept), numbers, tensors)
        finally:
            if mode.report is not None:
                mode.report(reversal.drift)

    def _backward(
        self,
        seen: Tensor,
        states: Tensor | None,
        kept: Iterator[Sequence[Tensor]],
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
    ) -> Gradients:
        """The same, with what is kept of each block from the last one on."""
        seen, *of_rest = (self._laid_out(given, given[0]) for given in (seen, *(() if states is None else (states,))))
        like = seen[0]
        cotangents = Cotangents(
            window=tuple(_zeros(like, 1 + sum(self.schedule.blocks[-1].block.pattern.ends))),
            seen=like,
            states=(),
            sums=tuple(torch.zeros_like(tensors[i]) for i in self.wanted),
            later=tuple(_zeros(like, self.schedule.later)),
        )
        by_block: list[tuple[Tensor, ...]] = []
        recorded = self._recorded()
        unseen = _once(
            lambda scheduled: self._laid_out(like.new_zeros(scheduled.block.pattern.steps, *like.shape), like)
        )
        end, flat = len(seen), seen.reshape(len(seen), -1)
        of_observed = (seen, *of_rest)
        for scheduled, of_block, given in zip(self.schedule.blocks[::-1], kept, numbers[::-1], strict=True):
            if scheduled.sees_end:
                end -= 1
                cotangents = cotangents._replace(window=(seen[end], *cotangents.window[1:]))
            of_nodes, *of_states = (unseen(scheduled),) * len(of_observed)
            if scheduled.seen is not None:
                begin = end - len(scheduled.seen)
                of_nodes, *of_states = (
                    self._laid_out(unseen(scheduled).index_copy(0, scheduled.seen, observed[begin:end]), like)
                    for observed in of_observed
                )
                end = begin
            earlier_count = 1 + len(given.looked_up) if scheduled.earlier else 0
            window, earlier, products = _cut(of_block, 1 + sum(scheduled.block.pattern.begins), earlier_count)
            filters = None
            if scheduled.filtered is not None:
                filters = self._filters(scheduled.filtered, flat, like, earlier)
            given_cotangents = cotangents._replace(seen=of_nodes, states=tuple(of_states))
            found = recorded(scheduled).adjoint(window, given, tensors, given_cotangents, filters, products)
            cotangents = Cotangents(found.window, of_nodes, (), found.sums, found.later)
            by_block.append((*found.numbers, *found.looked_up))
        return Gradients(cotangents.window[0].contiguous(), by_block[::-1], cotangents.sums)

    def _filters(self, filtered: FilteredBlock, seen: Tensor, like: Tensor, earlier: Sequence[Tensor]) -> FilterNumbers:
        if filtered.products is None:
            return FilterNumbers(filtered.value)
        shape = len(filtered.value), *like.shape
        of_observed = filtered.observed_value, filtered.observed_slope
        value, slope = (
            like.new_zeros(shape) if weights is None else (weights.to(seen.dtype) @ seen).reshape(shape)
            for weights in of_observed
        )
        numbers = FilterNumbers(
            filtered.value, filtered.products, self._laid_out(value, like), self._laid_out(slope, like)
        )
        if filtered.earlier is None:
            return numbers
        states, *looked_up = earlier
        times = self.schedule.times[filtered.earlier]
        return numbers._replace(earlier=states, earlier_times=times, earlier_looked_up=tuple(looked_up))

    def _laid_out(self, states: Tensor, x: Tensor) -> Tensor:
        return laid_out(states, x.ndim, self.blocks.axis)

    def keeps(self) -> Callable[[int], bool]:
        """Tells of a block whether the past before it is kept for the backward pass."""
        return _every if self.reversible is None else self._reversal(self.reversible).keeps

    def _reversal(self, mode: Reversible) -> CompiledReversal:
        return CompiledReversal(mode, self.schedule, self.blocks)

    def _recorded(self) -> Callable[[ScheduledBlock], RecordedBlock]:
        def made(scheduled: ScheduledBlock) -> RecordedBlock:
            kind = AdjointKind(
                self.wanted,
                self.differentiate_times,
                scheduled.order,
                scheduled.earlier,
                self.schedule.later,
                self.slopes,
                self.lookups,
            )
            return self.blocks.recorded(scheduled.block.pattern, kind)

        return _once(made)


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
    if not (torch.is_grad_enabled() and needs_graph):
        with torch.no_grad():
            numbers = _with_looked_up(solve, _numbers(solve, weights, times), looked_up)
            found, _ = solve.forward(y0, numbers, tensors, None)
            return found, found
    solve.compile_adjoints()
    outputs = _CompiledSolve.apply(  # type: ignore[no-untyped-call]
        solve, len(tensors), y0, weights, times, *tensors, *looked_up
    )
    return outputs[0], outputs[-1]


def _numbers(solve: CompiledSolve, weights: Tensor | None, times: Tensor | None) -> list[BlockNumbers]:
    known = solve.schedule.numbers
    if known is not None:
        return known
    assert weights is not None
    assert times is not None
    on_device = weights.to(times.device)
    return [block.numbers(on_device, times) for block in solve.schedule.blocks]


def _with_looked_up(
    solve: CompiledSolve, numbers: list[BlockNumbers], looked_up: Sequence[Tensor]
) -> list[BlockNumbers]:
    if not looked_up:
        return numbers
    sizes = [len(block.times) for block in solve.schedule.blocks]
    by_block = zip(*(of_rows.split(sizes) for of_rows in looked_up), strict=True)
    return [given._replace(looked_up=of_block) for given, of_block in zip(numbers, by_block, strict=True)]


class _CompiledSolve(torch.autograd.Function):
    """(y0, weights, times, tensors, looked_up) -> the states at the observed nodes, and again for slopes there."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: CompiledSolve,
        count: int,
        y0: Tensor,
        weights: Tensor | None,
        times: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        numbers = _numbers(solve, weights, times)
        tensors, looked_up = tensors[:count], tensors[count:]
        states, kept = solve.forward(y0, _with_looked_up(solve, numbers, looked_up), tensors, solve.keeps())
        ctx.solve, ctx.numbers, ctx.sizes = solve, numbers, [len(of_block) for of_block in kept]
        ctx.like = None if weights is None or times is None else (weights.shape, weights.device, times.shape)
        ctx.save_for_backward(*tensors, *looked_up, *(tensor for of_block in kept for tensor in of_block))
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
        solve, (count, lookups) = ctx.solve, ctx.counts
        tensors, looked_up, rest = saved[:count], saved[count : count + lookups], iter(saved[count + lookups :])
        kept = [tuple(next(rest) for _ in range(size)) for size in ctx.sizes]
        seen = states = _dense(of_states)
        for cotangent in of_slopes:
            seen = states + _dense(cotangent)
        numbers = _with_looked_up(solve, ctx.numbers, looked_up)
        of_y0, by_block, sums = solve.backward(seen, states if of_slopes else None, kept, numbers, tensors)
        of_weights = of_times = None
        if solve.differentiate_times:
            weights_shape, weights_device, times_shape = ctx.like
            of_weights = torch.zeros(weights_shape, dtype=torch.float64, device=seen.device)
            of_times = by_block[0][1].new_zeros(times_shape)
            for block, (of_rows, of_row_times, *_) in zip(solve.schedule.blocks, by_block, strict=True):
                of_weights.index_add_(0, block.weights, of_rows)
                of_times.index_add_(0, block.times, of_row_times)
            of_weights = of_weights.to(weights_device)
        of_tensors: list[Tensor | None] = [None] * (count + lookups)
        for i, total in zip(solve.wanted, sums, strict=True):
            of_tensors[i] = total
        first = 2 * solve.differentiate_times
        for place, i in enumerate(solve.lookups, start=first):
            of_tensors[count + i] = torch.cat([of_block[place] for of_block in by_block])
        return None, None, of_y0, of_weights, of_times, *of_tensors


def _cut(
    tensors: Sequence[Tensor], first: int, second: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:first], tensors[first : first + second], tensors[first + second :]


def _once(make: Callable[[ScheduledBlock], Made]) -> Callable[[ScheduledBlock], Made]:
    """What is made for a block, made once for all that are alike: it is asked for at every block."""
    known: dict[tuple[int, int, int], Made] = {}

    def made(scheduled: ScheduledBlock) -> Made:
        key = id(scheduled.block.pattern), scheduled.order, scheduled.earlier
        if key not in known:
            known[key] = make(scheduled)
        return known[key]

    return made


def _every(_: int) -> bool:
    return True


def _dense(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()


def _zeros(like: Tensor, count: int) -> list[Tensor]:
    return [torch.zeros_like(like) for _ in range(count)]
