"""What users ask of the adaptive methods' steps, and what they are told where that is wrong."""

import math
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
    lengths,
    methods,
    pendulum,
    solve,
)
from methods import slow_but
from scipy.integrate import solve_ivp
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import SolveReport

directions = pytest.mark.parametrize("direction", [1, -1])


def reported(f: Any, y0: Any, t: Any, method: str, **options: Any) -> tuple[Any, SolveReport]:
    report = SolveReport()
    with torch.no_grad():
        return solve(f, y0, t, method, report=report, **options), report


# ----------------------------------------------------------------------------------------------------- the steps' size


@methods
@directions
def test_first_step(direction: int, method: str) -> None:
    func = Counted(decaying)
    for first_step in (1e-3, f64(1e-3)[0]):
        func.log.clear()
        with torch.no_grad():
            solve(func, f64(2.0), (0.0, 1.0 * direction), method, first_step=first_step)
        assert func.log[0][0] == "step"
        assert func.log[0][3] == 1e-3


@methods
def test_a_first_step_that_is_too_long_becomes_shorter(method: str) -> None:
    y, report = reported(decaying, f64(2.0), (0.0, 3.0), method, first_step=1.0)
    assert report.rejected > 0
    assert float(y[-1]) == pytest.approx(float(decayed(f64(3.0))), abs=1e-5)


@methods
def test_steps_as_short_as_min_step_are_kept_whatever_their_error(method: str) -> None:
    y, report = reported(decaying, f64(2.0), (0.0, 1.0), method, rtol=1e-12, atol=1e-12, min_step=0.1)
    assert report.rejected == 0
    # Of the rounding of times two half steps may come.
    assert report.steps in (10, 11)
    assert lengths(report)[:-2] == pytest.approx(0.1)
    assert 1e-6 < abs(float(y[-1] - decayed(f64(1.0)))) < 0.1


@methods
def test_max_step(method: str) -> None:
    free, bound = (
        reported(decaying, f64(2.0), (0.0, 3.0), method, rtol=1e-3, atol=1e-3, **options)[1]
        for options in ({}, {"max_step": 0.07})
    )
    assert lengths(free).max() > 0.1
    assert lengths(bound).max() <= 0.07 * (1 + 1e-12)


@fast_by_adams
def test_the_largest_and_smallest_factors(method: str) -> None:
    """Of one step to the next; after a step was rejected, of one attempt to the next."""
    _, report = reported(decaying, f64(2.0), (0.0, 3.0), method, first_step=1e-6, ifactor=1.5)
    assert (lengths(report)[1:] / lengths(report)[:-1]).max() <= 1.5 * (1 + 1e-6)
    func = Counted(decaying)
    with torch.no_grad():
        solve(func, f64(2.0), (0.0, 30.0), method, first_step=10.0, dfactor=0.6)
    attempts = [entry[3] for entry in func.log if entry[0] == "step"]
    rejected = func.count("reject")
    assert rejected >= 5
    assert np.divide(attempts[1:6], attempts[:5]) == pytest.approx([0.6] * 5)


@fast_by_adams
def test_more_safety_means_shorter_steps(method: str) -> None:
    counts = [
        reported(pendulum, f64(1.0, 0.5), (0.0, 3.0), method, safety=safety)[1].steps for safety in (0.9, 0.5, 0.25)
    ]
    assert counts == sorted(set(counts))


@methods
@pytest.mark.parametrize("max_order", [1, 2, 4])
@pytest.mark.one_in(3)
def test_max_order(method: str, max_order: int) -> None:
    _, report = reported(pendulum, f64(1.0, 0.5), (0.0, 2.0), method, rtol=1e-4, atol=1e-4, max_order=max_order)
    assert max(report.orders) == max_order


@methods
def test_a_tight_tolerance_uses_high_orders_where_it_may(method: str) -> None:
    _, report = reported(pendulum, f64(1.0, 0.5), (0.0, 2.0), method, rtol=1e-9, atol=1e-9)
    assert max(report.orders) >= 5


@methods
@directions
def test_max_num_steps_names_the_time(method: str, direction: int) -> None:
    with pytest.raises(RuntimeError, match=r"max_num_steps 7 is exceeded at t = (-?[0-9.e-]+)") as raised:
        solve(decaying, f64(2.0), (0.0, 3.0 * direction), method, max_num_steps=7, first_step=1e-3)
    assert "larger rtol and atol" in str(raised.value)
    time = float(str(raised.value).split("t = ")[1].split(",")[0])
    assert 0 < time * direction < 3


