"""Stiff problems by BDF, on grids suited to them, against SciPy's Radau."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import in_turn, slow_but
from scipy.integrate import solve_ivp
from torch import Tensor

import torchdiffeq_lmm


@dataclass(frozen=True)
class Stiff:
    """A stiff problem y' = f(y) on [0, end], with f for tensors, or for numpy arrays where numpy is given too."""

    name: str
    f: Callable[..., Any]
    y0: tuple[float, ...]
    end: float


def van_der_pol(y: Any, lib: Any = torch) -> Any:
    x, v = y if lib is np else y.unbind()
    return lib.stack([v, 1000 * (1 - x * x) * v - x])


def robertson(y: Any, lib: Any = torch) -> Any:
    a, b, c = y if lib is np else y.unbind(-1)
    first, back, second = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    net = first - back
    return lib.stack([-net, net - second, second], -1)


HIRES_MATRIX = np.zeros((8, 8))
for row, column, rate in (
    *((0, 0, -1.71), (0, 1, 0.43), (0, 2, 8.32), (1, 0, 1.71), (1, 1, -8.75), (2, 2, -10.03), (2, 3, 0.43)),
    *((2, 4, 0.035), (3, 1, 8.32), (3, 2, 1.71), (3, 3, -1.12), (4, 4, -1.745), (4, 5, 0.43), (4, 6, 0.43)),
    *((5, 3, 0.69), (5, 4, 1.71), (5, 5, -0.43), (5, 6, 0.69), (6, 6, -1.81), (7, 6, 1.81)),
):
    HIRES_MATRIX[row, column] = rate
HIRES_PRODUCT = np.array([0, 0, 0, 0, 0, -280.0, 280.0, -280.0])
HIRES_SOURCE = np.array([0.0007, 0, 0, 0, 0, 0, 0, 0])
HIRES_CONSTANTS = HIRES_MATRIX.T, HIRES_PRODUCT, HIRES_SOURCE


@cache
def hires_constants(dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(each, dtype=dtype) for each in HIRES_CONSTANTS]


def hires(y: Any, lib: Any = torch) -> Any:
    matrix, of_product, source = HIRES_CONSTANTS if lib is np else hires_constants(y.dtype)
    return y @ matrix + of_product * (y[..., 5] * y[..., 7])[..., None] + source


# Past its first jump, near 807.
VAN_DER_POL = Stiff("van der Pol", van_der_pol, (2.0, 0.0), 1000.0)
ROBERTSON = Stiff("Robertson", robertson, (1.0, 0.0, 0.0), 1e4)
HIRES = Stiff("HIRES", hires, (1.0, 0, 0, 0, 0, 0, 0, 0.0057), 321.8122)
PROBLEMS = {problem.name: problem for problem in (VAN_DER_POL, ROBERTSON, HIRES)}


def radau(problem: Stiff, rtol: float, atol: float) -> tuple[np.ndarray, np.ndarray]:
    """The steps that Radau takes, and the state at the end."""
    done = solve_ivp(
        lambda t, y: problem.f(y, np),
        (0.0, problem.end),
        problem.y0,
        method="Radau",
        rtol=rtol,
        atol=atol,
        # By steps along the imaginary axis, which are exact, and take a fraction of the time of autograd.
        jac=lambda t, y: np.stack([problem.f(y + 1e-30j * row, np).imag for row in np.eye(len(y))], -1) / 1e-30,
    )
    return done.t, done.y[:, -1]


@cache
def reference(name: str) -> np.ndarray:
    return radau(PROBLEMS[name], 1e-8, 1e-13)[1]


@cache
def coarse_grid(name: str) -> np.ndarray:
    return radau(PROBLEMS[name], 1e-4, 1e-8)[0]


def refined(grid: np.ndarray, parts: int) -> Tensor:
    """A grid with every step of `grid` divided."""
    count = len(grid) - 1
    return torch.tensor(np.interp(np.linspace(0, count, count * parts + 1), np.arange(count + 1), grid))


def on(nodes: Tensor) -> dict[str, Callable[..., Tensor]]:
    return {"grid_constructor": lambda func, y0, t: nodes}


def end_by(name: str, method: str, nodes: Tensor, samples: tuple[int, ...] = ()) -> Tensor:
    """The state at the end of the problem of that name, for `samples` copies of its initial state."""
    problem = PROBLEMS[name]
    y0 = torch.tensor(problem.y0, dtype=nodes.dtype).expand(*samples, -1).clone()
    return torchdiffeq.odeint(lambda t, y: problem.f(y), y0, nodes[[0, -1]], method=method, options=on(nodes))[-1]


