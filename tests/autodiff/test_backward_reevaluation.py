"""func in the backward pass: another one is an error; dropout, autocast and buffers are what they were."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from backward import AGAIN, DIM, EXPLICIT, OBSERVED, STEPS, Plain, assert_same, draw, loss, solve
from methods import slow_but
from torch import Tensor, nn

from torchdiffeq_lmm import Checkpoint, Reversible

# ----------------------------------------------------------------------------- func is another in the backward pass


ELSEWHERE = r"func gave other values|ran the solution back"
FEW_AND_MANY = [1, 2, 3, 9, 40]


@pytest.mark.parametrize("steps", FEW_AND_MANY)
@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(1), Reversible(anchors=0)])
class TestAnotherFunc:
    def test_a_parameter_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward, steps=steps)
        with torch.no_grad():
            func.layer.bias.add_(1)
        with pytest.raises(RuntimeError, match="must not be modified in place before the backward pass"):
            loss(states).backward()

    def test_an_initial_state_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        y0 = draw(2, DIM)
        states = solve(Plain(), y0, backward, steps=steps)
        y0.add_(1)
        with pytest.raises(RuntimeError, match="must not be modified in place before the backward pass"):
            loss(states).backward()

    def test_other_data_of_a_parameter_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward, steps=steps)
        func.layer.weight.data = func.layer.weight.data * 2
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_randomness_from_elsewhere_is_an_error(self, backward: object, steps: int) -> None:
        rng, weight = np.random.default_rng(0), draw(DIM, DIM).requires_grad_()
        states = solve(
            lambda t, y: torch.tanh(y @ weight) * rng.normal(), draw(2, DIM), backward, steps=steps, params=[weight]
        )
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_a_mode_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        func = nn.BatchNorm1d(DIM, dtype=torch.float64)
        hosted = nn.Module()
        hosted.norm = func
        hosted.forward = lambda t, y: torch.tanh(func(y))
        states = solve(hosted, draw(4, DIM), backward, steps=steps)
        hosted.eval()
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_other_tensors_of_the_same_values_are_an_error(self, backward: object, steps: int) -> None:
        func = Plain()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.func = func

            def forward(self, y0: Tensor) -> Tensor:
                return solve(self.func, y0, backward, steps=steps)

        model = Model()
        copies = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
        states = torch.func.functional_call(model, copies, (draw(2, DIM),))
        with pytest.raises(ValueError, match="func uses another tensor"):
            loss(states).backward()

    def test_a_parameter_that_was_frozen_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM).requires_grad_(), backward, steps=steps)
        func.requires_grad_(False)
        with pytest.raises(RuntimeError):
            loss(states).backward()


# ------------------------------------------------------------------------------------------ dropout, autocast, modules


class Dropping(Plain):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.4, training=True)


@pytest.mark.parametrize("grad_filter", slow_but(["auto"], [None, "auto"]))
@pytest.mark.parametrize(
    ("method", "interp"),
    slow_but(
        [("abm3", "cubic")],
        [("leapfrog", "linear"), *((method, "cubic") for method in EXPLICIT)],
    ),
)
def test_dropout_drops_the_same_again(method: str, grad_filter: str | None, interp: str) -> None:
    def gradients(backward: object, steps: int) -> list[Tensor]:
        func, y0 = Dropping(), draw(4, DIM).requires_grad_()
        t = torch.tensor(OBSERVED, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        states = solve(func, y0, backward, t, steps, method=method, grad_filter=grad_filter, interp=interp)
        torch.rand(5)
        before = torch.get_rng_state()
        grads = torch.autograd.grad(loss(states), [y0, t, *func.parameters()])
        assert torch.equal(torch.get_rng_state(), before)
        return [states.detach(), *grads]

    for steps in (1, 2, STEPS):
        wanted = gradients("autograd", steps)
        for backward in ("checkpoint", Checkpoint(1), Checkpoint(5)):
            assert_same(gradients(backward, steps), wanted)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_dropout_does_not_run_backwards(steps: int) -> None:
    with pytest.raises(RuntimeError, match="needs a deterministic func, got one that draws random numbers"):
        solve(Dropping(), draw(2, DIM), "reversible", steps=steps)
    solve(Dropping().eval(), draw(2, DIM), "checkpoint", steps=steps)


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(1)])
def test_a_func_that_seeds_a_fork_is_deterministic(backward: object) -> None:
    weight = draw(DIM, DIM).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return torch.tanh(y @ weight) * torch.rand(DIM)

    grads = [
        torch.autograd.grad(loss(solve(func, draw(2, DIM), way, params=[weight])), weight)
        for way in ("autograd", backward)
    ]
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("outside", [None, torch.float16])
@pytest.mark.parametrize("backward", ["checkpoint", Checkpoint(1), Reversible(tolerance=1e-3)])
def test_autocast_is_the_same_again(backward: object, outside: torch.dtype | None) -> None:
    grads, kinds = [], []
    for way in ("autograd", backward):
        func, y0 = Plain(torch.float32), draw(2, DIM).float().requires_grad_()
        func.layer.register_forward_hook(lambda module, args, made: kinds.append(made.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = solve(func, y0, way)
        with torch.autocast("cpu", dtype=outside or torch.bfloat16, enabled=outside is not None):
            loss(states).backward()
        grads.append([states.detach(), y0.grad, *(parameter.grad for parameter in func.parameters())])
    assert set(kinds) == {torch.bfloat16}
    assert torch.equal(grads[0][0], grads[1][0])
    scale = max(float(grad.abs().max()) for grad in grads[0])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        assert float((got - wanted).abs().max()) < 0.02 * scale


def test_buffers_are_updated_by_every_evaluation() -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(DIM, dtype=torch.float64)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.norm(super().forward(t, y))

    grads = []
    for backward in ("autograd", "checkpoint", "reversible"):
        func = Normed()
        loss(solve(func, draw(4, DIM), backward)).backward()
        grads.append([parameter.grad for parameter in func.parameters()])
        assert int(func.norm.num_batches_tracked) == STEPS * (1 if backward == "autograd" else 2)
    assert_same(grads[1], grads[0])
    assert_same(grads[2], grads[0])


def test_parameters_of_another_dtype() -> None:
    grads: list[Iterator[Tensor] | tuple[Tensor, ...]] = []
    for backward in ("autograd", "checkpoint", "reversible"):
        weight = draw(DIM, DIM).float().requires_grad_()
        states = solve(lambda t, y, w=weight: torch.tanh(y @ w.double()), draw(2, DIM), backward, params=[weight])
        grads.append(torch.autograd.grad(loss(states), weight))
        assert grads[-1][0].dtype is torch.float32
    for grad in grads[1:]:
        assert_same(grad, grads[0], 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", ["checkpoint", Checkpoint(1)])
def test_dropout_on_a_gpu_drops_the_same_again(backward: object) -> None:
    grads = []
    for way in ("autograd", backward):
        func, y0 = Dropping().cuda(), draw(4, DIM).cuda().requires_grad_()
        torch.manual_seed(3)
        states = solve(func, y0, way)
        torch.rand(5, device="cuda")
        before = torch.cuda.get_rng_state()
        grads.append(torch.autograd.grad(loss(states.cpu()), [y0, *func.parameters()]))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert_same(grads[1], grads[0])