@methods
def test_the_report_tells_of_a_solve_that_failed(method: str) -> None:
    report, f = SolveReport(), Counted(decaying)
    with pytest.raises(RuntimeError, match="max_num_steps"):
        solve(f, f64(2.0), (0.0, 3.0), method, max_num_steps=7, report=report)
    assert report.evaluations == len(f.times) > 7
    assert report.steps + report.rejected + report.unsolved == 7


@methods
def test_max_num_steps_counts_from_one_output_to_the_next(method: str) -> None:
    """As torchdiffeq does."""
    _, report = reported(decaying, f64(2.0), (0.0, 3.0), method)
    t, most = f64(0.0, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0), int(0.7 * report.steps)
    y, other = reported(decaying, f64(2.0), t, method, max_num_steps=most)
    assert other.steps == report.steps
    torch.testing.assert_close(y[:, 0], decayed(t), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="max_num_steps"):
        reported(decaying, f64(2.0), (0.0, 3.0), method, max_num_steps=most)


# -------------------------------------------------------------------------------------------------- step_t and jump_t


@fast_by_adams
@directions
@pytest.mark.parametrize("as_tensor", [True, False])
def test_step_t_are_nodes(method: str, direction: int, as_tensor: bool) -> None:
    stops = [1.7 * direction, 0.3 * direction, 0.30001 * direction]
    given = f64(*stops) if as_tensor else stops
    y, report = reported(decaying, f64(2.0), (0.0, 3.0 * direction), method, step_t=given)
    assert set(stops) <= set(report.times)
    assert float(y[-1]) == pytest.approx(float(decayed(f64(3.0 * direction))), rel=1e-4)
    # They are nodes alone; order and length go on.
    assert report.orders[report.times.index(stops[0])] > 1


@methods
def test_step_t_outside_is_no_matter(method: str) -> None:
    plain = reported(decaying, f64(2.0), (0.0, 1.0), method)[1]
    others = reported(decaying, f64(2.0), (0.0, 1.0), method, step_t=[-1.0, 0.0, 1.0, 7.0])[1]
    assert plain.times == others.times


JUMP = 0.7123


def switching(t: Tensor, y: Tensor) -> Tensor:
    """y' = 1 before the jump, -3 y after it."""
    return torch.ones_like(y) if float(t) < JUMP else -3 * y


def switched(t: float) -> float:
    return 1 + t if t < JUMP else (1 + JUMP) * math.exp(-3 * (t - JUMP))


@methods
@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.one_in(3)
def test_a_jump(method: str, as_tensor: bool) -> None:
    func = Counted(switching)
    t = torch.linspace(0, 2, 9, dtype=F64)
    y, report = reported(func, f64(1.0), t, method, jump_t=f64(JUMP) if as_tensor else [JUMP])
    torch.testing.assert_close(y[:, 0], f64(*(switched(time) for time in t.tolist())), rtol=1e-5, atol=1e-5)
    assert JUMP in report.times
    begins = report.times.index(JUMP)
    assert report.orders[begins] == 1
    # Seen from both sides, never there.
    assert JUMP not in func.times
    assert math.nextafter(JUMP, 0) in func.times
    assert math.nextafter(JUMP, 1) in func.times
    assert report.evaluations == len(func.times)
    assert report.rejected <= 6


@methods
def test_a_jump_in_reversed_time(method: str) -> None:
    func = Counted(switching)
    with torch.no_grad():
        y = solve(func, f64(switched(1.5)), (1.5, 1.0, 0.25), method, jump_t=f64(JUMP))
    assert y[:, 0].tolist() == pytest.approx([switched(1.5), switched(1.0), switched(0.25)], rel=1e-5)
    assert JUMP not in func.times


@fast_by_adams
def test_a_jump_is_cheaper_where_it_is_known(method: str) -> None:
    known, unknown = (
        reported(switching, f64(1.0), (0.0, 2.0), method, **options)[1] for options in ({"jump_t": [JUMP]}, {})
    )
    assert known.rejected < unknown.rejected
    assert known.evaluations < unknown.evaluations


