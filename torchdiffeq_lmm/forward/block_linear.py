"""Linear equations (1 - b* Jᵀ) z = r of many samples at once, by the blocks of J, and verified by a residual.

The residual is worked out from the product with the whole of Jᵀ. So where the blocks do not fit, for samples are
coupled or a block is ill-conditioned, it is seen, and nothing is returned.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .block_jacobian import real_rows, rows_like
from .block_newton import inverses_of

_ROUNDING = 64
"""So many units in the last place are rounding, of sums with few terms."""

_TERMS = 16
"""Of more terms than that sums have more rounding, in proportion."""

_REFINEMENTS = 20
"""A solution by blocks is corrected so often, at most."""

_FEW = 16
"""Blocks of so few rows cost less than the corrections that older ones would need."""

_STALE = 0.1
"""Above this rate of convergence old blocks give way to new ones."""

Rows = Tensor


class BlockLinearSolver:
    """Solves such equations, one after the other; larger blocks are kept for as long as they serve."""

    def __init__(self) -> None:
        self._blocks: Tensor | None = None
        self._inverses: Tensor | None = None
        self._weight = 0.0

    def solve(
        self, product: Callable[[Rows], Rows], blocks: Callable[[], Tensor], rhs: Rows, weight: float, precision: float
    ) -> Rows | None:
        """Solve (1 - b* Jᵀ) z = r.

        Args:
            product: from v of shape (S, D) to Jᵀ v.
            blocks: makes J, of shape (S, D, D), real.
            rhs: r, of shape (S, D).
            weight: b*.
            precision: of the product, relative.

        Returns:
            z; None where the blocks do not solve it. Rows of r that are not finite make such rows of z.
        """
        eps = max(torch.finfo(real_rows(rhs).dtype).eps, precision)
        is_old = self._blocks is not None and self._blocks.shape[-1] > _FEW and self._weight == weight
        if is_old:
            found = self._refined(product, rhs, weight, eps, _STALE)
            if found is not None:
                return found
        self._blocks, self._weight = blocks(), weight
        self._inverses = inverses_of(self._blocks.mT, weight)
        return self._refined(product, rhs, weight, eps, 0.5)

    def _refined(
        self, product: Callable[[Rows], Rows], rhs: Rows, weight: float, eps: float, rate: float
    ) -> Rows | None:
        assert self._inverses is not None
        assert self._blocks is not None
        inverses, magnitudes = self._inverses, (weight * self._blocks).abs().mT
        is_finite = torch.isfinite(real_rows(rhs)).all(1, keepdim=True)
        given = rhs.where(is_finite, 0.0)

        def by_blocks(rows: Rows) -> Rows:
            return rows_like((inverses @ real_rows(rows).to(inverses.dtype)[..., None])[..., 0], rows)

        z = by_blocks(given)
        rounding = _ROUNDING * eps * max(1.0, self._blocks.shape[-1] / _TERMS)
        before = torch.inf
        for _ in range(_REFINEMENTS):
            correction = by_blocks(given - z + weight * product(z))
            own = torch.maximum(real_rows(z).abs(), real_rows(given).abs())
            # Of every entry, its own size or that of others that J adds to it.
            change = (magnitudes.to(own.dtype) @ own[..., None])[..., 0]
            amplified = (change.amax(1) / own.amax(1).clamp(min=torch.finfo(own.dtype).tiny)).clamp(min=1.0)
            sizes = torch.maximum(own, change / amplified[:, None]).clamp(min=torch.finfo(own.dtype).tiny)
            size = float((real_rows(correction).abs() / sizes).max())
            if not size < torch.inf:
                return None
            z = z + correction
            if size <= rounding:
                return z.where(is_finite, torch.nan)
            if size > rate * before:
                return None
            before = size
        return None
