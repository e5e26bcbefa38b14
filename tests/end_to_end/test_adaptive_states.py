"""The adaptive methods with states of all kinds, in batches, without gradients; and solves that end at an event."""

import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from adaptive import (
    F64,
    METHODS,
    Counted,
    decayed,
    decaying,
    f64,
    fast_by_adams,
    methods,
    robertson,
    robertson_numbers,
    solve,
)
from methods import slow_but
from scipy.integrate import solve_ivp
from torch import Tensor

from torchdiffeq_lmm import SolveReport

# ------------------------------------------------------------------------------------------------------------ states


@methods
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.one_in(3)
def test_tuples(direction: int, method: str) -> None:
    """As the same entries in one tensor."""
    y0 = (f64(2.0), torch.full((2, 2), 3.0, dtype=F64), torch.tensor(0.5, dtype=F64))
    t = direction * torch.linspace(0, 1.5, 4, dtype=F64)
    norm = lambda y: torch.cat([part.reshape(-1) for part in y]).square().mean().sqrt()  # noqa: E731
    y = solve(lambda t, y: tuple(decaying(t, part) for part in y), y0, t, method, norm=norm)
    flat = solve(decaying, torch.cat([part.reshape(-1) for part in y0]), t, method)
    assert [part.shape for part in y] == [(4, 1), (4, 2, 2), (4,)]
    together = torch.cat([part.reshape(4, -1) for part in y], -1)
    torch.testing.assert_close(together, flat, rtol=1e-9, atol=1e-9)
    for part, start in zip(y, y0, strict=True):
        wanted = torch.stack([decayed(time, float(start.reshape(-1)[0])).expand(start.shape) for time in t])
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5)


@methods
def test_complex_states(method: str) -> None:
    y0 = torch.tensor([1.0 + 0.5j, -1j], dtype=torch.complex128)
    t = torch.linspace(0, 2, 5, dtype=F64)
    y = solve(lambda t, y: (2j - 0.1) * y, y0, t, method, 1e-7, 1e-7)
    wanted = torch.exp((2j - 0.1) * t)[:, None] * y0
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@methods
def test_default_tolerances_are_below_the_rounding_of_single_precision(method: str) -> None:
    report = SolveReport()
    t = torch.linspace(0, 2, 5)
    y = torchdiffeq.odeint(decaying, torch.tensor([2.0]), t, method=method, options={"report": report})
    assert y.dtype is torch.float32
    torch.testing.assert_close(y[:, 0].double(), decayed(t.double()), rtol=2e-5, atol=2e-5)
    assert report.steps < 300


@methods
def test_no_tolerance_at_all(method: str) -> None:
    """Rounding is what is left of it."""
    y = solve(decaying, torch.tensor([2.0]), torch.tensor([0.0, 1.0]), method, 0.0, 0.0)
    assert float(y[-1]) == pytest.approx(float(decayed(f64(1.0))), abs=2e-5)


