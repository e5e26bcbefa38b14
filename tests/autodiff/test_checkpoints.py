"""Snapshots on the way, and the evaluations between them once more, against those of one whole run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.checkpoints import Checkpoints, between
from torchdiffeq_lmm.autodiff.rerun import Rerun, Snapshot, Snapshots
from torchdiffeq_lmm.autodiff.rng_state import ForwardContext, RngState
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import METHODS
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.unrolling import unroll

METHOD = {method.name: method for method in METHODS}
CPU = torch.device("cpu")
X0 = torch.tensor([0.4, -0.3], dtype=torch.float64)


class Recorder:
    """Evaluates a slope of a state's own number, and says when."""

    def __init__(self) -> None:
        self.recorded: list[float] = []
        self.evaluated: list[float] = []
        self.offset = 0.0

    def slope(self, time: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x + time) + self.offset + torch.rand(2, dtype=torch.float64)

    def record(self, time: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        assert torch.is_tensor(x)
        self.recorded.append(float(time))
        return self.slope(time, x), ("evaluation", float(time))

    def evaluate(self, time: Tensor, x: Tensor) -> Tensor:
        self.evaluated.append(float(time))
        return self.slope(time, x)


class Steps:
    """Explicit steps, or implicit ones by ten substitutions."""

    def __init__(self, evaluate: Callable[[int, Tensor, Tensor], Tensor], positions: list[float]) -> None:
        self._evaluate = evaluate
        self._positions = positions

    def __call__(self, state: int, x: Tensor) -> Tensor:
        return self._evaluate(state, torch.tensor(self._positions[state], dtype=torch.float64), x)

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: Any, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        increment = torch.zeros_like(x) if known is None else known
        slope = torch.zeros_like(x)
        for _ in range(3):
            slope = self(state, x + increment)
            increment = weight * slope + (torch.zeros_like(x) if known is None else known)
        return increment, slope

    def restart(self) -> None:
        pass


class Run:
    """A whole run, with its snapshots, states, slopes and what it takes to make it again."""

    def __init__(self, name: str, count: int, stride: int) -> None:
        torch.manual_seed(0)
        steps = 0.05 * (1 + 0.3 * torch.sin(torch.arange(count, dtype=torch.float64)))
        steps = torch.full_like(steps, 0.05) if name == "leapfrog_equal" else steps
        self.recurrence: Recurrence = unroll(METHOD[name], steps)
        self.recorder = Recorder()
        self.slopes: dict[int, Tensor] = {}
        self.states = {0: X0}
        snapshots = Snapshots(stride, None, CPU)
        history = History(X0)

        def evaluate(state: int, time: Tensor, x: Tensor) -> Tensor:
            self.slopes[state] = self.recorder.slope(time, x)
            return self.slopes[state]

        walk = Steps(evaluate, self.recurrence.positions)
        rows = self.recurrence.rows
        snapshots.pass_by(0, history)
        for state, x in march(history, rows, walk, walk.solve_implicit):
            self.states[state] = x
            if rows[state - 1].is_node and state < len(rows):
                snapshots.pass_by(state, history)
        self.snapshots = snapshots.taken
        self.end = history.x

    def rerun(self, keeps_values: bool = False) -> Rerun:
        return Rerun(
            self.recurrence,
            lambda evaluate: Steps(evaluate, self.recurrence.positions),
            self.recorder,
            ForwardContext(CPU),
            keeps_values,
        )

    def again(self, keeps_values: bool = False) -> Checkpoints:
        segments = between(self.snapshots, len(self.recurrence.rows), self.end)
        return Checkpoints(self.rerun(keeps_values), segments)


def test_snapshots_are_taken_at_every_stride_and_where_else_it_is_said() -> None:
    snapshots = Snapshots(3, 7, CPU)
    history = History(X0)
    due = [snapshots.pass_by(10 + node, history) for node in range(9)]
    assert [node for node, flag in enumerate(due) if flag] == [0, 3, 6, 7]
    assert [snapshot.state for snapshot in snapshots.taken] == [10, 13, 16, 17]
    assert snapshots.at(99, history).state == 99
    assert len(snapshots.taken) == 4


def test_a_snapshot_does_not_change_with_what_comes_after() -> None:
    history = History(X0, None, [X0], [X0, 2 * X0])
    snapshot = Snapshots(1, None, CPU).at(0, history)
    history.slopes.insert(0, 3 * X0)
    history.increments.clear()
    history.x = 5 * X0
    torch.rand(1)
    assert len(snapshot.history.slopes) == 2
    assert len(snapshot.history.increments) == 1
    assert snapshot.history.x is X0
    assert not snapshot.rng.equals(RngState.now(CPU))


@pytest.mark.parametrize("stride", [1, 3, 5, 100])
@pytest.mark.parametrize("name", ["leapfrog", "nystrom3", "ab1", "ab3", "ab5", "abm3", "am3", "bdf2", "bdf4"])
class TestCheckpoints:
    @pytest.mark.one_in(5)
    def test_evaluations_states_and_slopes_are_those_of_the_whole_run(self, name: str, stride: int) -> None:
        run = Run(name, 23, stride)
        torch.rand(17)
        before = torch.get_rng_state()
        again = run.again(keeps_values=True)
        at_node, evaluated = run.recurrence.nodes, run.recurrence.evaluated
        rows = run.recurrence.rows
        for state in range(len(rows), -1, -1):
            found = again.evaluation(state)
            assert (found is not None) == evaluated[state]
            if evaluated[state]:
                assert found == ("evaluation", run.recurrence.positions[state])
                assert torch.equal(again.slope(state), run.slopes[state])
            if state in at_node and 0 < state < len(rows):
                node = at_node.index(state)
                wanted = run.states[state] - run.states[at_node[node - 1]]
                torch.testing.assert_close(again.increment(node), wanted, rtol=0, atol=1e-14)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.one_in(5)
    def test_every_step_is_made_once_more(self, name: str, stride: int) -> None:
        run = Run(name, 23, stride)
        again = run.again()
        assert run.recorder.recorded == []
        for state in range(len(run.recurrence.rows), -1, -1):
            again.evaluation(state)
        per_implicit = [3 if row.implicit is not None else 0 for row in run.recurrence.rows]
        assert len(run.recorder.recorded) == sum(per_implicit) + sum(row.evaluates for row in run.recurrence.rows)
        assert run.recorder.evaluated == []

    def test_another_func_is_noticed(self, name: str, stride: int) -> None:
        run = Run(name, 23, stride)
        run.recorder.offset = 1e-4
        again = run.again()
        last = max(state for state, flag in enumerate(run.recurrence.evaluated) if flag)
        with pytest.raises(RuntimeError, match="func gave other values when it was evaluated again"):
            again.evaluation(last)

    @pytest.mark.one_in(5)
    def test_snapshots_can_be_taken_again(self, name: str, stride: int) -> None:
        run = Run(name, 23, stride)
        taken = run.rerun().snapshots(run.snapshots[0], stride)
        wanted = [snapshot for snapshot in run.snapshots if snapshot.state < len(run.recurrence.rows)]
        assert [snapshot.state for snapshot in taken][: len(wanted)] == [snapshot.state for snapshot in wanted]
        for got, known in zip(taken, wanted, strict=False):
            assert torch.equal(got.history.x, known.history.x)
            assert got.rng.equals(known.rng)
        assert run.recorder.recorded == []
        assert run.snapshots[0].history.slopes == []


def test_only_the_steps_of_one_stretch_are_alive() -> None:
    run = Run("ab2", 20, 5)
    again = run.again(keeps_values=True)
    held = []
    for state in range(19, -1, -1):
        again.evaluation(state)
        held.append(len(again._evaluations))
    assert max(held) <= 6


def test_what_differs_by_rounding_is_the_same() -> None:
    run = Run("ab2", 20, 5)
    run.recorder.offset = 1e-14
    again = run.again()
    assert again.evaluation(12) is not None


def test_a_state_that_is_not_a_number_is_no_other_state() -> None:
    run = Run("ab2", 20, 5)
    lost = SimpleNamespace(**run.snapshots[3]._asdict())
    lost.history = History(torch.full_like(X0, torch.nan))
    snapshots = [*run.snapshots[:3], Snapshot(lost.state, lost.history, lost.rng)]
    assert Checkpoints(run.rerun(), between(snapshots, len(run.recurrence.rows), run.end)).evaluation(11) is not None


def test_a_state_without_entries() -> None:
    recurrence = unroll(METHOD["ab2"], torch.full((6,), 0.1, dtype=torch.float64))
    recorder = SimpleNamespace(record=lambda time, x: (torch.zeros_like(x), "evaluation"))
    empty, random = torch.zeros(0, dtype=torch.float64), RngState.now(CPU)
    walk = Steps(lambda state, time, x: torch.zeros_like(x), recurrence.positions)
    snapshots, history = Snapshots(2, None, CPU), History(empty)
    snapshots.pass_by(0, history)
    for state, _ in march(history, recurrence.rows, walk, walk.solve_implicit):
        if recurrence.rows[state - 1].is_node:
            snapshots.pass_by(state, history)
    rerun = Rerun(recurrence, lambda e: Steps(e, recurrence.positions), recorder, ForwardContext(CPU), False)
    before_the_end = [snapshot for snapshot in snapshots.taken if snapshot.state < len(recurrence.rows)]
    again = Checkpoints(rerun, between(before_the_end, len(recurrence.rows), empty))
    for state in range(len(recurrence.rows) - 1, -1, -1):
        assert again.evaluation(state) == "evaluation" or not recurrence.evaluated[state]
    assert random.equals(RngState.now(CPU))
