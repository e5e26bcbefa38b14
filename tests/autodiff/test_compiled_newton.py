"""Equations of implicit steps by a compiled function: the values and gradients of eager solves, and of closed forms."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, Field, assert_same, compiling, start
from methods import IMPLICIT, NAMES, ORDER, slow_but
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Newton, SolveReport, odeint
from torchdiffeq_lmm.forward.newton_iteration import NewtonIteration

pytestmark = [NEEDS_TORCH, pytest.mark.filterwarnings("ignore:a GridParameter of kind")]

GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-3, 0.3, 24, dtype=torch.float64)])
EQUAL = torch.linspace(0, 1, 21, dtype=torch.float64)
CLOSE = 1e-7
"""Equations are solved to a part of the tolerances; the errors of two solutions add up."""


class VanDerPol(nn.Module):
    """μ from 1 to 1,000, or another power of ten, one for each sample."""

    def __init__(self, count: int = 5, power: float = 3.0) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.logspace(0, power, count, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        position, speed = y.unbind(-1)
        return torch.stack([speed, self.mu * (1 - position * position) * speed - position], -1)


def beginning(count: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([2.0, 0.0], dtype=dtype).repeat(count, 1)


def solved(func: nn.Module, y0: Tensor, t: Tensor, method: str, **keywords: Any) -> list[Tensor]:
    """The states, and the gradients of y0, t and all parameters."""
    y0, t = y0.detach().clone().requires_grad_(), t.detach().clone().requires_grad_()
    states = odeint(func, y0, t, method=method, **keywords)
    weights = torch.linspace(1, 2, states.numel(), dtype=states.dtype).reshape(states.shape)
    return [states.detach(), *torch.autograd.grad((weights * states).sum(), (y0, t, *func.parameters()))]


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each step that the compiled function has not solved, for how many samples."""
    steps: list[int] = []
    run = NewtonIteration.run

    def counted(self: NewtonIteration) -> None:
        steps.append(int((self.way != 3).sum()))
        run(self)

    monkeypatch.setattr(NewtonIteration, "run", counted)
    return steps


@pytest.mark.parametrize(
    ("method", "keywords"),
    slow_but(
        [("bdf2", {"grad_filter": "auto"})],
        [
            *((name, {}) for name in NAMES if name in IMPLICIT),
            ("bdf2", {"grad_filter": "auto"}),
            ("am3", {"grad_filter": "auto", "backward": "checkpoint"}),
            ("bdf4", {"backward": "checkpoint", "options": {"interp": "cubic", "step_size": 0.05}}),
            ("bdf3", {"grad_filter": torchdiffeq_lmm.CostateFilter(order=3), "options": {"perturb": True}}),
        ],
    ),
)
def test_values_and_gradients_are_those_of_an_eager_solve(
    method: str, keywords: dict[str, Any], eager_steps: list[int]
) -> None:
    # The others are not for stiff problems, or not for steps that grow.
    is_stiff = method in ("am2", "bdf1", "bdf2", "bdf3", "bdf4")
    func, t = VanDerPol(power=3.0 if is_stiff else 0.3), GRID if is_stiff else EQUAL
    compiled = solved(func, beginning(), t, method, compile=TRACED, **keywords)
    # Of the largest μ the first steps are long.
    few = len(eager_steps)
    assert_same(compiled, solved(func, beginning(), t, method, **keywords), CLOSE)
    assert few < 0.6 * (len(eager_steps) - few)


@pytest.mark.parametrize("method", slow_but(["bdf3"], ["bdf3", "am4"]))
def test_states_and_gradients_converge_to_the_closed_form(method: str, eager_steps: list[int]) -> None:
    # y' = λ (cos t - y) - sin t, y(0) = 1 + e: y = cos t + e exp(-λ t).
    rate = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    errors = []
    for steps in (16, 32, 64):
        e = torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 2.0], dtype=torch.float64)
        end = odeint(
            lambda t, y: rate * (t.cos() - y) - t.sin(),
            1 + e,
            t,
            method=method,
            options={"step_size": 2 / steps},
            compile=TRACED,
        )[-1]
        (grad,) = torch.autograd.grad(end.sum(), (e,))
        decay = torch.exp(-2 * rate)
        error = max((end.detach() - math.cos(2) - e.detach() * decay).abs().max(), (grad - decay).abs().max())
        errors.append(float(error))
    assert not eager_steps
    for coarse, fine in pairwise(errors):
        assert ORDER[method] - 0.4 < math.log2(coarse / fine) < ORDER[method] + 0.8, errors


def robertson(t: float, y: np.ndarray) -> list[float]:
    first, back, second = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return [back - first, first - back - second, second]


