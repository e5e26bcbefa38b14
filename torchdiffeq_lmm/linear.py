"""Linear equations (1 - A) z = r, from the product with A alone: dense for small systems, matrix-free for large ones.

Everything is real, complex vectors being taken for real ones of twice the length, and in float32 at least.

An equation is solved when every entry of its residual is rounding, of its own: what the last place of all entries of z
makes of it. So a large entry hides nothing of a small one that it has nothing to do with, another sample's say.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DENSE_LIMIT = 32
"""Systems of up to so many real unknowns are solved by their matrix."""

FALLBACK_LIMIT = 4096
"""Systems of up to so many are, where a Krylov space does not suffice."""

KRYLOV_LIMIT = 100
"""The largest dimension of a Krylov space."""

FEW_RESTARTS = 2
"""After so many full Krylov spaces a system is solved by its matrix, if it is not too large for one."""

MAX_RESTARTS = 100
"""After so many a larger one is given up."""

_ROUNDING = 1e3
"""A residual of so many units in the last place, by what these can do to it, is rounding; never more than √ε."""

_SWEEPS = 3
"""So many times a solution is improved in entries that are small beside others."""

_PROBES = 8
"""So often, at most, rounding is looked for."""

_DEAR = 0.25
"""For more products than this, times the number of unknowns, a matrix is made."""

_KEPT = 2
"""Of so many steps' matrices the factors are kept."""

Product = Callable[[Tensor], Tensor]


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
        return len(like) <= FALLBACK_LIMIT and self._calls > _DEAR * len(like)


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


def gmres(
    product: Product, rhs: Tensor, tolerance: float, restarts: int, precondition: Product | None = None
) -> tuple[Tensor, Tensor]:
    """Solve (1 - A) z = r by GMRES, from z = r if A is small, else from 0; restarted where the Krylov space is full.

    Args:
        product: from v to A v.
        rhs: r, a real vector.
        tolerance: for the norm of the residual, relative to that of r.
        restarts: at most so many times.
        precondition: from v to what is close to (1 - A)⁻¹ v.

    Returns:
        z, and its residual, which is above the tolerance where the restarts did not suffice.

    Source: Saad, Schultz, *GMRES: a generalized minimal residual algorithm* (SIAM J. Sci. Stat. Comput. 1986);
    preconditioned from the right.
    """
    goal = tolerance * float(rhs.norm())
    solution = rhs if precondition is None else precondition(rhs)
    residual = rhs - solution + product(solution)
    if not float(residual.norm()) <= float(rhs.norm()):
        solution, residual = torch.zeros_like(rhs), rhs
    for _ in range(restarts + 1):
        before = float(residual.norm())
        if not before > goal:
            break
        correction, residual = _krylov(product, residual, goal, precondition)
        solution = solution + correction
        remaining = float(residual.norm())
        # What a whole Krylov space does not lessen is rounding, or beyond it.
        if remaining <= goal or not remaining < 0.99 * before:
            break
        residual = rhs - solution + product(solution)
    return solution, residual


def _krylov(product: Product, residual: Tensor, goal: float, precondition: Product | None) -> tuple[Tensor, Tensor]:
    """The best correction for a residual in its Krylov space, and what it leaves of the residual."""
    remaining = float(residual.norm())
    size = min(KRYLOV_LIMIT, len(residual))
    basis = residual.new_empty(size + 1, len(residual))
    basis[0] = residual / remaining
    # The least-squares problem, and the same kept triangular by rotations.
    hessenberg, triangle = np.zeros((size + 1, size)), np.zeros((size, size))
    target = np.zeros(size + 1)
    target[0] = norm = remaining
    cosines, sines = np.zeros(size), np.zeros(size)
    used = 0
    for j in range(size):
        direction = basis[j] if precondition is None else precondition(basis[j])
        vector = direction - product(direction)
        # Twice, for orthogonality to rounding.
        for _ in range(2):
            components = basis[: j + 1] @ vector
            vector = vector - components @ basis[: j + 1]
            hessenberg[: j + 1, j] += components.double().cpu().numpy()
        hessenberg[j + 1, j] = length = float(vector.norm())
        column = hessenberg[: j + 2, j].copy()
        for i in range(j):
            column[i : i + 2] = (
                cosines[i] * column[i] + sines[i] * column[i + 1],
                cosines[i] * column[i + 1] - sines[i] * column[i],
            )
        radius = float(np.hypot(column[j], column[j + 1]))
        if not radius > 0:
            break
        cosines[j], sines[j] = column[j] / radius, column[j + 1] / radius
        column[j] = radius
        triangle[: j + 1, j] = column[: j + 1]
        target[j], target[j + 1] = cosines[j] * target[j], -sines[j] * target[j]
        used, remaining = j + 1, abs(float(target[j + 1]))
        if not length > 0:
            basis[j + 1] = 0
            break
        basis[j + 1] = vector / length
        if not remaining > goal:
            break
    if not used:
        return torch.zeros_like(residual), residual
    coefficients = np.linalg.solve(triangle[:used, :used], target[:used])
    left = -hessenberg[: used + 1, :used] @ coefficients
    left[0] += norm
    correction = torch.from_numpy(coefficients).to(residual) @ basis[:used]
    if precondition is not None:
        correction = precondition(correction)
    return correction, torch.from_numpy(left).to(residual) @ basis[: used + 1]


