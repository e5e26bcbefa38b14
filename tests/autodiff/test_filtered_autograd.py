"""A filtered solve is a good citizen of autograd: hooks, accumulation, chosen inputs, several processes."""

import os
from collections.abc import Callable

import pytest
import torch
from filtered import DIM, NODES, OBSERVED, DataParallelModel, Tanh, draw, index_of, loss, solve, train_in_process
from torch import Tensor, nn


class TestGoodCitizen:
    def test_hooks_see_the_whole_gradient_once(self) -> None:
        func = Tanh()
        seen: dict[str, list[Tensor]] = {"before": [], "after": []}
        func.inner.weight.register_hook(lambda grad: seen["before"].append(grad.clone()))
        func.inner.weight.register_post_accumulate_grad_hook(lambda p: seen["after"].append(p.grad.clone()))
        loss(solve(func, draw(2, DIM))).backward()
        assert [len(calls) for calls in seen.values()] == [1, 1]
        assert torch.equal(seen["before"][0], func.inner.weight.grad)
        assert torch.equal(seen["after"][0], func.inner.weight.grad)

    def test_gradients_accumulate(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        loss(solve(func, y0)).backward()
        once = func.outer.weight.grad.clone()
        loss(solve(func, y0)).backward()
        torch.testing.assert_close(func.outer.weight.grad, 2 * once)

    def test_frozen_and_unused_parameters_get_none(self) -> None:
        func = Tanh()
        func.inner.requires_grad_(False)
        loss(solve(func, draw(2, DIM))).backward()
        assert func.inner.weight.grad is None
        assert func.unused.grad is None
        free = Tanh()
        loss(solve(free, draw(2, DIM))).backward()
        assert torch.equal(func.outer.weight.grad, free.outer.weight.grad)

    @pytest.mark.parametrize("grad_filter", [None, "leapfrog"])
    def test_requires_a_gradient_only_where_something_does(self, grad_filter: object) -> None:
        func = Tanh().requires_grad_(False)
        assert not solve(func, draw(2, DIM), grad_filter=grad_filter).requires_grad
        assert solve(func, draw(2, DIM).requires_grad_(), grad_filter=grad_filter).requires_grad
        assert solve(func, draw(2, DIM), OBSERVED.clone().requires_grad_(), grad_filter=grad_filter).requires_grad
        func.outer.bias.requires_grad_()
        assert solve(func, draw(2, DIM), grad_filter=grad_filter).requires_grad

    def test_only_late_steps_have_parameters(self) -> None:
        theta = draw(DIM).requires_grad_()
        states = solve(lambda t, y: -y + theta if t > 0.45 else -y, draw(DIM))
        theta_everywhere = draw(len(NODES), DIM)
        theta_everywhere[:] = torch.where(NODES > 0.45, 1.0, 0.0)[:, None] * theta.detach()
        theta_everywhere.requires_grad_()
        everywhere = solve(lambda t, y: -y + theta_everywhere[index_of(t)], draw(DIM))
        (gradient,) = torch.autograd.grad(loss(states), theta)
        (gradients,) = torch.autograd.grad(loss(everywhere), theta_everywhere)
        torch.testing.assert_close(gradient, gradients[NODES > 0.45].sum(0))

    def test_autograd_grad_of_chosen_inputs(self) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        states = solve(func, y0)
        everything = torch.autograd.grad(loss(states), (y0, func.inner.weight), retain_graph=True)
        for chosen, wanted in zip((y0, func.inner.weight), everything, strict=True):
            assert torch.equal(torch.autograd.grad(loss(states), chosen, retain_graph=True)[0], wanted)
        assert func.inner.weight.grad is None
        loss(states).backward(inputs=[func.inner.weight])
        assert torch.equal(func.inner.weight.grad, everything[1])
        assert func.outer.weight.grad is None

    def test_backward_again_needs_retain_graph(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        states = solve(func, y0)
        loss(states).backward(retain_graph=True)
        once = func.outer.weight.grad.clone()
        loss(states).backward()
        torch.testing.assert_close(func.outer.weight.grad, 2 * once)
        with pytest.raises(RuntimeError, match="second time"):
            loss(states).backward()

    def test_no_grad_and_inference_mode(self) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        wanted = solve(func, y0).detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                states = solve(func, y0, OBSERVED.clone().requires_grad_())
            assert not states.requires_grad
            torch.testing.assert_close(states.clone(), wanted)

    @pytest.mark.parametrize("wrt", ["y0", "parameters"])
    def test_second_derivatives_are_refused(self, wrt: str) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        inputs = y0 if wrt == "y0" else func.inner.weight
        with pytest.raises(RuntimeError, match="grad_filter does not support create_graph=True"):
            torch.autograd.grad(loss(solve(func, y0)), inputs, create_graph=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_transforms_are_refused(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        with pytest.raises(RuntimeError):
            torch.func.grad(lambda y: loss(solve(func, y)))(y0)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(lambda y: solve(func, y), (y0,), (y0,))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    @pytest.mark.parametrize("dual", ["y0", "parameter", "t"])
    def test_forward_mode_is_refused(self, dual: str) -> None:
        values = {"y0": draw(DIM), "parameter": draw(DIM), "t": OBSERVED.clone()}
        with torch.autograd.forward_ad.dual_level():
            values[dual] = torch.autograd.forward_ad.make_dual(values[dual], torch.ones_like(values[dual]))
            with pytest.raises(RuntimeError, match="grad_filter does not support forward-mode"):
                solve(lambda t, y: y * values["parameter"] * t, values["y0"], values["t"])

    def test_gradcheck_for_y0_and_t(self) -> None:
        func = Tanh()
        inputs = (draw(DIM).requires_grad_(), OBSERVED.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda y0, t: solve(func, y0, t, step_size=0.13, grid_constructor=None), inputs)

    def test_autocast(self) -> None:
        net = nn.Linear(DIM, DIM)
        gradients = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                states = solve(lambda t, y: net(y), draw(2, DIM).float(), OBSERVED.float())
            assert states.dtype is torch.float32
            gradients += torch.autograd.grad(states.sum(), net.weight)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=0.1)

    def test_parameters_of_another_dtype(self) -> None:
        weight = draw(DIM, DIM).float().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ weight.double()), draw(DIM))).backward()
        assert weight.grad.dtype is torch.float32
        wide = weight.detach().double().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ wide), draw(DIM))).backward()
        torch.testing.assert_close(weight.grad, wide.grad.float())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_parameters_on_another_device(self) -> None:
        weight = draw(DIM, DIM).requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ weight.cuda()), draw(DIM).cuda(), OBSERVED.cuda())).backward()
        here = weight.detach().clone().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ here), draw(DIM))).backward()
        torch.testing.assert_close(weight.grad, here.grad)

    @pytest.mark.parametrize(
        "func",
        [lambda t, y: y, lambda t, y: y.view_as(y), lambda t, y: torch.ones_like(y), lambda t, y: y.detach() * 2],
        ids=["identity", "view", "constant", "detached"],
    )
    def test_functions_without_parameters(self, func: Callable) -> None:
        gradients = []
        for grad_filter in (None, "leapfrog"):
            y0 = draw(2, DIM).requires_grad_()
            gradients += torch.autograd.grad(loss(solve(func, y0, grad_filter=grad_filter)), y0)
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
    def test_dtypes_and_shapes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        gradients = []
        for each in (dtype, wide):
            theta = torch.ones(shape, dtype=each).mul(0.5).requires_grad_()
            y0 = (draw(*shape).to(wide) * (1 + 0.3j if wide.is_complex else 1)).to(each)
            states = solve(lambda t, y: theta * torch.sin(y), y0)
            assert (states.shape, states.dtype) == ((len(OBSERVED), *shape), each)
            # The cotangent is the same number in every dtype.
            states.backward(torch.ones_like(states))
            gradients.append(theta.grad)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradients[0].to(wide), gradients[1], rtol=30 * eps, atol=30 * eps)

    def test_nan_is_not_hidden(self) -> None:
        theta = torch.zeros(len(NODES), dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            n = index_of(t)
            return -y + theta[n] * (torch.inf if n == 4 else 1.0)

        states = solve(func, draw(DIM))
        assert states[:2].isfinite().all()
        assert states[2:].isnan().all()
        loss(states).backward()
        assert not theta.grad[4].isfinite()

    def test_a_callback_sees_every_state(self) -> None:
        class WithCallback(Tanh):
            def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
                seen.append((float(t0), y0.clone(), float(dt), y0.requires_grad))

        seen: list[tuple] = []
        solve(WithCallback(), draw(2, DIM), grad_filter=None)
        plain, seen = seen, []
        solve(WithCallback(), draw(2, DIM))
        assert len(plain) == len(seen) == len(NODES) - 1
        for a, b in zip(plain, seen, strict=True):
            assert a[0] == b[0]
            assert a[2] == b[2]
            assert torch.equal(a[1], b[1])
            assert not b[3]


@pytest.mark.slow
def test_data_parallel_training_gives_the_gradient_of_one_process(tmp_path: os.PathLike) -> None:
    batch = draw(8, DIM)
    arguments = (str(tmp_path / "rendezvous"), batch, str(tmp_path / "gradients"))
    # One of the two processes is this one: another takes seconds to start.
    other = torch.multiprocessing.get_context("spawn").Process(target=train_in_process, args=(1, *arguments))
    other.start()
    train_in_process(0, *arguments)
    other.join()
    assert other.exitcode == 0
    alone = DataParallelModel()
    alone(batch).square().mean().backward()
    for rank in range(2):
        gradients = torch.load(f"{tmp_path / 'gradients'}.{rank}", weights_only=True)
        for gradient, parameter in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
