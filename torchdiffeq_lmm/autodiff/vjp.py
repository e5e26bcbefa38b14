"""Vector–Jacobian products (vjp) of recorded evaluations, and the gradients of parameters that they add up to."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from .evaluation import Evaluation

_run_backward = Variable._execution_engine.run_backward

_AT_ONCE = 16
"""So many evaluations are differentiated with respect to the parameters in one call."""


class ParameterGradients:
    """The gradients of what func depends on besides its arguments, summed up."""

    def __init__(self) -> None:
        self._beyond: dict[int, Tensor] = {}
        self._sums: dict[int, _Sum] = {}
        self._pending: list[tuple[Evaluation, Tensor, float]] = []

    def collect(self, evaluation: Evaluation, cotangent: Tensor, weight: float = 1.0) -> None:
        """Pass weight × the cotangent of a slope on to the sources, or to the handle."""
        if evaluation.handle is not None:
            given = cotangent if weight == 1.0 else weight * cotangent
            before = self._beyond.get(id(evaluation.handle))
            self._beyond[id(evaluation.handle)] = given if before is None else before + given
        elif evaluation.sources:
            self._pending.append((evaluation, cotangent, weight))
            if len(self._pending) == _AT_ONCE:
                self.flush()

    def flush(self) -> None:
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
