"""A compiled function on the CPU whose kernels are called for one block after the other, without Python in between.

For a small func to call a function takes a hundred times as long as what its kernels do. All that changes from block to
block are addresses: so a table of them, and a loop over the table in C++, is all there is to a run over many blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_loop import BlockFunction, Given, Looped
from .kernel_calls import Argument, KernelCalls, is_laid_out, kernel_calls
from .table_loop import TableLoop

_KEPT = 32
"""So many plans of a function, for as many batch sizes, are remembered."""

_ALIGNMENT = 64
"""Buffers in one piece of memory begin at multiples of so many bytes."""


class KernelFunction(BlockFunction):
    """A function that Inductor has compiled.

    Args:
        run: the function.
        call: its code; see `kernel_calls`.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], call: Callable[..., Any]) -> None:
        super().__init__(run)
        self._call = call
        self._plans: dict[object, _Plan | None] = {}

    def looped(self, count: int, inputs: Sequence[Given], kept: Sequence[int], *, backwards: bool = False) -> Looped:
        """See `BlockFunction`.

        Raises:
            RuntimeError: a kernel raises an error.
        """
        key = (
            *((given.value.shape[given.has_stack :], given.value.stride()[given.has_stack :]) for given in inputs),
            *((given.is_stack, given.output) for given in inputs),
            *kept,
            backwards,
            count > 1,
        )
        if key not in self._plans:
            if len(self._plans) == _KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._planned(count, inputs, kept)
        plan = self._plans[key]
        if plan is None:
            return super().looped(count, inputs, kept, backwards=backwards)
        return plan.run(count, inputs, backwards)

    def _planned(self, count: int, inputs: Sequence[Given], kept: Sequence[int]) -> "_Plan | None":
        calls = kernel_calls(self._call, [given.one for given in inputs])
        if calls is None:
            return None
        for i, number in _carried(inputs, count):
            output = calls.outputs[number]
            if not is_laid_out(inputs[i].one, output.size, output.stride):
                return None
        return _Plan(calls, count, inputs, kept)


class _Plan:
    """How a loop is made, but for addresses.

    Args:
        calls: of the function.
        count, inputs, kept: see `BlockFunction.looped`; of the first one it matters whether it is more than 1.
    """

    def __init__(self, calls: KernelCalls, count: int, inputs: Sequence[Given], kept: Sequence[int]) -> None:
        self._outputs = calls.outputs
        self._constants = calls.constants
        self._kept = kept
        self._loop = TableLoop(calls.kernels, [[given.kind == "number" for given in of] for of in calls.arguments])
        self._stacked = {calls.outputs[number].buffer for number in kept}
        # What a block returns to the next one must outlive that one's first kernels.
        returned = {output.buffer: output for output in calls.outputs}
        self._returned = [(number, number in self._stacked, output) for number, output in returned.items()]
        scratch = [number for number in range(len(calls.buffers)) if number not in returned]
        sizes = [-(-calls.buffers[number] // _ALIGNMENT) * _ALIGNMENT for number in scratch]
        self._scratch = sum(sizes)
        # The rows of the table: inputs, buffers that are returned, all others at once, and zeros.
        row_of = {number: i for i, number in enumerate(returned, len(inputs))}
        rest = len(inputs) + len(returned)
        at = {number: (row, 0) for number, row in row_of.items()}
        at |= {number: (rest, sum(sizes[:i])) for i, number in enumerate(scratch)}
        places = [_place(given, at, rest + 1) for of in calls.arguments for given in of]
        self._rows = np.array([row for row, _ in places], dtype=np.intp)
        self._offsets = np.array([[offset] for _, offset in places], dtype=np.int64)
        # By how much addresses grow from block to block, and what is added for every other one.
        self._stacks = [(i, given.value.element_size()) for i, given in enumerate(inputs) if given.is_stack]
        steps = [(row_of[number], calls.buffers[number], is_stacked) for number, is_stacked, _ in self._returned]
        self._steps, self._every_other = np.zeros((2, rest + 2, 1), dtype=np.int64)
        for row, size, is_stacked in steps:
            (self._steps if is_stacked else self._every_other)[row] = size
        outputs = [(i, calls.outputs[number]) for i, number in _carried(inputs, count)]
        self._takes = np.array([i for i, _ in outputs], dtype=np.intp)
        self._from = np.array([row_of[output.buffer] for _, output in outputs], dtype=np.intp)
        self._further = np.array([[output.offset * output.dtype.itemsize] for _, output in outputs], dtype=np.int64)

    def run(self, count: int, inputs: Sequence[Given], backwards: bool) -> Looped:
        """See `BlockFunction.looped`."""
        memory = {
            number: torch.empty(
                output.step * (count if is_stacked else min(2, count)), dtype=output.dtype, device="cpu"
            )
            for number, is_stacked, output in self._returned
        }
        scratch = torch.empty(self._scratch, dtype=torch.uint8, device="cpu")
        first = [given.value.data_ptr() for given in inputs]
        first += [*(given.data_ptr() for given in memory.values()), scratch.data_ptr(), 0]
        addresses = np.array(first, dtype=np.int64)[:, None]
        if count > 1:
            addresses = self._of_blocks(addresses, count, inputs, backwards)
        self._loop(np.ascontiguousarray((addresses[self._rows] + self._offsets).T))
        return self._found(memory, count, 0 if backwards else count - 1)

    def _of_blocks(
        self, first: NDArray[np.int64], count: int, inputs: Sequence[Given], backwards: bool
    ) -> NDArray[np.int64]:
        """The addresses for each block, from those for the one whose number is 0, in the order of the blocks' turns."""
        turns = np.arange(count)
        steps = self._steps.copy()
        for i, size in self._stacks:
            steps[i] = inputs[i].value.stride(0) * size
        by_order = steps * (turns[::-1] if backwards else turns)
        addresses: NDArray[np.int64] = first + by_order + self._every_other * (turns % 2)
        addresses[self._takes, 1:] = addresses[self._from, :-1] + self._further
        for i in self._takes:
            given = inputs[i]
            for number, block in enumerate(given.starts or ()):
                turn = count - 1 - block if backwards else block
                addresses[i, turn] = (
                    given.value.data_ptr() + number * given.value.stride(0) * given.value.element_size()
                )
        return addresses

    def _found(self, memory: Mapping[int, Tensor], count: int, end: int) -> Looped:
        """The outputs, the block whose turn is last being `end`."""
        last, kept = [], {}
        for number, output in enumerate(self._outputs):
            whole = memory[output.buffer]
            if whole.dtype is not output.dtype:
                whole = whole.view(output.dtype)
            if number in self._kept:
                kept[number] = whole.as_strided((count, *output.size), (output.step, *output.stride), output.offset)
            copy = end if output.buffer in self._stacked else (count - 1) % 2
            last.append(whole.as_strided(output.size, output.stride, output.offset + copy * output.step))
        return Looped(last, kept)


def _carried(inputs: Sequence[Given], count: int) -> Iterator[tuple[int, int]]:
    """The inputs that are outputs of the block before, and which: of a single block none."""
    for i, given in enumerate(inputs if count > 1 else ()):
        if given.output is not None:
            yield i, given.output


def _place(given: Argument, buffers: Mapping[int, tuple[int, int]], zeros: int) -> tuple[int, int]:
    """Of an argument the row of the table of addresses, and what is added to it."""
    if given.kind == "input":
        return given.value, given.offset
    if given.kind == "buffer":
        row, offset = buffers[given.value]
        return row, offset + given.offset
    return zeros, given.value + given.offset
