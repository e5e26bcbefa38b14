"""Newton corrections of one large equation d = c + b* f(x + d): by products with the Jacobian J, or by sparse factors.

The first are made by a Jacobian of each iterate's own, the second by one that is kept from step to step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .implicit_equation import Equation
from .jacobian import Jacobian, to_real_sizes
from .known_jacobian import Known, KnownJacobian, KnownPreconditioner, KnownSparsity
from .krylov import Product, gmres
from .linear import Counted, from_real, noise, to_real
from .newton_options import Newton
from .sparse_matrix import Matrix, SparseFactors

INEXACT = 1e-3
"""Newton corrections that may end an iteration are solved to this relative residual."""

FAR = 0.1
"""Others to this one, at most."""

_NEAR = 1e-2
"""Residuals below this, in terms of atol + rtol |y|, may be the last ones."""

_STALE = 0.1
"""Above this rate of convergence a Jacobian from another iterate gives way to a new one."""

_KEPT = 2
"""Of so many steps' equations the factors are kept."""

_ROUNDING = 8
"""So many units in the last place are rounding."""

_CURVED = 8
"""By so many times what a change and its opposite differ by, differences may be wrong."""


class Corrector(Protocol):
    """What makes Newton corrections.

    Attributes:
        jacobian: makes products with J.
        is_dear: whether a matrix of J would have cost less.
        keeps: whether J is kept, so that corrections at several iterates can be compared.
        stale: above this rate of convergence J is to be made anew.
    """

    jacobian: Jacobian
    is_dear: bool
    keeps: bool
    stale: float

    def is_of(self, d: Tensor) -> bool:
        """Whether a correction at this iterate is made by its own J."""

    def renew(self, equation: Equation, d: Tensor, f: Tensor) -> None:
        """Make J anew, at an iterate."""

    def forget(self) -> None:
        """Forget J."""

    def correct(
        self, equation: Equation, d: Tensor, f: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, float]:
        """The correction at an iterate, and what it leaves of the linear equation, relative to the residual.

        Args:
            equation: the equation.
            d, f, residual: the iterate, f there and its residual.
            scale: sizes by which corrections are compared.
        """


class KrylovCorrector:
    """Corrections from products with J, along the directions of a Krylov space.

    Args:
        jacobian: makes the products.
        newton: how much work may be done.
        known: how to solve with 1 - b J approximately, if the user knows.
    """

    keeps = False
    stale = torch.inf

    def __init__(self, jacobian: Jacobian, newton: Newton, known: KnownPreconditioner | None = None) -> None:
        self.jacobian = jacobian
        self._newton = newton
        self.is_dear = False
        self._known = known
        self._equation: Equation | None = None
        self._norm = 0.0
        self._is_first = True
        self._first_forcing = INEXACT

    def is_of(self, d: Tensor) -> bool:
        """See `Corrector`."""
        del d
        return True

    def renew(self, equation: Equation, d: Tensor, f: Tensor) -> None:
        """See `Corrector`."""

    def forget(self) -> None:
        """See `Corrector`."""

    def correct(
        self, equation: Equation, d: Tensor, f: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, float]:
        """See `Corrector`."""
        x = equation.x
        product = self.jacobian.product(equation.slope, x + d, f, equation.sizes(d, f))
        # In terms of their scale, no large entries hide small ones.
        sizes = to_real_sizes(scale, x)
        rhs = to_real(residual) / sizes

        scaled = Counted(lambda v: equation.weight * product(sizes * v) / sizes)
        precondition: Product | None = None
        if self._known is not None:
            assert equation.time is not None
            apply = self._known.at(equation.time, x + d, equation.weight)
            precondition = _scaled(lambda v: to_real(apply(from_real(v, x))), sizes)
        norm = float(rhs.norm())
        forcing = self._forcing_of(equation, norm)
        if bool((rhs.abs() <= _NEAR).all()):
            forcing = INEXACT
        spaces = self._newton.krylov_dimension, self._newton.max_restarts
        found, left = gmres(scaled, rhs, forcing, *spaces, precondition)
        if self.jacobian.is_exact and len(rhs) <= self._newton.largest_matrix and scaled.is_dear(rhs):
            self.is_dear = True
        return from_real(sizes * found, x), float(left.norm()) / norm if norm > 0 else 0.0

    def _forcing_of(self, equation: Equation, norm: float) -> float:
        """To what part of its norm a residual is to be solved: no more than Newton's method makes use of.

        That is seen by how much the correction before it has lessened the residual, at first by that of the equation
        before. Source: Eisenstat, Walker, *Choosing the forcing terms in an inexact Newton method* (SIAM J. Sci.
        Comput. 1996), choice 2.
        """
        if self._equation is not equation:
            self._equation, self._is_first = equation, True
            forcing = self._first_forcing
        else:
            rate = norm / self._norm if self._norm > 0 else 0.0
            if self._is_first:
                self._first_forcing = min(max(0.5 * rate, INEXACT), FAR)
            self._is_first = False
            forcing = 0.9 * rate**2
        self._norm = norm
        return min(max(forcing, INEXACT), FAR)