@pytest.mark.parametrize("dtype", slow_but([torch.float64], [torch.float64, torch.float32]))
def test_against_radau(dtype: torch.dtype) -> None:
    wanted = solve_ivp(robertson, (0, 40.0), [1.0, 0, 0], method="Radau", rtol=1e-9, atol=1e-13).y[:, -1]
    t = torch.cat([torch.zeros(1), torch.logspace(-6, math.log10(40), 100)]).to(dtype)
    errors = []
    for compile in (TRACED, None):  # noqa: A001
        y = odeint(
            lambda t, y: torch.stack([*_robertson(y)], -1),
            torch.tensor([1.0, 0, 0], dtype=dtype).repeat(3, 1),
            t,
            method="bdf3",
            compile=compile,
        )
        errors.append(float(((y[-1, 0].double() - torch.from_numpy(wanted)) / torch.tensor([1, 1e-5, 1])).abs().max()))
    compiled, eager = errors
    assert compiled < 1.5 * eager + (1e-9 if dtype is torch.float64 else 1e-5)
    assert compiled < 3e-3


def _robertson(y: Tensor) -> tuple[Tensor, ...]:
    first, back, second = 0.04 * y[..., 0], 1e4 * y[..., 1] * y[..., 2], 3e7 * y[..., 1] ** 2
    return back - first, first - back - second, second


