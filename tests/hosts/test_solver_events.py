"""Solves that end at an event: its time, its state, their gradients, and what is refused."""

import math
from typing import Any

import pytest
import torch
import torchdiffeq
from leapfrog import INTERPS, decay, solve, tensor
from methods import slow_but
from torch import Tensor, nn

GRAVITY = 9.81


class Fall(nn.Module):
    """Free fall; the state is (height, velocity), as one tensor or as a tuple."""

    def __init__(self, is_tuple: bool = False) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(GRAVITY, dtype=torch.float64))
        self.is_tuple = is_tuple

    def forward(self, t: Tensor, y: Any) -> Any:
        velocity = y[1]
        slopes = velocity, -self.gravity.expand(velocity.shape)
        return slopes if self.is_tuple else torch.stack(slopes)

    def ground(self, t: Tensor, y: Any) -> Tensor:
        return y[0]


def landing(height: Tensor, velocity: Tensor, gravity: Tensor, backwards: bool) -> Tensor:
    """How long after the start the height is 0; negative where `backwards`."""
    root = torch.sqrt(velocity**2 + 2 * gravity * height)
    return (velocity - root if backwards else velocity + root) / gravity


PAIRS = [(False, "linear", False), (True, "cubic", False), (True, "linear", True), (False, "cubic", True)]