@fast_by_adams
def test_to_begin_anew_at_many_jumps_takes_hardly_more_evaluations_than_lsodas(method: str) -> None:
    """As along the pieces of a path of data: y' = slope (2 + tanh(y)), with another slope in each piece."""
    slopes = [0.5, -0.8, 0.3, 0.9, -0.6, -0.2, 0.7, -0.4, 0.1, -0.9]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return slopes[min(int(t), 9)] * (2 + torch.tanh(y))

    report = SolveReport()
    with torch.no_grad():
        options = {"jump_t": list(range(1, 10)), "report": report}
        y = solve(func, f64(0.1), (0.0, 10.0), method, 1e-4, 1e-6, **options)
    state, evaluations = np.array([0.1]), 0
    for slope in slopes:
        found = solve_ivp(lambda t, y, s=slope: s * (2 + np.tanh(y)), (0, 1), state, "LSODA", rtol=1e-4, atol=1e-6)
        state, evaluations = found.y[:, -1], evaluations + found.nfev
    assert report.evaluations <= 1.3 * evaluations
    assert y[-1].item() == pytest.approx(float(state[0]), abs=2e-3)


@methods
def test_outputs_at_jumps_and_beside_them(method: str) -> None:
    t = [0.0, JUMP, math.nextafter(JUMP, 1), 1.0]
    y, _ = reported(switching, f64(1.0), t, method, jump_t=[JUMP])
    assert y[:, 0].tolist() == pytest.approx([switched(time) for time in t], rel=1e-5)


@methods
@directions
def test_a_jump_in_single_precision(method: str, direction: int) -> None:
    """Of which func is told the neighbours in single precision, on the right sides."""
    jump = torch.tensor([0.3])
    func = Counted(lambda t, y: direction * torch.where(direction * t < jump, torch.ones_like(y), -3 * y))
    t = direction * torch.linspace(0, 1, 11)
    with torch.no_grad():
        y = solve(func, torch.ones(1), t, method, 1e-5, 1e-6, jump_t=direction * jump)[:, 0]
    wanted = [1 + s if s < 0.3001 else 1.3 * math.exp(-3 * (s - 0.3)) for s in t.abs().tolist()]
    assert y.tolist() == pytest.approx(wanted, rel=1e-3)
    assert direction * float(jump) not in func.times
    neighbours = {direction * float(torch.nextafter(jump, torch.tensor([to]))) for to in (0.0, 1.0)}
    assert neighbours <= set(func.times)


@methods
def test_jumps_at_the_ends(method: str) -> None:
    func = Counted(lambda t, y: -y)
    y, _ = reported(func, f64(1.0), (0.0, 1.0), method, jump_t=[0.0, 1.0])
    assert float(y[-1]) == pytest.approx(math.exp(-1), rel=1e-5)
    assert 0.0 not in func.times
    assert 1.0 not in func.times


@methods
def test_a_time_is_not_both_a_node_and_a_jump(method: str) -> None:
    for direction in (1, -1):
        with pytest.raises(ValueError, match=rf"step_t and jump_t must not .*got {direction * 0.5} in both"):
            solve(
                decaying,
                f64(2.0),
                (0.0, 1.0 * direction),
                method,
                step_t=f64(0.5 * direction),
                jump_t=f64(0.5 * direction, 0.7 * direction),
            )


# ------------------------------------------------------------------------------------------- tolerances, norm, dtype