@fast_by_adams
@pytest.mark.parametrize("direction", [1, -1])
def test_both_directions_of_time(method: str, direction: int) -> None:
    """The pendulum's energy, and the way back."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -torch.sin(y[0])])

    y0 = f64(1.0, 0.5)
    there = solve(func, y0, (0.0, 3.0 * direction), method, 1e-8, 1e-8)[-1]
    back = solve(func, there, (3.0 * direction, 0.0), method, 1e-8, 1e-8)[-1]
    energies = [float(y[1] ** 2 / 2 - torch.cos(y[0])) for y in (y0, there)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-6)
    torch.testing.assert_close(back, y0, rtol=0, atol=1e-6)
    assert float((there - y0).abs().max()) > 0.5


@fast_by_adams
def test_reversed_time_is_the_reversed_problem(method: str) -> None:
    reports = SolveReport(), SolveReport()
    backwards = solve(decaying, f64(2.0), (1.0, 0.3, -1.0), method, report=reports[0])
    forwards = solve(lambda t, y: -decaying(-t, y), f64(2.0), (-1.0, -0.3, 1.0), method, report=reports[1])
    assert torch.equal(backwards, forwards)
    assert reports[0].times == [-time for time in reports[1].times]


@methods
def test_a_state_without_dimensions(method: str) -> None:
    t = torch.linspace(0, 1, 3, dtype=F64)
    y0 = torch.tensor(2.0, dtype=F64, requires_grad=True)
    y = solve(decaying, y0, t, method)
    assert y.shape == (3,)
    torch.testing.assert_close(y, decayed(t), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y[-1], y0)
    assert float(gradient) == pytest.approx(math.exp(-1), rel=1e-3)


@pytest.mark.parametrize("method", [*METHODS, "bdf2"])
@pytest.mark.parametrize("shape", [(0, 3), (0,), (2, 0)])
def test_states_without_entries(method: str, shape: tuple[int, ...]) -> None:
    y0 = torch.zeros(shape, dtype=F64, requires_grad=True)
    y = solve(decaying, y0, (0.0, 0.5, 1.0), method)
    assert y.shape == (3, *shape)
    y.sum().backward()
    assert y0.grad.shape == shape


@methods
def test_a_state_that_stays(method: str) -> None:
    report = SolveReport()
    y = solve(lambda t, y: torch.zeros_like(y), f64(1.0, 0.0), (0.0, 1e6), method, report=report)
    assert torch.equal(y, f64(1.0, 0.0).expand(2, 2))
    assert report.steps < 400


@methods
def test_a_function_that_reuses_its_memory(method: str) -> None:
    memory = torch.empty(2, dtype=F64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -y[0]], out=memory)

    with torch.no_grad():
        y = solve(func, f64(0.0, 1.0), (0.0, 1.0), method)
    assert y[-1].tolist() == pytest.approx([math.sin(1), math.cos(1)], abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- batches

SAMPLES, TIMES = 64, (0.0, 0.4, 40.0)


@cache
def rates() -> Tensor:
    """Of 64 unlike reactions, of shape (3, 64): each rate within a factor of 4 either way."""
    factors = 4 ** (2 * torch.rand(3, SAMPLES, generator=torch.Generator().manual_seed(0), dtype=F64) - 1)
    return factors * f64(0.04, 1e4, 3e7)[:, None]


@cache
def robertson_references() -> np.ndarray:
    """Of shape (3, 64, 3)."""
    found = []
    for of_sample in rates().T.tolist():
        y = solve_ivp(
            lambda t, y, k=of_sample: robertson_numbers(t, y, k),
            (TIMES[0], TIMES[-1]),
            (1.0, 0.0, 0.0),
            method="LSODA",
            t_eval=TIMES,
            rtol=1e-9,
            atol=1e-14,
        ).y
        found.append(y.T)
    return np.stack(found, 1)


@cache
def robertson_batch() -> Tensor:
    y0 = f64(1.0, 0.0, 0.0).expand(SAMPLES, 3)
    with torch.no_grad():
        return solve(lambda t, y: robertson(t, y, rates()), y0, TIMES, "bdf", 1e-6, 1e-10)


@pytest.mark.slow
def test_every_sample_of_a_batch() -> None:
    exact = robertson_references()
    errors = np.abs(robertson_batch().numpy() - exact) / (np.abs(exact) + 1e-4)
    assert errors.max(axis=(0, 2)).max() < 3e-5


@pytest.mark.slow
def test_the_order_of_samples_is_no_matter() -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    y0 = f64(1.0, 0.0, 0.0).expand(SAMPLES, 3)
    with torch.no_grad():
        y = solve(lambda t, y: robertson(t, y, rates()[:, order]), y0, TIMES, "bdf", 1e-6, 1e-10)
    torch.testing.assert_close(y, robertson_batch()[:, order], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_more_of_the_same_samples_change_nothing(method: str) -> None:
    one, many = (
        solve(decaying, torch.full((samples, 2), 2.0, dtype=F64), (0.0, 2.0), method)[-1] for samples in (1, 50)
    )
    torch.testing.assert_close(many, one.expand(50, 2), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- modes of autograd


@pytest.mark.parametrize(
    ("method", "mode"),
    slow_but(
        [("bdf", torch.inference_mode), ("adams", torch.no_grad), ("adams", torch.inference_mode)],
        itertools.product(METHODS, [torch.no_grad, torch.inference_mode]),
    ),
)
def test_without_gradients_the_solution_is_the_same(method: str, mode: Callable[[], Any]) -> None:
    func = torch.nn.Linear(3, 3, dtype=F64)
    with torch.no_grad():
        func.weight.copy_(f64(0.1, 0.5, -0.3, -0.6, 0.2, 0.4, -0.2, 0.3, -0.9).reshape(3, 3))
    results = []
    for context in (nullcontext, mode):
        with context():
            y = solve(lambda t, y: torch.tanh(func(y)), torch.ones(2, 3, dtype=F64), (0.0, 0.4, 1.0), method)
        assert y.requires_grad == (context is nullcontext)
        results.append(y.detach().clone())
    # Without gradients Jacobians are by differences, so that equations are solved to the tolerance alone.
    accuracy = 1e-12 if method == "adams" else 1e-6
    torch.testing.assert_close(results[0], results[1], rtol=accuracy, atol=accuracy)


@methods
def test_tensors_made_in_inference_mode(method: str) -> None:
    with torch.inference_mode():
        y0, t, jump = f64(2.0), f64(0.0, 1.0), f64(0.5)
    weight = f64(1.0, requires_grad=True)
    y = solve(lambda t, y: -weight * y, y0, t, method, jump_t=jump)
    (gradient,) = torch.autograd.grad(y[-1].sum(), weight)
    assert float(gradient) == pytest.approx(-2 * math.exp(-1), rel=1e-4)


@fast_by_adams
@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
def test_another_default_device(method: str, backward: str) -> None:
    results = []
    for device in ("cpu", "meta"):
        y0, t = f64(1.0, 2.0, requires_grad=True), f64(0.0, 0.3, 1.0, requires_grad=True)
        weight = f64(0.7, requires_grad=True)
        torch.set_default_device(device)
        try:
            params = {"adjoint_params": (weight,)} if backward == "checkpoint" else {}
            y = solve(
                lambda t, y, w=weight: -w * y * torch.cos(t),
                y0,
                t,
                method,
                backward=backward,
                jump_t=[0.4],
                step_t=[0.2],
                **params,
            )
            gradients = torch.autograd.grad((y**2).sum(), (y0, t, weight))
        finally:
            # To name a device, be it the CPU, would slow every later operation down.
            torch.set_default_device(None)
        results.append([y.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ events

GRAVITY = 9.81


class Ball(torch.nn.Module):
    """Free fall; the state is (height, velocity), as one tensor or as a tuple."""

    def __init__(self, is_tuple: bool = False) -> None:
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(GRAVITY, dtype=F64))
        self.is_tuple = is_tuple

    def forward(self, t: Tensor, y: Any) -> Any:
        slopes = y[1], -self.gravity.expand(y[1].shape)
        return slopes if self.is_tuple else torch.stack(slopes)

    def ground(self, t: Tensor, y: Any) -> Tensor:
        return y[0]


EVENTS = [
    ("bdf", False, False),
    ("bdf", True, True),
    ("adams", True, False),
    ("adams", False, True),
    ("bdf", False, True),
    ("bdf", True, False),
    ("adams", False, False),
    ("adams", True, True),
]


@pytest.mark.parametrize("interface", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
@pytest.mark.parametrize(
    ("method", "backwards", "is_tuple"), slow_but([event for event in EVENTS[:4] if event[0] == "adams"], EVENTS)
)
def test_the_landing_of_a_ball_and_its_gradients(method: str, backwards: bool, is_tuple: bool, interface: Any) -> None:
    ball = Ball(is_tuple)
    height, velocity = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.7, 0.6))
    t0 = torch.tensor(0.4, dtype=F64, requires_grad=True)
    event_t, solution = torchdiffeq.odeint_event(
        ball,
        (height, velocity) if is_tuple else torch.stack([height, velocity]),
        t0,
        event_fn=ball.ground,
        reverse_time=backwards,
        odeint_interface=interface,
        method=method,
        rtol=1e-6,
        atol=1e-8,
    )
    root = torch.sqrt(velocity**2 + 2 * ball.gravity * height)
    duration = (velocity - root if backwards else velocity + root) / ball.gravity
    expected = t0 + duration
    torch.testing.assert_close(event_t, expected, rtol=1e-5, atol=1e-5)
    inputs = (height, velocity, ball.gravity, t0)
    torch.testing.assert_close(
        torch.autograd.grad(event_t, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs, retain_graph=True),
        rtol=1e-4,
        atol=1e-4,
    )
    final_height, final_velocity = (solution[0][-1], solution[1][-1]) if is_tuple else solution[-1]
    landing = velocity - ball.gravity * duration
    assert final_height.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(final_velocity, landing, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(final_velocity, inputs, allow_unused=True, materialize_grads=True, retain_graph=True),
        torch.autograd.grad(landing, inputs, allow_unused=True, materialize_grads=True, retain_graph=True),
        rtol=1e-4,
        atol=1e-4,
    )


@fast_by_adams
def test_a_ball_that_bounces(method: str) -> None:
    """Three flights, each with 0.8 of the speed of the one before, as a loop of events; and what that owes to it."""
    ball, restitution = Ball(), torch.tensor(0.8, dtype=F64, requires_grad=True)
    y, t = f64(1.0, 0.0), torch.tensor(0.0, dtype=F64)
    for _ in range(3):
        t, solution = torchdiffeq.odeint_event(
            ball, y, t, event_fn=ball.ground, odeint_interface=torchdiffeq.odeint, method=method, rtol=1e-6, atol=1e-8
        )
        y = torch.stack([solution[-1][0] * 0 + 1e-9, -restitution * solution[-1][1]])
    fall = math.sqrt(2 / GRAVITY)
    assert t.item() == pytest.approx(fall * (1 + 2 * 0.8 + 2 * 0.8**2), rel=1e-5)
    (gradient,) = torch.autograd.grad(t, restitution)
    assert float(gradient) == pytest.approx(fall * (2 + 4 * 0.8), rel=1e-4)


@methods
@pytest.mark.parametrize("direction", [1, -1])
def test_an_event_after_a_jump(method: str, direction: int) -> None:
    """y' is 1 before the jump at 0.5 and w after it."""
    weight = torch.tensor(3.0, dtype=F64, requires_grad=True)
    jump = direction * 0.5

    def func(t: Tensor, y: Tensor) -> Tensor:
        return direction * (torch.ones_like(y) if direction * float(t) < 0.5 else weight * torch.ones_like(y))

    counted, report = Counted(func), SolveReport()
    event_t, solution = torchdiffeq.odeint_event(
        counted,
        f64(0.0),
        torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, y: y[0] - 2.0,
        reverse_time=direction < 0,
        odeint_interface=torchdiffeq.odeint,
        method=method,
        options={"jump_t": f64(jump), "report": report},
        rtol=1e-6,
        atol=1e-8,
    )
    # 1.5 / w after the jump.
    assert event_t.item() == pytest.approx(direction * 1.0, abs=1e-7)
    assert solution[-1].item() == pytest.approx(2.0, abs=1e-7)
    (gradient,) = torch.autograd.grad(event_t, weight)
    assert float(gradient) == pytest.approx(-direction * 1.5 / 9, rel=1e-5)
    assert jump in report.times
    assert jump not in counted.times