def assert_ends_as_radau(name: str, end: Tensor, accuracy: float) -> None:
    found, exact = end.detach().double().numpy(), reference(name)
    assert (np.abs(found - exact) <= accuracy * (np.abs(exact) + 1e-6)).all(), found / exact - 1


# The methods share the problems out; bdf4 has the hardest one beside.
AGAINST_RADAU = [
    ("van der Pol", "bdf4", 8, 1e-5),
    ("Robertson", "bdf1", 3, 4e-2),
    ("Robertson", "bdf3", 4, 6.4e-4),
    ("Robertson", "bdf5", 8, 1e-6),
    ("Robertson", "bdf6", 16, 5e-9),
    ("Robertson", "am2", 3, 1.6e-3),
    ("HIRES", "bdf2", 3, 1.6e-2),
    ("HIRES", "bdf4", 4, 4e-5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "parts", "accuracy"), AGAINST_RADAU)
def test_against_radau(name: str, method: str, parts: int, accuracy: float) -> None:
    with torch.no_grad():
        assert_ends_as_radau(name, end_by(name, method, refined(coarse_grid(name), parts)), accuracy)


@pytest.mark.slow
def test_gradient_of_a_stiff_solve_is_that_of_the_flow() -> None:
    """∂y(T)/∂k for Robertson's fastest rate k, against differences of Radau; with the filter and without."""
    nodes = refined(coarse_grid("Robertson"), 3)

    def with_rate(k: Tensor | float) -> Callable[..., Any]:
        def f(y: Any, lib: Any = torch) -> Any:
            a, b, c = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * k * y[1] ** 2
            return lib.stack([b - a, a - b - c, c])

        return f

    ends = [radau(Stiff("", with_rate(k), ROBERTSON.y0, ROBERTSON.end), 1e-8, 1e-13)[1] for k in (0.999, 1.001)]
    expected = (ends[1] - ends[0])[0] / 0.002
    for grad_filter in (None, torchdiffeq_lmm.CostateFilter("trapezoid")):
        k = torch.ones((), dtype=torch.float64, requires_grad=True)
        f = with_rate(k)
        y0 = torch.tensor(ROBERTSON.y0, dtype=torch.float64)
        y = torchdiffeq_lmm.odeint(
            lambda t, y, f=f: f(y), y0, nodes[[0, -1]], method="bdf3", options=on(nodes), grad_filter=grad_filter
        )
        (gradient,) = torch.autograd.grad(y[-1, 0], k)
        assert float(gradient) == pytest.approx(expected, rel=1e-3 if grad_filter is None else 2e-2)


@pytest.mark.parametrize("method", slow_but(["bdf2"], ["bdf1", "bdf2", "bdf3", "bdf4", "bdf5", "bdf6"]))
def test_coarse_steps_far_beyond_explicit_stability(method: str) -> None:
    """y' = -10⁴ (y - cos t) - sin t from y = cos t, by steps of 500 time constants."""
    t = torch.linspace(0, 5, 101, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -1e4 * (y - torch.cos(t)) - torch.sin(t)

    y = torchdiffeq.odeint(func, torch.ones(1, dtype=torch.float64), t, method=method)
    assert (y[:, 0] - torch.cos(t)).abs().max() < 1e-4


def test_an_initial_transient_is_damped() -> None:
    """The solution falls from 3 to cos t within a step."""
    t = torch.linspace(0, 5, 101, dtype=torch.float64)
    y = torchdiffeq.odeint(
        lambda t, y: -1e4 * (y - torch.cos(t)) - torch.sin(t),
        torch.full((1,), 3.0, dtype=torch.float64),
        t,
        method="bdf4",
    )
    assert (y[10:, 0] - torch.cos(t[10:])).abs().max() < 1e-3


@pytest.mark.parametrize(("method", "ratio"), [("bdf3", 1.9), ("bdf4", 1.5), ("bdf5", 1.3), ("bdf6", 1.25)])
def test_steps_that_grow_too_fast_are_refused(method: str, ratio: float) -> None:
    nodes = torch.tensor(np.cumsum([0.0, *(1e-12 * ratio ** np.arange(70))]))
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return -y

    with pytest.raises(ValueError, match=rf"{method}.*not stable on this grid.*grow by up to {ratio}") as raised:
        torchdiffeq.odeint(func, torch.ones(1, dtype=torch.float64), nodes[[0, -1]], method=method, options=on(nodes))
    assert "lower order" in str(raised.value)
    assert not calls


def test_an_equation_without_a_solution_is_an_error() -> None:
    """y' = y² + 1 by a step that the implicit Euler method has no real solution for."""
    t = torch.tensor([0.0, 0.5, 1.5, 4.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"method 'bdf1' at t = 1\.5.*not solved.*residual is .*smaller steps"):
        torchdiffeq.odeint(lambda t, y: y * y + 1, torch.zeros(1, dtype=torch.float64), t, method="bdf1")


def test_a_function_that_gives_nan_is_an_error() -> None:
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="method 'bdf2' at t = 0"):
        torchdiffeq.odeint(lambda t, y: torch.sqrt(y - 2), torch.ones(1, dtype=torch.float64), t, method="bdf2")


BATCHES = [
    ("Robertson", "bdf1", 86, 4e-2),
    ("Robertson", "bdf2", 86, 2e-3),
    ("Robertson", "am2", 86, 2e-3),
    ("Robertson", "bdf2", 400, 2e-3),
    ("HIRES", "bdf3", 33, 2e-3),
]
DTYPES = [(torch.float32, True), (torch.float64, False)]


@pytest.mark.parametrize(
    ("name", "method", "samples", "accuracy", "dtype", "grad"),
    slow_but(
        [],
        [
            (*BATCHES[1], torch.float32, True),
            *((*batch, *(DTYPES[number % 2])) for number, batch in enumerate(BATCHES)),
        ],
    ),
)
def test_every_sample_of_a_batch_against_radau(
    name: str, method: str, samples: int, accuracy: float, dtype: torch.dtype, grad: bool
) -> None:
    nodes = refined(coarse_grid(name), 4).to(dtype)
    with torch.set_grad_enabled(grad):
        assert_ends_as_radau(name, end_by(name, method, nodes, (samples,)), accuracy)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("bdf2", torch.float32), ("am2", torch.float64)])
