"""The option jump_t: orders against SciPy by pieces, the side from which f is seen, and what is refused."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchdiffeq
from jumping import END, JUMPS, SOME, TIGHT, f64, jumping, rate
from methods import EVERY_METHOD, FAST_EXPLICIT, IMPLICIT, NAMES, ORDER, in_turn, slow_but
from problems import orders
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import method_info
from torchdiffeq_lmm.forward.jumps import jumps_of

# -------------------------------------------------------------------------------------------------- orders, forward


@cache
def exact() -> Callable[[float], np.ndarray]:
    """The flow, by SciPy's DOP853 from each jump to the next."""
    pieces, y = [], np.array([1.0, 0.5])
    bounds = (0.0, *JUMPS, END)
    for n, span in enumerate(pairwise(bounds)):
        solved = solve_ivp(
            lambda t, y, n=n: rate(n, t, y, np), span, y, method="DOP853", rtol=1e-13, atol=1e-13, dense_output=True
        )
        pieces.append(solved.sol)
        y = solved.y[:, -1]
    return lambda t: pieces[sum(t > jump for jump in JUMPS)](t)


@pytest.mark.parametrize(
    ("name", "is_on_node", "direction"),
    in_turn([(False, 1), (True, 1), (True, -1)], few=1, fast=("leapfrog", "ab3", "abm2")),
)
def test_order(name: str, is_on_node: bool, direction: int) -> None:
    """At outputs before, at and after jumps. Off the nodes, the last step before a jump is cut to 0.4 h."""
    outputs = f64(0.0, JUMPS[0], JUMPS[1], END)
    truth = torch.from_numpy(np.stack([exact()(float(t)) for t in outputs]))
    errors = []
    for n in (10, 20, 40):
        step = 0.2 / (n / 2 if is_on_node else n / 2 + 0.2)
        with torch.no_grad():
            states = torchdiffeq.odeint(
                lambda t, y: direction * jumping(direction * t, y),
                f64(1.0, 0.5),
                direction * outputs,
                method=name,
                options={"step_size": step, "jump_t": [direction * jump for jump in JUMPS]},
                **TIGHT,
            )
        errors.append(float((states - truth).abs().max()))
    # The fastest of them reach what SciPy's reference is good for.
    assert orders(errors)[-1] > ORDER[name] - 0.45 or errors[-1] < 1e-10, errors
    assert errors[-1] < 10 * (0.016 if ORDER[name] > 3 else 0.01) ** ORDER[name] + 1e-10


@pytest.mark.parametrize("name", slow_but(FAST_EXPLICIT, NAMES))
def test_the_jumps_are_put_among_given_nodes(name: str) -> None:
    """Without step_size the nodes are t, with a grid_constructor they are its; jumps fall between them."""
    whole = torch.linspace(0, END, 33, dtype=torch.float64)
    results = []
    for times, options in ((whole, {}), (whole[[0, -1]], {"grid_constructor": lambda func, y0, t: whole})):
        y = torchdiffeq.odeint(
            jumping, f64(1.0, 0.5), times, method=name, options={"jump_t": f64(*JUMPS), **options}, **TIGHT
        )
        results.append(y[-1])
    assert torch.equal(*results)
    error = (results[0] - torch.from_numpy(exact()(END))).abs().max()
    assert error < {1: 0.1, 2: 1e-2, 3: 1e-3}.get(ORDER[name], 1e-4)


@pytest.mark.parametrize("name", slow_but(["ab4", "leapfrog"], SOME))
def test_cubic_outputs_beside_a_jump(name: str) -> None:
    times = f64(0.0, 0.37, 0.399, 0.401, 0.44, 0.99, 1.01, END)
    truth = torch.from_numpy(np.stack([exact()(float(t)) for t in times]))
    errors = []
    for step in (0.04, 0.02, 0.01):
        options = {"step_size": step, "jump_t": JUMPS, "interp": "cubic"}
        states = torchdiffeq.odeint(jumping, f64(1.0, 0.5), times, method=name, options=options, **TIGHT)
        errors.append(float((states - truth).abs().max()))
    assert np.mean(orders(errors)) > min(ORDER[name], 4) - 0.4, errors


