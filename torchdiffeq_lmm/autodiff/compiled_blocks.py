"""Blocks of a captured func, traced and compiled once: then they serve for any steps, times, values and batch sizes."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.block_rows import Pattern

from .block_loop import BlockFunction, Given, carried, fixed, shifted, stacks
from .block_tracing import trace_adjoint, trace_backwards, trace_forward
from .block_values import AdjointKind, AdjointValues, BlockNumbers
from .compile_settings import Compile
from .compiled_functions import CompiledFunctions
from .func_capture import Dependencies
from .tracing import parts_of

_BLOCK = 10
"""Of so many steps a block is where every block is called by itself."""

_LIGHT_BLOCK = 5
"""Where a call of many blocks takes no longer; what is compiled is half as long then."""


class Forwarded(NamedTuple):
    """What a run of blocks leads to.

    Attributes:
        window: the past at its end.
        pasts: that at the beginning of each block, each tensor of shape (blocks, ...); empty where it is not wanted.
        nodes: the states at the beginnings of all steps, of shape (blocks, steps, *x.shape); None likewise.
        products: what is kept for the adjoint of each block, of shape (blocks, ...).
    """

    window: tuple[Tensor, ...]
    pasts: tuple[Tensor, ...]
    nodes: Tensor | None
    products: tuple[Tensor, ...]


class ForwardBlock(NamedTuple):
    """`forward_block`, compiled.

    Attributes:
        function: from the window, the numbers and the tensors to what it returns, and what is kept for the adjoint.
        size: of how many tensors the window is at its end.
        keeps: how many are kept.
        is_light: whether runs of many blocks pay: whether it is without matrix products.
    """

    function: BlockFunction
    size: int
    keeps: int
    is_light: bool

    def run(
        self,
        blocks: int,
        window: Sequence[Tensor],
        numbers: BlockNumbers,
        tensors: Sequence[Tensor],
        *,
        keeps_pasts: bool,
        keeps_nodes: bool,
    ) -> Forwarded:
        """Make the steps of so many blocks.

        Args:
            blocks: how many.
            window: the past at the beginning.
            numbers: of all blocks, of shape (blocks, ...).
            tensors: what func depends on.
            keeps_pasts, keeps_nodes: what is wanted.
        """
        products = range(self.size + 1, self.size + 1 + self.keeps) if keeps_pasts else ()
        # A single one may begin with another past than it ends with.
        is_run = blocks > 1
        kept = [*(range(self.size) if keeps_pasts and is_run else ()), *([self.size] if keeps_nodes else ()), *products]
        inputs = [*carried(window), *stacks(numbers.flat), *fixed(tensors)]
        found = self.function.looped(blocks, inputs, kept)
        pasts: tuple[Tensor, ...] = ()
        if keeps_pasts and is_run:
            pasts = tuple(shifted(first, found.kept[i]) for i, first in enumerate(window))
        elif keeps_pasts:
            pasts = tuple(first.unsqueeze(0) for first in window)
        nodes = found.kept[self.size] if keeps_nodes else None
        return Forwarded(tuple(found.last[: self.size]), pasts, nodes, tuple(found.kept[i] for i in products))


class BackwardsBlock(NamedTuple):
    """`reversed_block`, compiled."""

    function: BlockFunction

    def run(
        self,
        blocks: int,
        window: Sequence[Tensor],
        starts: Sequence[int],
        numbers: BlockNumbers,
        tensors: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The pasts at the beginnings of so many blocks.

        Args:
            blocks: how many.
            window: the pasts at the ends of certain ones, of shape (starts, ...).
            starts: these, from the last block on.
            numbers, tensors: see `ForwardBlock.run`.
        """
        inputs = [*carried(window, starts=tuple(starts)), *stacks(numbers.flat), *fixed(tensors)]
        kept = self.function.looped(blocks, inputs, range(len(window)), backwards=True).kept
        return tuple(kept[i] for i in range(len(window)))


class LaterCotangents(NamedTuple):
    """What the adjoint of a run of blocks begins with; see `Cotangents`.

    Attributes:
        window, sums, later: for the last block.
        seen, states: of each block, or the same of all.
    """

    window: Sequence[Tensor]
    seen: Given
    states: Sequence[Given]
    sums: Sequence[Tensor]
    later: Sequence[Tensor]