def test_company_changes_nothing(method: str, dtype: torch.dtype) -> None:
    """Beside a constant of any size, alone, in one tensor and in a tuple."""
    nodes = refined(coarse_grid("Robertson"), 4)[:40].to(dtype)
    y0 = torch.tensor(ROBERTSON.y0, dtype=dtype)
    t, options = nodes[[0, -1]], on(nodes)
    alone = torchdiffeq.odeint(lambda t, y: robertson(y), y0, t, method=method, options=options)[-1]
    for size in (1e4, 1e8):
        company = torch.full((2,), size, dtype=dtype)
        in_a_tuple = torchdiffeq.odeint(
            lambda t, y: (torch.zeros_like(y[0]), robertson(y[1])), (company, y0), t, method=method, options=options
        )
        in_a_tensor = torchdiffeq.odeint(
            lambda t, y: torch.cat([torch.zeros_like(y[:2]), robertson(y[2:])]),
            torch.cat([company, y0]),
            t,
            method=method,
            options=options,
        )
        for y in (in_a_tuple[1][-1], in_a_tensor[-1][2:]):
            torch.testing.assert_close(y, alone, rtol=1e-5 if dtype is torch.float32 else 1e-9, atol=1e-12)


def test_an_error_names_the_sample() -> None:
    """y' = y² + a has no solution to its implicit equation for one sample of three."""
    a = torch.tensor([[-4.0], [1.0], [-4.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"t = 1 was not solved: the worst entry of the state is y\[1, 0\] = "):
        torchdiffeq.odeint(lambda t, y: y * y + a, torch.zeros(3, 1, dtype=torch.float64), t, method="bdf1")
    with pytest.raises(RuntimeError, match=r"the worst entry of the state is y\[1\]\[1, 0\] = "):
        torchdiffeq.odeint(
            lambda t, y: (-y[0], y[1] ** 2 + a),
            (torch.ones(2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)),
            t,
            method="bdf1",
        )


def by_numpy(t: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(-50 * np.sin(y.numpy()))


def by_out(t: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(y)
    return torch.mul(torch.sin(y, out=out), -50.0, out=out)


FILTERED = {"grad_filter": "auto"}


@pytest.mark.parametrize(
    ("size", "func", "options", "grad"),
    [
        # Each pair of settings once.
        (2, by_numpy, {}, True),
        (2, by_numpy, FILTERED, False),
        (2, by_out, {}, False),
        (2, by_out, FILTERED, True),
        pytest.param(300, by_out, {}, True, marks=pytest.mark.slow),
        pytest.param(300, by_numpy, FILTERED, False, marks=pytest.mark.slow),
    ],
)
def test_func_without_gradients(
    size: int, func: Callable[[Tensor, Tensor], Tensor], options: dict[str, str], grad: bool
) -> None:
    y0, t = torch.linspace(0.1, 1, size, dtype=torch.float64), torch.linspace(0, 0.3, 4, dtype=torch.float64)
    # One step shows what becomes of a large state, and takes long enough.
    t = t if size == 2 else t[:2]
    expected = torchdiffeq.odeint(lambda t, y: -50 * torch.sin(y), y0, t, method="bdf2")
    with torch.set_grad_enabled(grad):
        y = torchdiffeq.odeint(func, y0, t, method="bdf2", options=dict(options))
    assert not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-10)


def test_a_gradient_that_func_cannot_give_is_its_own_error() -> None:
    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 11, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="numpy"):
        torchdiffeq.odeint(by_numpy, y0, t, method="bdf2")


class Remembers(torch.nn.Module):
    """Stores what it is given, as modules do for looking at it later."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(-50.0, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.last = 1.0 * y
        return self.rate * torch.sin(y)


@pytest.mark.parametrize("size", [2, 300])
def test_without_gradients_func_is_given_no_graph(size: int) -> None:
    func, t = Remembers(), torch.linspace(0, 1, 11, dtype=torch.float64)
    with torch.no_grad():
        torchdiffeq.odeint(func, torch.ones(size, dtype=torch.float64), t, method="bdf2")
    assert not func.last.requires_grad
    copy.deepcopy(func)


@pytest.mark.parametrize(
    ("size", "steps", "end"), slow_but([(8, 30, 0.2)], [(8, 30, 0.2), (300, 15, 0.1), (1025, 3, 5e-4)])
)
def test_a_stiff_system_of_any_size(size: int, steps: int, end: float) -> None:
    """The heat equation in `size` points: by its matrix where it is small, matrix-free where it is large."""
    width = 1 / (size + 1)
    x = width * torch.arange(1, size + 1, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(y, (1, 1))
        return (padded[2:] - 2 * y + padded[:-2]) / width**2

    y0 = torch.sin(torch.pi * x).requires_grad_()
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    y = torchdiffeq.odeint(func, y0, t, method="bdf4")[-1]
    rate = -4 / width**2 * np.sin(np.pi * width / 2) ** 2
    decay = np.exp(end * rate)
    torch.testing.assert_close(y, decay * y0, rtol=1e-5, atol=1e-8)
    (gradient,) = torch.autograd.grad(y @ torch.sin(torch.pi * x), y0)
    torch.testing.assert_close(gradient, decay * torch.sin(torch.pi * x), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [1e4, 1e6])
def test_a_start_far_from_the_solution_is_not_taken_for_it(rate: float, dtype: torch.dtype) -> None:
    """y' = -rate (y³ - 8) from 1: the slope at the first guess is larger than all that follows, by far."""
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    y = torchdiffeq.odeint(lambda t, y: -rate * (y**3 - 8), torch.ones(1, dtype=dtype), t, method="bdf1")
    assert float(y[-1]) == pytest.approx(2.0, rel=1e-4)


def test_a_steep_equation_without_a_solution_is_an_error() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="was not solved"):
        torchdiffeq.odeint(
            lambda t, y: torch.exp(50 * y * y) + 1, torch.zeros(1, dtype=torch.float64), t, method="bdf1"
        )


def test_a_singular_equation_is_an_error() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="was not solved"):
        torchdiffeq.odeint(lambda t, y: y + 1, torch.zeros(1, dtype=torch.float64), t, method="bdf1")


