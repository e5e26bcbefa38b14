"""Tensors of a graph as it is rewritten: nodes, or what has not been made into one node yet; see `components`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Parts:
    """A tensor as its slices along one dimension.

    Attributes:
        axis: the dimension, counted from the end, the last one being 1.
        values: the slices, without that dimension.
    """

    axis: int
    values: Sequence["Value"]


@dataclass(frozen=True, eq=False)
class Zero:
    """Zeros that nothing computes.

    Attributes:
        like: of what shape, dtype and device.
    """

    like: "Value"


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of all entries of a tensor, which is still to be made.

    Attributes:
        of: the tensor.
        dims: how many dimensions the sum has, all of size 1.
    """

    of: Node
    dims: int


Value = Node | Parts | Zero | Sum


def is_tensor(given: Any) -> bool:
    """Whether an argument of an operation is a tensor; nodes may stand for sizes, too."""
    return isinstance(given.meta["val"], Tensor) if isinstance(given, Node) else isinstance(given, Parts | Zero | Sum)


def shape_of(value: Value) -> list[Any]:
    """The sizes, numbers or symbols."""
    if isinstance(value, Node):
        return list(value.meta["val"].shape)
    if isinstance(value, Zero):
        return shape_of(value.like)
    if isinstance(value, Sum):
        return [1] * value.dims
    shape = shape_of(value.values[0])
    shape.insert(len(shape) + 1 - value.axis, len(value.values))
    return shape


def dtype_of(value: Value) -> torch.dtype:
    """The dtype."""
    if isinstance(value, Node):
        dtype: torch.dtype = value.meta["val"].dtype
        return dtype
    if isinstance(value, Parts):
        return dtype_of(value.values[0])
    return dtype_of(value.like if isinstance(value, Zero) else value.of)


def ndim_of(value: Value) -> int:
    """The number of dimensions."""
    return len(shape_of(value))


def from_end(value: Value, dim: int) -> int:
    """A dimension, counted from the end, the last one being 1."""
    ndim = ndim_of(value)
    return ndim - dim % ndim


def described(sizes: Sequence[Any]) -> list[str]:
    """Sizes that can be compared; to compare symbols themselves would fix what they stand for."""
    return [str(size.meta["val"]) if isinstance(size, Node) else str(size) for size in sizes]