@fast_by_adams
def test_tolerances_of_every_entry(method: str) -> None:
    """An entry whose errors count little is no reason for short steps."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], 20 * torch.cos(20 * t) + 0 * y[1]])

    y0 = f64(1.0, 0.0)
    tight, loose = (
        reported(func, y0, (0.0, 2.0), method, rtol=rtol, atol=atol)
        for rtol, atol in ((1e-5, 1e-5), (f64(1e-5, 1e-2), f64(1e-5, 1e2)))
    )
    assert loose[1].steps < 0.6 * tight[1].steps
    for y, _ in (tight, loose):
        assert float(y[-1, 0]) == pytest.approx(math.exp(-2), rel=1e-3)
    assert float(tight[0][-1, 1]) == pytest.approx(math.sin(40), abs=1e-2)


@fast_by_adams
def test_tolerances_of_a_tuple(method: str) -> None:
    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[0], 20 * torch.cos(20 * t) + 0 * y[1]

    y0 = (f64(1.0), torch.zeros(2, 2, dtype=F64))
    tight = reported(func, y0, (0.0, 2.0), method, rtol=1e-5, atol=1e-5)[1]
    loose = reported(func, y0, (0.0, 2.0), method, rtol=(1e-5, 1e-2), atol=(1e-5, 1e2))[1]
    assert loose.steps < 0.6 * tight.steps


@methods
def test_the_norm_is_given_the_state_as_the_user_knows_it(method: str) -> None:
    seen: list[Any] = []

    def norm(y: Any) -> Tensor:
        seen.append(y)
        return y[0].abs().max() if isinstance(y, tuple) else y.abs().max()

    y0 = (f64(1.0), torch.ones(2, 2, dtype=F64))
    reported(lambda t, y: (-y[0], -y[1]), y0, (0.0, 1.0), method, norm=norm)
    assert seen
    assert all(isinstance(y, tuple) and [part.shape for part in y] == [(1,), (2, 2)] for y in seen)
    seen.clear()
    reported(lambda t, y: -y, torch.ones(3, 2, dtype=F64), (0.0, 1.0), method, norm=norm)
    assert seen
    assert all(y.shape == (3, 2) for y in seen)


@fast_by_adams
def test_the_norm_decides(method: str) -> None:
    """Of a norm that sees one entry alone the other one's errors do not count; and numbers are as good as tensors."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], 20 * torch.cos(20 * t) + 0 * y[1]])

    both, one = (
        reported(func, f64(1.0, 0.0), (0.0, 1.0), method, norm=norm)[1]
        for norm in (lambda y: float(y.abs().max()), lambda y: float(y[0].abs()))
    )
    assert one.steps < 0.6 * both.steps


@fast_by_adams
def test_the_largest_component_counts_by_default(method: str) -> None:
    """torchdiffeq's norm of a tuple: a large component does not dilute the errors of a small one."""

    def func(t: Tensor, y: Any) -> Any:
        return torch.cos(9 * t) + 0 * y[0], 0 * y[1]

    counts = [
        reported(func, (f64(1.0), torch.ones(size, dtype=F64)), (0.0, 2.0), method)[1].steps for size in (1, 10_000)
    ]
    assert counts[0] == counts[1]


