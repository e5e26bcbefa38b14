"""How a state is made of samples, on which f acts independently of each other."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .known_jacobian import Known
from .newton_options import Newton

BatchDims = Literal["auto"] | int
"""How many leading dimensions of a state count its samples."""


class Systems(NamedTuple):
    """Into which systems the equations of implicit steps fall, how these are solved, and what is known of J."""

    samples: "Samples"
    newton: Newton
    known: Known | None = None


_NAMED = 5
"""So many samples are named in messages."""


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

    @cached_property
    def count(self) -> int:
        """How many samples there are."""
        return prod(self.shapes[0][: self.dims])

    @cached_property
    def entries(self) -> int:
        """How many entries a sample has."""
        return sum(prod(shape[self.dims :]) for shape in self.shapes)

    @property
    def is_matrix(self) -> bool:
        """Whether the state is the matrix of its samples as it is."""
        return len(self.shapes) == 1 and self.dims == 1 and len(self.shapes[0]) == 2

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

    def fewer(self) -> "Samples":
        """The same with a dimension less."""
        return Samples(self.shapes, self.dims - 1)

    def names(self, samples: NDArray[np.bool_]) -> str:
        """The indices of some samples in words: those of the first few."""
        first = np.flatnonzero(samples)[:_NAMED]
        indices = np.stack(np.unravel_index(first, self.shapes[0][: self.dims]), 1)
        return ", ".join(str(index.tolist()) for index in indices) + (", ..." if samples.sum() > _NAMED else "")


def samples_of(shapes: Sequence[torch.Size], batch_dims: object) -> Samples:
    """The samples of a state.

    Args:
        shapes: of its components, one where it is no tuple.
        batch_dims: how many leading dimensions count them. "auto": all that the components have in common, but for the
            last one of a state that is no tuple.

    Raises:
        TypeError: `batch_dims` is neither an int nor a string.
        ValueError: it is another string, or negative; or the components have not so many dimensions in common.
    """
    known = f"batch_dims must be 'auto' or an int that is not negative, got {batch_dims!r}"
    common = 0
    while all(len(shape) > common and shape[common] == shapes[0][common] for shape in shapes):
        common += 1
    if batch_dims != "auto":
        if not isinstance(batch_dims, int | str) or isinstance(batch_dims, bool):
            raise TypeError(known)
        if isinstance(batch_dims, str) or batch_dims < 0:
            raise ValueError(known)
        if batch_dims > common:
            raise ValueError(
                f"batch_dims must be at most {common}, the number of leading dimensions that all components of y0 have "
                f"in common, got {batch_dims} for shapes {[tuple(shape) for shape in shapes]}"
            )
        dims = batch_dims
    else:
        dims = max(0, common - 1) if len(shapes) == 1 else common
    # A state without entries is one sample.
    return Samples(tuple(shapes), dims if any(shape.numel() for shape in shapes) else 0)


def warn_of_failures(samples: Samples, x: Tensor, reason: str) -> None:
    """Warn of samples that are not finite at the end of a solve, where those that failed were to be NaN.

    Args:
        samples: how the state is made of them.
        x: the last state.
        reason: what has become of them, in words.
    """
    failed = (~torch.isfinite(samples.split(x.detach())).all(1)).cpu().numpy()
    if failed.any():
        warnings.warn(
            f"{reason} for {int(failed.sum())} of {samples.count} samples, {samples.names(failed)}: they are NaN from "
            f"there on, for on_failure is 'nan'",
            stacklevel=3,
        )
