"""Blocks of a captured func, traced and compiled once: then they serve for any steps, times, values and batch sizes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.block_rows import Pattern

from .block_tracing import trace_adjoint, trace_backwards, trace_forward
from .block_values import AdjointKind, AdjointValues, BlockNumbers, Cotangents, FilterNumbers
from .compile_settings import Compile, Traced
from .compiled_functions import CompiledFunctions
from .func_capture import Dependencies
from .tracing import parts_of

Forward = Callable[..., tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]]
"""From the window, the numbers and the tensors to what `forward_block` returns, and what is kept for the adjoint."""


class CompiledBlocks(CompiledFunctions):
    """The blocks of one func.

    Args:
        dependencies: func and what it depends on.
        settings: how to compile.
        keeps: whether matrix products are kept for adjoints: see `kept_products`.
        x, time: a state and a time, whose values do not matter.

    Attributes:
        axis: of the components of states, as `laid_out` takes it.
    """

    def __init__(self, dependencies: Dependencies, settings: Compile, x: Tensor, time: Tensor, keeps: bool) -> None:
        super().__init__(dependencies, settings, x, time)
        self._keeps = keeps
        self.axis = self._take_apart()

    def forward(self, pattern: Pattern) -> Forward:
        """`forward_block`, without the func and the pattern."""
        return self._for_any_size(lambda: self._forward(pattern))

    def backwards(self, pattern: Pattern) -> Callable[..., tuple[Tensor, ...]]:
        """`reversed_block`, without the func and the pattern."""
        return self._for_any_size(lambda: self._backwards(pattern))

    def recorded(self, pattern: Pattern, kind: AdjointKind) -> "RecordedBlock":
        """A block for a solve that is differentiated: see `block_and_adjoint`."""
        return self._for_any_size(lambda: self._recorded(pattern, kind))

    def _forward(self, pattern: Pattern) -> Forward:
        run, _ = self._made((pattern, None), lambda: trace_forward(self._func, pattern, self._like))
        return _called(run, pattern)

    def _backwards(self, pattern: Pattern) -> Callable[..., tuple[Tensor, ...]]:
        run, _ = self._made((pattern, "backwards"), lambda: trace_backwards(self._func, pattern, self._like))

        def call(window: Sequence[Tensor], numbers: BlockNumbers, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(run(*window, *numbers.flat, *tensors))

        return call

    def _recorded(self, pattern: Pattern, kind: AdjointKind) -> "RecordedBlock":
        key = pattern, kind, self._keeps
        run, block = self._made(key, lambda: trace_adjoint(self._func, pattern, kind, self._like, self._keeps))
        half = block.forward
        assert half is not None
        # Where it keeps nothing it is that of solves without a gradient.
        forward, _ = self._made((*key, "forward") if block.keeps else (pattern, None), lambda: half)
        sizes = (1 + sum(pattern.begins), len(kind.wanted), 2 * kind.times, len(kind.lookups))

        def adjoint(
            window: Sequence[Tensor],
            numbers: BlockNumbers,
            tensors: Sequence[Tensor],
            cotangents: Cotangents,
            filters: FilterNumbers | None,
            kept: Sequence[Tensor],
        ) -> AdjointValues:
            found = run(
                *window,
                *numbers.flat,
                *tensors,
                *cotangents.window,
                cotangents.seen,
                *cotangents.states,
                *cotangents.sums,
                *cotangents.later,
                *(() if filters is None else filters.flat),
                *kept,
            )
            return AdjointValues(*parts_of(found, sizes))

        return RecordedBlock(_called(forward, pattern), adjoint)


class RecordedBlock(NamedTuple):
    """A block for a solve that is differentiated.

    Attributes:
        forward: the block.
        adjoint: its adjoint, which takes the window, the numbers and the tensors of `forward_block`, cotangents, the
            filter's numbers, and what the block keeps.
    """

    forward: Forward
    adjoint: Callable[..., AdjointValues]


def _called(run: Traced, pattern: Pattern) -> Forward:
    size = 1 + sum(pattern.ends)

    def call(
        window: Sequence[Tensor], numbers: BlockNumbers, tensors: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        found = run(*window, *numbers.flat, *tensors)
        return tuple(found[:size]), found[size], tuple(found[size + 1 :])

    return call
