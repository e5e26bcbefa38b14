"""Sparse matrices of large systems: their structure, their entries from a few products, and their factors.

All of it needs SciPy, which is imported when it is first used, and works on the CPU.

Source: Curtis, Powell, Reid, *On the estimation of sparse Jacobian matrices* (J. Inst. Maths Applics 1974), for groups
of columns that have no row in common: one product makes the entries of all of them.
"""

from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .krylov import Product

Matrix = Any
"""A ``scipy.sparse.csc_array``, real, in double precision unless it is a structure."""


def scipy_sparse(option: str) -> Any:
    """The module ``scipy.sparse``, with its linear algebra.

    Args:
        option: what needs it, for the message.

    Raises:
        ImportError: SciPy is not there.
    """
    try:
        import scipy.sparse.linalg
    except ImportError as error:
        raise ImportError(f"{option} needs SciPy, which is not installed: pip install scipy") from error
    return scipy.sparse


class Sparsity:
    """Where a matrix may have entries that are not 0.

    Args:
        structure: a matrix of any type, whose stored entries are those.
    """

    def __init__(self, structure: Matrix) -> None:
        self.structure = structure
        self.structure.sort_indices()
        columns = np.repeat(np.arange(structure.shape[1]), np.diff(structure.indptr))
        self.groups = _groups(structure)
        of_entries = self.groups[columns]
        self._columns = columns
        self.count = int(self.groups.max(initial=-1)) + 1
        order = np.argsort(of_entries, kind="stable")
        self._entries = np.split(order, np.searchsorted(of_entries[order], np.arange(1, self.count)))

    @cached_property
    def transposed(self) -> "Sparsity":
        """That of the transposed matrix."""
        return Sparsity(self.structure.T.tocsc())

    def matrix(self, product: Product, scale: Tensor) -> Matrix:
        """The matrix A with this structure.

        Args:
            product: from v to A v, on real vectors.
            scale: of what size the entries of v are, of shape (n,).
        """
        data, rows = np.zeros(len(self._columns)), self.structure.indices
        sizes = scale.double().cpu().numpy()
        for group, entries in enumerate(self._entries):
            mask = torch.from_numpy(self.groups == group).to(scale.device)
            values = product(scale.where(mask, 0.0)).detach().double().cpu().numpy()
            data[entries] = values[rows[entries]] / sizes[self._columns[entries]]
        return type(self.structure)((data, rows, self.structure.indptr), shape=self.structure.shape)


def _groups(structure: Matrix) -> NDArray[np.int64]:
    """The number of the group of each column, first come, first served."""
    starts, indices = structure.indptr.tolist(), structure.indices.tolist()
    # The groups that have an entry in a row, as the bits of a number.
    taken = [0] * structure.shape[0]
    groups = np.empty(structure.shape[1], np.int64)
    for column in range(len(groups)):
        rows = indices[starts[column] : starts[column + 1]]
        met = 0
        for row in rows:
            met |= taken[row]
        free = ~met & (met + 1)
        for row in rows:
            taken[row] |= free
        groups[column] = free.bit_length() - 1
    return groups


class SparseFactors:
    """1 - b A by its sparse factors, in double precision.

    Args:
        matrix: A.
        weight: b.
    """

    def __init__(self, matrix: Matrix, weight: float) -> None:
        sparse = scipy_sparse("a sparse Jacobian")
        self._factors: Any = None
        system = (sparse.identity(matrix.shape[0], format="csc") - weight * matrix).tocsc()
        if np.isfinite(system.data).all():
            # What it raises where the matrix is singular.
            with suppress(RuntimeError):
                self._factors = sparse.linalg.splu(system, **_ordering(system))

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution for a right-hand side; NaN where the matrix is singular, or not finite."""
        if self._factors is None:
            return rhs * torch.nan
        found: Tensor = torch.from_numpy(self._factors.solve(rhs.detach().double().cpu().numpy()))
        return found.to(rhs)


def _ordering(matrix: Matrix) -> dict[str, Any]:
    """How to order and pivot; the error of lesser pivots is corrected along with what is left of the equation."""
    structure = matrix.astype(bool)
    if (structure != structure.T).nnz:
        return {}
    return {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.1, "options": {"SymmetricMode": True}}
