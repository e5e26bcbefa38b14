"""The past before each block of a compiled leapfrog solve, run backwards from the last block: see `reversal`."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .block_schedule import Schedule
from .block_values import BlockNumbers
from .compiled_blocks import CompiledBlocks
from .rerun import accepted_difference, relative_difference
from .reversal import Reversible, check_drift, larger_drift

Past = Sequence[Tensor]


class CompiledReversal:
    """The way back through the blocks of one solve.

    Args:
        mode: what the user asks for.
        schedule: the blocks, all but the first of which can be run backwards, and the last of which may be filled up.
        blocks: compiled.

    Attributes:
        drift: the largest so far.
    """

    def __init__(self, mode: Reversible, schedule: Schedule, blocks: CompiledBlocks) -> None:
        self.drift = 0.0
        self._mode = mode
        self._blocks = schedule.blocks
        self._compiled = blocks

    def keeps(self, i: int) -> bool:
        """Whether the past before a block is kept, and compared with what is come back to."""
        last = len(self._blocks) - 1
        # What is made before the second one is not leapfrog's; run backwards, the last step may be ill-conditioned.
        return i in (0, 1, last) or (i - 1) % math.ceil(last / (self._mode.anchors + 1)) == 0

    def compile(self) -> None:
        """Compile what the way back needs."""
        self._compiled.backwards(self._blocks[-1].block.pattern)

    def pasts(self, kept: Sequence[Past], numbers: Sequence[BlockNumbers], tensors: Sequence[Tensor]) -> Iterator[Past]:
        """The past before each block, from the last one to the first.

        Args:
            kept: of each block, empty where it is not.
            numbers: of each block.
            tensors: what func depends on.

        Raises:
            DriftError: the drift is beyond the tolerance.
        """
        tolerance = accepted_difference(self._mode.tolerance, kept[0][0].dtype)
        last = len(self._blocks) - 1
        after: Past = ()
        for i in range(last, -1, -1):
            past = kept[i]
            if 0 < i < last:
                reached = self._compiled.backwards(self._blocks[i].block.pattern)(after, numbers[i], tensors)
                if past:
                    self._measure(reached, past, tolerance)
                else:
                    past = reached
            yield past
            after = past

    def _measure(self, reached: Past, known: Past, tolerance: float) -> None:
        pairs = ((reached[0], known[0]), (reached[0] - reached[1], known[0] - known[1]))
        for one, other in pairs:
            self.drift = larger_drift(self.drift, relative_difference(one, other))
            check_drift(self.drift, tolerance)
