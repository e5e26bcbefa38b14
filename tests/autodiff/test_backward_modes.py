"""The backward modes as a user gives them: what they say of themselves, and what is refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchdiffeq
from backward import AGAIN, DIM, Plain, assert_same, draw, loss, solve
from methods import NAMES, slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, Reversible
from torchdiffeq_lmm.autodiff.backward_modes import BACKWARD_MODES, resolve_backward
from torchdiffeq_lmm.autodiff.checkpoints import Checkpoints, between
from torchdiffeq_lmm.autodiff.rerun import Snapshots
from torchdiffeq_lmm.autodiff.stored_evaluations import Autograd, Record, WithEvaluations

# ------------------------------------------------------------------------------------------------------- the policies


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Checkpoint(0), ValueError, "count must be at least 1, got 0"),
        (lambda: Checkpoint(-3), ValueError, "count must be at least 1, got -3"),
        (lambda: Checkpoint(2.0), TypeError, "count must be an int or None, got 2.0"),
        (lambda: Checkpoint(True), TypeError, "count must be an int or None, got True"),
        (lambda: Checkpoint("3"), TypeError, "count must be an int or None, got '3'"),
        (lambda: Checkpoint(tolerance="1"), TypeError, "tolerance must be a real number or None, got '1'"),
        (lambda: Checkpoint(tolerance=-1.0), ValueError, "tolerance must not be negative, got -1.0"),
        (lambda: Reversible(tolerance="1"), TypeError, "tolerance must be a real number or None, got '1'"),
        (lambda: Reversible(tolerance=1j), TypeError, "tolerance must be a real number"),
        (lambda: Reversible(tolerance=True), TypeError, "tolerance must be a real number"),
        (lambda: Reversible(tolerance=-1e-9), ValueError, "tolerance must not be negative, got -1e-09"),
        (lambda: Reversible(tolerance=float("nan")), ValueError, "tolerance must not be negative, got nan"),
        (lambda: Reversible(on_drift="ignore"), ValueError, "on_drift must be one of ('raise', 'checkpoint')"),
        (lambda: Reversible(report="drift"), TypeError, "report must be a callable that takes a float"),
        (lambda: Reversible(anchors=1.5), TypeError, "anchors must be an int, got 1.5"),
        (lambda: Reversible(anchors=False), TypeError, "anchors must be an int, got False"),
        (lambda: Reversible(anchors=-1), ValueError, "anchors must not be negative, got -1"),
    ],
)
def test_a_way_refuses_what_it_cannot_mean(make: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 99, 100, 101, 5000])
@pytest.mark.parametrize("count", [None, 1, 2, 7, 10**6])
def test_a_checkpoint_keeps_no_more_states_than_it_says(steps: int, count: int | None) -> None:
    stride = Checkpoint(count).stride(steps)
    kept = len(range(0, steps, stride))
    assert stride >= 1
    assert kept <= (count or np.ceil(np.sqrt(steps)))
    assert Checkpoint(steps).stride(steps) == 1
    assert Checkpoint(1).stride(steps) == steps


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
@pytest.mark.parametrize("anchors", [0, 1, 8, 10**6])
def test_a_reversible_keeps_no_more_anchors_than_it_says(steps: int, anchors: int) -> None:
    stride = Reversible(anchors=anchors).stride(steps)
    assert stride >= 1
    assert len(range(stride, steps, stride)) <= anchors
    assert Reversible(anchors=0).stride(steps) == steps


def test_names_stand_for_modes() -> None:
    assert list(BACKWARD_MODES.values()) == [Autograd(), Reversible(), Checkpoint()]
    for name, mode in BACKWARD_MODES.items():
        assert resolve_backward(name) == mode
    assert resolve_backward(Checkpoint(4)) == Checkpoint(4)


@dataclass(frozen=True)
class FirstState:
    """A mode of somebody else's: one state is kept, and all steps are made again from it."""

    evaluates_again = True

    def check(self, method: object, given: object) -> None:
        pass

    def snapshots(self, steps: int, device: torch.device) -> Snapshots:
        return Snapshots(steps, None, device)

    def evaluations(self, record: Record) -> WithEvaluations:
        rerun, taken, x = record.rerun, record.snapshots.taken, record.history.x
        segments = list(between(taken, rerun.recurrence.nodes[-1], x))
        assert len(segments) == 1
        return lambda gradients: gradients(Checkpoints(rerun, iter(segments)))


@pytest.mark.parametrize("method", slow_but(["leapfrog", "abm3"], ["leapfrog", "abm3", "bdf2"]))
def test_a_new_mode_is_an_entry_in_the_table(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKWARD_MODES, "first_state", FirstState())
    found = {}
    for backward in ("autograd", "first_state", FirstState()):
        func = Plain()
        y0 = draw(DIM).requires_grad_()
        solve(func, y0, backward, method=method)[-1].square().sum().backward()
        found[backward] = [y0.grad, *(parameter.grad for parameter in func.parameters())]
    for backward in ("first_state", FirstState()):
        torch.testing.assert_close(found[backward], found["autograd"], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="'first_state', a Checkpoint, a FirstState or a Reversible"):
        solve(Plain(), draw(DIM), "second_state", method=method)


