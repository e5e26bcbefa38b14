"""torchdiffeq's callbacks and its option perturb."""

import math
from typing import Any

import pytest
import torch
import torchdiffeq
from leapfrog import NODES, loop, solve, tensor
from torch import Tensor, nn

# -------------------------------------------------------------------------------------------------------- callbacks


class WithCallback(nn.Module):
    """x' = -w x, with callbacks that record all that happens."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor(0.5))
        self.log: list[tuple[Any, ...]] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        self.log.append(("func", t.item()))
        return tuple(-self.w * part for part in y) if isinstance(y, tuple) else -self.w * y

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append(("step", t0.item(), y0, dt.item()))

    def callback_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append(("adjoint", t0.item(), y0, dt.item()))


@pytest.mark.parametrize("direction", [1, -1])
def test_callback_before_every_evaluation(direction: int) -> None:
    func, y0 = WithCallback(), tensor(1.0, 2.0)
    nodes = direction * NODES["irregular"]
    x = loop(lambda t, y: -0.5 * y, y0, nodes)
    solve(func, y0, nodes)
    assert [entry[0] for entry in func.log] == ["step", "func"] * (len(nodes) - 1)
    for n, (step, evaluation) in enumerate(zip(func.log[::2], func.log[1::2], strict=True)):
        assert step[1] == evaluation[1] == nodes[n].item()
        torch.testing.assert_close(step[2], x[n])
        # torchdiffeq's dt is positive in both directions.
        assert step[3] == pytest.approx(abs(nodes[n + 1] - nodes[n]).item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.25}, {"step_size": 0.3, "interp": "cubic"}], ids=str)
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_callbacks_as_eulers(is_tuple: bool, direction: int, options: dict[str, Any]) -> None:
    """The same calls, with the same times and steps, as torchdiffeq's own method makes."""
    y0 = (tensor(1.0), torch.ones(2, 2, dtype=torch.float64)) if is_tuple else tensor(1.0, 2.0)
    t = direction * tensor(0.0, 0.5, 1.0)
    logs = {}
    for method in ("euler", "leapfrog"):
        func = WithCallback()
        torchdiffeq.odeint(func, y0, t, method=method, options=options or None)
        logs[method] = [entry for entry in func.log if entry[0] == "step"]
    assert len(logs["leapfrog"]) == len(logs["euler"])
    for ours, theirs in zip(logs["leapfrog"], logs["euler"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=1e-12)
        assert ours[3] == pytest.approx(theirs[3], abs=1e-12)
        assert isinstance(ours[2], tuple) == is_tuple
        if is_tuple:
            assert [part.shape for part in ours[2]] == [part.shape for part in theirs[2]]
    first = logs["leapfrog"][0][2]
    assert all(torch.equal(a, b) for a, b in zip(first, y0, strict=True))


def test_adjoint_callback() -> None:
    func = WithCallback()
    t = tensor(0.0, 0.5, 1.0)
    out = torchdiffeq.odeint_adjoint(func, tensor(1.0, 2.0), t, method="leapfrog", options={"step_size": 0.25})
    assert [entry[0] for entry in func.log] == ["step", "func"] * 4
    func.log.clear()
    out[-1].sum().backward()
    steps = [entry for entry in func.log if entry[0] == "adjoint"]
    assert [entry[1] for entry in steps] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [entry[3] for entry in steps] == pytest.approx([0.25] * 4)
    assert all(isinstance(entry[2], tuple) for entry in steps)
    assert not [entry for entry in func.log if entry[0] == "step"]


def test_callbacks_that_fixed_steps_do_not_have_are_warned_of() -> None:
    func = WithCallback()
    func.callback_accept_step = lambda t0, y0, dt: None
    with pytest.warns(UserWarning, match="does not support callbacks .*callback_accept_step"):
        solve(func, tensor(1.0), tensor(0.0, 1.0))


# ---------------------------------------------------------------------------------------------------------- perturb


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_evaluates_on_the_inner_side_of_nodes(dtype: torch.dtype, direction: int) -> None:
    times: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        times.append(t)
        return -y

    t = direction * torch.tensor([0.0, 0.25, 0.5, 1.0])
    solve(func, torch.ones(2, dtype=dtype), t, perturb=True)
    inward = torch.tensor([direction * 9.0], dtype=dtype)
    assert [s.item() for s in times] == torch.nextafter(t[:-1].to(dtype), inward.expand(3)).tolist()
    assert all(s.dtype is dtype for s in times)


@pytest.mark.parametrize("direction", [1, -1])
def test_perturb_at_a_jump(direction: int) -> None:
    """f jumps at a node. Beside the node f takes the value of the step that begins there, exactly at it another one."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        later, at = direction * t > 0.5, t == direction * 0.5
        return direction * torch.where(at, 100.0, torch.where(later, 3.0, 1.0)) * torch.ones_like(y)

    nodes = direction * torch.linspace(0, 1, 5, dtype=torch.float64)
    slopes = [1.0, 1.0, 3.0, 3.0]
    expected = loop(lambda t, y: direction * slopes[round(4 * abs(t.item()))] * torch.ones_like(y), tensor(0.0), nodes)
    torch.testing.assert_close(solve(func, tensor(0.0), nodes, perturb=True), expected)
    slopes[2] = 100.0
    expected = loop(lambda t, y: direction * slopes[round(4 * abs(t.item()))] * torch.ones_like(y), tensor(0.0), nodes)
    torch.testing.assert_close(solve(func, tensor(0.0), nodes), expected)


@pytest.mark.parametrize("direction", [1, -1])
def test_perturb_takes_the_end_of_a_cubic_from_the_left(direction: int) -> None:
    times: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        times.append(t.item())
        return torch.ones_like(y)

    solve(func, tensor(0.0), direction * tensor(0.0, 0.3, 1.0), step_size=0.25, interp="cubic", perturb=True)
    begin = [math.nextafter(direction * s, direction * 9) for s in (0.0, 0.25, 0.5, 0.75)]
    end = math.nextafter(direction * 0.5, 0)
    assert sorted(times, key=abs) == sorted([*begin, end], key=abs)
