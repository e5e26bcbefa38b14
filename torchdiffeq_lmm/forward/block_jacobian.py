"""The Jacobians of f for many samples at once: a block for each, of as many products as a sample has entries.

Everything is real, complex rows being taken for real ones of twice the length.
"""

from collections.abc import Callable
from contextlib import suppress
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from .implicit_equation import Flags
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
    return real.float() if real.dtype.itemsize < torch.float32.itemsize else real


def rows_like(real: Tensor, like: Tensor) -> Tensor:
    """Real rows as ones of the dtype of `like`."""
    real = real.to(like.dtype.to_real())
    return torch.view_as_complex(real.unflatten(1, (-1, 2))) if like.is_complex() else real


class CoupledError(Exception):
    """f does not act on samples independently."""


class BlockJacobian:
    """The blocks at one state after another, by auto-differentiation for as long as func allows, else by differences.

    Where other samples have a part in f of a sample, there are no blocks. With auto-differentiation that is seen by a
    random product, which is compared with that of the blocks; with differences, by changing no more than half of the
    samples.

    Args:
        differentiable: whether auto-differentiation may be tried: func is then given a state that requires a gradient.
        precision: of func's values, relative.
    """

    def __init__(self, differentiable: bool, precision: float) -> None:
        self._differentiable = differentiable
        self._precision = precision
        self._noise: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the next blocks are to be made by auto-differentiation."""
        return self._differentiable

    def by_differences(self) -> "BlockJacobian":
        """One that uses differences alone."""
        return BlockJacobian(False, self._precision)

    def differentiated(self, slope: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """F, and ∂f_i/∂x_j of every sample, of shape (S, D, D), by one evaluation; None where func has no graph.

        Args:
            slope: f, of all rows at once.
            x: the states, of shape (S, D).

        Raises:
            CoupledError: other samples have a part in it.
        """
        if not self._differentiable:
            return None
        try:
            with torch.enable_grad():
                f, blocks, product = _differentiated(slope, x)
        except (RuntimeError, _NoGraphError):
            # As func that uses NumPy or out= raises; an error of another cause, differences will meet again.
            self._differentiable = False
            return None
        if len(x) > 1:
            real = real_rows(x)
            if self._noise is None:
                self._noise = noise(real, 1)
            found, wanted = product(self._noise), (self._noise[:, None, :] @ blocks)[:, 0]
            terms = (self._noise.abs()[:, None, :] @ blocks.abs()).amax((1, 2))
            _check_agreement(found, wanted, self._precision**0.5 * terms)
        return f, blocks

    def differences(
        self, slope: Callable[[Tensor], Tensor], x: Tensor, f: Tensor, sizes: Tensor, samples: Flags
    ) -> Tensor:
        """The same blocks by differences; 0 for samples that are not asked for.

        Args:
            slope, x: see above.
            f: f there.
            sizes: what size the entries of a state and its corrections are of, of shape (S, D), real.
            samples: those asked for.

        Raises:
            CoupledError: see above.
        """
        increments = real_rows(
            torch.complex(*(2 * [_increments(x, sizes)])) if x.is_complex() else _increments(x, sizes)
        )
        units = torch.eye(increments.shape[1], dtype=increments.dtype, device=increments.device)
        start, asked = real_rows(f), torch.from_numpy(samples).to(x.device)[:, None]

        def difference(change: Tensor, changes: Tensor) -> Tensor:
            return real_rows(slope(x + rows_like(torch.where(changes, change, 0.0), x))) - start

        columns = torch.stack([difference(increments * unit, asked) for unit in units], 2)
        changes, left = asked, columns.abs().amax(2)
        if len(x) > 1:
            # Where some samples change, nothing does in the others. As many must be left for them to tell.
            if 2 * np.count_nonzero(samples) > len(samples):
                changes = noise(increments[:, :1], 1) > 0
                left = difference(increments, changes)
            left = left.masked_fill(changes, 0.0)
            _check_agreement(left, torch.zeros_like(left), _ROUNDING * self._precision * start.abs().amax(1))
        return columns.masked_fill(~asked[..., None], 0.0) / increments[:, None, :]


class _NoGraphError(Exception):
    """What func returns does not depend on the state by auto-differentiation."""


def _check_agreement(found: Tensor, wanted: Tensor, tolerance: Tensor) -> None:
    missed = (found - wanted).abs().amax(1)
    # What is not finite tells nothing of the others.
    if not bool((missed <= tolerance).logical_or(~torch.isfinite(tolerance)).all()):
        raise CoupledError


def _differentiated(slope: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    leaf = x.detach().requires_grad_()
    f = slope(leaf)
    if not f.requires_grad:
        raise _NoGraphError
    like = real_rows(x)

    def pulled(cotangent: Tensor, is_batched: bool = False) -> Tensor:
        (found,) = torch.autograd.grad(
            f, leaf, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=is_batched
        )
        if found is None:
            raise _NoGraphError
        return found

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
    return f.detach(), torch.stack(rows, 1).detach(), product


def _increments(x: Tensor, sizes: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    largest = sizes.amax(1, keepdim=True)
    known = torch.where(sizes > 0, sizes, eps**_UNKNOWN * torch.where(largest > 0, largest, 1.0))
    return (sqrt(eps) * known).clamp(min=torch.finfo(x.dtype).tiny)
