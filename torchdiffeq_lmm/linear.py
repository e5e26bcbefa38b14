"""Linear equations (1 - A) z = r, from the product with A alone: dense for small systems, matrix-free for large ones.

Everything is real: complex vectors are taken for real ones of twice the length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DENSE_LIMIT = 32
"""Systems of up to so many real unknowns are solved by their matrix."""

FALLBACK_LIMIT = 1024
"""Systems of up to so many are, where a Krylov space does not suffice."""

KRYLOV_LIMIT = 100
"""The largest dimension of a Krylov space."""

Product = Callable[[Tensor], Tensor]


def to_real(x: Tensor) -> Tensor:
    """A state as a real vector."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def from_real(vector: Tensor, like: Tensor) -> Tensor:
    """A real vector as a state of the shape and dtype of `like`."""
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
    """Solve (1 - A) z = r by GMRES from z = r, without restarts.

    Args:
        product: from v to A v.
        rhs: r, a real vector.
        tolerance: for the residual relative to r.

    Returns:
        z, and the relative residual, which is above the tolerance where `KRYLOV_LIMIT` dimensions did not suffice.

    Source: Saad, Schultz, *GMRES: a generalized minimal residual algorithm* (SIAM J. Sci. Stat. Comput. 1986).
    """
    scale = float(rhs.norm())
    if scale == 0.0:
        return rhs, 0.0
    residual = product(rhs)
    beta = float(residual.norm())
    if not beta > tolerance * scale:
        return rhs, beta / scale
    basis = [residual / beta]
    size = min(KRYLOV_LIMIT, len(rhs))
    hessenberg = torch.zeros(size + 1, size, dtype=torch.float64)
    target = torch.zeros(size + 1, dtype=torch.float64)
    target[0] = beta
    coefficients, remaining = target[:0], beta
    for j in range(size):
        vector = basis[j] - product(basis[j])
        # Twice, for orthogonality to rounding.
        for _ in range(2):
            stack = torch.stack(basis, 1)
            components = stack.T @ vector
            vector = vector - stack @ components
            hessenberg[: j + 1, j] += components.to(hessenberg)
        length = float(vector.norm())
        hessenberg[j + 1, j] = length
        small = hessenberg[: j + 2, : j + 1]
        coefficients = torch.linalg.lstsq(small, target[: j + 2, None], driver="gelsd").solution[:, 0]
        remaining = float((small @ coefficients - target[: j + 2]).norm())
        if not remaining > tolerance * scale or length <= tolerance * 1e-3 * scale:
            break
        basis.append(vector / length)
    correction = torch.stack(basis[: len(coefficients)], 1) @ coefficients.to(rhs)
    return rhs + correction, remaining / scale


def solve(product: Product, rhs: Tensor) -> Tensor:
    """Solve (1 - A) z = r to rounding.

    Args:
        product: from v to A v.
        rhs: r, a real vector.

    Raises:
        RuntimeError: the equation is singular, or too ill-conditioned for GMRES and too large for its matrix.
    """
    if len(rhs) > DENSE_LIMIT:
        solution, remaining = gmres(product, rhs, tolerance=10 * torch.finfo(rhs.dtype).eps)
        if remaining <= 1e4 * torch.finfo(rhs.dtype).eps:
            return solution
        if len(rhs) > FALLBACK_LIMIT:
            raise RuntimeError(
                f"a linear equation in {len(rhs)} unknowns was not solved: GMRES left a relative residual of "
                f"{remaining:.2g} after {KRYLOV_LIMIT} products; use smaller steps"
            )
    matrix = torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device) - matrix_of(product, rhs)
    exact: Tensor = torch.linalg.solve(matrix, rhs)
    return exact
