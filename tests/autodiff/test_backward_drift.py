"""Reversible solves that drift: an error, or checkpoints, never a wrong gradient."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from backward import DIM, Plain, assert_same, draw, loss, solve
from methods import slow_but
from torch import Tensor

from torchdiffeq_lmm import DriftError, Reversible


def decay(rate: Tensor, steps: int, backward: object, start: Sequence[float] = (1.0,)) -> Tensor:
    y0 = torch.tensor(start, dtype=rate.dtype)
    return solve(lambda t, y: -rate * y, y0, backward, (0.0, 1.0), steps, params=[rate])


def of_rate(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 15.0), (torch.float64, 25.0)])
def test_drift_raises_and_is_reported(dtype: torch.dtype, value: float) -> None:
    seen: list[float] = []
    states = decay(of_rate(value, dtype), 500, Reversible(anchors=0, report=seen.append))
    with pytest.raises(DriftError, match="backward='reversible' ran the solution back to a state that is off by"):
        states[-1].sum().backward()
    assert len(seen) == 1
    assert seen[0] > torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 15.0), (torch.float64, 25.0)])
@pytest.mark.parametrize("grad_filter", slow_but(["auto"], [None, "auto"]))
def test_drift_falls_back_to_checkpoints(dtype: torch.dtype, value: float, grad_filter: str | None) -> None:
    grads, seen = [], []
    for backward in ("autograd", Reversible(anchors=0, on_drift="checkpoint", report=seen.append)):
        rate, y0 = of_rate(value, dtype), torch.ones(2, dtype=dtype, requires_grad=True)
        states = solve(
            lambda t, y, rate=rate: -rate * y, y0, backward, steps=500, params=[rate], grad_filter=grad_filter
        )
        grads.append(torch.autograd.grad(states[-1].sum(), (rate, y0)))
    assert_same(grads[1], grads[0], 3e-4 if dtype is torch.float32 else 1e-11)
    assert len(seen) == 1
    assert seen[0] > torch.finfo(dtype).eps ** 0.5


def test_anchors_keep_the_drift_small() -> None:
    drifts: dict[int, float] = {}
    for anchors in (0, 1, 8):
        rate = of_rate(15.0, torch.float64)
        way = Reversible(tolerance=1.0, anchors=anchors, report=lambda drift, n=anchors: drifts.update({n: drift}))
        decay(rate, 300, way)[-1].sum().backward()
    assert drifts[1] < 0.1 * drifts[0]
    assert drifts[8] < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_is_right_or_an_error(dtype: torch.dtype) -> None:
    outcomes = []
    for value in range(4, 30, 4):
        wanted = of_rate(value, dtype)
        decay(wanted, 300, "autograd")[-1].sum().backward()
        rate = of_rate(value, dtype)
        try:
            decay(rate, 300, Reversible(anchors=0))[-1].sum().backward()
        except RuntimeError:
            outcomes.append("raised")
            continue
        outcomes.append("right")
        error = float((rate.grad - wanted.grad).abs() / wanted.grad.abs())
        assert error < 100 * torch.finfo(dtype).eps ** 0.5, value
    assert set(outcomes) == {"right", "raised"}


def test_the_tolerance_is_that_of_the_user() -> None:
    seen: list[float] = []
    decay(of_rate(9.0), 500, Reversible(tolerance=10.0, anchors=0, report=seen.append))[-1].sum().backward()
    drift = seen[0]
    assert 1e-6 < drift < 10
    decay(of_rate(9.0), 500, Reversible(tolerance=1.01 * drift, anchors=0))[-1].sum().backward()
    with pytest.raises(RuntimeError, match="is tolerated"):
        decay(of_rate(9.0), 500, Reversible(tolerance=0.99 * drift, anchors=0))[-1].sum().backward()


def test_reports_are_made_of_every_backward_pass() -> None:
    seen: list[float] = []
    states = solve(Plain(), draw(2, DIM), Reversible(report=seen.append))
    assert seen == []
    for _ in range(2):
        loss(states).backward(retain_graph=True)
    assert len(seen) == 2
    assert seen[0] == seen[1] <= 1e-14


@pytest.mark.parametrize("on_drift", ["raise", "checkpoint"])
def test_what_is_not_a_number_drifts(on_drift: str) -> None:
    rate, seen = of_rate(1.0), []
    way = Reversible(tolerance=float("inf"), on_drift=on_drift, report=seen.append)
    states = solve(lambda t, y: torch.sqrt(0.5 - rate * t) * y, torch.ones(2), way, steps=40, params=[rate])
    if on_drift == "raise":
        with pytest.raises(RuntimeError, match="not all numbers"):
            states[-1].sum().backward()
    else:
        states[-1].sum().backward()
        assert rate.grad.isnan()
    assert len(seen) == 1
    assert np.isnan(seen[0])


def test_a_large_component_hides_no_drift_of_a_small_one() -> None:
    def gradient(backward: object) -> float:
        rate = of_rate(15.0)
        only_second = torch.tensor([0.0, 1.0])
        y0 = torch.tensor([1e6, 1.0])
        states = solve(lambda t, y: -rate * y * only_second, y0, backward, steps=300, params=[rate])
        states[-1][1].backward()
        return float(rate.grad)

    assert gradient(Reversible()) == pytest.approx(gradient("autograd"), rel=1e-4)
    with pytest.raises(RuntimeError, match="off by"):
        gradient(Reversible(anchors=0))
