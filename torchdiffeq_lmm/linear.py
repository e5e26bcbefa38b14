"""Linear equations (1 - A) z = r, from the product with A alone: dense for small systems, matrix-free for large ones.

Everything is real, complex vectors being taken for real ones of twice the length, and in float32 at least.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DENSE_LIMIT = 32
"""Systems of up to so many real unknowns are solved by their matrix."""

FALLBACK_LIMIT = 1024
"""Systems of up to so many are, where a Krylov space does not suffice."""

KRYLOV_LIMIT = 100
"""The largest dimension of a Krylov space."""

MAX_RESTARTS = 10
"""After so many full Krylov spaces a system is given up."""

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


def gmres(product: Product, rhs: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Solve (1 - A) z = r by GMRES, from z = r if A is small, else from 0; restarted where the Krylov space is full.

    Args:
        product: from v to A v.
        rhs: r, a real vector.
        tolerance: for the residual relative to r.

    Returns:
        z, and the relative residual, which is above the tolerance where `MAX_RESTARTS` did not suffice.

    Source: Saad, Schultz, *GMRES: a generalized minimal residual algorithm* (SIAM J. Sci. Stat. Comput. 1986).
    """
    scale = float(rhs.norm())
    if scale == 0.0:
        return rhs, 0.0
    solution, residual = rhs, product(rhs)
    remaining = float(residual.norm())
    if remaining > scale:
        solution, residual, remaining = torch.zeros_like(rhs), rhs, scale
    for restart in range(MAX_RESTARTS + 1):
        if not remaining > tolerance * scale:
            break
        before = remaining
        correction, remaining = _krylov(product, residual, tolerance * scale)
        solution = solution + correction
        # What a whole Krylov space does not halve is rounding.
        if remaining <= tolerance * scale or remaining > 0.5 * before or restart == MAX_RESTARTS:
            break
        residual = rhs - solution + product(solution)
    return solution, remaining / scale


def _krylov(product: Product, residual: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The best correction for a residual in its Krylov space, and what it leaves of the residual."""
    remaining = float(residual.norm())
    size = min(KRYLOV_LIMIT, len(residual))
    basis = residual.new_empty(size + 1, len(residual))
    basis[0] = residual / remaining
    # The least-squares problem, kept triangular by rotations.
    triangle, target = np.zeros((size, size)), np.zeros(size + 1)
    target[0] = remaining
    cosines, sines = np.zeros(size), np.zeros(size)
    used = 0
    for j in range(size):
        vector = basis[j] - product(basis[j])
        column = np.zeros(j + 2)
        # Twice, for orthogonality to rounding.
        for _ in range(2):
            components = basis[: j + 1] @ vector
            vector = vector - components @ basis[: j + 1]
            column[: j + 1] += components.double().cpu().numpy()
        column[j + 1] = length = float(vector.norm())
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
        if not (remaining > tolerance and length > 0):
            break
        basis[j + 1] = vector / length
    coefficients = np.linalg.solve(triangle[:used, :used], target[:used])
    return torch.from_numpy(coefficients).to(residual) @ basis[:used], remaining


def solve(product: Product, rhs: Tensor, eps: float) -> Tensor:
    """Solve (1 - A) z = r to rounding.

    Args:
        product: from v to A v.
        rhs: r, a real vector.
        eps: the precision of the product.

    Raises:
        RuntimeError: the equation is singular, or too ill-conditioned for GMRES and too large for its matrix.
    """
    if len(rhs) == 0:
        return rhs
    if not bool(torch.isfinite(rhs).all()):
        # As everywhere in autograd, what is not finite is passed on.
        return rhs * torch.nan
    if len(rhs) > DENSE_LIMIT:
        solution, remaining = gmres(product, rhs, tolerance=10 * eps)
        if remaining <= 1e4 * eps:
            return solution
        if len(rhs) > FALLBACK_LIMIT:
            raise RuntimeError(
                f"a linear equation in {len(rhs)} unknowns was not solved: GMRES stopped at a relative residual of "
                f"{remaining:.2g}; use smaller steps"
            )
    matrix = torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device) - matrix_of(product, rhs)
    exact: Tensor = torch.linalg.solve(matrix, rhs)
    return exact
