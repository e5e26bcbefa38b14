"""The transposed Jacobians along a solve, from its recorded evaluations, as the discrete adjoint asks for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.block_jacobian import real_rows, rows_like
from torchdiffeq_lmm.forward.block_linear import BlockLinearSolver
from torchdiffeq_lmm.forward.known_jacobian import KnownPreconditioner
from torchdiffeq_lmm.forward.linear import Factorised, LinearSolver, from_real, matrix_of, to_real
from torchdiffeq_lmm.forward.samples import Systems
from torchdiffeq_lmm.forward.sparse_matrix import SparseFactors
from torchdiffeq_lmm.schemes.discrete_adjoint import Contributions, combine

from .evaluation import Evaluation
from .stored_evaluations import StoredEvaluations
from .vjp import ParameterGradients, vector_jacobian

_MANY = 0.25
"""For more groups of rows than this, times the number of unknowns, a matrix is no sparse one."""

_FEW = 16
"""So few are always."""

_KEPT = 8
"""Of so many states the Jacobians are kept: a filter asks for those of several nodes again and again."""

_SMALL = 2**16
"""Only Jacobians of so many entries, at most."""


class RecordedJacobians:
    """The transposed Jacobians along a solve.

    Args:
        stored: the evaluations.
        parameters: where the gradients of parameters are added up.
        collects: whether what is pulled back is what the parameters get too, as it is without a filter.
        time_gradients: where to add the gradients with respect to the times of the states; None if they are not needed.
        precision: the unit in the last place of products with the Jacobians.
        systems: into which implicit equations fall.
    """

    def __init__(
        self,
        stored: StoredEvaluations,
        parameters: ParameterGradients,
        collects: bool,
        time_gradients: Tensor | None,
        precision: float,
        systems: Systems,
    ) -> None:
        self._equations = LinearSolver(systems.newton)
        self._by_blocks = BlockLinearSolver()
        self._samples = systems.samples
        self._newton = systems.newton
        self._known = systems.known
        self._precision = precision
        self._stored = stored
        self._parameters = parameters
        self._collects = collects
        self._time_gradients = time_gradients
        self._kept: dict[int, Tensor] = {}

    def product(self, state: int, vector: Tensor) -> Tensor | None:
        """The product of the transposed Jacobian with a vector; None for 0."""
        evaluation = self._stored.evaluation(state)
        if evaluation is None:
            return None
        return vector_jacobian((evaluation.slope,), (vector,), evaluation.arguments[:1])[0]

    def damp(self, state: int, step: float, vector: Tensor) -> Tensor:
        """(1 - τ Jᵀ)⁻¹ times a vector."""
        return vector if self._stored.evaluation(state) is None else self._solve(state, step, vector)

    def expand(self, state: int, value: Tensor | None, slope: Tensor | None, step: float) -> Tensor | None:
        """V + Jᵀ S; with a step τ > 0, R (V + R Jᵀ (S - τ V)), R = (1 - τ Jᵀ)⁻¹. None is 0."""
        if step > 0.0 and value is not None and self._stored.evaluation(state) is not None:
            slope = -step * value if slope is None else slope - step * value
        pulled = None if slope is None else self.product(state, slope)
        if pulled is None:
            return value
        if step == 0.0:
            return pulled if value is None else value + pulled
        pulled = self._solve(state, step, pulled)
        return self._solve(state, step, pulled if value is None else value + pulled)

    def vjp(self, state: int, cotangent: Contributions) -> Contributions:
        """Jᵀ times a cotangent of the slope, which has gradients with respect to the time and parameters too."""
        evaluation = self._stored.evaluation(state) if cotangent else None
        if evaluation is None:
            return []
        weight, tensor = cotangent[0] if len(cotangent) == 1 else (1.0, combine(cotangent))
        if self._time_gradients is None and not self._collects:
            (pulled,) = vector_jacobian((evaluation.slope,), (tensor,), evaluation.arguments)
            return [] if pulled is None else [(weight, pulled)]
        pulled = self._vjp(evaluation, state, weight, tensor, self._collects)
        return [] if pulled is None else [(weight, pulled)]

    def vjp_seen(self, evaluation: Evaluation, state: int, cotangent: Tensor) -> Tensor | None:
        """The same for what E sees of the slope itself, which is for the parameters as it is."""
        return self._vjp(evaluation, state, 1.0, cotangent, collects=True)

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """The cotangent D of an implicit increment, (1 - b* Jᵀ) D = rhs."""
        evaluation = self._stored.evaluation(state)
        if evaluation is None:
            return rhs
        solution = self._solve(state, weight, rhs)
        if self._collects or self._time_gradients is not None:
            self._vjp(evaluation, state, weight, solution, self._collects)
        return solution

    def _vjp(
        self, evaluation: Evaluation, state: int, weight: float, cotangent: Tensor, collects: bool
    ) -> Tensor | None:
        arguments = evaluation.arguments if self._time_gradients is not None else evaluation.arguments[:1]
        sources = evaluation.sources if collects and evaluation.handle is None else ()
        if collects and evaluation.handle is not None:
            self._parameters.collect(evaluation, cotangent, weight)
        grads = vector_jacobian((evaluation.slope,), (cotangent,), (*arguments, *sources))
        if self._time_gradients is not None and grads[1] is not None:
            self._time_gradients[state] += weight * grads[1]
        self._parameters.add(sources, grads[len(arguments) :], weight)
        return grads[0]

    def _solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """The solution z of (1 - b* Jᵀ) z = r, to rounding."""
        while self._samples.dims and self._samples.count > 1:
            found = self._solve_blocks(state, weight, rhs)
            if found is not None:
                return found
            self._samples = self._samples.fewer()
            self._kept.clear()

        def jacobian_product(vector: Tensor) -> Tensor:
            pulled = self.product(state, from_real(vector, rhs))
            return torch.zeros_like(vector) if pulled is None else to_real(pulled)

        def product(vector: Tensor) -> Tensor:
            return weight * jacobian_product(vector)

        def matrix() -> Tensor:
            return weight * self._jacobian(state, lambda: matrix_of(jacobian_product, like))

        sparsity = None if isinstance(self._known, KnownPreconditioner | None) else self._known.sparsity
        like = to_real(rhs)
        factor: Callable[[], Factorised] | None = None
        if sparsity is not None and sparsity.transposed.count <= _MANY * len(like) + _FEW:
            transposed = sparsity.transposed

            def factor() -> Factorised:
                # By the same products, the weight counted.
                return SparseFactors(transposed.matrix(product, torch.ones_like(like)), 1.0)

        return from_real(self._equations.solve(product, like, self._precision, weight, factor, matrix), rhs)

    def _jacobian(self, state: int, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of the Jacobian of a state, once if it is small."""
        if state in self._kept:
            return self._kept[state]
        found = make()
        if found.numel() <= _SMALL:
            if len(self._kept) == _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[state] = found
        return found

    def _solve_blocks(self, state: int, weight: float, rhs: Tensor) -> Tensor | None:
        """The same for every sample by itself; None where they are coupled, or blocks too large."""
        samples = self._samples
        rows = samples.split(rhs)
        like = real_rows(rows)
        if not self._newton.allows_blocks(samples.count, like.shape[1]):
            return None

        def product(of: Tensor) -> Tensor:
            pulled = self.product(state, samples.join(of))
            return torch.zeros_like(of) if pulled is None else samples.split(pulled)

        def blocks() -> Tensor:
            units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
            return torch.stack([real_rows(product(rows_like(unit.expand_as(like), rows))) for unit in units], 1)

        found = self._by_blocks.solve(product, lambda: self._jacobian(state, blocks), rows, weight, self._precision)
        return None if found is None else samples.join(found)
