"""Linear equations (1 - A) z = r, from the product with A alone: dense for small systems, matrix-free for large ones.

Everything is real, complex vectors being taken for real ones of twice the length, and in float32 at least.

An equation is solved when every entry of its residual is rounding in terms of its own size, or of that of entries that
A adds to it: a large entry hides nothing of a small one that it has nothing to do with, another sample's say. Rounding
in the terms of A z, which is more where they cancel, is no such measure: (1 - A)⁻¹ may make little of a rough residual
and much of a smooth one. There the matrix is factored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .krylov import Product, gmres
from .newton_options import DEFAULT_NEWTON, Newton

DENSE_LIMIT = 32
"""Systems of up to so many real unknowns are solved by a matrix of their own; larger ones by products, if they can."""

LAST_RESTARTS = 100
"""After so many full Krylov spaces a system that is too large for a matrix is given up."""

_PRODUCT_ULPS = 64
"""So many units in the last place of what a product adds up are rounding."""

_REFINEMENTS = 20
"""A solution by factors is corrected so often, at most."""

_UNCERTAIN = 0.375
"""A solution may be uncertain by this power of the precision, relative to the size of its entries; more is an error."""

_SWEPT = 1e-4
"""By so much a sweep over all entries lessens the residual, in terms of their sizes."""

_SWEEPS = 3
"""So many times a solution is improved in entries that are small beside others."""

_PROBES = 8
"""So often, at most, rounding is looked for."""

_DEAR = 0.25
"""For more products than this, times the number of unknowns, a matrix is made."""

_KEPT = 2
"""Of so many steps' matrices the factors are kept."""


def to_real(x: Tensor) -> Tensor:
    """A state as a real vector."""
    real = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
    return real.to(torch.promote_types(real.dtype, torch.float32))


def from_real(vector: Tensor, like: Tensor) -> Tensor:
    """A real vector as a state of the shape and dtype of `like`."""
    vector = vector.to(like.dtype.to_real())
    if like.is_complex():
        return torch.view_as_complex(vector.reshape(*like.shape, 2))
    return vector.reshape(like.shape)


def matrix_of(product: Product, like: Tensor) -> Tensor:
    """The matrix of a linear map, column by column.

    Args:
        product: the map, on vectors.
        like: a vector.
    """
    return torch.stack([product(column) for column in torch.eye(len(like), dtype=like.dtype, device=like.device)], 1)


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Numbers between -1 and 1 of the shape of `like`, the same ones every time; PyTorch's own generators stay."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    numbers = torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * numbers - 1).to(like.device, like.dtype)


def is_rounding(residual: Tensor, own: Tensor, change: Callable[[int], Tensor]) -> bool:
    """Whether every entry of a residual is rounding.

    Args:
        residual: its entries' sizes.
        own: the rounding that is known, entry by entry.
        change: from a seed to what rounding of the unknowns, drawn by it, makes of the equation; it may cancel.
    """
    count = int((~(residual <= own)).sum())
    largest = torch.zeros_like(own)
    for seed in range(_PROBES):
        if count == 0:
            return True
        largest = torch.maximum(largest, change(seed))
        before, count = count, int((~(residual <= own + largest)).sum())
        # Entries where it has cancelled get fewer with every draw; others stay.
        if seed and 2 * count > before:
            break
    return count == 0


class Counted:
    """A product, and how often it was asked for."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._calls = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector."""
        self._calls += 1
        return self._product(vector)

    def is_dear(self, like: Tensor) -> bool:
        """Whether so many products were asked for, of vectors like this, that a matrix would have cost less."""
        return self._calls > _DEAR * len(like)


class Factorised(Protocol):
    """1 - A by its factors."""

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution for a right-hand side; not finite where the matrix is singular, or is not finite itself."""


class Factors:
    """1 - A by its factors, in double precision where the device has it."""

    def __init__(self, matrix: Tensor) -> None:
        size = len(matrix)
        dtype = matrix.dtype if matrix.device.type == "mps" else torch.float64
        unit = torch.eye(size, dtype=dtype, device=matrix.device)
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(unit - matrix.to(dtype))
        # What an infinite entry would make of a right-hand side is 0.
        self._scale = torch.where(torch.isfinite(matrix).all(), 1.0, torch.nan).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution for a right-hand side; not finite where the matrix is singular, or is not finite itself."""
        scaled = (self._scale * rhs.to(self._lu.dtype))[:, None]
        solution: Tensor = torch.linalg.lu_solve(self._lu, self._pivots, scaled)[:, 0]
        return solution.to(rhs.dtype)


