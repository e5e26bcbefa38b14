"""A solve with a backward mode among autograd's nodes: hooks, accumulation, and graphs that are kept or freed."""

import gc
import weakref

import pytest
import torch
import torchdiffeq
from backward import AGAIN, DIM, STEPS, Net, Plain, assert_same, draw, loss, solve

pytestmark = pytest.mark.usefixtures("_quick_collections")


@pytest.mark.parametrize("backward", AGAIN)
class TestGoodCitizen:
    def test_hooks_see_the_whole_gradient_once(self, backward: str) -> None:
        func, seen = Plain(), []
        func.layer.weight.register_hook(lambda grad: seen.append(grad.clone()))
        func.layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss(solve(func, draw(2, DIM), backward)).backward()
        assert len(seen) == 2
        assert torch.equal(seen[0], func.layer.weight.grad)
        assert torch.equal(seen[1], func.layer.weight.grad)

    def test_hooks_and_retained_gradients_of_tensors_that_are_no_leaves(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            weight, seen = draw(DIM, DIM).requires_grad_(), []
            theta = 2 * weight
            theta.retain_grad()
            theta.register_hook(seen.append)
            loss(solve(lambda t, y, theta=theta: torch.tanh(y @ theta), draw(2, DIM), way, params=[theta])).backward()
            assert len(seen) == 1
            grads.append([weight.grad, theta.grad, seen[0]])
        assert_same(grads[1], grads[0])

    def test_backward_again_needs_retain_graph(self, backward: str) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward)
        loss(states).backward(retain_graph=True)
        once = func.layer.weight.grad.clone()
        states[-1].sum().backward(retain_graph=True)
        other = func.layer.weight.grad - once
        loss(states).backward()
        torch.testing.assert_close(func.layer.weight.grad, 2 * once + other)
        with pytest.raises(RuntimeError, match="second time"):
            loss(states).backward()

    def test_solves_follow_one_another_and_stand_side_by_side(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            func, other, y0 = Plain(), Net(), draw(2, DIM).requires_grad_()
            middle = solve(func, y0, way)[-1]
            ends = [solve(func, middle, way)[-1] for _ in range(2)]
            total = loss(ends[0]) + loss(ends[1] * solve(other, middle, way)[-1])
            grads.append(torch.autograd.grad(total, [y0, *func.parameters(), other.outer.weight]))
        assert_same(grads[1], grads[0])

    def test_gradients_are_for_the_inputs_asked_for(self, backward: str) -> None:
        func, y0 = Plain(), draw(2, DIM).requires_grad_()
        states = solve(func, y0, backward)
        loss(states).backward(inputs=[func.layer.bias], retain_graph=True)
        assert func.layer.weight.grad is None
        (grad,) = torch.autograd.grad(loss(states), func.layer.bias)
        assert torch.equal(grad, func.layer.bias.grad)

    def test_nothing_requires_a_gradient(self, backward: str) -> None:
        func = Plain().requires_grad_(False)
        assert not solve(func, draw(2, DIM), backward).requires_grad
        assert solve(func, draw(2, DIM).requires_grad_(), backward).requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not solve(Plain(), draw(2, DIM).requires_grad_(), backward).requires_grad

    def test_torchdiffeqs_odeint_has_the_option(self, backward: str) -> None:
        t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        func, y0 = Plain(), draw(2, DIM)
        parameters = list(func.parameters())
        got = torchdiffeq.odeint(
            lambda t, y: func(t, y),
            y0,
            t,
            method="leapfrog",
            options={"backward": backward, "adjoint_params": func.parameters()},
        )
        wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", t)), parameters)
        assert_same(torch.autograd.grad(loss(got), parameters), wanted)

    def test_all_memory_is_freed_without_a_collector(self, backward: str) -> None:
        gc.collect()
        gc.disable()
        try:
            func = Plain()
            alive = weakref.ref(func)
            states = solve(func, draw(2, DIM), backward)
            loss(states).backward()
            del states, func
            assert alive() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("end", ["nothing", "retained", "raised"])
    def test_all_memory_is_freed_whatever_becomes_of_the_solution(self, backward: str, end: str) -> None:
        gc.collect()
        gc.disable()
        try:
            func, y0 = Plain(), draw(2, DIM)
            alive = weakref.ref(func)
            states = solve(func, y0, backward)
            if end == "retained":
                loss(states).backward(retain_graph=True)
            elif end == "raised":
                y0.zero_()
                with pytest.raises(RuntimeError, match="must not be modified in place"):
                    loss(states).backward()
            del states, func, y0
            assert alive() is None
        finally:
            gc.enable()

    def test_a_checkpoint_around_it(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            func, y0 = Plain(), draw(2, DIM).requires_grad_()
            states = torch.utils.checkpoint.checkpoint(
                lambda y, func=func, way=way: solve(func, y, way), y0, use_reentrant=False
            )
            grads.append(torch.autograd.grad(loss(states), [y0, *func.parameters()]))
        assert_same(grads[1], grads[0])

    def test_the_solution_may_change_afterwards(self, backward: str) -> None:
        grads = []
        for change in (False, True):
            func = Plain()
            states = solve(func, draw(2, DIM), backward)
            if change:
                states.detach().zero_()
            grads.append(torch.autograd.grad(loss(states), list(func.parameters())))
        assert_same(grads[1], grads[0])