@pytest.mark.parametrize("size", [2, 100, 2000])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_cotangents_that_are_not_finite_are_passed_on(scale: float, size: int) -> None:
    """As automatic loss scaling counts on."""
    y0 = torch.ones(size, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: -torch.sin(y), y0, t, method="bdf2")
    (scale * y[-1].sum()).backward()
    assert not torch.isfinite(y0.grad).any()


@pytest.mark.parametrize(
    ("method", "rate", "grid"),
    in_turn(
        list(itertools.product([1e2, 1e4, 1e6], ["equal", "growing"])),
        few=2,
        fast=("bdf2",),
        names=["bdf1", "bdf2", "bdf3", "bdf4", "bdf5"],
    ),
)
def test_the_filter_stays_bounded_where_the_costate_decays_within_a_step(method: str, rate: float, grid: str) -> None:
    """y' = -rate (y - θ): all of ∂y(T)/∂θ = 1 is within 1 / rate before the end."""
    steps = torch.ones(100, dtype=torch.float64)
    if grid == "growing":
        steps = torch.exp(0.01 * torch.arange(100, dtype=torch.float64))
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), (steps / steps.sum()).cumsum(0)])
    theta = torch.zeros(len(nodes), dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -rate * (y - theta[int((nodes - t).abs().argmin())])

    y = torchdiffeq_lmm.odeint(func, torch.zeros(1, dtype=torch.float64), nodes, method=method, grad_filter="auto")
    (gradient,) = torch.autograd.grad(y[-1].sum(), theta)
    assert 0.5 < float(gradient.sum()) < 9
    assert gradient[:-30].abs().max() < 1e-3


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.float64]))
@pytest.mark.parametrize("batch", [(), pytest.param((64,), marks=pytest.mark.slow)])
@pytest.mark.parametrize("saturates", slow_but([False], [False, True]))
def test_stiff_vectors_of_any_precision(saturates: bool, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """y' = M y with rates from 1 to 10⁴, and the same slopes cut off at 100."""
    if saturates and batch:
        pytest.skip("the Jacobian is 0 where slopes are cut off, and differences of it are no guide")
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    matrix = (-basis @ torch.diag(torch.logspace(0, 4, 8, dtype=torch.float64)) @ basis.T).to(dtype)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 100 * torch.tanh(0.01 * (y @ matrix)) if saturates else y @ matrix

    y0 = torch.randn(*batch, 8, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.linspace(0, 1, 51, dtype=dtype)
    y = torchdiffeq.odeint(func, y0, t, method="bdf2", rtol=1e-4, atol=1e-6)
    if not saturates:
        slow = y[-1] @ basis[:, 0].to(dtype)
        torch.testing.assert_close(slow, np.exp(-1) * (y0 @ basis[:, 0].to(dtype)), rtol=2e-3, atol=2e-3)
    assert y[-1].norm() < y0.norm()


@pytest.mark.parametrize("size", [32, 33, 300])
def test_gradients_under_autocast(size: int) -> None:
    """y' = W y with W = -1, in bfloat16."""
    linear = torch.nn.Linear(size, size, bias=False)
    with torch.no_grad():
        linear.weight.copy_(-torch.eye(size))
    y0, t = torch.ones(size, requires_grad=True), torch.linspace(0, 1, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torchdiffeq.odeint(lambda t, y: linear(y), y0, t, method="bdf2")
    (gradient,) = torch.autograd.grad(y[-1].sum(), y0)
    torch.testing.assert_close(gradient, torch.full((size,), float(np.exp(-1))), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("spread", "rate"), slow_but([(8, 1e3)], itertools.product([0, 8], [1.0, 1e3])))
def test_every_sample_of_a_batch_has_its_own_gradient(rate: float, spread: int) -> None:
    """However much more the loss sees of others; in single precision, against double."""
    found = []
    for dtype in (torch.float32, torch.float64):
        y0 = torch.linspace(0.5, 2, 40, dtype=torch.float64).to(dtype).requires_grad_()
        rates = rate * torch.linspace(1, 2, 40, dtype=torch.float64).to(dtype)
        t = torch.linspace(0, 1, 11, dtype=dtype)
        y = torchdiffeq.odeint(
            lambda t, y, k=rates: -k * (torch.tanh(y) - torch.cos(t) / 2), y0, t, method="bdf2", options={}
        )
        weights = torch.logspace(-spread / 2, spread / 2, 40, dtype=torch.float64).to(dtype)
        found.append(torch.autograd.grad((weights * y[1]).sum(), y0)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", slow_but([60], [60, 150]))
def test_a_beam_in_single_precision(size: int) -> None:
    """y' = -0.01 y'''' in space: the terms of f are 1e6 times as large as their sum."""
    width = 1 / (size + 1)

    def curvature(y: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(y, (1, 1))
        return (padded[..., 2:] - 2 * y + padded[..., :-2]) / width**2

    x = width * torch.arange(1, size + 1, dtype=torch.float64)
    y0, t = torch.sin(torch.pi * x) + 0.3 * x, torch.linspace(0, 0.02, 2, dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: -0.01 * curvature(curvature(y)), y0.float(), t.float(), method="bdf1")
    identity = torch.eye(size, dtype=torch.float64)
    matrix = curvature(identity)
    wanted = torch.linalg.solve(identity + 0.01 * t[-1] * matrix @ matrix, y0)
    torch.testing.assert_close(y[-1].double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", slow_but(["bdf2"], ["bdf1", "bdf2"]))
@pytest.mark.parametrize(("dtype", "end"), [(torch.float16, 1.0), (torch.float32, 10.0)])
def test_a_solution_may_vanish(dtype: torch.dtype, end: float, method: str) -> None:
    t = torch.linspace(0, end, 101).to(dtype)
    y = torchdiffeq.odeint(lambda t, y: -50 * torch.tanh(y), torch.ones(2, dtype=dtype), t, method=method, atol=0.0)
    assert (y[-1].abs() < 1e-5).all()
