"""Stiff problems in batches: a sample is solved as if it were alone, and so is its gradient."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from adaptive import hires
from methods import slow_but
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import torchdiffeq_lmm

GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 2, 60, dtype=torch.float64)])

lengths_of_grid = pytest.mark.parametrize("nodes", slow_but([20], [20, len(GRID)]))
"""Within the first 4e-4 of the reaction, or all of it."""
parts_of_grid = pytest.mark.parametrize("nodes", slow_but([20], [20, 40]))
"""The same, or up to 0.2: past the beginning, where steps are long."""


class Robertson(nn.Module):
    """Robertson's reaction with rates of its own for each sample; the state (..., 3), or a tuple of its parts."""

    def __init__(self, rates: Tensor, is_tuple: bool = False) -> None:
        super().__init__()
        self.logs = nn.Parameter(rates.log())
        self.is_tuple = is_tuple
        self.calls = 0

    def forward(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        a, b, c = (y[0][..., 0], y[0][..., 1], y[1]) if self.is_tuple else y.unbind(-1)
        k = self.logs.exp()
        first, back, second = k[:, 0] * a, k[:, 1] * b * c, k[:, 2] * b * b
        slopes = back - first, first - back - second, second
        return (torch.stack(slopes[:2], -1), slopes[2]) if self.is_tuple else torch.stack(slopes, -1)


def rates(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of unlike samples, each rate spread tenfold."""
    spread = torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    return (torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64) * 10**spread).to(dtype)


def start(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1.0, 0.0, 0.0], dtype=dtype).repeat(count, 1)


def solve(func: Callable[..., Any], y0: Any, t: Tensor = GRID, method: str = "bdf2", **keywords: Any) -> Any:
    return torchdiffeq_lmm.odeint(func, y0, t, method=method, **keywords)


@cache
def robertson_by_radau(sample: int, count: int) -> np.ndarray:
    k1, k2, k3 = rates(count)[sample].tolist()

    def f(t: float, y: np.ndarray) -> list[float]:
        first, back, second = k1 * y[0], k2 * y[1] * y[2], k3 * y[1] ** 2
        return [back - first, first - back - second, second]

    return solve_ivp(f, (0, 100.0), [1.0, 0, 0], method="Radau", rtol=1e-6, atol=1e-11).y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("bdf2", torch.float32),
        ("bdf3", torch.float64),
        ("am2", torch.float64),
    ],
)
def test_unlike_samples_are_solved_as_if_each_were_alone(method: str, dtype: torch.dtype) -> None:
    count = 300
    y = solve(Robertson(rates(count, dtype)), start(count, dtype), GRID.to(dtype), method)
    for sample in (17,) if dtype is torch.float32 else (299,):
        alone = solve(Robertson(rates(count, dtype)[sample : sample + 1]), start(1, dtype), GRID.to(dtype), method)
        assert torch.equal(y[:, sample], alone[:, 0])
        wanted = robertson_by_radau(sample, count)
        assert np.abs(y[-1, sample].detach().double().numpy() / wanted - 1).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("bdf2", torch.float64), ("bdf3", torch.float32)])
def test_unlike_samples_take_few_more_evaluations_than_one(method: str, dtype: torch.dtype) -> None:
    calls = []
    for count in (1, 256):
        func = Robertson(rates(256, dtype)[:count])
        solve(func, start(count, dtype), GRID.to(dtype), method)
        calls.append(func.calls)
    assert calls[1] <= 1.5 * calls[0]


@lengths_of_grid
def test_without_a_graph_unlike_samples_are_no_coupled_ones(nodes: int) -> None:
    """Their Jacobians, by differences, are of different iterates; taken for coupled they cost ten times as much."""
    calls, t = [], GRID[:nodes].float()
    for count in (1, 128):
        func = Robertson(rates(128, torch.float32)[:count])
        with torch.no_grad():
            y = solve(func, start(count, torch.float32), t)
        calls.append(func.calls)
    with torch.no_grad():
        alone = solve(Robertson(rates(128, torch.float32)[127:]), start(1, torch.float32), t)
    assert torch.equal(y[:, 127], alone[:, 0])
    assert calls[1] <= 2 * calls[0]


@lengths_of_grid
def test_equal_samples_take_no_more_evaluations_than_one(nodes: int) -> None:
    calls = []
    for count in (1, 128):
        func = Robertson(rates(1).repeat(count, 1))
        solve(func, start(count), GRID[:nodes])
        calls.append(func.calls)
    # To see whether samples are coupled takes none.
    assert calls[1] <= calls[0] + 1


@pytest.mark.parametrize("method", slow_but(["bdf2"], ["bdf2", "am2"]))
@parts_of_grid
def test_permuting_samples_permutes_results(nodes: int, method: str) -> None:
    count = 40
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    y = solve(Robertson(rates(count)), start(count), GRID[:nodes], method)
    permuted = solve(Robertson(rates(count)[order]), start(count), GRID[:nodes], method)
    assert torch.equal(permuted, y[:, order])


@pytest.mark.parametrize("dtype", slow_but([torch.float64], [torch.float32, torch.float64]))
@parts_of_grid
def test_scaling_one_component_changes_none_of_the_others(nodes: int, dtype: torch.dtype) -> None:
    """By a power of two, and its atol with it: but for the rounding of factors."""

    def scaled(by: float) -> Tensor:
        scale = torch.tensor([1.0, by, 1.0], dtype=dtype)
        func = Robertson(rates(8, dtype))
        atol = 1e-9 * scale
        t = GRID[:nodes].to(dtype)
        y = solve(lambda t, y: scale * func(t, y / scale), start(8, dtype), t, atol=atol, rtol=1e-6)
        return y.detach() / scale

    accuracy = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(scaled(2.0**12), scaled(1.0), rtol=accuracy, atol=0.0)


def van_der_pol(mu: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def func(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    return func


def oregonator(k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def func(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([k * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / k, 0.161 * (a - c)], -1)

    return func


PROBLEMS: dict[str, tuple[Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]], Tensor, list[float], Tensor]] = {
    "van der Pol": (
        van_der_pol,
        torch.logspace(0, 3, 64, dtype=torch.float64),
        [2.0, 0.0],
        torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-5, 0.3, 100, dtype=torch.float64)]),
    ),
    "Oregonator": (
        oregonator,
        torch.linspace(60, 90, 64, dtype=torch.float64),
        [1.0, 2.0, 3.0],
        torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 0.5, 130, dtype=torch.float64)]),
    ),
}


@cache
def sample_by_radau(name: str, sample: int) -> np.ndarray:
    make, values, y0, t = PROBLEMS[name]
    func = make(values[sample : sample + 1])
    return solve_ivp(
        lambda t, y: func(torch.tensor(t), torch.tensor(y)[None])[0].numpy(),
        (0, float(t[-1])),
        y0,
        method="Radau",
        rtol=1e-8,
        atol=1e-10,
    ).y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_worst_sample_is_as_accurate_as_alone(name: str, dtype: torch.dtype) -> None:
    make, values, y0, t = PROBLEMS[name]
    beginning = torch.tensor(y0, dtype=dtype)
    with torch.no_grad():
        y = solve(make(values.to(dtype)), beginning.repeat(len(values), 1), t.to(dtype))
        for sample in (0, 63):
            alone = solve(make(values.to(dtype)[sample : sample + 1]), beginning[None], t.to(dtype))
            wanted = sample_by_radau(name, sample)
            error, error_alone = (
                float(np.abs(x.double().numpy() / wanted - 1).max()) for x in (y[-1, sample], alone[-1, 0])
            )
            assert error <= 10 * error_alone + 1e-6
            assert error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bdf2", "bdf3"])
def test_the_worst_sample_of_hires_in_single_precision(method: str) -> None:
    """By the steps of this grid it is about 1e-3 from the solution at most."""
    values = torch.logspace(2, 3, 32)
    start = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.0057])
    t = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 30), torch.linspace(1, 20, 40)[1:]])

    def ends(k: Tensor) -> np.ndarray:
        y0 = start.repeat(len(k), 1)
        with torch.no_grad():
            y = solve(lambda t, y: torch.stack(hires(t, y.unbind(-1), k), -1), y0, t, method)
        return y[-1].double().numpy()

    found = ends(values)
    errors = {}
    for sample in (0, 31):
        rate = (float(values[sample]),)
        wanted = solve_ivp(hires, (0, 20.0), start.double(), method="Radau", args=rate, rtol=1e-8, atol=1e-12).y[:, -1]
        alone = ends(values[sample : sample + 1])[0]
        errors[sample], error_alone = (float(np.abs(x / wanted - 1).max()) for x in (found[sample], alone))
        assert errors[sample] <= 10 * error_alone + 1e-6
    assert max(errors.values()) < 2e-3


class TestGradients:
    @pytest.mark.parametrize(
        ("method", "backward", "grad_filter", "nodes"),
        slow_but(
            [("bdf2", "autograd", None, 20)],
            [
                ("bdf2", "autograd", None, 20),
                ("bdf2", "autograd", "auto", 20),
                ("am2", "checkpoint", "auto", 40),
                ("bdf3", "checkpoint", None, 40),
            ],
        ),
    )
    def test_that_of_a_sample_is_what_it_is_alone(
        self, method: str, backward: str, grad_filter: str | None, nodes: int
    ) -> None:
        count = 24
        ways: dict[str, Any] = {"method": method, "backward": backward, "grad_filter": grad_filter}
        func, y0 = Robertson(rates(count)), start(count).requires_grad_()
        solve(func, y0, GRID[:nodes], **ways)[-1, :, 0].square().sum().backward()
        for sample in (0, 23):
            alone, x0 = Robertson(rates(count)[sample : sample + 1]), start(1).requires_grad_()
            solve(alone, x0, GRID[:nodes], **ways)[-1, :, 0].square().sum().backward()
            torch.testing.assert_close(func.logs.grad[sample], alone.logs.grad[0], rtol=1e-7, atol=1e-14)
            torch.testing.assert_close(y0.grad[sample], x0.grad[0], rtol=1e-7, atol=1e-14)

    @pytest.mark.slow
    def test_against_differences_of_radaus_solution(self) -> None:
        count, sample, shift = 8, 5, 1e-3
        func = Robertson(rates(count))
        t = torch.cat([GRID[:1], torch.logspace(-6, 2, 240, dtype=torch.float64)])
        solve(func, start(count), t, "bdf4")[-1, :, 0].sum().backward()
        k = rates(count)[sample].numpy()

        def end(k: np.ndarray) -> float:
            def f(t: float, y: np.ndarray) -> list[float]:
                first, back, second = k[0] * y[0], k[1] * y[1] * y[2], k[2] * y[1] ** 2
                return [back - first, first - back - second, second]

            return solve_ivp(f, (0, 100.0), [1.0, 0, 0], method="Radau", rtol=1e-8, atol=1e-13).y[0, -1]

        wanted = []
        for i in range(3):
            ways = np.ones(3)
            ways[i] = np.exp(shift)
            wanted.append((end(k * ways) - end(k / ways)) / (2 * shift))
        np.testing.assert_allclose(func.logs.grad[sample].numpy(), wanted, rtol=1e-3)


class TestWhatCountsAsSamples:
    @parts_of_grid
    def test_a_tuple_state(self, nodes: int) -> None:
        count = 12
        plain = solve(Robertson(rates(count)), start(count), GRID[:nodes])
        func = Robertson(rates(count), is_tuple=True)
        parts = solve(func, (start(count)[:, :2], start(count)[:, 2]), GRID[:nodes])
        assert torch.equal(torch.cat([parts[0], parts[1][..., None]], -1), plain)

    @parts_of_grid
    def test_more_dimensions(self, nodes: int) -> None:
        count = 12
        plain = solve(Robertson(rates(count)), start(count), GRID[:nodes])

        class Folded(Robertson):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y.flatten(0, 1)).unflatten(0, (3, 4))

        folded = solve(Folded(rates(count)), start(count).unflatten(0, (3, 4)), GRID[:nodes])
        assert torch.equal(folded.flatten(1, 2), plain)

    @pytest.mark.parametrize("size", slow_but([3], [3, 40]))
    def test_coupled_samples_are_solved_as_one_system(self, size: int) -> None:
        """A mean over the batch, stiff: closed form for a linear f."""
        count = 8
        y0 = torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = torch.linspace(0, 1, 41, dtype=torch.float64)
        y = solve(lambda t, y: -1e3 * (y - y.mean(0)) - y.mean(0), y0, t)
        mean, h = y0.mean(0), 1 / 40
        wanted = mean * 1.0
        states = [mean, mean / (1 + h)]
        for _ in range(39):
            states.append((4 / 3 * states[-1] - 1 / 3 * states[-2]) / (1 + 2 / 3 * h))
        wanted = states[-1]
        torch.testing.assert_close(y[-1], wanted.expand(count, size), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("without_graph", [False, True])
    def test_samples_that_become_coupled(self, without_graph: bool) -> None:
        """After they were not: the Jacobian of then is no more than slow, or noticed."""
        y0 = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        t = torch.linspace(0, 1, 21, dtype=torch.float64)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return -100 * y if t < 0.5 else -100 * (y - y.flip(0))

        with torch.set_grad_enabled(not without_graph):
            y = solve(func, y0, t, "bdf1")
        h = 0.05
        wanted = y0
        for n in range(1, 21):
            matrix = (
                -100 * torch.eye(2, dtype=torch.float64)
                if n * h < 0.5 - 1e-9
                else torch.tensor([[-100.0, 100.0], [100.0, -100.0]], dtype=torch.float64)
            )
            wanted = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - h * matrix, wanted)
        torch.testing.assert_close(y[-1], wanted, rtol=1e-6, atol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("batch_dims", [0, 1])
    def test_it_may_be_said(self, batch_dims: int) -> None:
        """A matrix takes a product for each of its rows; where samples are taken to be independent, one more."""
        t = GRID[:40]
        alone = torch.stack([solve(Robertson(of_one), start(1), t)[-1, 0] for of_one in rates(3).split(1)])
        for dims in (batch_dims, "auto"):
            func, made = Robertson(rates(3)), list[Tensor]()

            def counted(t: Tensor, y: Tensor, func: Robertson = func, made: list[Tensor] = made) -> Tensor:
                if y.requires_grad:
                    y.register_hook(made.append)
                return func(t, y)

            y = solve(counted, start(3), t, options={"batch_dims": dims})
            torch.testing.assert_close(y[-1], alone, rtol=1e-5, atol=1e-12)
            assert made
            assert len(made) % (9 if dims == 0 else 4) == 0

    @pytest.mark.parametrize(
        ("batch_dims", "error", "message"),
        [
            (3, ValueError, r"batch_dims must be at most 2, .* got 3 for shapes \[\(4, 3\)\]"),
            (-1, ValueError, "batch_dims must be 'auto' or an int that is not negative, got -1"),
            (1.0, TypeError, "batch_dims must be 'auto' or an int that is not negative, got 1.0"),
            (True, TypeError, "batch_dims must be 'auto' or an int that is not negative, got True"),
            ("all", ValueError, "batch_dims must be 'auto' or an int that is not negative, got 'all'"),
        ],
    )
    def test_what_cannot_be_meant(self, batch_dims: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            solve(Robertson(rates(4)), start(4), options={"batch_dims": batch_dims})


def one_fails(t: Tensor, y: Tensor) -> Tensor:
    """Sample 2 has a slope that no step can have; the others decay."""
    bad = torch.zeros(len(y), 1, dtype=torch.bool)
    bad[2] = True
    return torch.where(bad & (t > 0.4), 1e3 * (1 + y * y), -50 * y)


class TestFailures:
    GRID = torch.linspace(0, 1, 11, dtype=torch.float64)

    def test_the_sample_is_named(self) -> None:
        y0 = torch.ones(5, 1, dtype=torch.float64)
        message = r"at t = 0\.5 was not solved: .* y\[2, 0\] .* 1 samples, of 5, .*: \[2\].*on_failure"
        with pytest.raises(RuntimeError, match=message):
            solve(one_fails, y0, self.GRID, "bdf1")

    def test_the_others_may_go_on(self) -> None:
        rate = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return one_fails(t, y) * rate / 50

        with pytest.warns(UserWarning, match=r"not solved for 1 of 5 samples, \[2\]: they are NaN from there on"):
            y = solve(func, y0, self.GRID, "bdf1", options={"on_failure": "nan"})
        assert torch.isnan(y[5:, 2]).all()
        assert torch.isfinite(y[:5]).all()
        others = [0, 1, 3, 4]
        n, h = torch.arange(11), 0.1
        torch.testing.assert_close(y[:, others, 0], ((1 + 50 * h) ** -n.double())[:, None].expand(11, 4))
        y[-1, others].sum().backward()
        # d/dλ (1 + λ h)^{-n} for each of the four.
        torch.testing.assert_close(rate.grad, torch.tensor(-4 * 10 * h * (1 + 50 * h) ** -11, dtype=torch.float64))
        torch.testing.assert_close(y0.grad[others], torch.full((4, 1), (1 + 50 * h) ** -10, dtype=torch.float64))
        assert y0.grad[2] == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
    def test_it_warns_once_of_all_that_fail(self, backward: str) -> None:
        times = torch.tensor([0.1, 0.4, 2.0, 0.4, 2.0, 0.8], dtype=torch.float64)[:, None]
        rate = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t > times, 1e3 * (1 + y * y), -rate * y)

        y0 = torch.ones(6, 1, dtype=torch.float64)
        ways: dict[str, Any] = {"adjoint_params": (rate,)} if backward == "checkpoint" else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = solve(func, y0, self.GRID, "bdf1", options={"on_failure": "nan"}, backward=backward, **ways)
        assert [str(warning.message)[:91] for warning in caught] == [
            "the implicit equations of method 'bdf1' were not solved for 4 of 6 samples, [0], [1], [3], "
        ]
        assert torch.isnan(y[..., 0]).sum(0).tolist() == [9, 6, 0, 6, 0, 2]
        y[-1, [2, 4]].sum().backward()
        torch.testing.assert_close(rate.grad, torch.tensor(-2 * 10 * 0.1 * 6.0**-11, dtype=torch.float64))

    def test_on_failure_must_be_known(self) -> None:
        with pytest.raises(ValueError, match="on_failure must be one of \\('raise', 'nan'\\), got 'ignore'"):
            solve(one_fails, torch.ones(5, 1), options={"on_failure": "ignore"})


@pytest.mark.slow
def test_torchdiffeqs_own_interfaces_have_batches_too() -> None:
    """odeint_adjoint's backward pass solves for the parameters as well, which no sample has."""
    count = 6
    found = []
    for odeint in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
        func, y0 = Robertson(rates(count)), start(count).requires_grad_()
        y = odeint(func, y0, GRID[:40], method="bdf3")
        y[-1, :, 0].sum().backward()
        found.append((y.detach(), func.logs.grad))
    # Without a graph there are differences for the Jacobians.
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.2, atol=1e-6)
