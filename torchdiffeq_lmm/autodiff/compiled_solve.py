"""A solve by compiled blocks, and its backward pass; it keeps the past at the beginnings of blocks alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .block_loop import Given, fixed, joined, shifted, stacks
from .block_schedule import Schedule, ScheduledRun
from .block_values import AdjointKind, BlockNumbers
from .compiled_blocks import CompiledBlocks, ForwardBlock, LaterCotangents, RecordedBlock
from .compiled_reversal import CompiledReversal
from .reversal import DriftError, Reversible
from .state_layout import laid_out

_RUN_BYTES = 2**20
"""A run of blocks has so many bytes of states, which stay in a processor's cache."""


class Kept(NamedTuple):
    """What is kept of a run of blocks for the backward pass, of shape (blocks, ...) where it is of each block.

    Attributes:
        pasts: the past before each block; where it is run backwards, before each anchor, of shape (anchors, ...).
        latest: the states of the latest nodes before each block, where the filter needs any.
        products: what adjoints need not make again.
    """

    pasts: tuple[Tensor, ...] = ()
    latest: tuple[Tensor, ...] = ()
    products: tuple[Tensor, ...] = ()


class Gradients(NamedTuple):
    """What a backward pass leads to.

    Attributes:
        y0: the gradient of the initial state.
        by_run: those of weights and times, if they are wanted, and of all wanted lookups, for each run, of shape
            (blocks, ...).
        tensors: of the wanted ones.
    """

    y0: Tensor
    by_run: list[tuple[Tensor, ...]]
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

    def runs(self, y0: Tensor, *, records: bool) -> list[ScheduledRun]:
        """The blocks, as many at once as need little memory.

        Args:
            y0: the initial state.
            records: whether there is a backward pass. What it needs is compiled, so that what cannot be is known
                beforehand.
        """
        last = self.schedule.blocks[-1]
        pattern = last.block.pattern
        if not records:
            block = self.blocks.forward(pattern)
        else:
            if self.reversible is not None:
                self.blocks.backwards(pattern)
            for one in self.schedule.unlike:
                self.blocks.recorded(one.block.pattern, self._kind(one.order, one.earlier))
            block = self.blocks.recorded(pattern, self._kind(last.order, last.earlier)).forward
        most = 1
        if block.is_light and y0.device.type == "cpu":
            most = _RUN_BYTES // max(1, pattern.steps * y0.numel() * y0.element_size())
        return self.schedule.runs(most)

    def forward(
        self,
        runs: Sequence[ScheduledRun],
        y0: Tensor,
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
        *,
        keeps_anchors: bool = False,
        keeps_all: bool = False,
    ) -> tuple[Tensor, list[Kept]]:
        """The states at the observed nodes, of shape (n, *y0.shape), and what is kept of each run.

        Args:
            runs: the blocks.
            y0: the initial state.
            numbers: of each run.
            tensors: what func depends on.
            keeps_anchors: whether the past is kept where a run backwards needs it.
            keeps_all: whether all is kept that a backward pass needs.
        """
        x = self._laid_out(y0, y0)
        window = (x, *_zeros(x, sum(runs[0].pattern.begins)))
        kept, found = list[Kept](), list[Tensor]()
        nodes: Tensor | None = None
        block_of = self._block_of(records=keeps_anchors or keeps_all)
        anchors_of = self._reversal().anchors if keeps_anchors else None
        for i, (run, given) in enumerate(zip(runs, numbers, strict=True)):
            anchors = [] if anchors_of is None else anchors_of(run)
            of_latest = keeps_all and any(one.earlier for one in runs[i : i + 2])
            before, latest_nodes = window, nodes
            window, pasts, nodes, products = block_of(run).run(
                run.blocks,
                before,
                given,
                tensors,
                keeps_pasts=keeps_all or bool(anchors),
                keeps_nodes=of_latest or run.seen is not None,
            )
            latest: tuple[Tensor, ...] = ()
            if keeps_all and run.earlier:
                assert nodes is not None
                assert latest_nodes is not None
                latest = (shifted(latest_nodes[-1, -run.earlier :], nodes[:, -run.earlier :]),)
            if not keeps_all:
                pasts = tuple(joined([past[i : i + 1] for i in anchors]).clone() for past in pasts) if anchors else ()
            kept.append(Kept(pasts, latest, products))
            if run.seen is not None:
                assert nodes is not None
                states = nodes.flatten(0, 1)
                found.append(states if len(run.seen) == len(states) else states.index_select(0, run.seen))
            if run.sees_end:
                found.append(window[0].unsqueeze(0))
        return (found[0] if len(found) == 1 else torch.cat(found)).contiguous(), kept

    def backward(
        self,
        runs: Sequence[ScheduledRun],
        seen: Tensor,
        states: Tensor | None,
        kept: Sequence[Kept],
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
        looked_up: Sequence[Tensor],
    ) -> Gradients:
        """From the cotangents of the observed states to the gradients.

        Args:
            runs: the blocks.
            seen: the cotangents.
            states: the same without what E sees of the slopes there, for the filter; None where that is nothing.
            kept, numbers, tensors: see `forward`.
            looked_up: for all rows of all blocks.

        Raises:
            DriftError: see `Reversible`.
        """

        def backward(kept: Iterator[Kept]) -> Gradients:
            return self._backward(runs, seen, states, kept, numbers, tensors, looked_up)

        mode = self.reversible
        if mode is None:
            return backward(reversed(kept))
        reversal, known = self._reversal(), [of_run.pasts for of_run in kept]
        try:
            return backward(Kept(tuple(pasts)) for pasts in reversal.pasts(runs, known, numbers, tensors))
        except DriftError:
            if mode.on_drift == "raise":
                raise
            y0 = kept[0].pasts[0][0]
            return backward(reversed(self.forward(runs, y0, numbers, tensors, keeps_all=True)[1]))
        finally:
            if mode.report is not None:
                mode.report(reversal.drift)

    def _backward(
        self,
        runs: Sequence[ScheduledRun],
        seen: Tensor,
        states: Tensor | None,
        kept: Iterator[Kept],
        numbers: Sequence[BlockNumbers],
        tensors: Sequence[Tensor],
        looked_up: Sequence[Tensor],
    ) -> Gradients:
        """The same, with what is kept of each run from the last one on."""
        observed = [self._laid_out(given, given[0]) for given in (seen, *(() if states is None else (states,)))]
        like, end = observed[0][0], len(seen)
        window: Sequence[Tensor] = _zeros(like, 1 + sum(runs[-1].pattern.ends))
        sums: Sequence[Tensor] = [torch.zeros_like(tensors[i]) for i in self.wanted]
        later: Sequence[Tensor] = _zeros(like, self.schedule.later)
        by_run: list[tuple[Tensor, ...]] = []
        recorded = self._recorded()
        for run, of_run, given in zip(reversed(runs), kept, reversed(numbers), strict=True):
            if run.sees_end:
                end -= 1
                window = (observed[0][end], *window[1:])
            begin = end if run.seen is None else end - len(run.seen)
            of_nodes = [self._at_nodes(run, given_there[begin:end], like) for given_there in observed]
            end = begin
            found = recorded(run).adjoint.run(
                run.blocks,
                of_run.pasts,
                given,
                tensors,
                LaterCotangents(window, of_nodes[0], of_nodes[1:], sums, later),
                self._filters(run, observed[0], like, of_run.latest, looked_up),
                of_run.products,
            )
            window, sums, later = found.window, found.sums, found.later
            by_run.append((*found.numbers, *found.looked_up))
        return Gradients(window[0].contiguous(), by_run[::-1], tuple(sums))

    def _at_nodes(self, run: ScheduledRun, seen: Tensor, like: Tensor) -> Given:
        """The cotangents at the beginnings of all steps of a run, from those at its observed nodes."""
        steps = run.pattern.steps
        if run.seen is None:
            return Given(self._laid_out(like.new_zeros(steps, *like.shape), like))
        shape = run.blocks, steps, *like.shape
        if len(seen) < run.blocks * steps:
            seen = like.new_zeros(run.blocks * steps, *like.shape).index_copy_(0, run.seen, seen)
        return Given(self._laid_out(seen.reshape(shape), like), is_stack=True)

    def _filters(
        self, run: ScheduledRun, seen: Tensor, like: Tensor, latest: Sequence[Tensor], looked_up: Sequence[Tensor]
    ) -> list[Given]:
        """What `FilterNumbers.flat` are in each block."""
        filtered = run.filtered
        if filtered is None:
            return []
        found = stacks([filtered.value])
        if filtered.products is None:
            return found
        found += stacks([filtered.products])
        rows = len(run.pattern.rows)
        for weights in (filtered.observed_value, filtered.observed_slope):
            if weights is None:
                found += fixed([self._laid_out(like.new_zeros(rows, *like.shape), like)])
            else:
                observed = (weights.to(seen.dtype) @ seen.reshape(len(seen), -1)).reshape(
                    *weights.shape[:2], *like.shape
                )
                found += stacks([self._laid_out(observed, like)])
        if filtered.earlier is not None and filtered.earlier_rows is not None:
            there = filtered.earlier_rows.reshape(-1)
            of_rows = (given.index_select(0, there).unflatten(0, filtered.earlier.shape) for given in looked_up)
            found += stacks([*latest, self.schedule.times[filtered.earlier], *of_rows])
        return found

    def _laid_out(self, states: Tensor, x: Tensor) -> Tensor:
        return laid_out(states, x.ndim, self.blocks.axis)

    def _reversal(self) -> CompiledReversal:
        assert self.reversible is not None
        return CompiledReversal(self.reversible, len(self.schedule.blocks), self.blocks)

    def _block_of(self, *, records: bool) -> Callable[[ScheduledRun], ForwardBlock]:
        if not records:
            return lambda run: self.blocks.forward(run.pattern)
        recorded = self._recorded()
        return lambda run: recorded(run).forward

    def _recorded(self) -> Callable[[ScheduledRun], RecordedBlock]:
        return lambda run: self.blocks.recorded(run.pattern, self._kind(run.order, run.earlier))

    def _kind(self, order: int, earlier: int) -> AdjointKind:
        return AdjointKind(
            self.wanted, self.differentiate_times, order, earlier, self.schedule.later, self.slopes, self.lookups
        )


def _zeros(like: Tensor, count: int) -> list[Tensor]:
    return [torch.zeros_like(like) for _ in range(count)]