class AdjointBlock(NamedTuple):
    """The adjoint of `forward_block`, compiled.

    Attributes:
        function: see `trace_adjoint`.
        sizes: of how many tensors the attributes of `AdjointValues` are but the last.
    """

    function: BlockFunction
    sizes: tuple[int, ...]

    def run(
        self,
        blocks: int,
        pasts: Sequence[Tensor],
        numbers: BlockNumbers,
        tensors: Sequence[Tensor],
        cotangents: LaterCotangents,
        filters: Sequence[Given],
        products: Sequence[Tensor],
    ) -> AdjointValues:
        """From the last of so many blocks to the first.

        Args:
            blocks: how many.
            pasts: at the beginning of each, of shape (blocks, ...).
            numbers: of all blocks, of shape (blocks, ...).
            tensors: what func depends on.
            cotangents: from the blocks after these.
            filters: the inputs that `FilterNumbers.flat` are.
            products: what has been kept of each block, of shape (blocks, ...).

        Returns:
            The values of the first block, but for `numbers` and `looked_up`: those of all, of shape (blocks, ...).
        """
        window, sums, *_ = self.sizes
        inputs = [
            *stacks(pasts),
            *stacks(numbers.flat),
            *fixed(tensors),
            *carried(cotangents.window),
            cotangents.seen,
            *cotangents.states,
            *carried(cotangents.sums, window),
            *carried(cotangents.later, sum(self.sizes)),
            *filters,
            *stacks(products),
        ]
        by_block = range(window + sums, sum(self.sizes))
        found = self.function.looped(blocks, inputs, by_block, backwards=True)
        values = [found.kept.get(i, value) for i, value in enumerate(found.last)]
        return AdjointValues(*parts_of(values, self.sizes))


class RecordedBlock(NamedTuple):
    """A block for a solve that is differentiated."""

    forward: ForwardBlock
    adjoint: AdjointBlock


class CompiledBlocks(CompiledFunctions):
    """The blocks of one func.

    Args:
        dependencies: func and what it depends on.
        settings: how to compile.
        keeps: whether matrix products are kept for adjoints: see `kept_products`.
        x, time: a state and a time, whose values do not matter.

    Attributes:
        axis: of the components of states, as `laid_out` takes it.
        block: of how many steps a block is.
    """

    _in_loops = True

    def __init__(self, dependencies: Dependencies, settings: Compile, x: Tensor, time: Tensor, keeps: bool) -> None:
        super().__init__(dependencies, settings, x, time)
        self._keeps = keeps
        self.axis = self._take_apart()
        self.block = settings.block or (_LIGHT_BLOCK if self._is_light else _BLOCK)
        # By number, for to hash a pattern takes long; the schedule of the solve keeps it.
        self._forwards: dict[int, ForwardBlock] = {}
        self._recordeds: dict[tuple[int, AdjointKind], RecordedBlock] = {}

    def forward(self, pattern: Pattern) -> ForwardBlock:
        """The block, for a solve without a gradient."""
        if id(pattern) not in self._forwards:
            self._forwards[id(pattern)] = self._for_any_size(lambda: self._forward(pattern))
        return self._forwards[id(pattern)]

    def backwards(self, pattern: Pattern) -> BackwardsBlock:
        """The block from its end to its beginning."""
        return self._for_any_size(lambda: self._backwards(pattern))

    def recorded(self, pattern: Pattern, kind: AdjointKind) -> RecordedBlock:
        """The block for a solve that is differentiated: see `block_and_adjoint`."""
        key = id(pattern), kind
        if key not in self._recordeds:
            self._recordeds[key] = self._for_any_size(lambda: self._recorded(pattern, kind))
        return self._recordeds[key]

    def _forward(self, pattern: Pattern) -> ForwardBlock:
        run, block = self._made((pattern, None), lambda: trace_forward(self._func, pattern, self._like))
        return ForwardBlock(run, 1 + sum(pattern.ends), 0, block.is_light)

    def _backwards(self, pattern: Pattern) -> BackwardsBlock:
        run, _ = self._made((pattern, "backwards"), lambda: trace_backwards(self._func, pattern, self._like))
        return BackwardsBlock(run)

    def _recorded(self, pattern: Pattern, kind: AdjointKind) -> RecordedBlock:
        key = pattern, kind, self._keeps
        run, block = self._made(key, lambda: trace_adjoint(self._func, pattern, kind, self._like, self._keeps))
        half = block.forward
        assert half is not None
        # Where it keeps nothing it is that of solves without a gradient.
        forward, _ = self._made((*key, "forward") if block.keeps else (pattern, None), lambda: half)
        sizes = (1 + sum(pattern.begins), len(kind.wanted), 2 * kind.times, len(kind.lookups))
        size = 1 + sum(pattern.ends)
        return RecordedBlock(ForwardBlock(forward, size, block.keeps, block.is_light), AdjointBlock(run, sizes))
