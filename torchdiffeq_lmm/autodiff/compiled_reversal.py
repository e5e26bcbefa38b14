"""The past before each block of a compiled leapfrog solve, run backwards from the last block: see `reversal`."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .block_loop import joined
from .block_schedule import ScheduledRun
from .block_values import BlockNumbers
from .compiled_blocks import CompiledBlocks
from .rerun import accepted_difference, relative_differences
from .reversal import Reversible, check_drift, larger_drift

Past = Sequence[Tensor]


class CompiledReversal:
    """The way back through the blocks of one solve.

    Args:
        mode: what the user asks for.
        blocks: how many there are, all but the first of which can be run backwards, and the last of which may be filled
            up.
        compiled: these.

    Attributes:
        drift: the largest so far.
    """

    def __init__(self, mode: Reversible, blocks: int, compiled: CompiledBlocks) -> None:
        self.drift = 0.0
        self._mode = mode
        self._last = blocks - 1
        self._compiled = compiled

    def anchors(self, run: ScheduledRun) -> list[int]:
        """The blocks of a run the past before which is kept, and compared with what is come back to."""
        every = max(1, self._mode.stride(self._last))
        numbers = enumerate(range(run.first, run.first + run.blocks))
        return [i for i, number in numbers if number in (0, self._last) or (number - 1) % every == 0]

    def pasts(
        self, runs: Sequence[ScheduledRun], kept: Sequence[Past], numbers: Sequence[BlockNumbers], tensors: Past
    ) -> Iterator[Past]:
        """The pasts before the blocks of each run, from the last run to the first, of shape (blocks, ...).

        Args:
            runs: the blocks.
            kept: of each, the pasts before its anchors, of shape (anchors, ...).
            numbers: of each.
            tensors: what func depends on.

        Raises:
            DriftError: the drift is beyond the tolerance.
        """
        after: Past = ()
        for run, known, given in zip(reversed(runs), reversed(kept), reversed(numbers), strict=True):
            pasts = self._pasts(run, known, given, tensors, after)
            yield pasts
            after = [past[0] for past in pasts]

    def _pasts(self, run: ScheduledRun, known: Past, numbers: BlockNumbers, tensors: Past, after: Past) -> Past:
        """Those of one run, from the past after it."""
        anchors = self.anchors(run)
        if len(anchors) == run.blocks:
            return known
        # What the first block makes is not all leapfrog's; run backwards, the last step may be ill-conditioned.
        begin = int(run.first == 0)
        end = run.blocks - (run.first + run.blocks - 1 == self._last)
        following = {anchor - 1: [past[i] for past in known] for i, anchor in enumerate(anchors)}
        ends = {end - 1: after} | {block: past for block, past in following.items() if begin <= block < end}
        starts = sorted(ends, reverse=True)
        window = [joined([ends[block][i].unsqueeze(0) for block in starts]) for i in range(len(ends[end - 1]))]
        of_blocks = BlockNumbers.of(*(given[begin:end] for given in numbers.flat))
        backwards = self._compiled.backwards(run.pattern)
        reached = backwards.run(end - begin, window, [block - begin for block in starts], of_blocks, tensors)
        inside = [i for i, anchor in enumerate(anchors) if begin <= anchor < end]
        if inside:
            there = [past[inside] for past in known]
            places = [anchors[i] - begin for i in inside]
            self._measure([past[places] for past in reached], there)
            for past, of_anchors in zip(reached, there, strict=True):
                past[places] = of_anchors
        if end - begin == run.blocks:
            return reached
        last = len(anchors) - (run.blocks - end)
        return [joined([there[:begin], past, there[last:]]) for past, there in zip(reached, known, strict=True)]

    def _measure(self, reached: Past, known: Past) -> None:
        tolerance = accepted_difference(self._mode.tolerance, known[0].dtype)
        pairs = ((reached[0], known[0]), (reached[0] - reached[1], known[0] - known[1]))
        for one, other in pairs:
            self.drift = larger_drift(self.drift, relative_differences(one, other))
            check_drift(self.drift, tolerance)
