"""A recorded solve among autograd's nodes: what frees it, and what cotangents it takes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
import torchsde
from methods import slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, Reversible

pytestmark = pytest.mark.usefixtures("_quick_collections")


class Field(nn.Module):
    """A network, and the drift and the diffusion of an SDE."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.drifts: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight)

    f = forward

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y


START = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
Make = Callable[..., Tensor]


def ode(method: str = "leapfrog", t: tuple[float, ...] = (0.0, 0.4, 1.0), **arguments: Any) -> Make:
    def make(func: Field, y0: Tensor = START) -> Tensor:
        options = {"step_size": 0.1, **arguments.get("options", {})}
        times = torch.tensor(t, dtype=torch.float64, requires_grad=options.get("interp") == "cubic")
        return torchdiffeq_lmm.odeint(func, y0.clone(), times, method=method, **{**arguments, "options": options})

    return make


def sde(method: str, **options: Any) -> Make:
    def make(func: Field, y0: Tensor = START) -> Tensor:
        bm = torchsde.BrownianInterval(0.0, 1.0, size=START.shape, dtype=START.dtype, entropy=1)
        ts = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
        return torchsde.sdeint(func, y0, ts, bm=bm, dt=0.1, method=method, options=options)

    return make


def reported(func: Field, y0: Tensor = START) -> Tensor:
    return ode(backward=Reversible(report=func.drifts.append))(func, y0)


def listed(func: Field, y0: Tensor = START) -> Tensor:
    params = tuple(func.parameters())
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torchdiffeq.odeint(
        lambda t, y: func(t, y), y0, t, method="ab3", options={"backward": "checkpoint", "adjoint_params": params}
    )


def event(func: Field, y0: Tensor = START) -> Tensor:
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"step_size": 0.1}
    found = torchdiffeq_lmm.odeint(
        func, y0, times, method="ab2", options=options, backward="checkpoint", event_fn=lambda t, y: t - 0.53
    )
    return found[1]


SOLVES: dict[str, Make] = {
    "filter": ode(grad_filter="auto"),
    "checkpoint": ode(backward="checkpoint"),
    "checkpoint, t": ode("abm3", backward=Checkpoint(2), options={"interp": "cubic"}),
    "checkpoint, backwards": ode("ab2", (1.0, 0.2, 0.0), backward="checkpoint"),
    "checkpoint, filter": ode("ab3", backward="checkpoint", grad_filter="auto"),
    "reversible": ode(backward="reversible"),
    "reversible, smooth": ode(t=(0.0, 0.5, 1.0), backward="reversible", grad_filter="smooth"),
    "reversible, reported": reported,
    "implicit": ode("bdf2"),
    "implicit, filter": ode("am3", grad_filter="auto"),
    "implicit, checkpoint": ode("bdf2", backward="checkpoint"),
    "event": event,
    "listed parameters": listed,
    "SDE, filter": sde("leapfrog", grad_filter="auto"),
    "SDE, implicit": sde("bdf2"),
}
solves = pytest.mark.parametrize(
    "make", slow_but([make for name, make in SOLVES.items() if "implicit, " not in name], SOLVES.values()), ids=SOLVES
)


@solves
@pytest.mark.parametrize("end", slow_but(["backward", "failed"], ["nothing", "backward", "retained", "failed"]))
@pytest.mark.one_in(5)
def test_a_module_that_keeps_its_own_solve_is_collected(make: Make, end: str) -> None:
    func = Field()
    func.kept = make(func)
    if end == "failed":
        with pytest.raises(RuntimeError, match="create_graph=True"):
            func.kept.sum().backward(create_graph=True)
    elif end != "nothing":
        func.kept.sum().backward(retain_graph=end == "retained")
    gone = weakref.ref(func)
    del func
    gc.collect()
    assert gone() is None


# What torchsde makes of an SDE refers to itself.
@pytest.mark.parametrize("make", [make for name, make in SOLVES.items() if "SDE" not in name])
@pytest.mark.one_in(3)
def test_all_is_freed_with_the_output_without_a_collector(make: Make) -> None:
    gc.collect()
    gc.disable()
    try:
        func = Field()
        gone = weakref.ref(func)
        states = make(func)
        last = states[-1].sum()
        del states, func
        # What is made of the output keeps the solve.
        last.backward(retain_graph=True)
        last.backward()
        del last
        assert gone() is None
    finally:
        gc.enable()


def test_backward_frees_func_while_the_output_lives() -> None:
    gc.collect()
    gc.disable()
    try:
        func = Field()
        gone = weakref.ref(func)
        states = ode(backward="checkpoint")(func)
        states.sum().backward(retain_graph=True)
        del func
        assert gone() is not None
        states.sum().backward()
        assert gone() is None
        with pytest.raises(RuntimeError, match="second time"):
            states.sum().backward()
    finally:
        gc.enable()


@solves
@pytest.mark.one_in(3)
def test_the_output_may_be_changed_in_place(make: Make) -> None:
    gradients = []
    for in_place in (False, True):
        func = Field()
        states = make(func)
        if in_place:
            states[-1] *= 2
            states.mul_(3)
        else:
            states = 3 * torch.cat([states[:-1], 2 * states[-1:]])
        (states**2).sum().backward()
        gradients.append(func.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


BATCHED = "grad_filter, backward and implicit methods do not support is_grads_batched=True"


@solves
class TestBatches:
    @pytest.mark.one_in(3)
    def test_batched_cotangents_are_refused(self, make: Make) -> None:
        func = Field()
        last = make(func)[-1].flatten()
        for inputs in (func.weight, list(func.parameters())):
            with pytest.raises(RuntimeError, match=BATCHED):
                torch.autograd.grad(last, inputs, torch.eye(3, dtype=last.dtype), is_grads_batched=True)
        # Nothing has been used up.
        found = [torch.autograd.grad(entry, func.weight, retain_graph=True)[0] for entry in last]
        (of_sum,) = torch.autograd.grad(last.sum(), func.weight)
        torch.testing.assert_close(sum(found), of_sum)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_vmap_of_the_gradient_is_refused(self, make: Make) -> None:
        func = Field()
        last = make(func)[-1].flatten()
        with pytest.raises(RuntimeError, match=BATCHED):
            torch.func.vmap(lambda g: torch.autograd.grad(last, func.weight, g)[0])(torch.eye(3, dtype=last.dtype))

    @pytest.mark.one_in(3)
    def test_a_vectorised_jacobian_is_refused(self, make: Make) -> None:
        func = Field()

        def last(y0: Tensor) -> Tensor:
            return make(func, y0)[-1].flatten()

        with pytest.raises(RuntimeError, match=BATCHED):
            torch.autograd.functional.jacobian(last, START, vectorize=True)
        assert torch.autograd.functional.jacobian(last, START).shape == (3, 1, 3)


def test_plain_and_smooth_gradients_may_be_batched() -> None:
    for make in (ode("ab3"), ode(t=(0.0, 0.5, 1.0), grad_filter="smooth")):
        func = Field()
        last = make(func)[-1].flatten()
        unit = torch.eye(3, dtype=last.dtype)
        (got,) = torch.autograd.grad(last, func.weight, unit, is_grads_batched=True, retain_graph=True)
        wanted = torch.stack([torch.autograd.grad(entry, func.weight, retain_graph=True)[0] for entry in last])
        torch.testing.assert_close(got, wanted)
