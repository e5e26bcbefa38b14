"""Linear equations (1 - A) z = r in Krylov spaces."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def gmres(
    product: Product,
    rhs: Tensor,
    tolerance: float,
    dimension: int,
    restarts: int,
    precondition: Product | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve (1 - A) z = r by GMRES, from z = P r if that is close, else from 0; restarted where the space is full.

    Args:
        product: from v to A v.
        rhs: r, a real vector.
        tolerance: for the norm of the residual, relative to that of r.
        dimension: of a full Krylov space.
        restarts: at most so many times.
        precondition: from v to P v, about (1 - A)⁻¹ v, from the right; None for P = 1. It need not be linear.

    Returns:
        z, and its residual, which is above the tolerance where the restarts did not suffice.

    Source: Saad, Schultz, *GMRES: a generalized minimal residual algorithm* (SIAM J. Sci. Stat. Comput. 1986); Saad,
    *A flexible inner-outer preconditioned GMRES algorithm* (SIAM J. Sci. Comput. 1993).
    """
    goal = tolerance * float(rhs.norm())
    if precondition is None:
        solution, residual = rhs, product(rhs)
    else:
        solution = precondition(rhs)
        residual = rhs - solution + product(solution)
    if not float(residual.norm()) <= float(rhs.norm()):
        solution, residual = torch.zeros_like(rhs), rhs
    for _ in range(restarts + 1):
        before = float(residual.norm())
        if not before > goal:
            break
        correction, residual = _krylov(product, residual, goal, dimension, precondition)
        solution = solution + correction
        remaining = float(residual.norm())
        # What a whole Krylov space does not lessen is rounding, or beyond it.
        if remaining <= goal or not remaining < 0.99 * before:
            break
        residual = rhs - solution + product(solution)
    return solution, residual


def _krylov(
    product: Product, residual: Tensor, goal: float, dimension: int, precondition: Product | None
) -> tuple[Tensor, Tensor]:
    """The best correction for a residual in its Krylov space, and what it leaves of the residual."""
    remaining = float(residual.norm())
    size = min(dimension, len(residual))
    basis = residual.new_empty(size + 1, len(residual))
    basis[0] = residual / remaining
    directions: list[Tensor] = []
    # The least-squares problem, and the same kept triangular by rotations.
    hessenberg, triangle = np.zeros((size + 1, size)), np.zeros((size, size))
    target = np.zeros(size + 1)
    target[0] = norm = remaining
    cosines, sines = np.zeros(size), np.zeros(size)
    used = 0
    for j in range(size):
        direction = basis[j] if precondition is None else precondition(basis[j])
        if precondition is not None:
            directions.append(direction)
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
    along = basis[:used] if precondition is None else torch.stack(directions[:used])
    correction = torch.from_numpy(coefficients).to(residual) @ along
    return correction, torch.from_numpy(left).to(residual) @ basis[: used + 1]