@methods
def test_the_dtype_of_times(method: str) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Func(torch.nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            assert t.dtype is torch.float32
            return -y

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            seen.append((t0.dtype, dt.dtype))

    y0, t = torch.ones(2), torch.tensor([0.0, 1.0])
    for options, wanted in (({}, F64), ({"dtype": torch.float32}, torch.float32), ({"dtype": F64}, F64)):
        seen.clear()
        y = solve(Func(), y0, t, method, 1e-4, 1e-4, **options)
        assert set(seen) == {(wanted, wanted)}
        assert y.dtype is torch.float32
        assert float(y[-1, 0].detach()) == pytest.approx(math.exp(-1), abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ refusals


@methods
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"first_step": 0.0}, ValueError, "first_step must be positive and finite, got 0.0"),
        ({"first_step": -0.1}, ValueError, "first_step must be positive and finite, got -0.1"),
        ({"first_step": math.inf}, ValueError, "first_step must be positive and finite, got inf"),
        ({"first_step": math.nan}, ValueError, "first_step must be positive and finite, got nan"),
        ({"first_step": "0.1"}, TypeError, "first_step must be a real number, got '0.1'"),
        ({"first_step": True}, TypeError, "first_step must be a real number, got True"),
        ({"first_step": torch.ones(2)}, TypeError, "first_step must be a real number, got tensor"),
        ({"min_step": -1.0}, ValueError, "min_step must be at least 0 and finite, got -1.0"),
        ({"min_step": None}, TypeError, "min_step must be a real number, got None"),
        ({"max_step": 0.0}, ValueError, "max_step must be positive, got 0.0"),
        ({"min_step": 1.0, "max_step": 0.5}, ValueError, "min_step must be at most max_step, got 1.0 and 0.5"),
        ({"safety": 0.0}, ValueError, "safety must be positive and finite, got 0.0"),
        ({"ifactor": 0.9}, ValueError, "ifactor must be at least 1 and finite, got 0.9"),
        ({"dfactor": 0.0}, ValueError, "dfactor must be positive and at most 1 and finite, got 0.0"),
        ({"dfactor": 1.5}, ValueError, "dfactor must be positive and at most 1 and finite, got 1.5"),
        ({"max_num_steps": 0}, ValueError, "max_num_steps must be at least 1, got 0"),
        ({"max_num_steps": 2.0}, TypeError, "max_num_steps must be an int or None, got 2.0"),
        ({"max_order": 0}, ValueError, "max_order must be from 1 to (5 for method 'bdf'|12 for method 'adams'), got 0"),
        ({"max_order": 13}, ValueError, "max_order must be from 1 to .*, got 13"),
        ({"max_order": 2.0}, TypeError, "max_order must be an int or None, got 2.0"),
        ({"max_order": True}, TypeError, "max_order must be an int or None, got True"),
        ({"step_t": [[0.5]]}, ValueError, r"step_t must be one-dimensional, got shape \(1, 1\)"),
        ({"step_t": [0.5, 0.5]}, ValueError, "step_t must not have any repeated elements, got 0.5 more than once"),
        ({"step_t": [math.nan]}, ValueError, "step_t must be finite"),
        ({"step_t": "now"}, TypeError, "step_t must be a one-dimensional tensor or a sequence of real numbers"),
        ({"jump_t": [0.5, 0.5]}, ValueError, "jump_t must not have any repeated elements, got 0.5 more than once"),
        ({"norm": 2}, TypeError, "norm must be a callable that takes a state, got 2"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a real floating dtype, got torch.int64"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be a real floating dtype, got torch.complex64"),
        ({"dtype": float}, TypeError, "dtype must be a real floating dtype, got <class 'float'>"),
        ({"report": []}, TypeError, r"report must be a SolveReport or None, got \[\]"),
        ({"on_failure": "stop"}, ValueError, "on_failure must be one of .*, got 'stop'"),
        ({"newton": 3}, TypeError, "newton must be a Newton"),
        ({"batch_dims": -1}, ValueError, "batch_dims must be .*, got -1"),
        ({"grad_filter": "smooth"}, ValueError, "Smooth.*'leapfrog', got method"),
        ({"grad_filter": "leapfrog"}, ValueError, "leapfrog"),
        ({"backward": "reversible"}, ValueError, "reversible.*leapfrog"),
        ({"rtol": -1e-3}, ValueError, "rtol must be finite and not negative, got -0.001"),
        ({"rtol": math.nan}, ValueError, "rtol must be finite and not negative, got nan"),
        ({"atol": math.inf}, ValueError, "atol must be finite and not negative, got inf"),
        ({"atol": "small"}, TypeError, "atol must be a real number, or a real tensor that broadcasts with y0"),
        ({"rtol": torch.ones(3)}, ValueError, r"rtol must broadcast with y0, of shape \(1,\), got shape \(3,\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values(method: str, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    func = Counted(decaying)
    with pytest.raises(kind, match=words):
        solve(func, f64(2.0), (0.0, 1.0), method, **options)
    assert not func.times


@methods
@pytest.mark.parametrize("option", ["step_size", "grid_constructor"])
def test_fixed_steps_are_refused(method: str, option: str) -> None:
    given = 0.1 if option == "step_size" else lambda func, y0, t: t
    fixed = "'bdf1' to 'bdf6'" if method == "bdf" else "'abm2' to 'abm5'"
    with pytest.raises(ValueError, match=f"{option} is for fixed steps, .*'{method}'.*{fixed}"):
        solve(decaying, f64(2.0), (0.0, 1.0), method, **{option: given})


@methods
def test_unknown_options_are_warned_of_in_torchdiffeqs_words(method: str) -> None:
    with pytest.warns(UserWarning, match=rf"{method}: Unexpected arguments \{{'maxorder': 2\}}"):
        y = solve(decaying, f64(2.0), (0.0, 1.0), method, maxorder=2)
    assert torch.equal(y, solve(decaying, f64(2.0), (0.0, 1.0), method))


@methods
@pytest.mark.parametrize("times", [(0.0, math.inf), (math.nan, 1.0), (0.0, -math.inf)])
def test_times_that_are_not_finite(method: str, times: tuple[float, float]) -> None:
    with pytest.raises((ValueError, AssertionError), match="t must be"):
        solve(decaying, f64(2.0), times, method)


@methods
def test_integer_states(method: str) -> None:
    with pytest.raises(TypeError, match=r"y0 must be a floating or complex tensor, got dtype torch\.int64"):
        solve(decaying, torch.ones(2, dtype=torch.int64), (0.0, 1.0), method)


@methods
@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (lambda y: y[:1], ValueError, r"func returned a tensor of shape \(1,\)"),
        (lambda y: y.float(), TypeError, "func returned a tensor of dtype torch.float32"),
        (lambda y: None, TypeError, "func returned NoneType"),
    ],
)
def test_bad_answers_of_func(method: str, bad: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        solve(lambda t, y: bad(y), f64(1.0, 2.0), (0.0, 1.0), method)


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(("method", "direction"), slow_but([("adams", -1)], [("bdf", 1), ("adams", -1)]))
def test_a_solution_that_blows_up(method: str, direction: int) -> None:
    """x' = x² from 1 has a pole at t = 1."""
    with pytest.raises(
        RuntimeError, match=r"no step that is accurate enough at t = (-?[0-9.]+): .*y\[0\] = "
    ) as raised:
        solve(lambda t, y: direction * y * y, f64(1.0), (0.0, 2.0 * direction), method, 1e-4, 1e-4)
    time = float(str(raised.value).split("t = ")[1].split(":")[0])
    assert time == pytest.approx(direction, abs=1e-2)


@methods
@pytest.mark.parametrize("since", [0.0, 0.5])
def test_a_function_that_returns_nan(method: str, since: float) -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return -y if float(t) < since else torch.full_like(y, math.nan)

    func, report = Counted(broken), SolveReport()
    with pytest.raises(RuntimeError, match=rf"method '{method}' found no step .* at t = {since:g}: .*NaN"):
        solve(func, f64(1.0), (0.0, 1.0), method, report=report)
    assert report.rejected + report.unsolved < 80


@methods
def test_a_function_that_returns_nan_is_no_better_with_a_shortest_step(method: str) -> None:
    with pytest.raises(RuntimeError, match=r"at t = 0: .*NaN"):
        solve(lambda t, y: torch.full_like(y, math.nan), f64(1.0), (0.0, 1.0), method, min_step=0.1)


@methods
def test_an_unknown_jump_is_found(method: str) -> None:
    y, report = reported(switching, f64(1.0), (0.0, 2.0), method)
    assert float(y[-1]) == pytest.approx(switched(2.0), rel=1e-4)
    nearest = np.abs(np.array(report.times) - JUMP).min()
    assert nearest < 1e-3


# ---------------------------------------------------------------------------------------------------------- interfaces


@methods
def test_both_interfaces(method: str) -> None:
    t = torch.linspace(0, 1, 4, dtype=F64)
    by_theirs = solve(decaying, f64(2.0), t, method)
    by_ours = solve(decaying, f64(2.0), t, method, interface=lambda *a, options, **k: torchdiffeq_lmm.odeint(*a, **k))
    assert torch.equal(by_theirs, by_ours)


def test_the_tables_have_them() -> None:
    from torchdiffeq._impl.odeint import SOLVERS

    for method in METHODS:
        assert SOLVERS[method].__name__ == method
        assert SOLVERS[method].valid_callbacks() == {"callback_step", "callback_accept_step", "callback_reject_step"}
    assert torchdiffeq.odeint(decaying, f64(2.0), f64(0.0, 1.0), method="bdf").shape == (2, 1)


@pytest.mark.parametrize("method", ["bdf", "adams"])
@pytest.mark.parametrize(("option", "rtol"), [("min_step", 1e-9), ("max_step", 0.1)])
def test_an_interval_of_ten_steps_has_ten_steps(method: str, option: str, rtol: float) -> None:
    """However 0.1 is rounded; the rest of an interval may be a little more than the shortest step or the longest."""
    report = SolveReport()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {option: 0.1, "first_step": 0.1, "max_order": 1, "ifactor": 1.0, "report": report}
    torchdiffeq.odeint(
        lambda t, y: -y, torch.ones(2, dtype=torch.float64), t, method=method, rtol=rtol, atol=rtol, options=options
    )
    assert report.steps == 10
