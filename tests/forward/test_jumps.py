"""The option jump_t: right-hand sides that jump in time, against closed forms, SciPy by pieces and torchdiffeq."""

import gc
import weakref
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from problems import orders
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter, Reversible, method_info
from torchdiffeq_lmm.forward.jumps import jumps_of
from torchdiffeq_lmm.hosts import solver
from torchdiffeq_lmm.schemes.methods import METHODS

NAMES = [method.name for method in METHODS]
ORDER = {method.name: method.order for method in METHODS}
IMPLICIT = {name for name in NAMES if method_info(name).kind == "implicit"}
TIGHT = {"rtol": 1e-12, "atol": 1e-13}
SOME = ["leapfrog", "ab4", "abm3", "am3", "bdf2"]


def f64(*values: float, **keywords: bool) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **keywords)


# -------------------------------------------------------------------------------------------------- orders, forward

JUMPS = (0.4, 1.0)
END = 1.6


def rate(piece: int, t: Tensor, y: Tensor, lib: object = torch) -> Tensor:
    """The right-hand side before, between and after `JUMPS`."""
    if piece == 0:
        return lib.stack([y[1], -lib.sin(y[0])])
    if piece == 1:
        return lib.stack([2 - y[1] * y[0], y[0] + lib.cos(3 * t)])
    return lib.stack([-y[1], y[0] - 1])


def jumping(t: Tensor, y: Tensor) -> Tensor:
    return rate(sum(float(t) >= jump for jump in JUMPS), t, y)


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


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("is_on_node", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_order(name: str, is_on_node: bool, direction: int) -> None:
    """At outputs before, at and after jumps. Off the nodes, the last step before a jump is cut to 0.4 h."""
    if not is_on_node and direction < 0:
        pytest.skip("is the same")
    outputs = f64(0.0, JUMPS[0], JUMPS[1], END)
    truth = torch.from_numpy(np.stack([exact()(float(t)) for t in outputs]))
    errors = []
    for n in (20, 40, 80) if ORDER[name] < 5 else (30, 60, 120):
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
    assert errors[-1] < 10 * 0.01 ** ORDER[name] + 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_jumps_are_put_among_given_nodes(name: str) -> None:
    """Without step_size the nodes are t, with a grid_constructor they are its; jumps fall between them."""
    whole = torch.linspace(0, END, 65, dtype=torch.float64)
    results = []
    for times, options in ((whole, {}), (whole[[0, -1]], {"grid_constructor": lambda func, y0, t: whole})):
        y = torchdiffeq.odeint(
            jumping, f64(1.0, 0.5), times, method=name, options={"jump_t": f64(*JUMPS), **options}, **TIGHT
        )
        results.append(y[-1])
    assert torch.equal(*results)
    error = (results[0] - torch.from_numpy(exact()(END))).abs().max()
    assert error < {1: 0.1, 2: 5e-3, 3: 2e-4}.get(ORDER[name], 2e-5)


@pytest.mark.parametrize("name", SOME)
def test_cubic_outputs_beside_a_jump(name: str) -> None:
    times = f64(0.0, 0.37, 0.399, 0.401, 0.44, 0.99, 1.01, END)
    truth = torch.from_numpy(np.stack([exact()(float(t)) for t in times]))
    errors = []
    for step in (0.04, 0.02, 0.01):
        options = {"step_size": step, "jump_t": JUMPS, "interp": "cubic"}
        states = torchdiffeq.odeint(jumping, f64(1.0, 0.5), times, method=name, options=options, **TIGHT)
        errors.append(float((states - truth).abs().max()))
    assert np.mean(orders(errors)) > min(ORDER[name], 4) - 0.4, errors


@pytest.mark.parametrize("name", ["ab4", "abm4", "am4", "bdf4", "leapfrog"])
def test_without_jump_t_it_is_first_order(name: str) -> None:
    """What the option is for."""
    errors = []
    for step in (0.02, 0.01, 0.005):
        states = torchdiffeq.odeint(
            jumping, f64(1.0, 0.5), f64(0.0, END), method=name, options={"step_size": step}, **TIGHT
        )
        errors.append(float((states[-1] - torch.from_numpy(exact()(END))).abs().max()))
    assert np.mean(orders(errors)) < 1.6
    assert errors[-1] > 1e-4


# ------------------------------------------------------------------------------------------------------ two solves


class Switched(nn.Module):
    """y' = A tanh(y) before the switch, B tanh(y) after it; without one, by the matrix of a number."""

    def __init__(self, switch: float | None = None, number: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrices = nn.ParameterList(torch.randn(3, 3, generator=generator, dtype=dtype) for _ in range(2))
        self.switch = switch
        self.number = number

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        number = self.number if self.switch is None else int(t > self.switch)
        return self.matrices[number] @ torch.tanh(y)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.5, -0.3, 0.8], dtype=dtype, requires_grad=True)


