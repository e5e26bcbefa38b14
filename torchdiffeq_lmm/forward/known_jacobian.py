"""What the user knows of the Jacobian J of a large system: its structure, itself, or how to solve with it.

That is checked before the first step, as far as it can be; whether it is the Jacobian of func, at every new one: see
`sparse_corrector`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.methods import Method

from .krylov import Product
from .sparse_matrix import Matrix, Sparsity, scipy_sparse
from .vector_field import VectorField


@dataclass(frozen=True)
class KnownSparsity:
    """The structure of J, from which a few products make it.

    Attributes:
        sparsity: of J.
        field: f.
    """

    sparsity: Sparsity
    field: VectorField

    def matrix(self, product: Product, scale: Tensor, time: Tensor, x: Tensor) -> Matrix:
        """J at a state.

        Args:
            product: from v to J v.
            scale: of what size the entries of a state and its corrections are, of shape (n,).
            time: what func is given for it.
            x: the solver's state.
        """
        del time, x
        return self.sparsity.matrix(product, scale)

    def complaint(self, row: int, column: int | None, found: float, wanted: float) -> str:
        """What is wrong, where the matrix has `found` and J `wanted`; the column is None where it is not known."""
        del found
        if column is None:
            return (
                f"jac_sparsity lacks an entry in row {row}: the derivative of func's entry {row}, that of "
                f"{self.field.entry(row)}, depends on entries of the state at which jac_sparsity is 0"
            )
        return (
            f"jac_sparsity lacks the entry ({row}, {column}): the derivative of func's entry {row}, that of "
            f"{self.field.entry(row)}, with respect to {self.field.entry(column)} is {wanted:.6g}"
        )


class KnownJacobian:
    """J as the user's function.

    Args:
        jac: ``jac(t, y)`` in the user's time and structure of the state.
        field: f.
        size: n.

    Attributes:
        sparsity: of the last J; None where it has been asked for none.
    """

    def __init__(self, jac: Callable[[Tensor, Any], Any], field: VectorField, size: int) -> None:
        self._jac = jac
        self._field = field
        self._size = size
        self.sparsity: Sparsity | None = None

    def matrix(self, product: Product, scale: Tensor, time: Tensor, x: Tensor) -> Matrix:
        """J at a state: see `KnownSparsity.matrix`."""
        del product, scale
        returned = self._jac(time, self._field.user_state(x))
        matrix = self._field.direction * _csc("jac", "jac(t, y)", returned, self._size).astype(np.float64)
        last = None if self.sparsity is None else self.sparsity.structure
        if (
            last is None
            or not np.array_equal(last.indptr, matrix.indptr)
            or not np.array_equal(last.indices, matrix.indices)
        ):
            self.sparsity = Sparsity(matrix)
        return matrix

    def complaint(self, row: int, column: int | None, found: float, wanted: float) -> str:
        """See `KnownSparsity.complaint`."""
        of = f"func's entry {row}, that of {self._field.entry(row)},"
        if column is None:
            return f"jac(t, y) is not the Jacobian of func: row {row} is not the derivative of {of}"
        sign = self._field.direction
        return (
            f"jac(t, y) is not the Jacobian of func: its entry ({row}, {column}) is {sign * found:.6g}; the derivative "
            f"of {of} with respect to {self._field.entry(column)} is {sign * wanted:.6g}"
        )


class KnownPreconditioner:
    """How to solve with 1 - b J approximately, as the user's function.

    Args:
        preconditioner: ``preconditioner(t, y, b)`` in the user's time and structure of the state; it returns a function
            from v to about (1 - b J)⁻¹ v, v and what it returns of that structure, too.
        field: f.
    """

    def __init__(self, preconditioner: Callable[[Tensor, Any, float], Any], field: VectorField) -> None:
        self._preconditioner = preconditioner
        self._field = field

    def at(self, time: Tensor, x: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
        """From v to about (1 - b J)⁻¹ v, at a state, in the solver's structure of states.

        Args:
            time: what func is given for it.
            x: the solver's state.
            weight: b.

        Raises:
            TypeError, ValueError: what the user's functions return is not as it must be.
        """
        field = self._field
        apply = self._preconditioner(time, field.user_state(x), field.direction * weight)
        if not callable(apply):
            raise TypeError(
                f"preconditioner(t, y, b) must return a function from v to about (1 - b J)⁻¹ v, got {apply!r}"
            )
        return lambda v: field.flat_state(apply(field.user_state(v)), v, "preconditioner(t, y, b)")


Known = KnownSparsity | KnownJacobian | KnownPreconditioner


def known_jacobian(
    jac_sparsity: Any,
    jac: Any,
    preconditioner: Any,
    method: Method,
    field: VectorField,
    y0: Tensor,
    batch_dims: object,
) -> Known | None:
    """What the user knows of the Jacobian; None where that is nothing, or of no use.

    Args:
        jac_sparsity: where the Jacobian may have entries that are not 0: a SciPy sparse matrix (its stored entries), or
            a dense tensor or array of zeros and others; of shape (n, n), with n the number of entries of the state,
            flattened; those of a tuple follow each other, one component after the other.
        jac: ``jac(t, y)`` returns the Jacobian, of that shape too: a dense tensor or array, a SciPy sparse matrix or a
            sparse tensor.
        preconditioner: see `KnownPreconditioner`. b is negative where the user's time is decreasing.
        method: the solver's.
        field: f.
        y0: the solver's initial state. Its device must be the CPU for the first two to be used; elsewhere a warning
            says that they are not.
        batch_dims: the option of that name, which must be "auto" or 0: the state is one system.

    Raises:
        TypeError: one of the three is of a wrong type; or the state is complex, where J is real.
        ValueError: more than one is given, or one to an explicit method, or to the backward solve of odeint_adjoint; or
            jac_sparsity has a wrong shape or is not finite.
        ImportError: SciPy is needed, and is not installed.
    """
    options = {"jac_sparsity": jac_sparsity, "jac": jac, "preconditioner": preconditioner}
    given = [name for name, value in options.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)} are mutually exclusive options, got all of them; give one")
    (name,) = given
    if not method.is_implicit:
        raise ValueError(
            f"{name} is for implicit methods, whose steps are equations; method {method.name!r} is explicit"
        )
    if field.is_adjoint:
        raise ValueError(
            f"{name} is of func, and no option for the backward solve of odeint_adjoint, whose state is another; give "
            f"adjoint_options without it, or use odeint"
        )
    if batch_dims not in ("auto", 0):
        raise ValueError(
            f"batch_dims must be 'auto' or 0 where {name} is given, which is for the whole state as one system, got "
            f"{batch_dims!r}"
        )
    if name != "jac_sparsity" and not callable(options[name]):
        expected = "jac(t, y) -> matrix" if name == "jac" else "preconditioner(t, y, b) -> (v -> about (1 - b J)⁻¹ v)"
        raise TypeError(f"{name} must be a function {expected}, got {options[name]!r}")
    if name == "preconditioner":
        return KnownPreconditioner(preconditioner, field)
    if y0.is_complex():
        raise TypeError(
            f"{name} is for real states, got y0 of dtype {y0.dtype}; make the real and the imaginary part components "
            f"of a tuple"
        )
    size = y0.numel()
    scipy_sparse(name)
    sparsity = None if jac_sparsity is None else Sparsity(_csc(name, name, jac_sparsity, size))
    if y0.device.type != "cpu":
        warnings.warn(
            f"{name} is used on the CPU alone, where sparse matrices are factored; the state is on {y0.device}, so "
            f"implicit steps are solved by products with the Jacobian, in Krylov spaces",
            stacklevel=3,
        )
        return None
    return KnownJacobian(jac, field, size) if sparsity is None else KnownSparsity(sparsity, field)


def _csc(option: str, what: str, matrix: Any, size: int) -> Matrix:
    """A matrix of the user's as one of SciPy's, of which stored entries count."""
    sparse = scipy_sparse(option)
    if not (isinstance(matrix, Tensor | np.ndarray) or sparse.issparse(matrix)):
        raise TypeError(
            f"{what} must be a SciPy sparse matrix, a tensor or an array of shape ({size}, {size}), got "
            f"{type(matrix).__name__}"
        )
    if tuple(matrix.shape) != (size, size):
        raise ValueError(
            f"{what} must have the shape ({size}, {size}), a row and a column for each entry of the flattened state, "
            f"got {tuple(matrix.shape)}"
        )
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu()
        if matrix.layout != torch.strided:
            entries = matrix.to_sparse_coo().coalesce()
            matrix = sparse.coo_array((entries.values().numpy(), entries.indices().numpy()), shape=(size, size))
        else:
            matrix = matrix.numpy()
    if matrix.dtype.kind not in "biuf":
        raise TypeError(f"{what} must have real entries, got dtype {matrix.dtype}")
    found = sparse.csc_array(matrix)
    found.sum_duplicates()
    if option == "jac_sparsity" and not np.isfinite(found.data).all():
        raise ValueError(f"{what} must be finite, got NaN or infinity among its entries")
    return found
