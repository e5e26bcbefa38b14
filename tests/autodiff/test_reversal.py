"""Leapfrog run backwards: the way back is the way forth, and the drift says where it is not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.rerun import Rerun, Snapshots
from torchdiffeq_lmm.autodiff.reversal import DriftError, Reversal, is_reversible, reversed_row
from torchdiffeq_lmm.autodiff.rng_state import ForwardContext
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import METHODS
from torchdiffeq_lmm.schemes.unrolling import unroll

METHOD = {method.name: method for method in METHODS}
CPU = torch.device("cpu")
Slope = Callable[[Tensor, Tensor], Tensor]


def turning(time: Tensor, x: Tensor) -> Tensor:
    return torch.stack([x[1], -torch.sin(x[0])]) * (1 + 0.3 * torch.cos(time))


class Recorder:
    def __init__(self, slope: Slope) -> None:
        self.slope = slope
        self.times: list[float] = []

    def record(self, time: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        self.times.append(float(time))
        return self.slope(time, x), ("evaluation", float(time), x.clone())

    def evaluate(self, time: Tensor, x: Tensor) -> Tensor:
        return self.slope(time, x)


class Steps:
    def __init__(self, evaluate: Callable[[int, Tensor, Tensor], Tensor], positions: list[float]) -> None:
        self._evaluate = evaluate
        self._positions = positions

    def __call__(self, state: int, x: Tensor) -> Tensor:
        return self._evaluate(state, torch.tensor(self._positions[state], dtype=torch.float64), x)

    def solve_implicit(self, *args: object) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def restart(self) -> None:
        pass


class Run:
    """A solve forth, all its states, and the way back."""

    def __init__(
        self,
        steps: Tensor,
        stride: int,
        slope: Slope = turning,
        x0: tuple[float, ...] = (0.6, 0.2),
        tolerance: float = 1e-8,
    ) -> None:
        self.recurrence = unroll(METHOD["leapfrog"], steps)
        history = History(torch.tensor(x0, dtype=torch.float64))
        self.states, self.slopes = [history.x], {}
        snapshots = Snapshots(stride, len(steps) - 1, CPU)

        def evaluate(state: int, time: Tensor, x: Tensor) -> Tensor:
            self.slopes[state] = slope(time, x)
            return self.slopes[state]

        walk = Steps(evaluate, self.recurrence.positions)
        snapshots.pass_by(0, history)
        for state, x in march(history, self.recurrence.rows, walk, walk.solve_implicit):
            self.states.append(x)
            if state < len(steps):
                snapshots.pass_by(state, history)
        self.anchors = [*snapshots.taken, snapshots.at(len(steps), history)]
        self.recorder = Recorder(slope)
        self.rerun = Rerun(
            self.recurrence,
            lambda evaluate: Steps(evaluate, self.recurrence.positions),
            self.recorder,
            ForwardContext(CPU),
            keeps_values=True,
        )
        self.back = Reversal(self.rerun, self.anchors, tolerance)

    def all_the_way(self) -> None:
        for state in range(len(self.states) - 2, -1, -1):
            self.back.evaluation(state)


def equal(count: int, h: float = 0.05) -> Tensor:
    return torch.full((count,), h, dtype=torch.float64)


GRIDS = {
    "equal": equal(24),
    "truncated": torch.cat([equal(23), equal(1, 0.011)]),
    "growing": 0.03 * torch.exp(0.03 * torch.arange(24, dtype=torch.float64)),
    "wild": 0.05 * (1 + 0.4 * torch.sin(2.3 * torch.arange(24, dtype=torch.float64))),
}


def test_leapfrog_alone_can_be_undone() -> None:
    assert [method.name for method in METHODS if is_reversible(method)] == ["leapfrog"]


def test_a_reversed_row_undoes_a_row() -> None:
    recurrence = unroll(METHOD["leapfrog"], GRIDS["wild"])
    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    before = torch.tensor([0.1, 0.4], dtype=torch.float64)
    slope = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for row in recurrence.rows[1:]:
        forth = History(x, before, [], [])
        ((_, after),) = march(forth, [row], lambda n, x: slope, None)
        back = History(x, after, [], [])
        ((_, again),) = march(back, [reversed_row(row)], lambda n, x: slope, None)
        torch.testing.assert_close(again, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("stride", [1, 2, 5, 8, 24, 100])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.one_in(5)
def test_the_way_back_is_the_way_forth(grid: str, stride: int) -> None:
    run = Run(GRIDS[grid], stride)
    last = len(run.states) - 1
    assert run.back.evaluation(last) is None
    for state in range(last - 1, -1, -1):
        for _ in range(2):
            name, time, x = run.back.evaluation(state)
        assert (name, time) == ("evaluation", run.recurrence.positions[state])
        torch.testing.assert_close(x, run.states[state], rtol=0, atol=1e-12)
        torch.testing.assert_close(run.back.slope(state), run.slopes[state], rtol=0, atol=1e-12)
        if state:
            wanted = run.states[state] - run.states[state - 1]
            torch.testing.assert_close(run.back.increment(state), wanted, rtol=0, atol=1e-12)
    assert run.back.drift < 1e-13
    assert run.recorder.times == [run.recurrence.positions[state] for state in range(last - 1, -1, -1)]


@pytest.mark.parametrize("count", [2, 3])
def test_few_steps(count: int) -> None:
    for stride in (1, 2, 3):
        run = Run(equal(count), stride)
        run.all_the_way()
        assert len(run.recorder.times) == count


def test_states_may_be_left_out() -> None:
    run = Run(equal(24), 7)
    for state in (20, 13, 3, 0):
        assert torch.allclose(run.back.evaluation(state)[2], run.states[state], rtol=0, atol=1e-13)


def test_drift_is_measured_against_what_is_known() -> None:
    run = Run(equal(24), 24)
    run.anchors[0].history.x = run.states[0] * (1 + 1e-10)
    run.all_the_way()
    assert run.back.drift == pytest.approx(1e-10, rel=0.3)


@pytest.mark.parametrize("stride", [5, 24])
def test_drift_beyond_the_tolerance_is_an_error(stride: int) -> None:
    run = Run(equal(24), stride, tolerance=1e-8)
    run.recorder.slope = lambda time, x: turning(time, x) + 1e-3
    with pytest.raises(DriftError, match=r"off by .*, relative to its entries, where 1e-08 is tolerated"):
        run.all_the_way()
    assert run.back.drift > 1e-8
    tolerant = Run(equal(24), stride, tolerance=1.0)
    tolerant.recorder.slope = run.recorder.slope
    tolerant.all_the_way()
    assert 1e-8 < tolerant.back.drift < 1


def test_drift_that_is_not_a_number_stays() -> None:
    run = Run(equal(24), 5, tolerance=math.inf)
    run.recorder.slope = lambda time, x: turning(time, x) * (torch.nan if time == 12 else 1.0)
    with pytest.raises(DriftError, match="not all numbers"):
        run.all_the_way()
    assert math.isnan(run.back.drift)


def test_drift_grows_as_the_parasitic_mode_does_and_anchors_stop_it() -> None:
    drifts = []
    for stride in (120, 40, 10):
        run = Run(equal(120), stride, slope=lambda time, x: -3 * x, x0=(1.0, 0.3), tolerance=math.inf)
        run.all_the_way()
        drifts.append(run.back.drift)
    assert drifts[0] > 10 * drifts[1]
    assert drifts[2] < 1e-13


def test_a_zero_state_and_an_empty_one_do_not_drift() -> None:
    for x0 in ((0.0, 0.0), ()):
        run = Run(equal(24), 5, slope=lambda time, x: torch.zeros_like(x), x0=x0)
        run.all_the_way()
        assert run.back.drift == 0
