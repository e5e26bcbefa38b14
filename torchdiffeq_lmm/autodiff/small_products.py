"""Small matrix products as sums, which Inductor fuses with what is around them; a call of BLAS would take longer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SMALL = 4096
"""So many multiplications, and fewer, are small; measured at states of shape (64, 2) to (64, 16) on a CPU."""

_ASSUMED = 64
"""What a size that is not known is taken for."""


def is_small(a: Tensor, b: Tensor) -> bool:
    """Whether a product is."""
    rows, inner = a.shape
    count = 1
    for size in (rows, inner, b.shape[1]):
        count *= size if isinstance(size, int) else _ASSUMED
    return count <= _SMALL


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def _mm(a: Tensor, b: Tensor) -> Any:
    return _product(a, b) if is_small(a, b) else NotImplemented


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    if (beta, alpha) != (1, 1) or not is_small(a, b):
        return NotImplemented
    return c + _product(a, b)


SMALL_PRODUCTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
}
"""Decompositions for `make_fx`."""
