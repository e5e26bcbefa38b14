"""The loop over blocks that are alike: one compiled function, run for each of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """An input of the function.

    Attributes:
        value: the same for all blocks, or for the one that is run first; or a stack of values.
        is_stack: whether it is one for each block, of shape (blocks, ...).
        output: which output of the block that is run before it is in its place; None for none.
        starts: the blocks for which it is not, in the order in which they are run, from the first one on; for these
            `value` is a stack. None for the first one alone, with a value.
    """

    value: Tensor
    is_stack: bool = False
    output: int | None = None
    starts: tuple[int, ...] | None = None

    @property
    def one(self) -> Tensor:
        """A value for one block."""
        return self.value[0] if self.has_stack else self.value

    @property
    def has_stack(self) -> bool:
        """Whether there is more than one value."""
        return self.is_stack or self.starts is not None


def fixed(tensors: Sequence[Tensor]) -> list[Given]:
    """The same for all blocks."""
    return [Given(tensor) for tensor in tensors]


def stacks(tensors: Sequence[Tensor]) -> list[Given]:
    """Those of each block."""
    return [Given(tensor, is_stack=True) for tensor in tensors]


def carried(tensors: Sequence[Tensor], first: int = 0, starts: tuple[int, ...] | None = None) -> list[Given]:
    """What the block before returns, from an output on; they are given for the first block, or for certain ones."""
    return [Given(tensor, output=first + i, starts=starts) for i, tensor in enumerate(tensors)]


class Looped(NamedTuple):
    """What a loop leads to.

    Attributes:
        last: the outputs of the block that is run last.
        kept: those that are wanted of every block, each of shape (blocks, ...), by their numbers.
    """

    last: Sequence[Tensor]
    kept: dict[int, Tensor]


class BlockFunction:
    """A function of tensors that returns tensors, to be run for one block or many.

    Args:
        run: the function.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]]) -> None:
        self._run = run

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What the function returns."""
        return self._run(*inputs)

    def looped(self, count: int, inputs: Sequence[Given], kept: Sequence[int], *, backwards: bool = False) -> Looped:
        """Run it for so many blocks.

        Args:
            count: how many.
            inputs: of the function.
            kept: the outputs that are wanted of every block.
            backwards: whether from the last block to the first.
        """
        last: Sequence[Tensor] = ()
        found: list[list[Tensor]] = [[] for _ in kept]
        for block in reversed(range(count)) if backwards else range(count):
            last = self._run(*(_value(given, block, last) for given in inputs))
            for number, of_blocks in zip(kept, found, strict=True):
                of_blocks.append(last[number])
        return Looped(
            last,
            {
                number: joined([value.unsqueeze(0) for value in (of_blocks[::-1] if backwards else of_blocks)])
                for number, of_blocks in zip(kept, found, strict=True)
            },
        )


def shifted(first: Tensor, stack: Tensor) -> Tensor:
    """The first value, then those of a stack but the last, in the same layout."""
    found = torch.empty_like(stack)
    found[0].copy_(first)
    found[1:].copy_(stack[:-1])
    return found


def joined(stacks: Sequence[Tensor]) -> Tensor:
    """Stacks one after the other; the layout of each value remains."""
    one = stacks[0]
    if len(stacks) == 1:
        return one
    order = [0, *sorted(range(1, one.ndim), key=one.stride, reverse=True)]
    return torch.cat([stack.permute(order) for stack in stacks]).permute([order.index(dim) for dim in range(one.ndim)])


def _value(given: Given, block: int, last: Sequence[Tensor]) -> Tensor:
    """An input for a block, the one before having returned `last`."""
    if given.is_stack:
        return given.value[block]
    if given.starts is not None and block in given.starts:
        return given.value[given.starts.index(block)]
    return given.value if given.output is None or not last else last[given.output]
