"""Event functions that are no events: refused at once, with the time and the value."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import torchdiffeq_lmm

METHODS = ("leapfrog", "ab3", "bdf2")
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
Y0 = torch.tensor([1.0], dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def event(
    event_fn: Any,
    method: str = "leapfrog",
    odeint: Callable[..., Any] = torchdiffeq.odeint,
    t: Tensor = T,
    y0: Any = Y0,
) -> float:
    return float(odeint(decay, y0, t, method=method, options={"step_size": 0.1}, event_fn=event_fn)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("entries", [1, 2])
def test_zero_at_the_beginning_is_an_error(entries: int, direction: int, method: str) -> None:
    calls = []

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return torch.cat([y - 1, y - 0.5])[:entries]

    t = torch.tensor([0.25, 0.25 + direction], dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"event_fn must not be 0 where the solve begins, got 0 .* at t = 0\.25: .*1e-7"
    ):
        event(event_fn, method, t=t)
    # Once by torchdiffeq.
    assert len(calls) == 2


def test_beside_the_event_the_next_one_is_found() -> None:
    """A ball that has just bounced, moved as the message says, next hits the floor after 2 v / g = 0.4."""

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], torch.full_like(y[1], -10.0)])

    def landing(height: float) -> float:
        y0 = torch.tensor([height, 2.0], dtype=torch.float64)
        solved = torchdiffeq.odeint(
            fall, y0, T, method="leapfrog", options={"step_size": 0.01}, event_fn=lambda t, y: y[0]
        )
        return float(solved[0])

    with pytest.raises(ValueError, match="add 1e-7 to its height"):
        landing(0.0)
    assert landing(1e-7) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("event_fn", "direction", "time"),
    [
        (lambda t, y: math.nan * y[0], 1, "0"),
        (lambda t, y: torch.stack([y[0], math.nan * y[0]]), 1, "0"),
        # Later: at the first node beyond 0.65, and in the search between two nodes.
        (lambda t, y: torch.sqrt(0.65 - t.abs()), 1, "0.7"),
        (lambda t, y: torch.sqrt(0.65 - t.abs()), -1, "-0.7"),
        (lambda t, y: torch.where((t - 0.65).abs() < 0.02, math.nan, 0.64 - t), 1, "0.65"),
    ],
)
def test_not_a_number_is_an_error(event_fn: Any, direction: int, time: str, method: str) -> None:
    with pytest.raises(ValueError, match=rf"event_fn must return numbers, got NaN at t = {time}$"):
        event(event_fn, method, t=direction * T)


def test_a_state_that_is_not_a_number_is_told_from_an_event_that_is_not() -> None:
    with pytest.raises(ValueError, match=r"got NaN at t = 0\.2, where y is not finite itself; look at func"):
        torchdiffeq.odeint(
            lambda t, y: -y if t < 0.05 else y * math.nan,
            Y0,
            T,
            method="leapfrog",
            options={"step_size": 0.1},
            event_fn=lambda t, y: y[0] - 0.5,
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float32])
def test_every_real_dtype_changes_its_sign(dtype: torch.dtype) -> None:
    assert event(lambda t, y: (t < 0.33).to(dtype)) == pytest.approx(0.33, abs=1e-8)


@pytest.mark.parametrize("method", ["leapfrog", "rk4"])
@pytest.mark.parametrize(
    ("event_fn", "error", "message"),
    [
        (3, TypeError, r"event_fn must be a callable \(t, y\) -> tensor, got 3"),
        (lambda t, y: 1.0, TypeError, "event_fn must return a real tensor, got 1.0"),
        (lambda t, y: None, TypeError, "event_fn must return a real tensor, got None"),
        (lambda t, y: 1j * y, TypeError, "event_fn must return a real tensor, got dtype torch.complex128"),
        (lambda t, y: y[:0], ValueError, r"event_fn must return at least one number, got shape \(0,\)"),
        (lambda t, y: y if t == 0 else 0.5, TypeError, "event_fn must return a real tensor, got 0.5"),
    ],
)
def test_what_is_no_event_function(event_fn: Any, error: type[Exception], message: str, method: str) -> None:
    with pytest.raises(error, match=message):
        event(event_fn, method, torchdiffeq_lmm.odeint)