WAYS: list[dict] = [
    {},
    {"grad_filter": CostateFilter("trapezoid")},
    {"backward": "checkpoint"},
    {"grad_filter": CostateFilter("trapezoid"), "backward": "checkpoint"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "heun2", "midpoint"])
def test_it_is_two_solves(name: str, way: dict) -> None:
    """States and gradients, to rounding; the right-hand side does not depend on time but by the jump."""
    if name in ("heun2", "midpoint") and list(way) != ["grad_filter"]:
        pytest.skip("torchdiffeq's own, and not filtered")
    first, second = f64(0.0, 0.2, 0.51), f64(0.51, 0.8, 1.0)
    options = {"step_size": 0.04}
    y0, field = start(), Switched(0.51)
    together = torchdiffeq_lmm.odeint(
        field, y0, f64(0.0, 0.2, 0.51, 0.8, 1.0), method=name, options={**options, "jump_t": [0.51]}, **way
    )
    gradient = torch.autograd.grad(together.square().sum(), (y0, *field.parameters()))

    matrices = list(field.parameters())
    fields = [Switched(None, number) for number in range(2)]
    for other in fields:
        other.matrices = nn.ParameterList(matrices)
    before = torchdiffeq_lmm.odeint(fields[0], y0, first, method=name, options=options, **way)
    after = torchdiffeq_lmm.odeint(fields[1], before[-1], second, method=name, options=options, **way)
    apart = torch.cat([before, after[1:]])
    expected = torch.autograd.grad(apart.square().sum(), (y0, *matrices))
    # The times of the second solve begin at 0.51 and not at 0: so do those of the piece.
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_it_is_two_solves_run_backwards_and_smoothed() -> None:
    """Leapfrog's own ways, and one drift for every piece."""
    for way in ({"backward": "reversible"}, {"grad_filter": "smooth"}):
        y0, field = start(), Switched(0.5)
        options = {"step_size": 0.05}
        t = f64(0.0, 0.5, 1.0)
        together = torchdiffeq_lmm.odeint(field, y0, t, method="leapfrog", options={**options, "jump_t": [0.5]}, **way)
        gradient = torch.autograd.grad(together[-1].square().sum(), (y0, *field.parameters()))
        fields = [Switched(None, number) for number in range(2)]
        for other in fields:
            other.matrices = field.matrices
        middle = torchdiffeq_lmm.odeint(fields[0], y0, t[:2], method="leapfrog", options=options, **way)[-1]
        last = torchdiffeq_lmm.odeint(fields[1], middle, t[1:], method="leapfrog", options=options, **way)[-1]
        expected = torch.autograd.grad(last.square().sum(), (y0, *field.parameters()))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)
    drifts: list[float] = []
    way = Reversible(report=drifts.append)
    y = torchdiffeq_lmm.odeint(
        Switched(0.5), start(), t, method="leapfrog", options={"step_size": 0.05, "jump_t": [0.5]}, backward=way
    )
    y[-1].sum().backward()
    assert len(drifts) == 2
    assert all(drift < 1e-10 for drift in drifts)


