"""Transposed Jacobians and gradients of parameters, against dense matrices."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchdiffeq_lmm.autodiff.evaluation import Evaluation
from torchdiffeq_lmm.autodiff.recorded_jacobians import RecordedJacobians
from torchdiffeq_lmm.autodiff.stored_evaluations import Kept
from torchdiffeq_lmm.autodiff.vjp import ParameterGradients, hooks_suspended
from torchdiffeq_lmm.forward.newton_options import Newton
from torchdiffeq_lmm.forward.samples import Samples, Systems

DIM = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluation(
    func: Callable[[Tensor, Tensor], Tensor],
    sources: Sequence[Tensor] = (),
    seed: int = 0,
    handle: Tensor | None = None,
) -> Evaluation:
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, time = draw(DIM, seed=seed) + zero, 0.5 + zero
    edges = (get_gradient_edge(x), get_gradient_edge(time))
    return Evaluation(get_gradient_edge(func(time, x)), edges, tuple(sources), handle)


def kept(*evaluations: Evaluation | None) -> Kept:
    return Kept(dict(enumerate(evaluations)), {}, {}, list(range(len(evaluations))))


ONE = Systems(Samples((torch.Size([3]),), 0), Newton())
"""No samples."""


def linearisation(
    *evaluations: Evaluation | None, collects: bool = True, times: Tensor | None = None
) -> tuple[RecordedJacobians, ParameterGradients]:
    parameters = ParameterGradients()
    return RecordedJacobians(
        kept(*evaluations), parameters, collects, times, torch.finfo(torch.float64).eps, ONE
    ), parameters


WEIGHT = draw(DIM, DIM, seed=7)


def func(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.tanh(weight @ y) * t


def jacobian(seed: int = 0) -> Tensor:
    x = draw(DIM, seed=seed)
    return 0.5 * (1 - torch.tanh(WEIGHT @ x).square())[:, None] * WEIGHT


class TestRecordedJacobians:
    def test_a_product_is_with_the_transposed_jacobian(self) -> None:
        maps, _ = linearisation(evaluation(func(WEIGHT)), None)
        vector = draw(DIM, seed=1)
        torch.testing.assert_close(maps.product(0, vector), jacobian().T @ vector)
        assert maps.product(1, vector) is None

    @pytest.mark.parametrize("step", [0.0, 0.3])
    @pytest.mark.parametrize(("has_value", "has_slope"), [(True, True), (True, False), (False, True), (False, False)])
    def test_an_expansion(self, step: float, has_value: bool, has_slope: bool) -> None:
        maps, _ = linearisation(evaluation(func(WEIGHT)), None)
        value = draw(DIM, seed=2) if has_value else None
        slope = draw(DIM, seed=3) if has_slope else None
        got = maps.expand(0, value, slope, step)
        v = value if has_value else torch.zeros(DIM, dtype=torch.float64)
        s = slope if has_slope else torch.zeros(DIM, dtype=torch.float64)
        damped = torch.linalg.inv(torch.eye(DIM, dtype=torch.float64) - step * jacobian().T)
        wanted = damped @ (v + damped @ jacobian().T @ (s - step * v))
        if not (has_value or has_slope):
            assert got is None
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert maps.expand(1, value, slope, step) is value

    @pytest.mark.parametrize("collects", [False, True])
    def test_pulling_back_collects_what_the_parameters_and_the_time_get(self, collects: bool) -> None:
        weight = WEIGHT.clone().requires_grad_()
        times = torch.zeros(2, dtype=torch.float64)
        maps, parameters = linearisation(None, evaluation(func(weight), [weight]), collects=collects, times=times)
        first, second = draw(DIM, seed=1), draw(DIM, seed=2)
        assert maps.vjp(1, []) == []
        assert maps.vjp(0, [(1.0, first)]) == []
        total = torch.zeros(DIM, dtype=torch.float64)
        for cotangent in ([(2.0, first)], [(1.0, first), (-0.5, second)]):
            ((factor, pulled),) = maps.vjp(1, cotangent)
            summed = sum(w * c for w, c in cotangent)
            torch.testing.assert_close(factor * pulled, jacobian().T @ summed)
            total += summed
        x = draw(DIM)
        activated = torch.tanh(WEIGHT @ x)
        torch.testing.assert_close(times[1], activated @ total)
        assert float(times[0]) == 0
        if collects:
            wanted = torch.outer(0.5 * (1 - activated.square()) * total, x)
            torch.testing.assert_close(parameters.of(weight), wanted)
        else:
            assert parameters.of(weight) is None

    def test_what_the_loss_sees_of_a_slope_is_for_the_parameters_in_any_case(self) -> None:
        weight = WEIGHT.clone().requires_grad_()
        each = evaluation(func(weight), [weight])
        maps, parameters = linearisation(each, collects=False)
        maps.vjp_seen(each, 0, draw(DIM, seed=1))
        assert parameters.of(weight) is not None

    @pytest.mark.parametrize("collects", [False, True])
    def test_an_implicit_cotangent_solves_its_equation(self, collects: bool) -> None:
        weight = WEIGHT.clone().requires_grad_()
        maps, parameters = linearisation(evaluation(func(weight), [weight]), None, collects=collects)
        rhs = draw(DIM, seed=4)
        solution = maps.solve(0, 0.4, rhs)
        torch.testing.assert_close(solution - 0.4 * jacobian().T @ solution, rhs, rtol=1e-10, atol=1e-12)
        assert torch.equal(maps.solve(1, 0.4, rhs), rhs)
        assert (parameters.of(weight) is not None) == collects


class TestParameterGradients:
    @pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
    def test_they_are_sums_with_weights_however_many(self, count: int) -> None:
        weight, other = WEIGHT.clone().requires_grad_(), draw(DIM, seed=8).requires_grad_()
        parameters = ParameterGradients()
        wanted = torch.zeros_like(WEIGHT), torch.zeros(DIM, dtype=torch.float64)
        for i in range(count):
            uses_other = i % 3 == 0
            sources = [weight, other] if uses_other else [weight]
            each = evaluation(lambda t, y, both=uses_other: weight @ y + (other if both else 0.0), sources, seed=i)
            cotangent, factor = draw(DIM, seed=100 + i), 1.0 if i % 2 else 0.3
            parameters.collect(each, cotangent, factor)
            wanted[0].add_(torch.outer(factor * cotangent, draw(DIM, seed=i)))
            wanted[1].add_(factor * cotangent if uses_other else 0.0)
        parameters.flush()
        parameters.flush()
        torch.testing.assert_close(parameters.of(weight), wanted[0])
        torch.testing.assert_close(parameters.of(other), wanted[1])
        assert parameters.of(WEIGHT) is None

    def test_no_cotangent_is_changed(self) -> None:
        weight, cotangent = draw(DIM, seed=8).requires_grad_(), draw(DIM, seed=1)
        before = cotangent.clone()
        parameters = ParameterGradients()
        for _ in range(40):
            parameters.collect(evaluation(lambda t, y: y + weight, [weight]), cotangent)
        parameters.flush()
        assert torch.equal(cotangent, before)
        torch.testing.assert_close(parameters.of(weight), 40 * before)

    def test_a_gradient_that_others_see_is_not_added_to(self) -> None:
        source, grad = draw(DIM).requires_grad_(), draw(DIM, seed=1)
        before = grad.clone()
        parameters = ParameterGradients()
        parameters.add([source], [grad], 1.0)
        parameters.add([source], [None], 1.0)
        parameters.add([source], [grad], 2.0)
        parameters.add([source], [grad], 1.0)
        assert torch.equal(grad, before)
        torch.testing.assert_close(parameters.of(source), 4 * before)

    @pytest.mark.filterwarnings("ignore:Sparse invariant checks")
    def test_sparse_gradients_add_up(self) -> None:
        source = draw(4, DIM).requires_grad_()
        indices, values = torch.tensor([[1]]), draw(1, DIM, seed=1)
        grad = torch.sparse_coo_tensor(indices, values, (4, DIM), check_invariants=False)
        for order in ([grad, grad, grad], [grad, grad.to_dense(), grad], [grad.to_dense(), grad, grad]):
            parameters = ParameterGradients()
            for factor, each in zip((1.0, 2.0, 1.0), order, strict=True):
                parameters.add([source], [each], factor)
            torch.testing.assert_close(parameters.of(source).to_dense(), 4 * grad.to_dense())

    def test_a_handle_gets_the_cotangent_itself(self) -> None:
        handle, cotangent = torch.zeros(DIM, dtype=torch.float64), draw(DIM, seed=1)
        parameters = ParameterGradients()
        each = evaluation(lambda t, y: y, handle=handle)
        assert parameters.of_handle(handle) is None
        parameters.collect(each, cotangent)
        parameters.collect(each, cotangent, 0.5)
        torch.testing.assert_close(parameters.of_handle(handle), 1.5 * cotangent)


def test_hooks_are_suspended_and_come_back() -> None:
    first, second, none = (torch.ones(2, requires_grad=True) for _ in range(3))
    seen: list[str] = []
    handles = [first.register_hook(lambda grad: seen.append("first")), second.register_hook(lambda grad: 2 * grad)]
    with contextlib.suppress(ZeroDivisionError), hooks_suspended([first, second, none]):
        (grad,) = torch.autograd.grad((first * second).sum(), second)
        torch.testing.assert_close(grad, torch.ones(2))
        assert seen == []
        raise ZeroDivisionError
    (first * second).sum().backward()
    assert seen == ["first"]
    torch.testing.assert_close(second.grad, 2 * torch.ones(2))
    for handle in handles:
        handle.remove()
    (first * second).sum().backward()
    assert seen == ["first"]
    torch.testing.assert_close(second.grad, 3 * torch.ones(2))