@pytest.mark.parametrize("name", slow_but(["ab4"], ["ab4", "abm4", "am4", "bdf4", "leapfrog"]))
def test_without_jump_t_it_is_first_order(name: str) -> None:
    """What the option is for."""
    errors = []
    for step in (0.04, 0.02, 0.01):
        states = torchdiffeq.odeint(
            jumping, f64(1.0, 0.5), f64(0.0, END), method=name, options={"step_size": step}, **TIGHT
        )
        errors.append(float((states[-1] - torch.from_numpy(exact()(END))).abs().max()))
    assert np.mean(orders(errors)) < 1.6
    assert errors[-1] > 1e-4


# ------------------------------------------------------------------------------------------------------ the sides


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.one_in(5)
def test_f_is_seen_from_the_side_of_the_step(name: str, direction: int, perturb: bool) -> None:
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(direction * float(t))
        return -y

    options = {"step_size": 0.125, "jump_t": [0.5 * direction], "perturb": perturb}
    torchdiffeq.odeint(func, f64(1.0), direction * f64(0.0, 1.0), method=name, options=options)
    around = {t for t in seen if abs(t - 0.5) < 1e-9}
    left, right = np.nextafter(0.5, 0), np.nextafter(0.5, 1)
    is_at_end = name in IMPLICIT or method_info(name).evaluations == 2
    # The sweeps that make a start do not reach the end of four steps but for these.
    is_at_end |= name == "ab5"
    assert around == ({left, right} if is_at_end else {right})
    if not perturb:
        others = {t for t in seen if abs(t - 0.5) >= 1e-9}
        assert others <= {n / 8 for n in range(9)}
    before = seen.index(right)
    assert all(t < 0.5 for t in seen[:before])
    assert all(t > 0.5 for t in seen[before:])


