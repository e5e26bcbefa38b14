"""The evaluations of a solve, as what its adjoint needs of them: transposed Jacobians, and gradients of parameters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from torchdiffeq_lmm.forward.linear import LinearSolver, from_real, to_real
from torchdiffeq_lmm.schemes.discrete_adjoint import Contributions, combine

from .evaluation import Evaluation
from .stored_evaluations import Recollection

_run_backward = Variable._execution_engine.run_backward

_AT_ONCE = 16
"""So many evaluations are differentiated with respect to the parameters in one call."""


class ParameterGradients:
    """The gradients of what func depends on besides its arguments, summed up."""

    def __init__(self) -> None:
        self._beyond: dict[int, Tensor] = {}
        self._sums: dict[int, _Sum] = {}
        self._pending: list[tuple[Evaluation, Tensor, float]] = []

    def give(self, evaluation: Evaluation, cotangent: Tensor, weight: float = 1.0) -> None:
        """Pass weight × the cotangent of a slope on to the sources, or to the handle."""
        if evaluation.handle is not None:
            given = cotangent if weight == 1.0 else weight * cotangent
            before = self._beyond.get(id(evaluation.handle))
            self._beyond[id(evaluation.handle)] = given if before is None else before + given
        elif evaluation.sources:
            self._pending.append((evaluation, cotangent, weight))
            if len(self._pending) == _AT_ONCE:
                self.settle()

    def settle(self) -> None:
        """Do what has been put off."""
        pending, self._pending = self._pending, []
        if pending:
            evaluations, cotangents, weights = zip(*pending, strict=True)
            sources = tuple({id(s): s for evaluation in evaluations for s in evaluation.sources}.values())
            weight = 1.0
            if len(set(weights)) == 1 and len(sources) <= len(pending):
                # Fewer multiplications, where steps are equal and share their parameters.
                weight = weights[0]
            else:
                cotangents = tuple(map(mul, weights, cotangents))
            grads = vector_jacobian([evaluation.slope for evaluation in evaluations], cotangents, sources)
            self.add(sources, grads, weight)

    def add(self, sources: Sequence[Tensor], grads: Sequence[Tensor | None], weight: float) -> None:
        """Add weight × gradients to the sums."""
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        sums = self._sums
        for source, grad in zip(sources, grads, strict=True):
            if grad is None:
                continue
            before = sums.get(id(source))
            if before is None:
                sums[id(source)] = _Sum(
                    source, grad if weight == 1.0 else grad * weight, is_own=weight != 1.0 and not grad.is_sparse
                )
            elif before.is_own and not grad.is_sparse:
                totals.append(before.total)
                terms.append(grad)
            else:
                # A sparse tensor can be added to a dense one, but not the other way round.
                first, second = sorted((before.total, weight * grad), key=lambda term: term.is_sparse)
                total = first + second
                sums[id(source)] = _Sum(source, total, is_own=not total.is_sparse)
        if totals:
            torch._foreach_add_(totals, terms, alpha=weight)

    def of(self, source: Tensor) -> Tensor | None:
        """The gradient of a source; None for 0."""
        found = self._sums.get(id(source))
        return None if found is None else found.total

    def of_handle(self, handle: Tensor) -> Tensor | None:
        """The cotangent of a handle; None for 0."""
        return self._beyond.get(id(handle))


class _Sum(NamedTuple):
    source: Tensor
    total: Tensor
    is_own: bool
    """Whether nobody else sees the memory of the total."""


class Linearisation:
    """The transposed Jacobians along a solve.

    Args:
        recollection: the evaluations.
        parameters: where the gradients of parameters are added up.
        collects: whether what is pulled back is what the parameters get too, as it is without a filter.
        time_gradients: where to add the gradients with respect to the times of the states; None if they are not needed.
        precision: the unit in the last place of products with the Jacobians.
    """

    def __init__(
        self,
        recollection: Recollection,
        parameters: ParameterGradients,
        collects: bool,
        time_gradients: Tensor | None,
        precision: float,
    ) -> None:
        self._equations = LinearSolver()
        self._precision = precision
        self._recollection = recollection
        self._parameters = parameters
        self._collects = collects
        self._time_gradients = time_gradients

    def product(self, state: int, vector: Tensor) -> Tensor | None:
        """The product of the transposed Jacobian with a vector; None for 0."""
        evaluation = self._recollection.evaluation(state)
        if evaluation is None:
            return None
        return vector_jacobian((evaluation.slope,), (vector,), evaluation.arguments[:1])[0]

    def expand(self, state: int, value: Tensor | None, slope: Tensor | None, step: float) -> Tensor | None:
        """V + Jᵀ S; with a step τ > 0, R (V + R Jᵀ (S - τ V)), R = (1 - τ Jᵀ)⁻¹. None is 0."""
        if step > 0.0 and value is not None and self._recollection.evaluation(state) is not None:
            slope = -step * value if slope is None else slope - step * value
        pulled = None if slope is None else self.product(state, slope)
        if pulled is None:
            return value
        if step == 0.0:
            return pulled if value is None else value + pulled
        pulled = self._solve(state, step, pulled)
        return self._solve(state, step, pulled if value is None else value + pulled)

    def pull_back(self, state: int, cotangent: Contributions) -> Contributions:
        """Jᵀ times a cotangent of the slope, which has gradients with respect to the time and parameters too."""
        evaluation = self._recollection.evaluation(state) if cotangent else None
        if evaluation is None:
            return []
        weight, tensor = cotangent[0] if len(cotangent) == 1 else (1.0, combine(cotangent))
        if self._time_gradients is None and not self._collects:
            (pulled,) = vector_jacobian((evaluation.slope,), (tensor,), evaluation.arguments)
            return [] if pulled is None else [(weight, pulled)]
        pulled = self._pull_back(evaluation, state, weight, tensor, self._collects)
        return [] if pulled is None else [(weight, pulled)]

    def pull_back_seen(self, evaluation: Evaluation, state: int, cotangent: Tensor) -> Tensor | None:
        """The same for what E sees of the slope itself, which is for the parameters as it is."""
        return self._pull_back(evaluation, state, 1.0, cotangent, collects=True)

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """The cotangent D of an implicit increment, (1 - b* Jᵀ) D = rhs."""
        evaluation = self._recollection.evaluation(state)
        if evaluation is None:
            return rhs
        solution = self._solve(state, weight, rhs)
        if self._collects or self._time_gradients is not None:
            self._pull_back(evaluation, state, weight, solution, self._collects)
        return solution

    def _pull_back(
        self, evaluation: Evaluation, state: int, weight: float, cotangent: Tensor, collects: bool
    ) -> Tensor | None:
        arguments = evaluation.arguments if self._time_gradients is not None else evaluation.arguments[:1]
        sources = evaluation.sources if collects and evaluation.handle is None else ()
        if collects and evaluation.handle is not None:
            self._parameters.give(evaluation, cotangent, weight)
        grads = vector_jacobian((evaluation.slope,), (cotangent,), (*arguments, *sources))
        if self._time_gradients is not None and grads[1] is not None:
            self._time_gradients[state] += weight * grads[1]
        self._parameters.add(sources, grads[len(arguments) :], weight)
        return grads[0]

    def _solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """The solution z of (1 - b* Jᵀ) z = r, to rounding."""

        def product(vector: Tensor) -> Tensor:
            pulled = self.product(state, from_real(vector, rhs))
            return torch.zeros_like(vector) if pulled is None else weight * to_real(pulled)

        return from_real(self._equations.solve(product, to_real(rhs), self._precision, weight), rhs)


@contextmanager
def hooks_suspended(sources: Iterable[Tensor]) -> Iterator[None]:
    """Keep hooks and retained gradients from what is only a part of the gradient; they are for the whole."""
    sources = list(sources)
    retained = [(source, source.grad) for source in sources if source.retains_grad]
    hooks = [source._backward_hooks for source in sources if source._backward_hooks]
    copies = [hook.copy() for hook in hooks]
    for hook in hooks:
        hook.clear()
    try:
        yield
    finally:
        for hook, copy in zip(hooks, copies, strict=True):
            hook.update(copy)
        for source, grad in retained:
            source.grad = grad


def vector_jacobian(
    outputs: Sequence[Tensor | GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[Tensor | GradientEdge]
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` returns, whose checks cost as much as a small network does.

    The graph is kept, for a part of it may belong to others too.
    """
    return _run_backward(
        tuple(outputs), tuple(cotangents), True, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