@pytest.mark.parametrize(
    ("interface", "backwards", "interp", "is_tuple"),
    # For odeint_adjoint both ways to interpolate, for a tensor and a tuple.
    slow_but(
        [(torchdiffeq.odeint, *PAIRS[2])],
        [
            *((torchdiffeq.odeint, *pair) for pair in PAIRS),
            *((torchdiffeq.odeint_adjoint, *pair) for pair in PAIRS[1:3]),
        ],
    ),
)
def test_event_and_its_gradients(interface: Any, backwards: bool, interp: str, is_tuple: bool) -> None:
    fall = Fall(is_tuple)
    height, velocity = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.6))
    t0 = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y0 = (height, velocity) if is_tuple else torch.stack([height, velocity])
    event_t, solution = torchdiffeq.odeint_event(
        fall,
        y0,
        t0,
        event_fn=fall.ground,
        reverse_time=backwards,
        odeint_interface=interface,
        method="leapfrog",
        options={"step_size": 0.00075, "interp": interp},
    )
    expected = t0 + landing(height, velocity, fall.gravity, backwards)
    torch.testing.assert_close(event_t, expected, rtol=1e-4, atol=1e-4)
    inputs = (height, velocity, fall.gravity, t0)
    torch.testing.assert_close(
        torch.autograd.grad(event_t, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs, retain_graph=True),
        rtol=1e-2,
        atol=1e-2,
    )
    final_height, final_velocity = (solution[0][-1], solution[1][-1]) if is_tuple else solution[-1]
    duration = expected - t0
    torch.testing.assert_close(final_height.item(), 0.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(final_velocity, velocity - fall.gravity * duration, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.autograd.grad(final_velocity, inputs, allow_unused=True, materialize_grads=True, retain_graph=True),
        torch.autograd.grad(
            velocity - fall.gravity * duration, inputs, allow_unused=True, materialize_grads=True, retain_graph=True
        ),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("backwards", [False, True])
def test_event_times_are_of_second_order(backwards: bool, interp: str) -> None:
    fall = Fall()
    expected = landing(tensor(1.7), tensor(0.6), tensor(GRAVITY), backwards).item()
    for step_size in (0.04, 0.02, 0.01, 0.005):
        t = tensor(0.0, -1.0 if backwards else 1.0)
        event_t, _ = solve(fall, tensor(1.7, 0.6), t, fall.ground, step_size=step_size, interp=interp)
        # A multiple of the square, no order between neighbours: how the event lies to the nodes plays a part.
        assert event_t.item() == pytest.approx(expected, abs=step_size**2)


@pytest.mark.parametrize("direction", [1, -1])
def test_event_time_with_time_in_func_and_event(direction: int) -> None:
    """x' = 2 t from t0, until x = t² + c: the event function sees the user's time."""
    t0 = torch.tensor(direction * 0.5, dtype=torch.float64)

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        return direction * t - 1.234 + 0 * y[0]

    event_t, solution = torchdiffeq.odeint_event(
        lambda t, y: 2 * t + 0 * y,
        tensor(0.25),
        t0,
        event_fn=event_fn,
        reverse_time=direction < 0,
        method="leapfrog",
        options={"step_size": 0.001, "interp": "cubic"},
    )
    assert event_t.item() == pytest.approx(direction * 1.234, abs=1e-8)
    assert solution[-1].item() == pytest.approx(1.234**2, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_dtypes_of_events(dtype: torch.dtype) -> None:
    event_t, solution = solve(
        lambda t, y: -torch.ones_like(y),
        torch.ones(2, dtype=dtype),
        torch.tensor([0.0, 1.0]),
        lambda t, y: y[0].real - 0.33,
        step_size=0.1,
    )
    assert event_t.dtype is torch.float32
    assert event_t.item() == pytest.approx(0.67, abs=1e-5)
    assert solution.dtype is dtype
    assert solution.shape == (2, 2)


def test_an_event_in_the_first_step() -> None:
    event_t, solution = solve(
        lambda t, y: -torch.ones_like(y),
        tensor(1.0, requires_grad=True),
        tensor(0.0, 1.0),
        lambda t, y: y[0] - 0.75,
        step_size=1.0,
        interp="cubic",
    )
    assert event_t.item() == pytest.approx(0.25, abs=1e-8)
    assert solution[:, 0].tolist() == pytest.approx([1.0, 0.75], abs=1e-8)


@pytest.mark.slow
def test_no_event() -> None:
    with pytest.raises(RuntimeError, match=r"event_fn did not change its sign within 20000 steps of step_size 0.1"):
        solve(lambda t, y: 0 * y, tensor(1.0), tensor(0.0, 1.0), lambda t, y: y[0], step_size=0.1)


def test_the_steps_to_an_event_may_be_limited() -> None:
    def first_passage(max_num_steps: int) -> Tensor:
        options = {"step_size": 0.25, "max_num_steps": max_num_steps}
        start, times = tensor(0.0), tensor(0.0, 1.0)
        return solve(lambda t, y: torch.ones_like(y), start, times, lambda t, y: y[0] - 2.1, **options)[0]

    assert first_passage(9).item() == pytest.approx(2.1, abs=1e-8)
    with pytest.raises(RuntimeError, match=r"event_fn did not change its sign within 8 steps of step_size 0.25"):
        first_passage(8)


@pytest.mark.parametrize(
    ("max_num_steps", "error", "message"),
    [
        (2.0, TypeError, "max_num_steps must be an int or None, got 2.0"),
        (True, TypeError, "max_num_steps must be an int or None, got True"),
        (0, ValueError, "max_num_steps must be at least 1, got 0"),
        (9, ValueError, "max_num_steps 9 is exceeded: the grid has 10 steps"),
    ],
)
def test_max_num_steps(max_num_steps: object, error: type[Exception], message: str) -> None:
    options = {"step_size": 0.1, "max_num_steps": max_num_steps}
    with pytest.raises(error, match=message):
        torchdiffeq.odeint(decay, tensor(1.0), tensor(0.0, 1.0), method="leapfrog", options=options)


def test_an_event_needs_a_step_size() -> None:
    with pytest.raises(ValueError, match=r"step_size must be given .*event_fn.*None"):
        solve(decay, tensor(1.0), tensor(0.0, 1.0), lambda t, y: y[0] + 1)


def test_an_event_takes_the_smallest_of_the_tolerances_of_a_tuple() -> None:
    event_t, _ = torchdiffeq.odeint(
        lambda t, y: (torch.ones_like(y[0]), torch.ones_like(y[1])),
        (tensor(0.0), tensor(0.0)),
        tensor(0.0, 1.0),
        atol=(1e-2, 1e-9),
        method="leapfrog",
        options={"step_size": 0.25},
        event_fn=lambda t, y: y[0].sum() - 0.6,
    )
    assert float(event_t) == pytest.approx(0.6, abs=2e-9)


def test_an_event_needs_finite_times() -> None:
    with pytest.raises(ValueError, match="t must be finite, got"):
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(-math.inf, 1.0),
            method="leapfrog",
            options={"step_size": 0.25},
            event_fn=lambda t, y: y.sum() - 0.6,
        )


def test_an_event_needs_a_positive_tolerance() -> None:
    with pytest.raises(ValueError, match=r"atol must be positive .*event_fn.* 0\.0"):
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(0.0, 1.0),
            method="leapfrog",
            atol=0.0,
            options={"step_size": 0.1},
            event_fn=lambda t, y: y[0] - 0.7,
        )
