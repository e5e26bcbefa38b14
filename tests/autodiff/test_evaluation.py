"""Evaluations with a graph of their own: where it begins, where it ends, and what it leads to."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq._impl.misc import _PerturbFunc

from torchdiffeq_lmm.autodiff.evaluation import Evaluation, Recorder
from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.hosts.torchdiffeq_host import unwrap

TIME = torch.tensor(0.3, dtype=torch.float64)
X = torch.tensor([0.5, -0.2], dtype=torch.float64)


def recorder(
    func: Callable[..., Any], parameters: Sequence[Tensor] | None = None, times: bool = False, are_all: bool = True
) -> Recorder:
    return Recorder(VectorField(unwrap(_PerturbFunc(func)), X, perturb=False), X, times, parameters, are_all)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients(evaluation: Evaluation, cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        evaluation.slope, (*evaluation.arguments, *evaluation.sources), cotangent, allow_unused=True, retain_graph=True
    )


@pytest.mark.parametrize("known", [False, True])
def test_the_graph_goes_from_the_slope_to_the_arguments_and_the_sources(known: bool) -> None:
    weight, cotangent = leaf(2.0, 3.0), torch.tensor([1.0, 10.0], dtype=torch.float64)
    each = recorder(lambda t, y: t * weight * y.square(), [weight] if known else None, times=True)
    slope, evaluation = each.record(TIME, X)
    torch.testing.assert_close(slope.detach(), 0.3 * weight.detach() * X.square())
    assert evaluation.sources == (weight,)
    assert evaluation.handle is None
    by_state, by_time, by_weight = gradients(evaluation, cotangent)
    torch.testing.assert_close(by_state, 0.6 * weight.detach() * X * cotangent)
    torch.testing.assert_close(by_time, (weight.detach() * X.square()) @ cotangent)
    torch.testing.assert_close(by_weight, 0.3 * X.square() * cotangent)


def test_the_time_is_an_argument_only_where_it_is_differentiated() -> None:
    for times in (False, True):
        _, evaluation = recorder(lambda t, y: t * y, times=times).record(TIME, X)
        assert len(evaluation.arguments) == 1 + times


@pytest.mark.parametrize("times", [False, True])
def test_evaluations_are_apart_from_one_another_and_from_what_came_before(times: bool) -> None:
    before = leaf(1.0, 1.0)
    each = recorder(torch.mul, times=times)
    first, _ = each.record(TIME.clone().requires_grad_() * 1, X * before)
    second, evaluation = each.record(TIME, first)
    assert evaluation.sources == ()
    assert evaluation.handle is None
    assert second.requires_grad
    assert torch.autograd.grad(second.sum(), before, allow_unused=True) == (None,)


def test_a_slope_that_depends_on_nothing_has_no_evaluation() -> None:
    slope, evaluation = recorder(lambda t, y: y.detach() * 2).record(TIME, X)
    assert evaluation is None
    torch.testing.assert_close(slope, 2 * X)


def test_evaluating_alone_makes_no_graph() -> None:
    weight, modes = leaf(2.0, 3.0), []

    def func(t: Tensor, y: Tensor) -> Tensor:
        modes.append((torch.is_grad_enabled(), y.requires_grad))
        return weight * y

    slope = recorder(func).evaluate(TIME, X.clone().requires_grad_())
    assert not slope.requires_grad
    assert modes == [(False, False)]
    torch.testing.assert_close(slope, weight.detach() * X)


def test_func_may_differentiate_with_respect_to_its_argument() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.requires_grad_()
            return torch.autograd.grad(torch.sin(y).sum(), y, create_graph=True)[0]

    each = recorder(func)
    torch.testing.assert_close(each.evaluate(TIME, X), torch.cos(X))
    slope, evaluation = each.record(TIME, X)
    torch.testing.assert_close(slope.detach(), torch.cos(X))
    torch.testing.assert_close(gradients(evaluation, torch.ones_like(X))[0], -torch.sin(X))


def test_the_graph_does_not_keep_the_state() -> None:
    given = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        given.append(weakref.ref(y))
        return y + 1

    _, evaluation = recorder(func).record(TIME, X.clone())
    assert given[0]() is None
    torch.testing.assert_close(gradients(evaluation, X)[0], X)


def test_sources_are_the_leaves_wherever_they_are() -> None:
    first, second, unused = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(0.0, 0.0)
    each = recorder(lambda t, y: torch.sin(first * y) + (second * first).sum())
    _, evaluation = each.record(TIME, X)
    assert {id(source) for source in evaluation.sources} == {id(first), id(second)}
    assert unused.grad is None


def test_what_was_made_before_is_reached_by_a_handle() -> None:
    weight = leaf(1.0, 2.0)
    theta = weight.exp()
    slope, evaluation = recorder(lambda t, y: theta * y).record(TIME, X)
    assert evaluation.handle.shape == slope.shape
    assert evaluation.handle.untyped_storage().nbytes() == slope.element_size()
    (grad,) = torch.autograd.grad(evaluation.handle, weight, torch.ones_like(X), retain_graph=True)
    torch.testing.assert_close(grad, weight.detach().exp() * X)


@pytest.mark.parametrize("listed", ["theta", "weight"])
def test_known_sources_may_be_leaves_or_not(listed: str) -> None:
    weight = leaf(1.0, 2.0)
    theta = weight.exp()
    chosen = theta if listed == "theta" else weight
    each = recorder(lambda t, y: theta * y, [chosen])
    for _ in range(2):
        _, evaluation = each.record(TIME, X)
        assert evaluation.handle is None
        assert evaluation.sources == (chosen,)
        wanted = X if listed == "theta" else X * theta.detach()
        torch.testing.assert_close(gradients(evaluation, torch.ones_like(X))[1], wanted)


def test_one_of_many_outputs_may_be_known() -> None:
    first, second = leaf(1.0, 2.0).exp().unbind()
    each = recorder(lambda t, y: y * first, [first])
    _, evaluation = each.record(TIME, X)
    assert evaluation.sources == (first,)
    with pytest.raises(ValueError, match="adjoint_params must be given"):
        recorder(lambda t, y: y * second, [first]).record(TIME, X)


@pytest.mark.parametrize("known", [0, 1, 40])
def test_what_is_not_known_is_an_error_or_left_out(known: int) -> None:
    weight, other = leaf(1.0, 2.0), leaf(3.0, 4.0)
    parameters = [weight, *(leaf(0.0) for _ in range(known - 1))] if known else []

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * other * (weight if known else 1.0)

    with pytest.raises(ValueError, match=r"adjoint_params must be given where func depends on more than"):
        recorder(func, parameters).record(TIME, X)
    _, evaluation = recorder(func, parameters, are_all=False).record(TIME, X)
    assert id(other) not in map(id, evaluation.sources)
    assert evaluation.handle is None


def test_of_many_known_sources_only_those_that_matter_are_named() -> None:
    weights = [leaf(float(i), 1.0) for i in range(50)]
    each = recorder(lambda t, y: y * weights[int(10 * t.detach())], weights)
    for step in (0, 1, 4):
        _, evaluation = each.record(torch.tensor(step / 10 + 0.05, dtype=torch.float64), X)
        assert len(evaluation.sources) == 1
        assert evaluation.sources[0] is weights[step]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_tangents_are_refused() -> None:
    with torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(torch.ones(2).double(), torch.ones(2).double())
        with pytest.raises(RuntimeError, match="does not support forward-mode"):
            recorder(lambda t, y: weight * y).record(TIME, X)
