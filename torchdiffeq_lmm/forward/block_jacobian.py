"""The Jacobians of f for many samples at once: a block for each, of as many products as a sample has entries.

Everything is real, complex rows being taken for real ones of twice the length.
"""

from collections.abc import Callable
from contextlib import suppress
from math import sqrt

import torch
from torch import Tensor

from .linear import noise

_FEW = 16
"""So few rows of a Jacobian are made one by one, for less than what it takes to set up a batch of them."""

_BATCH = 64
"""So many rows are made at once, as they take the memory of so many gradients."""

_UNKNOWN = 0.25
"""An entry of which no size is known is changed as if it were ε to this power of the largest one of its sample."""

_ROUNDING = 8
"""So many units in the last place are rounding."""


def real_rows(rows: Tensor) -> Tensor:
    """Rows as real ones, in float32 at least."""
    real = torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows
    return real.to(torch.promote_types(real.dtype, torch.float32))


def rows_like(real: Tensor, like: Tensor) -> Tensor:
    """Real rows as ones of the dtype of `like`."""
    real = real.to(like.dtype.to_real())
    return torch.view_as_complex(real.unflatten(1, (-1, 2))) if like.is_complex() else real


class BlockJacobian:
    """The blocks at one state after another, by auto-differentiation for as long as func allows, else by differences.

    Args:
        differentiable: whether auto-differentiation may be tried: func is then given a state that requires a gradient.
    """

    def __init__(self, differentiable: bool) -> None:
        self._differentiable = differentiable

    @property
    def is_exact(self) -> bool:
        """Whether the last blocks were made by auto-differentiation."""
        return self._differentiable

    def by_differences(self) -> "BlockJacobian":
        """One that uses differences alone."""
        return BlockJacobian(False)

    def blocks(
        self, slope: Callable[[Tensor], Tensor], x: Tensor, f: Tensor, sizes: Tensor, precision: float
    ) -> Tensor | None:
        """∂f_i/∂x_j of every sample, of shape (S, D, D); None where other samples have a part in it.

        That is seen by a random product, which is compared with that of the blocks; with differences, by changing half
        of the samples.

        Args:
            slope: f, of all rows at once.
            x: the states, of shape (S, D).
            f: f there.
            sizes: what size the entries of a state and its corrections are of, of shape (S, D), real.
            precision: of func's values, relative.
        """
        if self._differentiable:
            try:
                with torch.enable_grad():
                    blocks, product = _differentiated(slope, x)
            except (RuntimeError, _NoGraphError):
                # As func that uses NumPy or out= raises; an error of another cause, differences will meet again.
                self._differentiable = False
            else:
                if len(x) == 1:
                    return blocks
                u = noise(real_rows(x), 1)
                found, wanted = product(u), (u[:, None, :] @ blocks)[:, 0]
                terms = (u.abs()[:, None, :] @ blocks.abs()).amax((1, 2))
                return blocks if _agree(found, wanted, terms, precision**0.5) else None
        increments = real_rows(
            torch.complex(*(2 * [_increments(x, sizes)])) if x.is_complex() else _increments(x, sizes)
        )
        units = torch.eye(increments.shape[1], dtype=increments.dtype, device=increments.device)
        start = real_rows(f)

        def difference(change: Tensor) -> Tensor:
            return real_rows(slope(x + rows_like(change, x))) - start

        blocks = torch.stack([difference(increments * unit) for unit in units], 2) / increments[:, None, :]
        if len(x) == 1:
            return blocks
        # Where half of the samples change, nothing does in the others.
        changes = noise(increments[:, :1], 1) > 0
        left = difference(torch.where(changes, increments, 0.0)).masked_fill(changes, 0.0)
        rounding = _ROUNDING * precision * start.abs().amax(1)
        return blocks if _agree(left, torch.zeros_like(left), rounding, 1.0) else None


class _NoGraphError(Exception):
    """What func returns does not depend on the state by auto-differentiation."""


def _agree(found: Tensor, wanted: Tensor, terms: Tensor, tolerance: float) -> bool:
    missed = (found - wanted).abs().amax(1)
    # What is not finite tells nothing of the others.
    return bool((missed <= tolerance * terms).logical_or(~torch.isfinite(terms)).all())


def _differentiated(slope: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    leaf = x.detach().requires_grad_()
    f = slope(leaf)
    if not f.requires_grad:
        raise _NoGraphError
    like = real_rows(x)
    if torch.autograd.grad(f, leaf, torch.zeros_like(f), retain_graph=True, allow_unused=True)[0] is None:
        raise _NoGraphError

    def pulled(cotangent: Tensor, is_batched: bool = False) -> Tensor:
        return torch.autograd.grad(f, leaf, cotangent, retain_graph=True, is_grads_batched=is_batched)[0]

    def product(u: Tensor) -> Tensor:
        return real_rows(pulled(rows_like(u, f)))

    units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    cotangents = [rows_like(unit.expand_as(like), f) for unit in units]
    rows: list[Tensor] | None = None
    if len(units) > _FEW:
        # An operation in func may have no rule for batches.
        with suppress(RuntimeError):
            batches = [torch.stack(cotangents[i : i + _BATCH]) for i in range(0, len(cotangents), _BATCH)]
            rows = [real_rows(row) for batch in batches for row in pulled(batch, is_batched=True)]
    if rows is None:
        rows = [real_rows(pulled(cotangent)) for cotangent in cotangents]
    return torch.stack(rows, 1).detach(), product


def _increments(x: Tensor, sizes: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    largest = sizes.amax(1, keepdim=True)
    known = torch.where(sizes > 0, sizes, eps**_UNKNOWN * torch.where(largest > 0, largest, 1.0))
    return (sqrt(eps) * known).clamp(min=torch.finfo(x.dtype).tiny)
