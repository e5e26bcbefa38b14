"""The Jacobian J of f at a state: as a matrix, or as products J v; by auto-differentiation, or by differences.

Everything is real, complex vectors being taken for real ones of twice the length: see `linear.to_real`.
"""

from collections.abc import Callable
from contextlib import suppress
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor

from .krylov import Product
from .linear import from_real, matrix_of, to_real

Slope = Callable[[Tensor], Tensor]

_Made = TypeVar("_Made")

_ROWS_ONE_BY_ONE = 16
"""So few rows of a Jacobian are made one by one, for less than what it takes to set up a batch of them."""

_ROWS_AT_ONCE = 64
"""So many rows are made at once, as they take the memory of so many gradients."""

_UNKNOWN_SIZE = 0.25
"""An entry of which no size is known is changed as if it were ε to this power of the largest one."""


class Jacobian:
    """J at one state after another, by auto-differentiation for as long as func allows, else by differences.

    Args:
        differentiable: whether auto-differentiation may be tried: func is then given a state that requires a gradient.
    """

    def __init__(self, differentiable: bool) -> None:
        self._differentiable = differentiable

    @property
    def is_exact(self) -> bool:
        """Whether the last Jacobian was made by auto-differentiation."""
        return self._differentiable

    def use_differences(self) -> None:
        """Use nothing but differences from now on."""
        self._differentiable = False

    def matrix(self, slope: Slope, x: Tensor, f: Tensor, sizes: Tensor) -> Tensor:
        """J as a real matrix.

        Args:
            slope: f.
            x: the state.
            f: f there.
            sizes: what size the entries of a state and its corrections are of, of the shape of x, real.
        """
        if self._differentiable:
            found = self._differentiated(lambda: _matrix(slope, x))
            if found is not None:
                return found
        increments = self.increments(x, sizes)
        return matrix_of(lambda unit: _difference(slope, x, f, increments * unit), to_real(x)) / increments

    def product(self, slope: Slope, x: Tensor, f: Tensor, sizes: Tensor) -> Product:
        """From v to J v: see `matrix`."""
        if self._differentiable:
            found = self._differentiated(lambda: _product(slope, x))
            if found is not None:
                return found
        increments = self.increments(x, sizes)

        def product(v: Tensor) -> Tensor:
            # No entry is changed by more than its own increment.
            length = float((v / increments).abs().max())
            return _difference(slope, x, f, v / length) * length if length > 0 else torch.zeros_like(v)

        return product

    @staticmethod
    def increments(x: Tensor, sizes: Tensor) -> Tensor:
        """By how much the entries of a real vector are changed for differences: see `matrix`."""
        return to_real_sizes(_difference_increments(x, sizes), x)

    def row(self, slope: Slope, x: Tensor, index: int) -> Tensor | None:
        """A row of J by auto-differentiation; None where func does not allow it. Slopes are real."""
        return self._differentiated(lambda: _row(slope, x, index)) if self._differentiable else None

    def _differentiated(self, make: Callable[[], _Made | None]) -> _Made | None:
        """What is made by auto-differentiation; None, now and from now on, where func does not allow it."""
        try:
            with torch.enable_grad():
                found = make()
        except RuntimeError:
            # As func that uses NumPy or out= raises; an error of another cause, differences will meet again.
            found = None
        self._differentiable = found is not None
        return found


def to_real_sizes(sizes: Tensor, like: Tensor) -> Tensor:
    """Real sizes of the entries of a state, for each entry of it as a real vector."""
    return to_real(torch.complex(sizes, sizes) if like.is_complex() else sizes)


def _matrix(slope: Slope, x: Tensor) -> Tensor | None:
    leaf = x.detach().requires_grad_()
    f = slope(leaf)
    if not f.requires_grad:
        return None
    like = to_real(x)
    units = torch.eye(len(like), dtype=like.dtype, device=like.device)

    if torch.autograd.grad(f, leaf, torch.zeros_like(f), retain_graph=True, allow_unused=True)[0] is None:
        return None

    def pulled(cotangent: Tensor, is_batched: bool = False) -> Tensor:
        return torch.autograd.grad(f, leaf, cotangent, retain_graph=True, is_grads_batched=is_batched)[0]

    cotangents = [from_real(unit, x) for unit in units]
    if len(like) > _ROWS_ONE_BY_ONE:
        # An operation in func may have no rule for batches.
        with suppress(RuntimeError):
            batches = [torch.stack(cotangents[i : i + _ROWS_AT_ONCE]) for i in range(0, len(cotangents), _ROWS_AT_ONCE)]
            return torch.stack([to_real(row) for batch in batches for row in pulled(batch, is_batched=True)])
    return torch.stack([to_real(pulled(cotangent)) for cotangent in cotangents])


def _row(slope: Slope, x: Tensor, index: int) -> Tensor | None:
    leaf = x.detach().requires_grad_()
    f = slope(leaf)
    if not f.requires_grad:
        return None
    (row,) = torch.autograd.grad(f.reshape(-1)[index], leaf, allow_unused=True)
    return torch.zeros_like(to_real(x)) if row is None else to_real(row)


def _product(slope: Slope, x: Tensor) -> Product | None:
    """J v as the derivative of Jᵀ u, which is linear in u."""
    leaf = x.detach().requires_grad_()
    f = slope(leaf)
    if not f.requires_grad:
        return None
    u = torch.zeros_like(f, requires_grad=True)
    (pulled,) = torch.autograd.grad(f, leaf, u, create_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return torch.zeros_like

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(pulled, u, from_real(v, x), retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if found is None else to_real(found)

    # Whether func can be differentiated twice is seen now, when differences can still take over.
    product(torch.zeros_like(to_real(x)))
    return product


def _difference_increments(x: Tensor, sizes: Tensor) -> Tensor:
    """√ε of the sizes, by which the error of a difference, of rounding and curvature, is least."""
    eps = torch.finfo(x.dtype).eps
    largest = sizes.max() if sizes.numel() else sizes.new_zeros(())
    known = torch.where(sizes > 0, sizes, eps**_UNKNOWN_SIZE * torch.where(largest > 0, largest, 1.0))
    return (sqrt(eps) * known).clamp(min=torch.finfo(x.dtype).tiny)


def _difference(slope: Slope, x: Tensor, f: Tensor, change: Tensor) -> Tensor:
    return to_real(slope(x + from_real(change, x)) - f)
