"""How a state is made of samples, on which f acts independently of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

BatchDims = Literal["auto"] | int
"""How many leading dimensions of a state count its samples."""


@dataclass(frozen=True)
class Samples:
    """A state as a matrix whose rows are samples.

    Attributes:
        shapes: of the components of a tuple state, which is flattened to one vector; of the state itself, where it is
            no tuple.
        dims: how many leading dimensions count the samples; the components have them in common. 0 for a single one.
    """

    shapes: tuple[torch.Size, ...]
    dims: int

    @property
    def count(self) -> int:
        """How many samples there are."""
        return prod(self.shapes[0][: self.dims])

    def split(self, y: Tensor) -> Tensor:
        """The state with a row for each sample, of shape (S, D)."""
        if len(self.shapes) == 1:
            return y.reshape(self.count, -1)
        parts = y.split([shape.numel() for shape in self.shapes])
        return torch.cat([part.reshape(self.count, -1) for part in parts], 1)

    def join(self, rows: Tensor) -> Tensor:
        """The state of rows of shape (S, D)."""
        if len(self.shapes) == 1:
            return rows.reshape(self.shapes[0])
        parts = rows.split([shape.numel() // self.count for shape in self.shapes], 1)
        return torch.cat([part.reshape(-1) for part in parts])

    def fewer(self) -> "Samples | None":
        """The same with a dimension less, where there is one."""
        return Samples(self.shapes, self.dims - 1) if self.dims else None

    def index(self, row: int) -> tuple[int, ...]:
        """The index of a sample."""
        return tuple(int(i) for i in torch.unravel_index(torch.tensor(row, device="cpu"), self.shapes[0][: self.dims]))


def samples_of(shapes: Sequence[torch.Size], dims: int | None) -> Samples:
    """The samples of a state.

    Args:
        shapes: of its components, one where it is no tuple.
        dims: how many leading dimensions count them. None: all that the components have in common, but for the last
            one of a state that is no tuple.

    Raises:
        ValueError: the components have not so many dimensions in common.
    """
    common = 0
    while all(len(shape) > common and shape[common] == shapes[0][common] for shape in shapes):
        common += 1
    if dims is not None:
        if dims > common:
            raise ValueError(
                f"batch_dims must be at most {common}, the number of leading dimensions that all components of y0 have "
                f"in common, got {dims} for shapes {[tuple(shape) for shape in shapes]}"
            )
        return Samples(tuple(shapes), dims)
    found = Samples(tuple(shapes), max(0, common - 1) if len(shapes) == 1 else common)
    return Samples(found.shapes, 0) if found.count == 0 else found