@pytest.mark.parametrize("name", SOME)
def test_a_jump_at_an_end_makes_no_node_and_is_seen_from_inside(name: str) -> None:
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return -y

    t = f64(0.0, 1.0)
    plain = torchdiffeq.odeint(func, f64(1.0), t, method=name, options={"step_size": 0.25})
    times = len(seen)
    ends = torchdiffeq.odeint(func, f64(1.0), t, method=name, options={"step_size": 0.25, "jump_t": [0.0, 1.0]})
    assert torch.equal(plain, ends)
    assert len(seen) == 2 * times
    assert all(0 < s < 1 for s in seen[times:])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(*name.values, {"step_size": 0.1}, marks=name.marks) for name in EVERY_METHOD),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in SOME),
    ],
)
def test_times_outside_are_ignored(name: str, options: dict) -> None:
    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    results = [
        torchdiffeq.odeint(
            lambda t, y: -y * torch.cos(t), f64(1.0, 2.0), t, method=name, options={**options, "jump_t": jumps}
        )
        # Implicit steps take many times as long.
        for jumps in (None, [-1.0, 3.0], [], f64(7.0))[: 2 if name in IMPLICIT else None]
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


class NotesSteps(nn.Module):
    """y' = -y, and where its steps began and how long they were."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[float] = []
        self.lengths: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.nodes.append(float(t))
        self.lengths.append(float(dt))


def test_a_jump_is_the_node_that_it_is_but_for_rounding() -> None:
    """Where nodes, outputs or jumps have been rounded, no step is as short as the rounding."""
    for dtype in (torch.float32, torch.float64):
        t = torch.linspace(0, 1, 11, dtype=dtype)
        for jumps in ([0.3, 0.7], torch.tensor([0.3, 0.7]), [3 * 0.1, 7 * 0.1]):
            for options in ({}, {"step_size": 0.1}, {"grid_constructor": lambda func, y0, t: t}):
                field = NotesSteps()
                torchdiffeq.odeint(field, f64(1.0), t, method="ab3", options={**options, "jump_t": jumps})
                assert len(field.lengths) == 10
                assert field.lengths == pytest.approx([0.1] * 10, rel=1e-5)


def test_steps_go_on_from_the_jump() -> None:
    field = NotesSteps()
    torchdiffeq.odeint(field, f64(1.0), f64(0.0, 1.0), method="ab2", options={"step_size": 0.3, "jump_t": [0.65, 0.31]})
    assert field.nodes == pytest.approx([0.0, 0.3, 0.31, 0.61, 0.65, 0.95])


@pytest.mark.usefixtures("_method_tables")
def test_constant_coefficients_hold_from_jump_to_jump() -> None:
    torchdiffeq_lmm.register_method("test_jump_ab2", [0, -1, 1], [-0.5, 1.5, 0])
    options = {"step_size": 0.01, "jump_t": JUMPS}
    errors = []
    for step in (0.011, 0.0055):
        y = torchdiffeq.odeint(
            jumping, f64(1.0, 0.5), f64(0.0, END), method="test_jump_ab2", options={**options, "step_size": step}
        )
        errors.append(float((y[-1] - torch.from_numpy(exact()(END))).abs().max()))
    assert orders(errors)[0] > 1.7


@pytest.mark.slow
def test_a_path_that_is_linear_from_data_to_data() -> None:
    """A neural CDE as torchcde makes it: dz = F(z) dX, a jump at every one of 20 data, ends included."""
    points = torch.linspace(0, 2, 21, dtype=torch.float64)
    data = torch.cumsum(torch.randn(21, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0) * 0.2

    def func(t: Tensor, z: Tensor) -> Tensor:
        n = min(max(int(torch.searchsorted(points, t, right=True)) - 1, 0), 19)
        slope = (data[n + 1] - data[n]) / (points[n + 1] - points[n])
        return torch.stack([torch.sin(z[1]) * slope[0], torch.cos(z[0]) * slope[1]])

    fine = torchdiffeq.odeint(func, f64(1.0, 0.5), points, method="dopri5", options={"jump_t": points}, **TIGHT)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for steps in (4, 8, 16):
        for with_jumps in (True, False):
            options = {"step_size": 0.1 / steps, **({"jump_t": points} if with_jumps else {})}
            y = torchdiffeq.odeint(func, f64(1.0, 0.5), points, method="ab4", options=options)
            errors[with_jumps].append(float((y - fine).abs().max()))
    assert np.mean(orders(errors[True])) > 3.5, errors
    assert np.mean(orders(errors[False])) < 1.5
    assert errors[True][-1] < 1e-3 * errors[False][-1]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("jump_t", "error", "message"),
    [
        ([0.2, float("nan")], ValueError, "jump_t must be finite, got \\[0.2, nan\\]"),
        (f64(0.2, float("inf")), ValueError, "jump_t must be finite, got \\[0.2, inf\\]"),
        ([0.2, 0.3, 0.2], ValueError, "jump_t must not have any repeated elements, got 0.2 more than once"),
        (0.5, ValueError, "jump_t must be one-dimensional, got shape \\(\\)"),
        (torch.zeros(2, 1), ValueError, "jump_t must be one-dimensional, got shape \\(2, 1\\)"),
        ([0.2, True], TypeError, "jump_t must hold real numbers, got \\[0.2, True\\]"),
        (f64(0.2).bool(), TypeError, "jump_t must hold real numbers, got a tensor of dtype torch.bool"),
        (f64(0.2) * 1j, TypeError, "jump_t must hold real numbers, got a tensor of dtype torch.complex128"),
        ("half", TypeError, "jump_t must be a one-dimensional tensor or a sequence of real numbers, got 'half'"),
        ([0.2, "half"], TypeError, "jump_t must be a one-dimensional tensor or a sequence of real numbers"),
        ([f64(0.2, requires_grad=True)[0]], TypeError, "jump_t must be one tensor where its times require a gradient"),
    ],
)
@pytest.mark.parametrize("direction", [1, -1])
def test_refused(jump_t: object, error: type[Exception], message: str, direction: int) -> None:
    if direction < 0 and isinstance(jump_t, Tensor) and jump_t.dtype is torch.bool:
        pytest.skip("torchdiffeq itself raises an error")
    calls = []
    if direction < 0 and isinstance(jump_t, Tensor) and "inf" in message:
        message = "jump_t must be finite, got \\[0.2, inf\\]"
    with pytest.raises(error, match=message):
        torchdiffeq.odeint(
            lambda t, y: calls.append(t) or -y,
            f64(1.0),
            direction * f64(0.0, 1.0),
            method="ab2",
            options={"jump_t": jump_t},
        )
    assert not calls


def test_integers_and_any_order() -> None:
    found = jumps_of([3, 1, 2], is_negated=False, negate=False)
    assert found.times.tolist() == [1.0, 2.0, 3.0]
    assert jumps_of(torch.tensor([3, 1]), is_negated=True, negate=True).times.tolist() == [-3.0, -1.0]
    assert jumps_of((), is_negated=False, negate=False) is None


def test_step_t_and_other_options_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="step_t"):
        torchdiffeq.odeint(
            lambda t, y: -y, f64(1.0), f64(0.0, 1.0), method="ab2", options={"jump_t": [0.5], "step_t": f64(0.2)}
        )