@methods
def test_an_event_function_of_time(method: str) -> None:
    event_t, solution = torchdiffeq.odeint_event(
        decaying,
        f64(2.0),
        torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, y: t - 1.2345 + 0 * y[0],
        odeint_interface=torchdiffeq.odeint,
        method=method,
        rtol=1e-7,
        atol=1e-9,
    )
    assert event_t.item() == pytest.approx(1.2345, abs=1e-8)
    assert solution[-1].item() == pytest.approx(float(decayed(f64(1.2345))), abs=1e-6)


@fast_by_adams
def test_no_event(method: str) -> None:
    with pytest.raises(RuntimeError, match="max_num_steps 200 is exceeded at t = "):
        torchdiffeq.odeint(
            lambda t, y: torch.cos(t) + 0 * y,
            f64(1.0),
            f64(0.0, 1.0),
            method=method,
            options={"max_num_steps": 200},
            event_fn=lambda t, y: y[0] + 1,
        )


@methods
def test_known_options_are_not_warned_of(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(
            decaying,
            f64(2.0),
            (0.0, 1.0),
            method,
            norm=lambda y: y.abs().max(),
            first_step=0.01,
            min_step=0.0,
            max_step=0.5,
            safety=0.9,
            ifactor=5.0,
            dfactor=0.3,
            max_num_steps=1000,
            step_t=None,
            jump_t=None,
            dtype=F64,
            report=None,
        )
