"""An entry of a tensor by an index that is a tensor itself, without reading its value: for graphs of func."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SelectByTensor(TorchFunctionMode):
    """Within it ``x[i]``, with an i of no dimension, is an `index_select`; else PyTorch reads i as a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], Tensor):
            args = _selected(*args)
        return func(*args, **(kwargs or {}))


def _selected(x: Tensor, index: Any) -> tuple[Tensor, Any]:
    """The same entries of another tensor, by another index, in which no tensor is a number.

    Args:
        x: a tensor.
        index: as of ``x[index]``.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    dims = [_dims_of(entry) for entry in entries]
    dim = 0
    for i, entry in enumerate(entries):
        if entry is Ellipsis:
            dim += x.ndim - sum(dims)
        elif _is_number(entry):
            row = torch.where(entry < 0, entry + x.shape[dim], entry)
            x, entries[i] = x.index_select(dim, row.long().reshape(1)), 0
        dim += dims[i]
    return x, tuple(entries)


def _dims_of(entry: Any) -> int:
    """Of how many dimensions of x an entry of an index is."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    if isinstance(entry, Tensor) and entry.dtype in _MASKS:
        return entry.ndim
    return 1


def _is_number(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.ndim == 0 and entry.dtype in _INTEGERS


_MASKS = (torch.bool, torch.uint8)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