@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
def test_random_functions_draw_the_same_numbers_again(backward: str) -> None:
    results = []
    for way in ("autograd", backward):
        torch.manual_seed(3)
        field = Switched(0.5)
        dropout = nn.Dropout(0.5)
        y = torchdiffeq_lmm.odeint(
            lambda t, y, field=field: dropout(field(t, y)),
            start(),
            f64(0.0, 1.0),
            method="ab3",
            options={"step_size": 0.1, "jump_t": [0.3, 0.6]},
            backward=way,
            adjoint_params=None if way == "autograd" else tuple(field.parameters()),
        )
        y[-1].sum().backward()
        results.append([parameter.grad for parameter in field.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("name", SOME)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Times of float32, of which 0.3 is none; y' = -y, then y' = 1."""
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.05}.get(dtype, 1e-3)
    y0 = torch.ones(2, dtype=dtype)
    states = torchdiffeq.odeint(
        lambda t, y: -y if t < 0.3 else torch.ones_like(y),
        y0,
        torch.tensor([0.0, 0.3, 1.0]),
        method=name,
        options={"step_size": 0.05, "jump_t": [0.3]},
    )
    assert states.dtype is dtype
    exact_states = torch.tensor([1.0, np.exp(-0.3), np.exp(-0.3) + 0.7], dtype=torch.float64)
    got = (states.real if dtype.is_complex else states).double()
    torch.testing.assert_close(got, exact_states[:, None].expand(3, 2), rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("name", SOME)
def test_tuples(name: str) -> None:
    options = {"step_size": 0.05, "jump_t": f64(*JUMPS)}
    whole = torchdiffeq.odeint(jumping, f64(1.0, 0.5), f64(0.0, END), method=name, options=options)

    def parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slope = jumping(t, torch.stack([y[0], y[1][0]]))
        return slope[0], slope[1:]

    a, b = torchdiffeq.odeint(parts, (f64(1.0)[0], f64(0.5)), f64(0.0, END), method=name, options=options)
    torch.testing.assert_close(torch.stack([a, b[:, 0]], 1), whole, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ the sides


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("options", [{"step_size": 0.1}, {}], ids=["step_size", "times"])
@pytest.mark.parametrize("name", NAMES)
def test_times_outside_are_ignored(name: str, options: dict) -> None:
    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    results = [
        torchdiffeq.odeint(
            lambda t, y: -y * torch.cos(t), f64(1.0, 2.0), t, method=name, options={**options, "jump_t": jumps}
        )
        for jumps in (None, [-1.0, 3.0], [], f64(7.0))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_jump_is_the_node_that_it_is_but_for_rounding() -> None:
    """Where nodes, outputs or jumps have been rounded, no step is as short as the rounding."""
    lengths: list[float] = []

    class Field(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            lengths.append(float(dt))

    for dtype in (torch.float32, torch.float64):
        t = torch.linspace(0, 1, 11, dtype=dtype)
        for jumps in ([0.3, 0.7], torch.tensor([0.3, 0.7]), [3 * 0.1, 7 * 0.1]):
            for options in ({}, {"step_size": 0.1}, {"grid_constructor": lambda func, y0, t: t}):
                lengths.clear()
                torchdiffeq.odeint(Field(), f64(1.0), t, method="ab3", options={**options, "jump_t": jumps})
                assert len(lengths) == 10
                assert lengths == pytest.approx([0.1] * 10, rel=1e-5)


def test_steps_go_on_from_the_jump() -> None:
    nodes: list[float] = []

    class Field(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            nodes.append(float(t))

    torchdiffeq.odeint(
        Field(), f64(1.0), f64(0.0, 1.0), method="ab2", options={"step_size": 0.3, "jump_t": [0.65, 0.31]}
    )
    assert nodes == pytest.approx([0.0, 0.3, 0.31, 0.61, 0.65, 0.95])


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


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_with_respect_to_the_jump(name: str, direction: int) -> None:
    """y' = a y until J and b y from there: dy(T)/dJ = (a - b) y(T)."""
    jump = f64(0.5 * direction, requires_grad=True)
    a, b = -0.7, 0.4
    y = torchdiffeq.odeint(
        lambda t, y: direction * torch.where(direction * t < 0.5, a, b) * y,
        f64(1.0),
        direction * f64(0.0, 1.0),
        method=name,
        options={"step_size": 0.01, "jump_t": jump},
        **TIGHT,
    )
    (gradient,) = torch.autograd.grad(y[-1].sum(), jump)
    truth = direction * (a - b) * np.exp(0.5 * (a + b))
    # With respect to the length of a step that is cut short leapfrog's gradient is of first order.
    tolerance = 0.05 if name == "leapfrog" else {1: 0.02, 2: 5e-3}.get(ORDER[name], 1e-4)
    assert float(gradient) == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
@pytest.mark.parametrize("name", [*SOME, "ab3"])
def test_gradients_are_those_of_the_discrete_solution(name: str, way: dict) -> None:
    """By finite differences of y0 and the times; the jumps stay. Filters leave these as they are."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        slope = torch.stack([y[1] * torch.cos(t), -torch.sin(y[0])])
        return slope if t < 0.3 else slope * y[0] + 1 if t < 0.6 else -slope * t

    def last(y0: Tensor, t: Tensor) -> Tensor:
        given = {"adjoint_params": ()} if "backward" in way else {}
        options = {"step_size": 0.13, "jump_t": [0.3, 0.6]}
        return torchdiffeq_lmm.odeint(func, y0, t, method=name, options=options, **given, **way, **TIGHT)

    inputs = (f64(1.0, 0.5, requires_grad=True), f64(0.0, 0.42, 0.9, requires_grad=True))
    torch.autograd.gradcheck(last, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_gradients_with_respect_to_jumps_that_f_knows(name: str) -> None:
    """f takes its side from the jump itself, so that finite differences of the whole are possible."""

    def last(jumps: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            slope = torch.stack([y[1] * torch.cos(t), -torch.sin(y[0])])
            return slope if t < jumps[0] else slope * y[0] + 1 if t < jumps[1] else -slope * t

        options = {"step_size": 0.13, "jump_t": jumps}
        return torchdiffeq.odeint(func, f64(1.0, 0.5), f64(0.0, 0.42, 0.9), method=name, options=options, **TIGHT)

    torch.autograd.gradcheck(last, (f64(0.33, 0.67, requires_grad=True),), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("is_given", [False, True], ids=["step_size", "times"])
@pytest.mark.parametrize("name", ["ab4", "abm4", "am4", "bdf4"])
def test_gradients_are_torchdiffeqs(name: str, is_given: bool) -> None:
    """With respect to y0, a parameter, outputs (one of them at a jump) and jumps, beside dopri5's."""
    results = []
    for method in ("dopri5", name):
        y0, k = f64(1.0, 0.5, requires_grad=True), f64(0.8, requires_grad=True)
        jump = f64(0.5, requires_grad=True)
        marks = f64(0.0, 0.25, 0.5, 0.875, 1.25, requires_grad=True)
        grid = torch.linspace(0, 1.25, 161, dtype=torch.float64)
        t = marks
        if is_given:
            # Of all nodes the marks alone are differentiated.
            t = grid.index_copy(0, (marks.detach() * 128).round().long(), marks)

        def func(t: Tensor, y: Tensor, k: Tensor = k, jump: Tensor = jump) -> Tensor:
            return torch.where(t < jump, -k * y + torch.sin(t), 2 * torch.cos(3 * t) - 0.5 * y * k)

        options = {"jump_t": jump} | ({} if method == "dopri5" or is_given else {"step_size": 1 / 128})
        y = torchdiffeq.odeint(func, y0, t, method=method, options=options, **TIGHT)
        y = y[(marks.detach() * 128).round().long()] if is_given else y
        loss = (y * torch.arange(1, 6)[:, None]).square().sum()
        results.append(torch.autograd.grad(loss, (y0, k, marks, jump)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", ["ab2", "ab3", "abm3"])
def test_second_derivatives(name: str) -> None:
    """y' = a y, then b y: the second derivative with respect to the jump is (a - b)² y(T)."""
    jump = f64(0.5, requires_grad=True)
    y = torchdiffeq.odeint(
        lambda t, y: torch.where(t < 0.5, -0.7, 0.4) * y,
        f64(1.0),
        f64(0.0, 1.0),
        method=name,
        options={"step_size": 0.0101, "jump_t": jump},
    )
    (first,) = torch.autograd.grad(y[-1].sum(), jump, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), jump)
    assert float(second) == pytest.approx(1.21 * np.exp(-0.15), rel=0.02)


# --------------------------------------------------------------------------------------------------------- filters

FILTER_JUMP, FILTER_END = 0.8, 2.0
TARGET = np.array([0.3, -0.2])


def theta(t: np.ndarray) -> np.ndarray:
    return np.stack([1 + 0.5 * np.sin(3 * t), 1.5 + t])


def pushed(x: Tensor, th: Tensor, is_after: bool, lib: object) -> Tensor:
    pendulum = lib.stack([x[1] * th[0], -lib.sin(x[0]) * th[1] - 0.3 * x[1]])
    return pendulum + (2.0 if is_after else -1.0) * lib.stack([0 * x[0] + 1, x[0]])


@cache
def filter_reference(is_observed: bool) -> tuple[Callable[[float, bool], np.ndarray], np.ndarray]:
    """The density (∂f/∂θ)ᵀ p at a time, seen from the left or the right, for ½ |x(T) - target|², and |x(J)|² / 2."""
    tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}
    flows, costates, x = [], [], np.array([1.0, 0.5])
    spans = ((0.0, FILTER_JUMP), (FILTER_JUMP, FILTER_END))
    for is_after, span in enumerate(spans):
        solved = solve_ivp(lambda t, x, a=bool(is_after): pushed(x, theta(t), a, np), span, x, **tight)
        flows.append(solved.sol)
        x = solved.y[:, -1]

    def adjoint(t: float, p: np.ndarray, is_after: int) -> np.ndarray:
        x, th, push = flows[is_after](t), theta(t), 2.0 if is_after else -1.0
        return -np.stack([(-np.cos(x[0]) * th[1] + push) * p[1], th[0] * p[0] - 0.3 * p[1]])

    p = x - TARGET
    for is_after in (1, 0):
        solved = solve_ivp(lambda t, p, a=is_after: adjoint(t, p, a), spans[is_after][::-1], p, **tight)
        costates.insert(0, solved.sol)
        p = solved.y[:, -1] + (flows[0](FILTER_JUMP) if is_observed and is_after else 0)

    def density(t: float, is_after: bool) -> np.ndarray:
        x, p = flows[is_after](t), costates[is_after](t)
        return np.stack([x[1] * p[0], -np.sin(x[0]) * p[1]])

    return density, p


@pytest.mark.parametrize(("weights", "is_observed"), [("step", True), ("step", False), ("trapezoid", True)])
@pytest.mark.parametrize("name", ["leapfrog", "ab1", "ab3", "abm3", "am2", "am3", "milne_simpson", "bdf2", "bdf4"])
def test_the_filtered_gradient_is_second_order_at_every_node(name: str, weights: str, is_observed: bool) -> None:
    """One parameter per node, that of the jump for both its sides; with steps of another length after it."""
    density, costate = filter_reference(is_observed)
    is_at_end = name in IMPLICIT or method_info(name).evaluations == 2
    errors, of_y0 = [], []
    for n in (20, 40, 80):
        before = np.linspace(0, FILTER_JUMP, n + 1)
        nodes = torch.from_numpy(np.concatenate([before, np.linspace(FILTER_JUMP, FILTER_END, n + 1)[1:]]))
        parameters = torch.tensor(theta(nodes.numpy()).T.copy()).requires_grad_()
        y0 = f64(1.0, 0.5, requires_grad=True)

        def func(t: Tensor, x: Tensor, nodes: Tensor = nodes, parameters: Tensor = parameters) -> Tensor:
            index = int((nodes - t).abs().argmin())
            return pushed(x, parameters[index], bool(t > FILTER_JUMP), torch)

        states = torchdiffeq_lmm.odeint(
            func,
            y0,
            f64(0.0, FILTER_JUMP, FILTER_END),
            method=name,
            options={"grid_constructor": lambda f, y, t, nodes=nodes: nodes, "jump_t": [FILTER_JUMP]},
            grad_filter=CostateFilter(weights),
            **TIGHT,
        )
        loss = 0.5 * (states[2] - torch.from_numpy(TARGET)).square().sum()
        (loss + (0.5 * states[1].square().sum() if is_observed else 0)).backward()

        # What the sides own, and the density that each sees.
        steps = nodes.diff().tolist()
        left, right = steps[0], steps[-1]
        expected = []
        for m, t in enumerate(nodes.tolist()):
            around = [steps[m - 1] if m else 0.0, steps[m] if m < 2 * n else 0.0]
            width = around[1] or around[0]
            if weights == "trapezoid":
                width = sum(around) / 2
                if not is_at_end and m in (n - 1, 2 * n - 1):
                    # Its half cell is left to the node before.
                    width = 1.5 * steps[m]
            if m != n:
                expected.append(width * density(t, m > n))
            elif not is_at_end:
                expected.append((right if weights == "step" else right / 2) * density(t, True))
            else:
                share = left / (left + right)
                expected.append(width * (share * density(t, False) + (1 - share) * density(t, True)))
        difference = (parameters.grad - torch.from_numpy(np.stack(expected))).abs().amax(1)
        errors.append(float(difference[: None if is_at_end else -1].max()) * n)
        of_y0.append(float((y0.grad - torch.from_numpy(costate)).abs().max()))
    order = min(2, ORDER[name])
    assert orders(errors)[-1] > order - 0.25, errors
    assert np.mean(orders(errors)) > order - 0.4, errors
    assert of_y0[-1] < (0.1 if order == 1 else 5e-3)


# ---------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_events_after_jumps(name: str, direction: int, interp: str) -> None:
    """y = exp(-t) until 0.51, then y' = -3 y until 0.77, then y' = -1: it is 0.1 at a time that is known."""
    middle = np.exp(-0.51)
    last = middle * np.exp(-3 * 0.26)
    cases = {0.8: -np.log(0.8), 0.5: 0.51 + np.log(middle / 0.5) / 3, 0.1: 0.77 + last - 0.1}
    for level, truth in cases.items():
        y0 = f64(1.0, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            s = direction * t
            return direction * (-y if s < 0.51 else -3 * y if s < 0.77 else -torch.ones_like(y))

        event_t, states = torchdiffeq.odeint_event(
            func,
            y0,
            f64(0.0)[0],
            event_fn=lambda t, y, level=level: y[0] - level,
            reverse_time=direction < 0,
            odeint_interface=torchdiffeq.odeint,
            method=name,
            options={"step_size": 0.01, "interp": interp, "jump_t": f64(0.51, 0.77, 5.0, 1e9) * direction},
        )
        accuracy = 0.02 if ORDER[name] == 1 else 4e-4
        assert direction * float(event_t.detach()) == pytest.approx(truth, abs=accuracy)
        assert float(states[-1, 0].detach()) == pytest.approx(level, abs=1e-6)
        (gradient,) = torch.autograd.grad(event_t, y0)
        slope = {0.8: 0.8, 0.5: 1.5, 0.1: 1.0}[level]
        by_y0 = {0.8: 0.8, 0.5: 0.5, 0.1: last}[level]
        assert direction * float(gradient[0]) == pytest.approx(by_y0 / slope, abs=10 * accuracy)


@pytest.mark.parametrize("way", [{"grad_filter": "auto"}, {"backward": "checkpoint"}], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_events_filtered_and_recomputed(name: str, way: dict) -> None:
    """At a fixed time, so that the state there is that of an ordinary solve; a jump just after it changes nothing."""
    results = []
    for is_event in (True, False):
        field, y0 = Switched(0.5), start()
        options = {"step_size": 0.05, "jump_t": [0.5, 0.81]}
        t = f64(0.0, 0.7999999)
        arguments = {"method": name, "options": options, **way, **TIGHT}
        if is_event:
            _, y = torchdiffeq_lmm.odeint(field, y0, t, event_fn=lambda t, y: t - 0.7999999, **arguments)
        else:
            y = torchdiffeq_lmm.odeint(field, y0, t, **arguments)
        y[-1].square().sum().backward()
        results.append((y[-1].detach(), y0.grad, *(parameter.grad for parameter in field.parameters())))
    # Between nodes the event's state is interpolated.
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-4)


def test_an_event_at_a_jump_and_one_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"step_size": 0.1, "jump_t": [0.5]}

    def event(level: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, y: t - level

    for level in (0.5, 0.5 - 1e-7, 0.5 + 1e-7):
        event_t, y = torchdiffeq.odeint(
            lambda t, y: torch.where(t < 0.5, 1.0, -2.0) + 0 * y,
            f64(0.0),
            f64(0.0, 1.0),
            method="ab3",
            options=options,
            event_fn=event(level),
        )
        assert float(event_t) == pytest.approx(level, abs=1e-8)
        assert float(y[-1]) == pytest.approx(0.5, abs=1e-6)
    monkeypatch.setattr(solver, "MAX_EVENT_STEPS", 100)
    with pytest.raises(RuntimeError, match="did not change its sign within 100 steps"):
        torchdiffeq.odeint(
            lambda t, y: y,
            f64(0.0),
            f64(0.0, 1.0),
            method="ab1",
            options={"step_size": 0.01, "jump_t": [0.5, 0.9999]},
            event_fn=lambda t, y: y[0] - 1,
        )


@pytest.mark.parametrize("is_event", [False, True])
@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_all_memory_is_freed_without_a_collector(way: dict, is_event: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        field = Switched(0.5)
        given = {"event_fn": lambda t, y: t - 0.93} if is_event else {}
        options = {"step_size": 0.1, "jump_t": [0.5, 0.7]}
        y = torchdiffeq_lmm.odeint(field, start(), f64(0.0, 1.0), method="ab3", options=options, **given, **way)
        states = y[1] if is_event else y
        states[-1].sum().backward()
        gone = weakref.ref(field)
        del field, y, states
        assert gone() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------------- adjoint


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", ["ab4", "abm4", "am4", "bdf4"])
def test_odeint_adjoint(name: str, direction: int, as_list: bool) -> None:
    """Observations at many times, one of them a jump: its backward solves begin and end there."""

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(f64(0.9))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            s = direction * t
            return direction * torch.where(
                s < 0.33, -self.k * y, torch.where(s < 0.5, self.k * torch.cos(y), 1 - self.k * y * s)
            )

    t = direction * torch.linspace(0, 1, 9, dtype=torch.float64)
    jumps = [0.33 * direction, 0.5 * direction]
    results = []
    for odeint, method, options in (
        (torchdiffeq.odeint, "dopri5", {"jump_t": f64(*jumps)}),
        (torchdiffeq.odeint_adjoint, name, {"jump_t": jumps if as_list else f64(*jumps), "step_size": 1 / 96}),
    ):
        field, y0 = Field(), f64(1.0, 0.2, requires_grad=True)
        states = odeint(field, y0, t, method=method, options=options, rtol=1e-9, atol=1e-10)
        states.square().sum().backward()
        results.append((states.detach(), y0.grad, field.k.grad))
    # One side of a jump for the other, in one evaluation, would make an error of 5e-3.
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ SDEs


class JumpingDrift(nn.Module):
    noise_type = "diagonal"

    def __init__(self, noise: float, sde_type: str = "ito") -> None:
        super().__init__()
        self.noise = noise
        self.sde_type = sde_type
        self.k = nn.Parameter(f64(1.0))
        self.seen: list[float] = []

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(float(t))
        return -self.k * y if t < 0.5 else 2 - self.k * y * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.noise * torch.ones_like(y) * (1.0 if t < 0.5 else 3.0)


@pytest.mark.parametrize("grad_filter", [None, CostateFilter("trapezoid"), "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_an_sde_without_noise_is_the_ode(name: str, grad_filter: object) -> None:
    ts, jumps = f64(0.0, 0.3, 0.5, 1.0), [0.5, 0.72]
    results, gradients = [], []
    for is_sde in (True, False):
        sde, y0 = JumpingDrift(0.0), f64(1.0, 0.7).reshape(1, 2).requires_grad_()
        options = {"jump_t": jumps} if grad_filter is None else {"jump_t": jumps, "grad_filter": grad_filter}
        if is_sde:
            y = torchsde.sdeint(sde, y0, ts, method=name, dt=0.03, rtol=1e-9, atol=1e-11, options=options)
        else:
            y = torchdiffeq.odeint(
                sde.f, y0, ts, method=name, options={**options, "step_size": 0.03}, rtol=1e-9, atol=1e-11
            )
        y.square().sum().backward()
        results.append((y.detach(), y0.grad))
        gradients.append(sde.k.grad)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    # On a path the filter uses one formula at all nodes, for an ODE the better of two.
    tolerance = 1e-9 if grad_filter is None else 0.1 if ORDER[name] == 1 else 2e-2
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=1e-9)


def test_small_noise_and_a_jump_of_the_drift() -> None:
    """Additive noise on given paths: beside a fine solve the error is second order in h again, with jump_t."""
    y0, ts = torch.ones(16, 1, dtype=torch.float64), f64(0.0, 1.0)
    errors: dict[bool, list[float]] = {True: [], False: []}
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(16, 1), dtype=torch.float64, entropy=5)
    with torch.no_grad():
        fine = torchsde.sdeint(
            JumpingDrift(1e-6), y0, ts, bm=bm, method="ab2", dt=1 / 2048, options={"jump_t": f64(0.5)}
        )[-1]
        for dt in (1 / 16, 1 / 32, 1 / 64):
            for with_jumps in (True, False):
                options = {"jump_t": [0.5]} if with_jumps else {}
                y = torchsde.sdeint(JumpingDrift(1e-6), y0, ts, bm=bm, method="ab2", dt=dt, options=options)[-1]
                errors[with_jumps].append(float((y - fine).square().mean().sqrt()))
    assert np.mean(orders(errors[True])) > 1.7, errors
    assert np.mean(orders(errors[False])) < 1.4, errors


class Recorded:
    """A Brownian motion that notes what it is asked for."""

    def __init__(self, bm: torchsde.BaseBrownian) -> None:
        self.bm = bm
        self.asked: list[tuple[float, float]] = []

    def __call__(self, a: float, b: float) -> Tensor:
        self.asked.append((float(a), float(b)))
        return self.bm(a, b)

    def __getattr__(self, name: str) -> object:
        return getattr(self.bm, name)


def test_an_sde_at_a_jump() -> None:
    """Drift and diffusion see its two sides, increments are over the true intervals, and steps go on from it."""
    bm = Recorded(torchsde.BrownianInterval(0.0, 1.0, size=(1, 1), dtype=torch.float64, entropy=5))
    sde = JumpingDrift(0.1)
    torchsde.sdeint(
        sde,
        torch.ones(1, 1, dtype=torch.float64),
        f64(0.0, 1.0),
        bm=bm,
        method="abm2",
        dt=0.2,
        options={"jump_t": [0.5]},
    )
    intervals = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)]
    np.testing.assert_allclose(sorted(set(bm.asked)), intervals, rtol=0, atol=1e-12)
    assert (0.4, 0.5) in bm.asked
    assert bm.asked[-1][1] == 1.0
    around = {t for t in sde.seen if abs(t - 0.5) < 1e-9}
    assert around == {np.nextafter(0.5, 0), np.nextafter(0.5, 1)}


@pytest.mark.parametrize("name", SOME)
def test_an_sde_goes_on_where_it_ended(name: str) -> None:
    """The first piece takes the past up, the last one hands it on; at a jump there is none to take up."""
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(2, 1), dtype=torch.float64, entropy=5)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    arguments = {"bm": bm, "method": name, "dt": 1 / 32, "options": {"jump_t": [0.5, 0.5 + 1 / 8]}}
    with torch.no_grad():
        whole = torchsde.sdeint(JumpingDrift(0.1), y0, f64(0.0, 0.25, 0.5, 0.75, 1.0), **arguments)
        y, extra = y0, None
        for begin, end, expected in zip((0.0, 0.25, 0.5, 0.75), (0.25, 0.5, 0.75, 1.0), whole[1:], strict=True):
            states, extra = torchsde.sdeint(
                JumpingDrift(0.1), y, f64(begin, end), extra=True, extra_solver_state=extra, **arguments
            )
            y = states[-1]
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_jumps_of_an_sde_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="jump_t must not require a gradient"):
        torchsde.sdeint(
            JumpingDrift(0.1),
            torch.ones(1, 1, dtype=torch.float64),
            f64(0.0, 1.0),
            method="ab2",
            dt=0.1,
            options={"jump_t": f64(0.5, requires_grad=True)},
        )


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
