"""What a filtered solve keeps, and that all of it is freed."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from filtered import DIM, NODES, OBSERVED, Tanh, draw, loss, solve
from methods import slow_but
from torch import Tensor

from torchdiffeq_lmm import LeapfrogFilter

pytestmark = pytest.mark.usefixtures("_quick_collections")


class Marked(torch.autograd.Function):
    """The identity; tells of the life of the graph that it is in."""

    class Mark:
        pass

    @staticmethod
    def forward(ctx: object, y: Tensor, alive: list[weakref.ref]) -> Tensor:
        ctx.mark = Marked.Mark()
        alive.append(weakref.ref(ctx.mark))
        return y.clone()

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


@pytest.mark.parametrize("step_size", slow_but([4e-4], [4e-4, 2e-4]))
def test_many_steps(step_size: float) -> None:
    """Beyond Python's limit of recursion, in the forward pass, the backward pass and the end of the graph."""
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones((), dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    states = solve(
        lambda t, y: -rate * y, y0, t, LeapfrogFilter("trapezoid"), step_size=step_size, grid_constructor=None
    )
    states[-1].backward()
    # y(1) = exp(-rate)
    torch.testing.assert_close(rate.grad, -torch.exp(-rate.detach()), rtol=1e-7, atol=0)


class TestMemory:
    @staticmethod
    def bytes_saved(func: Callable, y0: Tensor, grad_filter: object) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solve(func, y0, NODES, grad_filter)
        return total

    def test_saves_no_more_than_autograd_and_the_states(self) -> None:
        func, y0 = Tanh(), draw(50, DIM).requires_grad_()
        states = len(NODES) * y0.numel() * y0.element_size()
        plain = self.bytes_saved(func, y0, None)
        assert plain > states
        assert self.bytes_saved(func, y0, "leapfrog") <= plain + states

    def test_the_tape_holds_no_states_and_no_slopes(self) -> None:
        """What f itself does not save is gone as soon as the solver is through with it."""
        theta = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
        alive: list[weakref.ref] = []
        most = 0

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal most
            slope = y + theta
            alive.extend((weakref.ref(y), weakref.ref(slope)))
            most = max(most, sum(reference() is not None for reference in alive))
            return slope

        states = solve(func, draw(DIM), step_size=0.01, grid_constructor=None)
        assert len(alive) == 200
        assert most <= 4
        loss(states).backward()
        assert theta.grad.isfinite().all()

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("times_require_grad", [False, True])
    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_nothing_survives_the_last_reference(self, backward: bool, times_require_grad: bool, interp: str) -> None:
        alive: list[weakref.ref] = []

        class SolvesItself(Tanh):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                slope = Marked.apply(super().forward(t, y), alive)
                alive.extend((weakref.ref(y), weakref.ref(slope)))
                return slope

            def solve(self, y0: Tensor, t: Tensor) -> Tensor:
                self.states = solve(self, y0, t, interp=interp)
                return self.states

        gc.collect()
        gc.disable()
        try:
            func = SolvesItself()
            y0 = draw(2, DIM).requires_grad_()
            t = OBSERVED.clone().requires_grad_(times_require_grad)
            states = func.solve(y0, t)
            alive.append(weakref.ref(states))
            if backward:
                loss(states).backward()
            del states
            assert any(reference() is not None for reference in alive)
            del func.states
            assert not [reference() for reference in alive if reference() is not None]
            gone = weakref.ref(func)
            del func
            assert gone() is None
        finally:
            gc.enable()

    def test_backward_frees_the_states_while_the_solution_lives(self) -> None:
        seen: list[weakref.ref] = []

        class Watched(Tanh):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                seen.append(weakref.ref(y))
                return super().forward(t, y)

        states = solve(Watched(), draw(2, DIM))
        loss(states).backward()
        assert not [reference() for reference in seen if reference() is not None]
        assert states.grad_fn is not None