class LinearSolver:
    """Solves equations (1 - A) z = r to rounding, one after the other.

    What it has learned of one it uses for the next, whose A is not much different.
    """

    def __init__(self) -> None:
        self._factors: dict[float, Factors] = {}
        self._is_dear = False

    def solve(self, product: Product, rhs: Tensor, eps: float, weight: float = 1.0) -> Tensor:
        """Solve (1 - A) z = r.

        Args:
            product: from v to A v.
            rhs: r, a real vector.
            eps: the precision of the product.
            weight: a number to which A is proportional, from equation to equation.

        Raises:
            RuntimeError: the equation is singular, or too ill-conditioned for GMRES and too large for its matrix.
        """
        if len(rhs) == 0:
            return rhs
        if not bool(torch.isfinite(rhs).all()):
            # As everywhere in autograd, what is not finite is passed on.
            return rhs * torch.nan
        if len(rhs) <= DENSE_LIMIT:
            matrix = torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device) - matrix_of(product, rhs)
            exact: Tensor = torch.linalg.solve(matrix, rhs)
            return exact
        is_small = len(rhs) <= FALLBACK_LIMIT
        if is_small and self._is_dear:
            return self._by_matrix(product, rhs, eps, weight)
        factors = self._factors.get(weight) or next(reversed(self._factors.values()), None)
        precondition = None if factors is None else factors.solve
        restarts = FEW_RESTARTS if is_small else MAX_RESTARTS
        counted = Counted(product)
        solution, residual = gmres(counted, rhs, 10 * eps, restarts, precondition)
        self._is_dear = counted.is_dear(rhs)
        for _ in range(_SWEEPS):
            sizes = _own_sizes(solution, rhs, residual)
            if _is_rounding(counted, solution, residual, sizes, eps):
                return solution
            # In terms of what each entry is, no large one hides a small one.
            scaled, _ = gmres(
                lambda v, sizes=sizes: counted(sizes * v) / sizes,  # type: ignore[misc]
                residual / sizes,
                tolerance=10 * eps / max(float((residual / sizes).abs().max()), 10 * eps),
                restarts=FEW_RESTARTS,
                precondition=None if precondition is None else lambda v, sizes=sizes: precondition(sizes * v) / sizes,  # type: ignore[misc]
            )
            solution = solution + sizes * scaled
            residual = rhs - solution + product(solution)
        if is_small:
            return self._by_matrix(product, rhs, eps, weight)
        sizes = _own_sizes(solution, rhs, residual)
        if not _is_rounding(product, solution, residual, sizes, eps):
            raise RuntimeError(
                f"a linear equation in {len(rhs)} unknowns was not solved: GMRES stopped at a relative residual of "
                f"{float(residual.norm() / rhs.norm()):.2g}; use smaller steps"
            )
        return solution

    def _by_matrix(self, product: Product, rhs: Tensor, eps: float, weight: float) -> Tensor:
        self._is_dear = False
        factors = Factors(matrix_of(product, rhs))
        self._factors.pop(weight, None)
        if len(self._factors) == _KEPT:
            del self._factors[next(iter(self._factors))]
        self._factors[weight] = factors
        solution = factors.solve(rhs)
        for _ in range(2):
            residual = rhs - solution + product(solution)
            solution = solution + factors.solve(residual)
        residual = rhs - solution + product(solution)
        if not _is_rounding(product, solution, residual, _own_sizes(solution, rhs, residual), eps):
            raise RuntimeError(
                f"a linear equation in {len(rhs)} unknowns was not solved, because it is singular, or too "
                f"ill-conditioned: its matrix left a relative residual of {float(residual.norm() / rhs.norm()):.2g}; "
                f"use smaller steps, or double precision"
            )
        return solution


def _own_sizes(solution: Tensor, rhs: Tensor, residual: Tensor) -> Tensor:
    """Of every entry, the size of the terms of its equation: r, z and A z = z - r + residual; nowhere 0."""
    sizes = torch.maximum(torch.maximum(solution.abs(), rhs.abs()), residual.abs())
    return sizes.clamp(min=max(torch.finfo(rhs.dtype).eps * float(sizes.max()), torch.finfo(rhs.dtype).tiny))


def _is_rounding(product: Product, solution: Tensor, residual: Tensor, sizes: Tensor, eps: float) -> bool:
    rounding = min(_ROUNDING * eps, eps**0.5)
    return is_rounding(
        residual.abs(), rounding * sizes, lambda seed: rounding * product(noise(solution, seed) * sizes).abs()
    )
