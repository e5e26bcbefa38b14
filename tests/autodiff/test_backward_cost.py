"""What a backward mode costs: evaluations, memory, and many steps."""

import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from backward import AGAIN, DIM, EXPLICIT, draw, loss, solve
from methods import slow_but
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, CostateFilter, Reversible


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(DIM, DIM))
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(y @ self.weight)


@pytest.mark.parametrize("grad_filter", slow_but(["auto"], [None, "auto"]))
@pytest.mark.parametrize(
    ("method", "backward"),
    [
        *itertools.product(EXPLICIT, ["checkpoint", Checkpoint(1), Checkpoint(40)]),
        ("leapfrog", "reversible"),
        ("leapfrog", Reversible(anchors=0)),
    ],
)
@pytest.mark.one_in(4)
def test_at_most_one_extra_forward_pass(method: str, backward: object, grad_filter: str | None) -> None:
    steps = 100
    func = Counting()
    states = solve(func, draw(2, DIM), backward, steps=steps, method=method, grad_filter=grad_filter)
    forward = func.calls
    per_step = torchdiffeq_lmm.method_info(method).evaluations
    assert per_step * steps <= forward <= per_step * steps + 12
    loss(states).backward()
    assert per_step * (steps - 1) <= func.calls - forward <= forward


@pytest.mark.parametrize("method", slow_but(["bdf2"], ["bdf2", "am3"]))
def test_implicit_steps_are_solved_once_more(method: str) -> None:
    func = Counting()
    states = solve(func, draw(2, DIM), method=method, steps=50)
    forward = func.calls
    loss(states).backward()
    assert func.calls <= 2.1 * forward


class CountedTanh(torch.autograd.Function):
    """tanh, which counts how often it is differentiated."""

    differentiated = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        CountedTanh.differentiated += 1
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y * y)


@pytest.mark.parametrize("order", slow_but([2], [2, "method"]))
def test_the_jacobian_of_a_state_is_made_once_however_often_a_filter_asks_for_it(order: Any) -> None:
    size, counts = 12, []
    weight = draw(size, size).requires_grad_()
    for steps in (15, 30):
        states = torchdiffeq_lmm.odeint(
            lambda t, y: CountedTanh.apply(y @ weight),
            draw(size),
            torch.linspace(0, 0.02 * steps, steps + 1, dtype=torch.float64),
            method="bdf4",
            grad_filter=CostateFilter(order=order),
        )
        before = CountedTanh.differentiated
        states[-1].sum().backward()
        counts.append(CountedTanh.differentiated - before)
    # For a matrix as often as it has rows; the rest are single products.
    assert (counts[1] - counts[0]) / 15 < 1.5 * size


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self._meet(each.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:

            def gone(_: object) -> None:
                self.alive -= size
                del self._known[key]

            self._known[key] = weakref.ref(storage, gone)
            self.alive += size
            self.bytes = max(self.bytes, self.alive)


def peak(backward: object, steps: int, method: str = "leapfrog", grad_filter: str | None = None) -> int:
    weight = draw(20_000).requires_grad_()
    y0 = draw(20_000, seed=1)
    with Peak() as measured:
        states = solve(
            lambda t, y: torch.cos(weight * y), y0, backward, (0.0, 1.0), steps, method, grad_filter, [weight]
        )
        states[-1].sum().backward()
    assert measured.bytes > y0.nbytes
    return measured.bytes


@pytest.mark.parametrize("grad_filter", slow_but([None], [None, "auto"]))
def test_reversal_needs_no_more_memory_for_more_steps(grad_filter: str | None) -> None:
    few, many = (peak("reversible", steps, grad_filter=grad_filter) for steps in (50, 250))
    assert many <= 1.1 * few
    assert peak("autograd", 100, grad_filter=grad_filter) > 2 * few


@pytest.mark.slow
@pytest.mark.parametrize("method", ["leapfrog", "ab3"])
def test_checkpoints_need_memory_like_the_root_of_the_steps(method: str) -> None:
    bytes_ = [peak("checkpoint", steps, method) for steps in (25, 100, 400)]
    orders = np.diff(np.log2(bytes_)) / 2
    assert np.all(orders > 0.2)
    assert np.all(orders < 0.53)
    assert bytes_[-1] < peak("autograd", 256, method)


@pytest.mark.slow
def test_the_number_of_checkpoints_is_the_users() -> None:
    few, root, many = (peak(Checkpoint(count), 200) for count in (2, 14, 200))
    assert root < 0.5 * few
    assert root < 0.5 * many


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["autograd", *AGAIN])
def test_many_steps(backward: str) -> None:
    steps = 4_000
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    states = solve(lambda t, y: rate * (y @ turn), y0, backward, (0.0, 2.0), steps, params=[rate])
    states[-1][0].backward()
    assert float(states[-1][0].detach()) == pytest.approx(np.cos(1.0), abs=1e-7)
    assert float(rate.grad) == pytest.approx(-2 * np.sin(1.0), abs=1e-7)