def _scaled(product: Product, sizes: Tensor) -> Product:
    return lambda v: product(sizes * v) / sizes


class SparseCorrector:
    """Corrections by the sparse factors of 1 - b* J, whose J is kept for as long as it serves.

    Args:
        jacobian: makes products with J, for its entries and for a check of them.
        known: the structure of J, or J itself.
        precision: the relative precision of func's values.
        on_jacobian: called whenever J is made.
    """

    keeps = True
    stale = _STALE
    is_dear = False

    def __init__(
        self,
        jacobian: Jacobian,
        known: KnownSparsity | KnownJacobian,
        precision: float,
        on_jacobian: Callable[[], object],
    ) -> None:
        self.jacobian = jacobian
        self._on_jacobian = on_jacobian
        self._known = known
        self._precision = precision
        self._made = 0
        self._matrix: Matrix | None = None
        self._made_at: Tensor | None = None
        self._factors: dict[float, SparseFactors] = {}

    def is_of(self, d: Tensor) -> bool:
        """See `Corrector`."""
        return d is self._made_at

    def forget(self) -> None:
        """See `Corrector`."""
        self._matrix, self._made_at = None, None

    def renew(self, equation: Equation, d: Tensor, f: Tensor) -> None:
        """See `Corrector`.

        Raises:
            ValueError: what the user knows of J is wrong.
        """
        assert equation.time is not None
        self._made += 1
        self._on_jacobian()
        x, sizes = equation.x + d, equation.sizes(d, f)
        scale = self.jacobian.increments(x, sizes)
        product = self.jacobian.product(equation.slope, x, f, sizes)
        matrix = self._known.matrix(product, scale, equation.time, x)
        at = _Checked(matrix, equation, x, f, sizes, scale, self._precision, self._made)
        row = at.wrong_row(product, self.jacobian.is_exact)
        is_unseen = row is not None and self.jacobian.is_exact and isinstance(self._known, KnownJacobian)
        if is_unseen and at.is_of_differences(product):
            # What auto-differentiation does not see of func, the user may know.
            self.jacobian.use_differences()
            row = None
        if row is not None:
            column, found, wanted = at.wrong_entry(row, self.jacobian)
            raise ValueError(self._known.complaint(row, column, found, wanted))
        self._matrix, self._made_at = matrix, d
        self._factors.clear()

    def correct(
        self, equation: Equation, d: Tensor, f: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, float]:
        """See `Corrector`."""
        del scale
        if self._matrix is None:
            self.renew(equation, d, f)
        weight = equation.weight
        if weight not in self._factors:
            if len(self._factors) == _KEPT:
                del self._factors[next(iter(self._factors))]
            self._factors[weight] = SparseFactors(self._matrix, weight)
        return from_real(self._factors[weight].solve(to_real(residual)), residual), 0.0