class Nodes(nn.Module):
    """A callback of torchdiffeq's beside func."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(30.0, dtype=torch.float64))
        self.seen: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * (t.cos() - y)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.seen.append(float(t0))


@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "bdf2", "options": REGULAR, "grad_filter": "auto"},
        {"method": "am2", "options": {**REGULAR, "jump_t": [0.5]}},
        {"method": "bdf2", "options": REGULAR, "backwards": True},
        {"method": "bdf2", "rtol": 1e-6, "atol": (1e-6, 1e-8), "options": REGULAR},
    ],
    ids=["rows", "jump", "backwards in time", "tolerances of entries"],
)
def test_rows_of_steps_jumps_and_tolerances(keywords: dict[str, Any]) -> None:
    func, t = Field(), INSIDE.flip(0) if keywords.get("backwards") else INSIDE
    given = {name: value for name, value in keywords.items() if name != "backwards"}
    if isinstance(given.get("atol"), tuple):
        given["atol"] = torch.tensor(given["atol"], dtype=torch.float64)
    found = solved(func, start(), t, compile=TRACED, **given)
    assert_same(found, solved(func, start(), t, **given), 1e-6)


def test_adaptive_steps() -> None:
    func, report = VanDerPol(3), SolveReport()
    keywords: dict[str, Any] = {"method": "bdf", "rtol": 1e-6, "atol": 1e-8}
    found = solved(func, beginning(3), GRID[[0, 20, 24]], compile=TRACED, options={"report": report}, **keywords)
    assert report.steps < report.evaluations < 4 * report.steps
    assert_same(found, solved(func, beginning(3), GRID[[0, 20, 24]], **keywords), 1e-3)


def test_callbacks_are_called() -> None:
    func = Nodes()
    for method in ("bdf1", "bdf"):
        func.seen.clear()
        odeint(func, torch.ones(2, 1, dtype=torch.float64), INSIDE, method=method, compile=TRACED)
        assert func.seen[0] == 0.0
        assert len(func.seen) >= 3


def test_what_a_callback_changes_of_func_is_seen() -> None:
    class Switched(Nodes):
        limit = 1.0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.rate * (self.limit * t.cos() - y)

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            self.limit = 1.0 if t0 < 0.5 else 2.0

    func, found = Switched(), []
    for compile in (TRACED, None):  # noqa: A001
        y = odeint(func, torch.ones(2, 1, dtype=torch.float64), EQUAL, method="bdf2", compile=compile)
        found.append([y.detach(), *torch.autograd.grad(y[-1].sum(), (func.rate,))])
    assert_same(*found, CLOSE)
    assert float(found[0][0][-1, 0]) > 1.0


@pytest.mark.parametrize("method", slow_but(["bdf2"], ["bdf2", "bdf"]))
def test_the_time_of_an_event_and_its_gradient(method: str) -> None:
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    t0, y0 = torch.zeros((), dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def solve(*args: Any, **keywords: Any) -> Any:
        options = {"compile": TRACED, **({"step_size": 0.01} if method == "bdf2" else {})}
        return torchdiffeq.odeint(*args, **keywords, options=options)

    time, _ = torchdiffeq.odeint_event(
        lambda t, y: -rate * y,
        y0,
        t0,
        event_fn=lambda t, y: y.sum() - 0.5,
        odeint_interface=solve,
        method=method,
        rtol=1e-7,
        atol=1e-9,
    )
    (grad,) = torch.autograd.grad(time, (rate,))
    assert float(time.detach()) == pytest.approx(math.log(2) / 2, abs=2e-4)
    assert float(grad) == pytest.approx(-math.log(2) / 4, abs=2e-3)


class Pair(nn.Module):
    """A tuple state: a matrix beside a vector of the same samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([5.0, 50.0, 500.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.rate[:, None] * (y[1][:, None].sin() - y[0]), y[0].sum(-1) - y[1]


@pytest.mark.slow
def test_a_tuple_and_dimensions_of_samples(eager_steps: list[int]) -> None:
    func, found = Pair(), []
    for compile in (TRACED, None):  # noqa: A001
        y0 = start().requires_grad_(), torch.ones(3, dtype=torch.float64, requires_grad=True)
        y = odeint(func, y0, INSIDE, method="bdf2", options=REGULAR, compile=compile)
        found.append([*y, *torch.autograd.grad(sum(part.square().sum() for part in y), (*y0, func.rate))])
        assert compile is None or len(eager_steps) < 5
    assert_same(*([part.detach() for part in one] for one in found), CLOSE)
    y0 = torch.linspace(1, 2, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    # In a dimension more than that of the samples.
    ends = [
        odeint(lambda t, y: -50 * y**3, y0, INSIDE, method="bdf2", options=options, compile=compile)
        for compile, options in ((TRACED, {**REGULAR, "batch_dims": 2}), (None, REGULAR))  # noqa: A001
    ]
    assert_same(ends[:1], ends[1:], CLOSE)


def test_without_gradients() -> None:
    func = VanDerPol()
    expected = odeint(func, beginning(), GRID, method="bdf2").detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = odeint(func, beginning(), GRID, method="bdf2", compile=TRACED)
            assert not found.requires_grad
            assert_same([found], [expected], CLOSE)
            # And with what was made in that mode.
            assert_same([odeint(func, beginning(), GRID.clone(), method="bdf2", compile=TRACED)], [expected], CLOSE)


@pytest.mark.parametrize(
    ("shape", "dims"), slow_but([((2, 2), 0)], [((), "auto"), ((2, 2), 0), ((2, 3), 2), ((2, 3, 2), 1)])
)
def test_shapes_and_dimensions_of_samples(shape: tuple[int, ...], dims: object, eager_steps: list[int]) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        # In one system all entries have a part in each other.
        return -0.5 * y**3 + 0.2 * (y.sum() if dims == 0 else y)

    y0, options = torch.linspace(1, 2, math.prod(shape), dtype=torch.float64).reshape(shape), {"batch_dims": dims}
    found = odeint(func, y0, EQUAL, method="bdf2", compile=TRACED, options=options)
    assert len(eager_steps) < 10
    assert_same([found], [odeint(func, y0, EQUAL, method="bdf2")], CLOSE)


@pytest.mark.slow
def test_it_is_compiled_once_for_steps_times_values_and_batches() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return weight * (t.cos() - y) ** 3 - y

    weight = nn.Parameter(torch.tensor(50.0, dtype=torch.float64))
    keywords: dict[str, Any] = {"method": "bdf2", "compile": TRACED}
    with compiling(1):
        odeint(func, start(3), INSIDE, **keywords)
    with compiling(0):
        odeint(func, start(3), 2 * GRID, **keywords)
        odeint(func, start(3), GRID, method="bdf4", compile=TRACED)
        with torch.no_grad():
            weight.mul_(0.5)
            odeint(func, start(3), INSIDE, **keywords)
    for batch, count in ((7, 1), (4, 0), (100, 0)):
        with compiling(count):
            found = odeint(func, start(batch), INSIDE, **keywords)
        assert_same([found.detach()], [odeint(func, start(batch), INSIDE, method="bdf2").detach()], CLOSE)


def test_a_sample_does_not_depend_on_the_others(eager_steps: list[int]) -> None:
    rates = torch.logspace(-1, 3, 6, dtype=torch.float64)[:, None]

    def ends(chosen: list[int]) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            # Its Jacobian is not symmetric, nor the same for any two samples.
            return rate * (t.cos() - y**3) + y.flip(1) * scales

        rate = rates[chosen]
        return odeint(func, torch.ones(len(chosen), 2, dtype=torch.float64), EQUAL, method="bdf2", compile=TRACED)

    scales = torch.tensor([0.1, -0.2], dtype=torch.float64)
    every, turned, few = ends([0, 1, 2, 3, 4, 5]), ends([5, 4, 3, 2, 1, 0]), ends([1, 4])
    assert len(eager_steps) <= 6
    # Beside others that stop earlier or later, and are more or fewer.
    assert torch.equal(every, turned.flip(1))
    assert torch.equal(every[:, [1, 4]], few)


class TestWhatIsLeftToTheEagerIterations:
    def test_steps_on_which_newtons_method_does_not_converge(self, eager_steps: list[int]) -> None:
        # Newton's method leads away from the zero of an arctan that it begins too far from.
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -40 * torch.atan(scale * y) / scale

        scale = torch.tensor([[0.01], [25.0]], dtype=torch.float64)
        y0, t = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.linspace(0, 2, 3, dtype=torch.float64)
        y = odeint(func, y0, t, method="bdf1", compile=TRACED)
        assert eager_steps
        assert set(eager_steps) == {1}
        residual = y[1:] - y[:-1] - func(t, y[1:])
        assert float(residual.abs().max()) < 1e-9

    GRID = torch.linspace(0, 1, 11, dtype=torch.float64)

    @staticmethod
    def _fails(t: Tensor, y: Tensor) -> Tensor:
        """From t = 0.45 on, no step of the third sample has a solution."""
        ends = (t > 0.45) & (torch.arange(5)[:, None] == 2)
        return torch.where(ends, 1e3 * (1 + y * y), -50 * y)

    def test_a_sample_without_a_solution_is_named(self) -> None:
        y0 = torch.ones(5, 1, dtype=torch.float64)
        message = r"at t = 0\.5 was not solved: .* y\[2, 0\] .* 1 samples, of 5, .*: \[2\].*on_failure"
        with pytest.raises(RuntimeError, match=message):
            odeint(self._fails, y0, self.GRID, method="bdf1", compile=TRACED)

    def test_the_others_may_go_on(self) -> None:
        y0 = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
        options = {"on_failure": "nan"}
        with pytest.warns(UserWarning, match=r"not solved for 1 of 5 samples, \[2\]: they are NaN from there on"):
            y = odeint(self._fails, y0, self.GRID, method="bdf1", compile=TRACED, options=options)
        assert torch.isnan(y[5:, 2]).all()
        others = [0, 1, 3, 4]
        exact = (6.0 ** -torch.arange(11, dtype=torch.float64))[:, None].expand(11, 4)
        torch.testing.assert_close(y.detach()[:, others, 0], exact)
        y[-1, others].sum().backward()
        torch.testing.assert_close(y0.grad[others], torch.full((4, 1), 6.0**-10, dtype=torch.float64))
        assert y0.grad[2] == 0


def _solve(**keywords: Any) -> None:
    given: dict[str, Any] = {"func": VanDerPol(), "y0": beginning(), "method": "bdf2", "compile": TRACED, **keywords}
    odeint(t=INSIDE, **given)


def _autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _solve()


def _adjoint() -> None:
    torchdiffeq.odeint_adjoint(VanDerPol(), beginning(), INSIDE, method="bdf2", options={"compile": True})


REFUSALS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "coupled samples": (
        RuntimeError,
        "acts on samples independently .* in f of 3 of 3 samples",
        lambda: _solve(func=lambda t, y: y.mean(0) - y * y, y0=start()),
    ),
    "many entries": (ValueError, "at most 8 entries .* got 10", lambda: _solve(func=lambda t, y: -y, y0=start(2, 10))),
    "no samples": (
        ValueError,
        "at most 8 entries .* got 10, where 0 dimensions",
        lambda: _solve(options={"batch_dims": 0}),
    ),
    "no matrix": (
        ValueError,
        "matrix_limit",
        lambda: _solve(options={"newton": Newton(matrix_limit=0, fallback_limit=0)}),
    ),
    "complex": (TypeError, "y0 must be float32 or float64", lambda: _solve(y0=beginning() + 0j)),
    "half": (TypeError, "y0 must be float32 or float64", lambda: _solve(y0=beginning(dtype=torch.bfloat16))),
    "known Jacobian": (
        ValueError,
        "jac_sparsity, jac and preconditioner must not",
        lambda: _solve(options={"jac_sparsity": torch.ones(10, 10)}),
    ),
    "values": (
        RuntimeError,
        "compile cannot trace func",
        lambda: _solve(func=lambda t, y: y if y.sum() > 0 else -y),
    ),
    "random": (RuntimeError, "draws random numbers", lambda: _solve(func=lambda t, y: y * torch.rand(()))),
    "autocast": (RuntimeError, "compile does not support autocast", _autocast),
    "odeint_adjoint": (ValueError, "compile must not be given to odeint_adjoint", _adjoint),
    "adams": (ValueError, "not for method 'adams'", lambda: _solve(method="adams")),
    "type": (TypeError, "compile must be True", lambda: _solve(compile="yes")),
}


@pytest.mark.parametrize(("error", "match", "solve"), REFUSALS.values(), ids=REFUSALS)
def test_what_it_is_not_for_is_refused(error: type[Exception], match: str, solve: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        solve()