@pytest.mark.parametrize(
    ("backward", "error", "message"),
    [
        ("adjoint", ValueError, "backward must be 'autograd', 'reversible', 'checkpoint', a Checkpoint or a Rev"),
        (3, TypeError, "got 3"),
        (Checkpoint, TypeError, "got <class"),
        (["checkpoint"], TypeError, "got ['checkpoint']"),
        ("reversible", ValueError, "needs a method that can be run backwards, as 'leapfrog' can, got method 'ab3'"),
        (Reversible(anchors=2), ValueError, "use backward='checkpoint'"),
    ],
)
def test_resolve_backward_names_what_is_wrong(backward: object, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        solve(Plain(), draw(DIM), backward, method="ab3")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_only_leapfrog_runs_backwards() -> None:
    for name in NAMES:
        if name == "leapfrog":
            solve(Plain(), draw(DIM), "reversible", method=name)
        else:
            with pytest.raises(ValueError, match="can be run backwards"):
                solve(Plain(), draw(DIM), "reversible", method=name)


@pytest.mark.parametrize("method", [None, "dopri5", "rk4", "midpoint"])
def test_methods_of_others_have_no_such_way(method: str | None) -> None:
    func, y0, t = Plain(), draw(DIM), torch.tensor([0.0, 1.0], dtype=torch.float64)
    name = method or "dopri5"
    with pytest.raises(ValueError, match=f"backward is for the methods of torchdiffeq_lmm, got method '{name}'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, backward="checkpoint")
    with pytest.raises(ValueError, match=f"adjoint_params is for the methods of torchdiffeq_lmm, got method '{name}'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, adjoint_params=tuple(func.parameters()))
    with pytest.raises(ValueError, match="backward must be 'autograd'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, backward="nonsense")


def test_two_answers_to_one_question_are_refused() -> None:
    func, y0, t = Plain(), draw(DIM), torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="backward is given twice"):
        torchdiffeq_lmm.odeint(func, y0, t, method="ab2", backward="checkpoint", options={"backward": "autograd"})
    with pytest.raises(ValueError, match="adjoint_params is given twice"):
        torchdiffeq_lmm.odeint(
            func, y0, t, method="ab2", backward="checkpoint", adjoint_params=(), options={"adjoint_params": ()}
        )


def test_adjoint_params_are_asked_for_where_they_are_needed_and_only_there() -> None:
    func, y0 = Plain(), draw(DIM)
    for callable_ in (func.forward, lambda t, y: func(t, y)):
        with pytest.raises(ValueError, match="adjoint_params must be given where func is not"):
            solve(callable_, y0)
    with pytest.raises(ValueError, match="adjoint_params must not be given where backward is 'autograd'"):
        torchdiffeq_lmm.odeint(func, y0, torch.tensor([0.0, 1.0]).double(), method="ab2", adjoint_params=())
    with pytest.raises(TypeError, match="must be an iterable of tensors, got a tensor"):
        solve(func, y0, params=func.layer.weight)
    with pytest.raises(TypeError, match="must be an iterable of tensors, got 3 as number 1"):
        solve(func, y0, params=[func.layer.weight, 3])


@pytest.mark.parametrize("backward", AGAIN)
def test_a_module_must_list_what_it_does_not_own(backward: str) -> None:
    func, outside = Plain(), draw(DIM).requires_grad_()

    class More(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func = func

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.func(t, y) * outside

    with pytest.raises(ValueError, match="adjoint_params must be given where func depends on more than the parameters"):
        loss(solve(More(), draw(2, DIM), backward)).backward()
    listed = [*func.parameters(), outside]
    got = torch.autograd.grad(loss(solve(More(), draw(2, DIM), backward, params=listed)), listed)
    assert_same(got, torch.autograd.grad(loss(solve(More(), draw(2, DIM), "autograd")), listed))


@pytest.mark.parametrize("backward", AGAIN)
def test_a_module_that_uses_another_tensor_late_must_list_it_too(backward: str) -> None:
    outside = draw(DIM).requires_grad_()

    class Late(Plain):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(t, y) * (outside if t > 0.5 else 1.0)

    with pytest.raises(ValueError, match="adjoint_params must be given"):
        loss(solve(Late(), draw(2, DIM), backward)).backward()


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(3), Reversible(anchors=1)])
def test_odeint_adjoint_has_its_own_way(backward: object) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="backward must be 'autograd' in odeint_adjoint"):
        torchdiffeq.odeint_adjoint(Plain(), draw(DIM), t, method="leapfrog", options={"backward": backward})


@pytest.mark.parametrize("backward", AGAIN)
def test_second_derivatives_are_refused(backward: str) -> None:
    y0 = draw(DIM).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss(solve(Plain(), y0, backward)), y0, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("backward", AGAIN)
def test_forward_mode_and_transforms_are_refused(backward: str) -> None:
    func = Plain()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not support forward-mode"),
    ):
        solve(func, torch.autograd.forward_ad.make_dual(draw(DIM), draw(DIM)), backward)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: loss(solve(func, y, backward)))(draw(DIM))
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda y: loss(solve(func, y, backward)))(draw(2, DIM))


@pytest.mark.parametrize("method", ["ab3", "bdf2"])
def test_a_tolerance_accepts_a_func_that_is_not_quite_the_same_again(method: str) -> None:
    func = Plain()
    y0 = draw(DIM).requires_grad_()
    found = {}
    for tolerance in (None, 1e-3):
        x = solve(func, y0, Checkpoint(2, tolerance), method=method)[-1]
        with torch.no_grad():
            # In a way that versions do not show, as sums do whose order changes.
            for parameter in func.parameters():
                parameter.data.mul_(1 + 1e-6)
        found[tolerance] = x
    with pytest.raises(RuntimeError, match=r"differ by up to .* give Checkpoint a larger tolerance"):
        found[None].sum().backward()
    found[1e-3].sum().backward()
    assert y0.grad is not None