def _cancelled(eps: float, change: Tensor, sizes: Tensor) -> Tensor:
    """What rounding may make of terms of A z that cancel; no more than √ε is put up with."""
    return torch.minimum(_PRODUCT_ULPS * eps * change, eps**0.5 * sizes)


class LinearSolver:
    """Solves equations (1 - A) z = r to rounding, one after the other.

    What it has learned of one it uses for the next, whose A is not much different.

    Args:
        newton: how large a matrix, and a Krylov space, may be.
    """

    def __init__(self, newton: Newton = DEFAULT_NEWTON) -> None:
        self._options = newton
        self._factors: dict[float, Factorised] = {}
        self._is_dear = False

    def solve(
        self,
        product: Product,
        rhs: Tensor,
        precision: float,
        weight: float = 1.0,
        factor: Callable[[], Factorised] | None = None,
        matrix: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Solve (1 - A) z = r.

        Args:
            product: from v to A v.
            rhs: r, a real vector.
            precision: of the product, which may be less than that of r.
            weight: a number to which A is proportional, from equation to equation.
            factor: makes the factors of 1 - A for less than its matrix would cost; always given, or never.
            matrix: makes A; by products where it is not given. Only small systems ask for it.

        Raises:
            RuntimeError: the equation is singular, or too ill-conditioned for GMRES and too large for its matrix.
        """
        if len(rhs) == 0:
            return rhs
        if not bool(torch.isfinite(rhs).all()):
            # As everywhere in autograd, what is not finite is passed on.
            return rhs * torch.nan
        largest = self._options.largest_matrix
        if len(rhs) <= min(DENSE_LIMIT, largest):
            known = matrix_of(product, rhs) if matrix is None else matrix()
            exact: Tensor = torch.linalg.solve(torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device) - known, rhs)
            return exact
        equation = _LinearEquation(Counted(product), rhs, precision, self._options.krylov_dimension)
        restarts = self._options.max_restarts
        if factor is not None:
            solution = self._by_factors(equation, weight, factor)
            if solution is not None:
                return solution
        if len(rhs) > largest:
            found = equation.by_products(max(restarts, LAST_RESTARTS), is_last=True)
            if found is None:
                raise RuntimeError(
                    f"a linear equation in {len(rhs)} unknowns was not solved by GMRES, and there are more than "
                    f"{largest}, too many for its matrix; use smaller steps, double precision, or a larger "
                    f"fallback_limit of Newton"
                )
            return found
        factors = self._latest(weight)
        found = None
        if factors is not None:
            found = equation.by_factors(factors, is_own=False)
        elif not self._is_dear:
            found = equation.by_products(restarts)
            self._is_dear = equation.product.is_dear(rhs)
        return self._by_matrix(equation, weight) if found is None else found

    def _latest(self, weight: float) -> Factorised | None:
        return self._factors.get(weight) or next(reversed(self._factors.values()), None)

    def _by_factors(
        self, equation: "_LinearEquation", weight: float, factor: Callable[[], Factorised]
    ) -> Tensor | None:
        """The solution by factors that are at hand, or by new ones."""
        factors = self._latest(weight)
        found = None if factors is None else equation.by_factors(factors, is_own=False)
        return self._by_new(equation, weight, factor) if found is None else found

    def _by_new(self, equation: "_LinearEquation", weight: float, factor: Callable[[], Factorised]) -> Tensor | None:
        factors = factor()
        self._factors.pop(weight, None)
        if len(self._factors) == _KEPT:
            del self._factors[next(iter(self._factors))]
        self._factors[weight] = factors
        found = equation.by_factors(factors, is_own=True)
        if found is None:
            self._factors.clear()
        return found

    def _by_matrix(self, equation: "_LinearEquation", weight: float) -> Tensor:
        self._is_dear = False
        found = self._by_new(equation, weight, lambda: Factors(matrix_of(equation.product, equation.rhs)))
        if found is None:
            raise RuntimeError(
                f"a linear equation in {len(equation.rhs)} unknowns was not solved, because it is singular, or too "
                f"ill-conditioned; use smaller steps, or double precision"
            )
        return found


@dataclass(frozen=True)
class _LinearEquation:
    """(1 - A) z = r: see `LinearSolver.solve`."""

    product: Counted
    rhs: Tensor
    precision: float
    dimension: int

    def by_products(self, restarts: int, is_last: bool = False) -> Tensor | None:
        """The solution by GMRES, first for all entries at once, then in terms of what each of them is.

        Args:
            restarts: see `gmres`.
            is_last: whether there is no other way: then a residual may be what rounding makes of terms of A z that
                cancel, but no more than √ε; or the last correction is as small as by factors.
        """
        eps, rhs, uncertain = self._eps, self.rhs, torch.inf
        z, _ = gmres(self.product, rhs, 10 * eps + self._lowered(), self.dimension, restarts)
        for sweep in range(_SWEEPS + 1):
            # Anew, as rounding in large products has no part in what the Krylov space tells.
            residual = self._residual(z)
            own = torch.maximum(z.abs(), rhs.abs())
            if bool((residual.abs() <= _PRODUCT_ULPS * eps * own).all()):
                return z
            sizes, change = self._sizes(z)
            bound = _PRODUCT_ULPS * eps * sizes
            if self.precision > eps:
                bound += _cancelled(self.precision, change, sizes)
            elif is_last:
                bound = torch.maximum(bound, _cancelled(eps, change, sizes))
            if bool((residual.abs() <= bound).all()):
                return z
            if sweep < _SWEEPS:
                residual = residual / sizes
                scaled, left = gmres(
                    lambda v, sizes=sizes: self.product(sizes * v) / sizes,  # type: ignore[misc]
                    residual,
                    _SWEPT,
                    self.dimension,
                    restarts,
                )
                z = z + sizes * scaled
                is_swept = float(left.norm()) <= _SWEPT * float(residual.norm())
                uncertain = float(scaled.abs().max()) if is_swept else torch.inf
        # One entry of many may be rounding by more than its bound.
        return z if is_last and uncertain <= max(eps, self.precision) ** _UNCERTAIN else None

    def by_factors(self, factors: Factorised, is_own: bool) -> Tensor | None:
        """The solution by the factors of 1 - A, or of what is close to it, and by corrections with them.

        What is uncertain of it is known then: the last correction.
        """
        z = factors.solve(self.rhs)
        if not bool(torch.isfinite(z).all()):
            return None
        sizes, _ = self._sizes(z)
        eps = max(self._eps, self.precision)
        before = torch.inf
        for _ in range(_REFINEMENTS):
            correction = factors.solve(self._residual(z))
            size = float((correction.abs() / sizes).max())
            if not size < torch.inf:
                return None
            # There may be more rounding in the products than in factors of their own; up to here it is put up with.
            if is_own and size <= eps**_UNCERTAIN:
                return z
            z = z + correction
            if size <= _PRODUCT_ULPS * eps:
                return z
            if size > 0.5 * before:
                return None
            before = size
        return None

    @property
    def _eps(self) -> float:
        return torch.finfo(self.rhs.dtype).eps

    def _lowered(self) -> float:
        """What a lower precision of the product leaves of the residual, relative to r."""
        if self.precision <= self._eps:
            return 0.0
        scale = float(self.rhs.norm())
        return self.precision * min(1.0, float(self.product(self.rhs).norm()) / scale) if scale > 0 else 0.0

    def _residual(self, z: Tensor) -> Tensor:
        return self.rhs - z + self.product(z)

    def _sizes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of every entry, its own size or that of others that A adds to it; and what A makes of these. Nowhere 0."""
        own = torch.maximum(z.abs(), self.rhs.abs())
        # Twice, for what is added up may cancel.
        change = torch.maximum(*(self.product(noise(z, seed) * own).abs() for seed in (0, 1)))
        amplified = max(1.0, float(change.max()) / max(float(own.max()), torch.finfo(z.dtype).tiny))
        return torch.maximum(own, change / amplified).clamp(min=torch.finfo(z.dtype).tiny), change
