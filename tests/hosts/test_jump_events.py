"""jump_t with events and in odeint_adjoint."""

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torchdiffeq
from jumping import SOME, TIGHT, WAYS, Switched, f64, start
from methods import FAST_EXPLICIT, IMPLICIT, ORDER, in_turn, slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm.hosts import solver

pytestmark = pytest.mark.usefixtures("_quick_collections")

# ---------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("name", "direction", "interp"),
    in_turn([(1, "linear"), (-1, "cubic"), (-1, "linear"), (1, "cubic")], few=1, fast=FAST_EXPLICIT),
)
def test_events_after_jumps(name: str, direction: int, interp: str) -> None:
    """y = exp(-t) until 0.51, then y' = -3 y until 0.77, then y' = -1: it is 0.1 at a time that is known."""
    step = 0.01 if ORDER[name] < 3 else 0.02
    middle = np.exp(-0.51)
    last = middle * np.exp(-3 * 0.26)
    cases = {0.8: -np.log(0.8), 0.5: 0.51 + np.log(middle / 0.5) / 3, 0.1: 0.77 + last - 0.1}
    if name in IMPLICIT:
        # They take many times as long: after the first jump, or after both.
        del cases[0.8], cases[0.5 if interp == "linear" else 0.1]
    for level, truth in cases.items():
        y0 = f64(1.0, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            s = direction * t
            return direction * (-y if s < 0.51 else -3 * y if s < 0.77 else -torch.ones_like(y))

        event_t, states = torchdiffeq.odeint_event(
            func,
            y0,
            f64(0.0)[0],
            event_fn=lambda t, y, level=level: y[0] - level,
            reverse_time=direction < 0,
            odeint_interface=torchdiffeq.odeint,
            method=name,
            options={"step_size": step, "interp": interp, "jump_t": f64(0.51, 0.77, 5.0, 1e9) * direction},
        )
        accuracy = 0.02 if ORDER[name] == 1 else 4e-4
        assert direction * float(event_t.detach()) == pytest.approx(truth, abs=accuracy)
        assert float(states[-1, 0].detach()) == pytest.approx(level, abs=1e-6)
        (gradient,) = torch.autograd.grad(event_t, y0)
        slope = {0.8: 0.8, 0.5: 1.5, 0.1: 1.0}[level]
        by_y0 = {0.8: 0.8, 0.5: 0.5, 0.1: last}[level]
        assert direction * float(gradient[0]) == pytest.approx(by_y0 / slope, abs=10 * accuracy)


@pytest.mark.parametrize("way", [{"grad_filter": "auto"}, {"backward": "checkpoint"}], ids=str)
@pytest.mark.parametrize("name", slow_but(["leapfrog", "abm3"], SOME))
def test_events_filtered_and_recomputed(name: str, way: dict) -> None:
    """At a fixed time, so that the state there is that of an ordinary solve; a jump just after it changes nothing."""
    results = []
    for is_event in (True, False):
        field, y0 = Switched(0.5), start()
        options = {"step_size": 0.05, "jump_t": [0.5, 0.81]}
        t = f64(0.0, 0.7999999)
        arguments = {"method": name, "options": options, **way, **TIGHT}
        if is_event:
            _, y = torchdiffeq_lmm.odeint(field, y0, t, event_fn=lambda t, y: t - 0.7999999, **arguments)
        else:
            y = torchdiffeq_lmm.odeint(field, y0, t, **arguments)
        y[-1].square().sum().backward()
        results.append((y[-1].detach(), y0.grad, *(parameter.grad for parameter in field.parameters())))
    # Between nodes the event's state is interpolated.
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-4)


def test_an_event_at_a_jump_and_one_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"step_size": 0.1, "jump_t": [0.5]}

    def event(level: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, y: t - level

    for level in (0.5, 0.5 - 1e-7, 0.5 + 1e-7):
        event_t, y = torchdiffeq.odeint(
            lambda t, y: torch.where(t < 0.5, 1.0, -2.0) + 0 * y,
            f64(0.0),
            f64(0.0, 1.0),
            method="ab3",
            options=options,
            event_fn=event(level),
        )
        assert float(event_t) == pytest.approx(level, abs=1e-8)
        assert float(y[-1]) == pytest.approx(0.5, abs=1e-6)
    monkeypatch.setattr(solver, "MAX_EVENT_STEPS", 100)
    with pytest.raises(RuntimeError, match="did not change its sign within 100 steps"):
        torchdiffeq.odeint(
            lambda t, y: y,
            f64(0.0),
            f64(0.0, 1.0),
            method="ab1",
            options={"step_size": 0.01, "jump_t": [0.5, 0.9999]},
            event_fn=lambda t, y: y[0] - 1,
        )


@pytest.mark.parametrize("is_event", [False, True])
@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_all_memory_is_freed_without_a_collector(way: dict, is_event: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        field = Switched(0.5)
        given = {"event_fn": lambda t, y: t - 0.93} if is_event else {}
        options = {"step_size": 0.1, "jump_t": [0.5, 0.7]}
        y = torchdiffeq_lmm.odeint(field, start(), f64(0.0, 1.0), method="ab3", options=options, **given, **way)
        states = y[1] if is_event else y
        states[-1].sum().backward()
        gone = weakref.ref(field)
        del field, y, states
        assert gone() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------------- adjoint


@pytest.mark.parametrize(
    ("name", "direction", "as_list"),
    slow_but(
        [("ab4", -1, True)],
        [
            *itertools.product(["ab4"], [1, -1], [True, False]),
            *(("abm4", 1, False), ("abm4", -1, True), ("am4", 1, False), ("bdf4", -1, True)),
        ],
    ),
)
def test_odeint_adjoint(name: str, direction: int, as_list: bool) -> None:
    """Observations at many times, one of them a jump: its backward solves begin and end there."""
    jumps = [0.33 * direction, 0.5 * direction]
    options = {"jump_t": jumps if as_list else f64(*jumps), "step_size": 1 / 48}
    found = states_and_gradients(torchdiffeq.odeint_adjoint, name, direction, options)
    # One side of a jump for the other, in one evaluation, would make an error of 5e-3.
    torch.testing.assert_close(found, by_dopri5(direction), rtol=1e-5, atol=2e-5)


class Thrice(nn.Module):
    """Another field in each of three pieces."""

    def __init__(self, direction: int) -> None:
        super().__init__()
        self.direction = direction
        self.k = nn.Parameter(f64(0.9))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        s = self.direction * t
        late = torch.where(s < 0.5, self.k * torch.cos(y), 1 - self.k * y * s)
        return self.direction * torch.where(s < 0.33, -self.k * y, late)


def states_and_gradients(odeint: Callable[..., Tensor], method: str, direction: int, options: dict) -> list[Tensor]:
    field, y0 = Thrice(direction), f64(1.0, 0.2, requires_grad=True)
    t = direction * torch.linspace(0, 1, 9, dtype=torch.float64)
    states = odeint(field, y0, t, method=method, options=options, rtol=1e-9, atol=1e-10)
    states.square().sum().backward()
    return [states.detach(), y0.grad, field.k.grad]


@cache
def by_dopri5(direction: int) -> list[Tensor]:
    options = {"jump_t": f64(0.33 * direction, 0.5 * direction)}
    return states_and_gradients(torchdiffeq.odeint, "dopri5", direction, options)