@dataclass(frozen=True)
class _Checked:
    """A matrix that is to be J at a state.

    Attributes:
        matrix: the matrix.
        equation, x, f: the equation, the state and f there.
        sizes, scale: what size the entries of x and its corrections are of, and of what size changes of it are.
        precision: the relative precision of func's values.
        seed: of random numbers.
    """

    matrix: Matrix
    equation: Equation
    x: Tensor
    f: Tensor
    sizes: Tensor
    scale: Tensor
    precision: float
    seed: int

    def wrong_row(self, product: Product, is_exact: bool) -> int | None:
        """The first row whose product with a random vector is another than that of J; None where there is none.

        Args:
            product: from v to J v.
            is_exact: whether by auto-differentiation, else by differences.
        """
        wrong = self._differs(self._times(self._changes), product, is_exact)
        return int(wrong.nonzero()[0]) if bool(wrong.any()) else None

    def is_of_differences(self, exact: Product) -> bool:
        """Whether differences agree with the matrix, and not with auto-differentiation, by which `exact` is J v."""
        product = Jacobian(False).product(self.equation.slope, self.x, self.f, self.sizes)
        if self.wrong_row(product, False) is not None:
            return False
        return bool(self._differs(exact(self._changes.to(self.scale.dtype)).double(), product, False).any())

    @property
    def _changes(self) -> Tensor:
        drawn = noise(to_real(self.x), self.seed)
        # No entry is so small that it would hide what is wrong in its column.
        return (self.scale * torch.where(drawn < 0, drawn - 1, drawn + 1) / 2).double()

    def _differs(self, found: Tensor, product: Product, is_exact: bool) -> Tensor:
        """In which rows what was found for J u is wrong by a product."""
        u = self._changes
        wanted = product(u.to(self.scale.dtype)).double()
        terms = self._times(u.abs(), absolute=True)
        bound: Tensor
        if is_exact:
            bound = self.precision**0.5 * terms + _ROUNDING * self.precision * terms.max()
        else:
            of_terms = self._times(to_real(self.sizes).double(), absolute=True)
            rounding = _ROUNDING * self.precision * (to_real(self.f).double().abs() + of_terms)
            # What is not linear in u is in the entries of the matrix, too.
            curved = (wanted + product(-u.to(self.scale.dtype)).double()).abs()
            bound = self.precision**0.25 * terms + rounding + _CURVED * curved
        # What is not finite makes corrections that are not either.
        differs: Tensor = ((found - wanted).abs() > bound) & torch.isfinite(terms) & torch.isfinite(wanted)
        return differs

    def wrong_entry(self, row: int, jacobian: Jacobian) -> tuple[int | None, float, float]:
        """The worst entry of a row, by its column, and what it is and should be; (None, 0, 0) where it is not known."""
        wanted = jacobian.row(self.equation.slope, self.x, row)
        if wanted is None:
            return None, 0.0, 0.0
        entries = self.matrix.tocsr()[[row], :].tocoo()
        of_row = torch.zeros_like(wanted, dtype=torch.float64)
        stored = torch.zeros_like(of_row, dtype=torch.bool)
        columns = torch.from_numpy(entries.col).long()
        of_row[columns] = torch.from_numpy(entries.data)
        stored[columns] = True
        missed = (of_row - wanted.double()).abs()
        # An entry that is there may have what belongs to one that is not.
        lacking = missed.where(~stored, 0.0)
        column = int((lacking if bool(lacking.any()) else missed).argmax())
        return column, float(of_row[column]), float(wanted[column])

    def _times(self, u: Tensor, absolute: bool = False) -> Tensor:
        matrix = abs(self.matrix) if absolute else self.matrix
        product: Tensor = torch.from_numpy(matrix @ u.cpu().numpy())
        return product


def corrector_of(
    jacobian: Jacobian, newton: Newton, known: Known | None, precision: float, on_jacobian: Callable[[], object]
) -> Corrector:
    """What makes the corrections, by what the user knows of J."""
    if known is None or isinstance(known, KnownPreconditioner):
        return KrylovCorrector(jacobian, newton, known)
    return SparseCorrector(jacobian, known, precision, on_jacobian)
