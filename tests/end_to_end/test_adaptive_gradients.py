"""Gradients of the adaptive methods: against SciPy's sensitivities, replayed by hand, by all modes and filters."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from adaptive import F64, METHODS, decayed, decaying, f64, fast_by_adams, methods, solve
from methods import slow_but
from problems import PENDULUM, Reference
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.autograd import forward_ad

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, CostateFilter, SolveReport
from torchdiffeq_lmm.schemes.variable_order import FAMILIES

TIMES = (0.0, 0.3, 1.1, 2.0)
WEIGHTS = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


@dataclass(frozen=True)
class Parametrised:
    """y' = f(t, y, p) in two dimensions, with `f` for tensors, and `numbers` its value and Jacobians for numbers."""

    f: Callable[[Tensor, Tensor, Tensor], Tensor]
    numbers: Callable[[float, np.ndarray, np.ndarray], tuple[list[float], list[list[float]], list[list[float]]]]
    y0: tuple[float, float]
    p: tuple[float, float, float, float]


def stiff(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    (a, b), (rate, frequency, pull, decay) = y.unbind(), p.unbind()
    return torch.stack([pull * b - rate * (a - torch.cos(frequency * t)), torch.sin(a) - decay * b])


def soft(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    (a, b), (scale, pull, decay, push) = y.unbind(), p.unbind()
    return torch.stack([scale * b, push * torch.cos(1.5 * t) - pull * torch.sin(a) - decay * b])


STIFF = Parametrised(
    stiff,
    lambda t, y, p: (
        [-p[0] * (y[0] - np.cos(p[1] * t)) + p[2] * y[1], -p[3] * y[1] + np.sin(y[0])],
        [[-p[0], p[2]], [np.cos(y[0]), -p[3]]],
        [[np.cos(p[1] * t) - y[0], -p[0] * t * np.sin(p[1] * t), y[1], 0], [0, 0, 0, -y[1]]],
    ),
    (0.5, 1.0),
    (200.0, 3.0, 0.5, 0.7),
)
SOFT = Parametrised(
    soft,
    lambda t, y, p: (
        [y[1] * p[0], -p[1] * np.sin(y[0]) - p[2] * y[1] + p[3] * np.cos(1.5 * t)],
        [[0, p[0]], [-p[1] * np.cos(y[0]), -p[2]]],
        [[y[1], 0, 0, 0], [0, -np.sin(y[0]), -y[1], np.cos(1.5 * t)]],
    ),
    (1.0, 0.5),
    (1.0, 1.3, 0.2, 0.8),
)
OF_METHOD = {"bdf": STIFF, "adams": SOFT}


def loss(y: Tensor) -> Tensor:
    return (WEIGHTS * y * y).sum()


@cache
def sensitivities(problem: Parametrised) -> list[Tensor]:
    """The gradients of the loss with respect to y0, p and t, by the equations of the derivatives."""
    p, y0 = np.array(problem.p), np.array(problem.y0)

    def augmented(t: float, z: np.ndarray) -> np.ndarray:
        f, by_y, by_p = problem.numbers(t, z[:2], p)
        derivatives = np.array(by_y) @ z[2:].reshape(2, 6) + np.concatenate([np.zeros((2, 2)), by_p], 1)
        return np.concatenate([f, derivatives.reshape(-1)])

    begin = np.concatenate([y0, np.eye(2, 6).reshape(-1)])
    z = solve_ivp(augmented, (TIMES[0], TIMES[-1]), begin, method="DOP853", t_eval=TIMES, rtol=1e-12, atol=1e-13).y.T
    cotangents = 2 * WEIGHTS.numpy() * z[:, :2]
    total = np.einsum("nd,ndk->k", cotangents, z[:, 2:].reshape(-1, 2, 6))
    slopes = np.array([problem.numbers(t, y, p)[0] for t, y in zip(TIMES, z[:, :2], strict=True)])
    by_t = (cotangents * slopes).sum(1)
    # All states but the first depend on t_0 by where they come from.
    by_later_y0 = total[:2] - cotangents[0]
    by_t[0] = -by_later_y0 @ slopes[0]
    return [torch.from_numpy(gradient) for gradient in (total[:2], total[2:], by_t)]


def gradients(problem: Parametrised, method: str, rtol: float, **options: Any) -> list[Tensor]:
    y0, p, t = (f64(*values, requires_grad=True) for values in (problem.y0, problem.p, TIMES))
    if options.get("backward", "autograd") != "autograd":
        options["adjoint_params"] = (p,)
    y = solve(lambda t, y: problem.f(t, y, p), y0, t, method, rtol, rtol, **options)
    return list(torch.autograd.grad(loss(y), (y0, p, t)))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------------------------------- y0, parameters, times


@methods
@pytest.mark.parametrize("rtol", slow_but([1e-4], [1e-4, 1e-6, 1e-8]))
def test_gradients_are_those_of_the_flow(method: str, rtol: float) -> None:
    problem, report = OF_METHOD[method], SolveReport()
    found = gradients(problem, method, rtol, report=report)
    for gradient, wanted in zip(found, sensitivities(problem), strict=True):
        assert relative(gradient, wanted) < 100 * rtol
    if method == "bdf":
        # Long steps for what is stiff.
        assert problem.p[0] * np.diff(report.times).max() > 3


@methods
def test_gradients_of_times_at_nodes_and_inside_steps(method: str) -> None:
    """dy / dt is func, wherever the output is."""
    report = SolveReport()
    solve(decaying, f64(2.0), (0.0, 2.0), method, 1e-7, 1e-7, report=report)
    middle = len(report.times) // 2
    node = report.times[middle]
    inside = 0.6 * node + 0.4 * report.times[middle + 1]
    t = f64(0.0, node, inside, 2.0, requires_grad=True)
    y = solve(decaying, f64(2.0), t, method, 1e-7, 1e-7)
    assert float((y.detach()[:, 0] - decayed(t.detach())).abs().max()) < 1e-5
    with torch.no_grad():
        wanted = decaying(t, y[:, 0])
    for output in (1, 2, 3):
        (gradient,) = torch.autograd.grad(y[output, 0], t, retain_graph=True)
        assert gradient[output].item() == pytest.approx(wanted[output].item(), rel=1e-4)
        others = [other for other in (1, 2, 3) if other != output]
        assert not gradient[others].any()


# ------------------------------------------------------------------------------------------- what the graph consists of

PULSE = (1.3, 0.7)


def pulse(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Attempts fail where it begins."""
    (a, b), (scale, height) = y.unbind(), p.unbind()
    return torch.stack([b * scale, height * (20 / (1 + ((t - 1) / 0.02) ** 2)) - torch.sin(a)])


def lagrange(times: Tensor, at: float) -> Tensor:
    """The weights of the polynomial through values at some times."""
    return torch.stack(
        [
            torch.stack([(at - other) / (time - other) for other in times if other != time]).prod()
            for time in times.unbind()
        ]
    )


def replayed(y0: Tensor, p: Tensor, report: SolveReport, at: float) -> Tensor:
    """The steps of an Adams solve that were kept, made by hand; the state at a time inside one, and the last one."""
    (family,) = [family for family in FAMILIES if family.name == "adams"]
    times, x = report.times, y0
    states, slopes = [y0], list[Tensor]()
    for n, order in enumerate(report.orders):
        lengths = np.diff(times[: n + 2])[::-1]
        for row, time in zip(family.rows(order, lengths.tolist()), (times[n], times[n + 1]), strict=True):
            slopes.insert(0, pulse(torch.tensor(time, dtype=F64), states[-1] if time == times[n] else x, p))
            x = states[-1] + sum(weight * slopes[lag] for lag, weight in row.slopes)
        states.append(x)
    end = next(n for n, time in enumerate(times) if time >= at)
    through = range(end, end - min(end, family.reach(report.orders[end - 1])) - 1, -1)
    weights = lagrange(f64(*(times[n] for n in through)), at)
    inside = (weights[:, None] * torch.stack([states[n] for n in through])).sum(0)
    return torch.stack([y0, inside, x])


@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
def test_rejected_attempts_leave_no_trace(backward: str) -> None:
    y0, p, report = f64(0.3, 0.5, requires_grad=True), f64(*PULSE, requires_grad=True), SolveReport()
    t = (0.0, 1.234, 2.0)
    params = {} if backward == "autograd" else {"adjoint_params": (p,)}
    y = solve(lambda t, y: pulse(t, y, p), y0, t, "adams", 1e-5, 1e-5, report=report, backward=backward, **params)
    by_hand = replayed(y0, p, report, t[1])
    assert report.rejected > 0
    torch.testing.assert_close(y, by_hand, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad((WEIGHTS[:3] * states**2).sum(), (y0, p)) for states in (y, by_hand))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@fast_by_adams
def test_checkpoints_give_the_gradient_of_autograd(method: str) -> None:
    problem, rtol = OF_METHOD[method], 1e-6
    plain = gradients(problem, method, rtol)
    for backward in ("checkpoint", Checkpoint(2)):
        found = gradients(problem, method, rtol, backward=backward)
        for one, other in zip(found, plain, strict=True):
            # Implicit equations are solved once more, to the tolerance.
            assert relative(one, other) < (1e-11 if method == "adams" else 20 * rtol)


@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
@methods
def test_jumps_and_their_gradients(method: str, backward: str) -> None:
    """y' = a before the jump at s, b y after it: y(1) = (1 + a s) e^{b (1 - s)}."""
    a, b, s, y0 = (f64(value, requires_grad=True) for value in (2.0, -1.5, 0.4, 1.0))

    def func(t: Tensor, y: Tensor) -> Tensor:
        return a.expand(1) if float(t.detach()) < 0.4 else b * y

    params = {} if backward == "autograd" else {"adjoint_params": (a, b)}
    y = solve(func, y0, (0.0, 0.7, 1.0), method, 1e-7, 1e-7, jump_t=s, backward=backward, **params)
    exact = (y0 + a * s) * torch.exp(b * (1 - s))
    torch.testing.assert_close(y[-1], exact, rtol=1e-5, atol=1e-5)
    inputs = (a, b, s, y0)
    torch.testing.assert_close(
        torch.autograd.grad(y[-1], inputs), torch.autograd.grad(exact, inputs), rtol=1e-4, atol=1e-4
    )


@methods
def test_gradients_of_complex_states(method: str) -> None:
    y0 = torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True)
    rate = torch.tensor(-0.1 + 2j, dtype=torch.complex128, requires_grad=True)
    y = solve(lambda t, y: rate * y, y0, (0.0, 1.0), method, 1e-7, 1e-7)
    exact = y0 * torch.exp(rate)
    target = torch.tensor([0.2 - 0.3j], dtype=torch.complex128)
    found, wanted = (torch.autograd.grad((state - target).abs().square().sum(), (y0, rate)) for state in (y[-1], exact))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_adams() -> None:
    """y' = -w y² from 1: y(1) = 1 / (1 + w)."""
    w = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y = solve(lambda t, y: -w * y**2, f64(1.0), (0.0, 1.0), "adams", 1e-8, 1e-8)
    (first,) = torch.autograd.grad(y[-1].sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)
    assert first.item() == pytest.approx(-1 / 1.7**2, rel=1e-5)
    assert second.item() == pytest.approx(2 / 1.7**3, rel=1e-5)


def test_bdf_refuses_second_derivatives() -> None:
    y0 = f64(1.0, requires_grad=True)
    y = solve(lambda t, y: -(y**2), y0, (0.0, 1.0), "bdf")
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(y[-1].sum(), y0, create_graph=True)


def by_dual_numbers(function: Callable[[Tensor], Tensor], at: tuple[Tensor], along: tuple[Tensor]) -> tuple[Any, Any]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(*at, *along))))


def is_read_by_transforms() -> bool:
    """Whether tensors have `tolist` inside of torch.func.jvp. In torch 2.5 they do not, and no solve works there."""
    try:
        torch.func.jvp(lambda x: x * x.tolist()[0], (f64(1.0),), (f64(1.0),))
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("jvp", [by_dual_numbers, torch.func.jvp])
def test_forward_mode(jvp: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Through y0 and parameters, with Adams methods; else it is refused, for a tangent would be lost."""
    if jvp is torch.func.jvp and not is_read_by_transforms():
        pytest.skip("a limit of this version of torch")
    one = f64(1.0)

    def end(method: str, y0: Tensor = one, w: Tensor = one, t: Any = (0.0, 1.0), **options: Any) -> Tensor:
        return solve(lambda t, y: -w * y, y0, t, method, 1e-7, 1e-7, **options)[-1]

    for inputs in ("y0", "w"):
        _, tangent = jvp(lambda given, key=inputs: end("adams", **{key: given}), (one,), (one,))
        wanted = np.exp(-1) if inputs == "y0" else -np.exp(-1)
        assert float(tangent) == pytest.approx(wanted, rel=1e-5)
        with pytest.raises(RuntimeError, match=r"do(es)? not support"):
            jvp(lambda given, key=inputs: end("bdf", **{key: given}), (one,), (one,))
    for method in METHODS:
        for inputs, given in (("t", f64(0.0, 1.0)), ("jump_t", f64(0.5)), ("step_t", f64(0.5))):
            with pytest.raises(RuntimeError, match=r"do(es)? not support"):
                jvp(lambda given, key=inputs: end(method, **{key: given}), (given,), (given,))


# --------------------------------------------------------------------------------------------------------- filters


def density(method: str, rtol: float, grad_filter: object) -> tuple[SolveReport, np.ndarray]:
    """The gradient of every node's own parameters, divided by the step, of shape (N + 1, 2), of a smooth θ(t)."""
    seen: list[tuple[float, Tensor]] = []

    def func(t: Tensor, x: Tensor) -> Tensor:
        time = float(t.detach())
        seen.append((time, torch.tensor(PENDULUM.theta(np.array(time))).requires_grad_()))
        return PENDULUM.torch_f(x, seen[-1][1])

    report, x0 = SolveReport(), f64(*PENDULUM.x0)
    y = solve(func, x0, (0.0, PENDULUM.horizon), method, rtol, rtol, report=report, grad_filter=grad_filter)
    (0.5 * (y[-1] - f64(*PENDULUM.target)).square().sum()).backward()
    found = {time: np.zeros(2) for time in report.times}
    for time, theta in seen:
        if theta.grad is not None:
            found[time] += theta.grad.numpy()
    steps = np.diff(report.times)
    return report, np.array(list(found.values())) / np.append(steps, steps[-1])[:, None]


@cache
def continuous(observed: tuple[float, ...] = ()) -> Reference:
    return Reference(PENDULUM, [*observed, PENDULUM.horizon])


@fast_by_adams
def test_filtered_gradients_converge_to_the_density(method: str) -> None:
    """At every node, where those of auto-differentiation do not."""
    means = []
    for rtol in (1e-4, 1e-6, 1e-8):
        report, found = density(method, rtol, "auto")
        exact = continuous().density(f64(*report.times), last=True).numpy()
        errors = np.abs(found - exact).max(1)
        assert errors.max() < 0.02
        means.append(float((errors[:-1] * np.diff(report.times)).sum()))
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.3 * means[0]
    report, found = density(method, 1e-6, None)
    exact = continuous().density(f64(*report.times), last=True).numpy()
    assert np.abs(found - exact).max() > 1


CENTRES = (0.2, 0.8, 1.4, 1.9)


def bumps(t: Tensor) -> Tensor:
    return torch.stack([torch.exp(-(((t - centre) / 0.25) ** 2)) for centre in CENTRES], -1)


@cache
def gradient_in_the_basis(observed: tuple[float, ...]) -> np.ndarray:
    """∫ φ_k ∂E/∂θ dt, of shape (4, 2)."""
    reference, total = continuous(observed), np.zeros((4, 2))
    points, weights = np.polynomial.legendre.leggauss(30)
    for begin, end in pairwise((0.0, *observed, PENDULUM.horizon)):
        times = begin + (end - begin) * (points + 1) / 2
        values = [PENDULUM.theta_vjp(reference.state(t), PENDULUM.theta(t), reference.costate(t, 0.5)) for t in times]
        total += np.einsum("n,nk,nd->kd", weights * (end - begin) / 2, bumps(torch.from_numpy(times)).numpy(), values)
    return total


@fast_by_adams
@pytest.mark.parametrize("observed", [pytest.param((), marks=pytest.mark.slow), (0.7, 1.3)])
def test_gradients_in_a_basis_converge(method: str, observed: tuple[float, ...]) -> None:
    """θ(t) + Σ c_k φ_k(t), by trapezoid weights and by auto-differentiation, the latter with the tolerance."""
    exact = gradient_in_the_basis(observed)

    def error(rtol: float, grad_filter: object) -> float:
        c = torch.zeros(4, 2, dtype=F64, requires_grad=True)

        def func(t: Tensor, x: Tensor) -> Tensor:
            theta = torch.tensor(PENDULUM.theta(np.array(float(t.detach())))) + bumps(t.detach()) @ c
            return PENDULUM.torch_f(x, theta)

        t = (0.0, *observed, PENDULUM.horizon)
        y = solve(func, f64(*PENDULUM.x0), t, method, rtol, rtol, grad_filter=grad_filter)
        (0.5 * (y[1:] - f64(*PENDULUM.target)).square().sum()).backward()
        return float(np.abs(c.grad.numpy() - exact).max() / np.abs(exact).max())

    filtered = [error(rtol, CostateFilter("trapezoid")) for rtol in (1e-3, 1e-5, 1e-7)]
    assert filtered == sorted(filtered, reverse=True)
    assert filtered[-1] < 0.2 * filtered[0]
    assert filtered[-1] < 3e-3
    plain = [error(rtol, None) for rtol in (1e-4, 1e-7)]
    assert plain[-1] < 0.1 * plain[0]
    assert plain[-1] < 3e-4


def test_the_filter_with_checkpoints() -> None:
    """The same as with all evaluations kept."""

    class Func(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.zeros(4, 2, dtype=F64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            theta = torch.tensor(PENDULUM.theta(np.array(float(t.detach())))) + bumps(t.detach()) @ self.c
            return PENDULUM.torch_f(x, theta)

    found = []
    for backward in ("autograd", "checkpoint"):
        func = Func()
        y = solve(
            func,
            f64(*PENDULUM.x0),
            (0.0, 0.7, PENDULUM.horizon),
            "adams",
            1e-5,
            1e-5,
            grad_filter="auto",
            backward=backward,
        )
        (y[1:] ** 2).sum().backward()
        found.append(func.c.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------- odeint_adjoint


class Net(nn.Module):
    """A small network in two dimensions, or a large one."""

    def __init__(self, width: int = 5, stiffness: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(3, width, dtype=F64)
        self.outer = nn.Linear(width, 2, dtype=F64)
        self.rate = stiffness
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) / width**0.5)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        seen = torch.cat([y, torch.cos(t).expand(*y.shape[:-1], 1)], -1)
        return self.outer(torch.tanh(self.inner(seen))) - self.rate * y


def of_network(interface: Callable[..., Tensor], net: nn.Module, rtol: float, **how: Any) -> Tensor:
    """All gradients in a vector: of the parameters, y0 and t."""
    y0 = f64(0.5, -0.8, 1.0, 0.3).reshape(2, 2).requires_grad_()
    t = f64(0.0, 0.6, 1.5, requires_grad=True)
    net.zero_grad()
    y = interface(net, y0, t, rtol=rtol, atol=rtol, **how)
    (y**3).sum().backward()
    return torch.cat([gradient.grad.reshape(-1) for gradient in (y0, t, *net.parameters())])


@cache
def by_dopri8() -> Tensor:
    """The gradients of the small network."""
    return of_network(torchdiffeq.odeint, Net(), 1e-11, method="dopri8")


@pytest.mark.parametrize(("there", "back"), slow_but([("adams", "adams")], itertools.product(METHODS, METHODS)))
def test_the_adjoint_method(there: str, back: str) -> None:
    net = Net()
    for rtol in (1e-4, 1e-7):
        found = of_network(torchdiffeq.odeint_adjoint, net, rtol, method=there, adjoint_method=back)
        assert relative(found, by_dopri8()) < 50 * rtol


@pytest.mark.slow
@methods
def test_the_number_of_parameters_does_not_enter_the_equations(method: str) -> None:
    """100,000 parameters: a matrix of their Jacobian would have 80 GB."""
    net = Net(width=16_700, stiffness=30.0)
    assert sum(parameter.numel() for parameter in net.parameters()) > 1e5
    wanted = of_network(torchdiffeq.odeint, net, 1e-8, method="dopri8")
    found = of_network(torchdiffeq.odeint_adjoint, net, 1e-5, method=method)
    assert relative(found, wanted) < 1e-3


@fast_by_adams
def test_options_of_the_adjoint_solve(method: str) -> None:
    net, reports = Net(), (SolveReport(), SolveReport())
    found = of_network(
        torchdiffeq.odeint_adjoint,
        net,
        1e-6,
        method=method,
        options={"report": reports[0]},
        adjoint_options={"report": reports[1], "max_order": 3, "norm": "seminorm"},
    )
    assert relative(found, by_dopri8()) < 1e-4
    assert reports[0].times[-1] == 1.5
    # The last part of the way back.
    assert reports[1].times[0] == 0.6
    assert reports[1].times[-1] == 0.0
    assert max(reports[1].orders) <= 3


@fast_by_adams
def test_the_adjoint_method_with_a_tuple(method: str) -> None:
    """y_0' = -w y_0 y_1, y_1' = -y_1: y_0(1) = exp(-w (1 - 1/e)) from 1 and 1."""
    w = nn.Parameter(torch.tensor(0.8, dtype=F64))

    class Func(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = w

        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -self.w * y[0] * y[1].sum(), -y[1]

    y0 = (torch.ones(2, 2, dtype=F64, requires_grad=True), f64(1.0, requires_grad=True))
    y = torchdiffeq.odeint_adjoint(Func(), y0, f64(0.0, 1.0), rtol=1e-7, atol=1e-7, method=method)
    part = 1 - np.exp(-1)
    torch.testing.assert_close(y[0][-1].detach(), torch.full((2, 2), np.exp(-0.8 * part), dtype=F64), rtol=1e-5, atol=0)
    by_w, *by_y0 = torch.autograd.grad(y[0][-1].sum(), (w, *y0))
    assert by_w.item() == pytest.approx(-4 * part * np.exp(-0.8 * part), rel=1e-5)
    assert by_y0[0].flatten().tolist() == pytest.approx([np.exp(-0.8 * part)] * 4, rel=1e-5)
    assert by_y0[1].item() == pytest.approx(-4 * 0.8 * part * np.exp(-0.8 * part), rel=1e-5)


@methods
@pytest.mark.parametrize("wrong", [{"grad_filter": "auto"}, {"backward": "checkpoint"}])
def test_what_the_adjoint_method_refuses(method: str, wrong: dict[str, str]) -> None:
    (option,) = wrong
    with pytest.raises(ValueError, match=f"{option} must be .* in odeint_adjoint"):
        torchdiffeq.odeint_adjoint(
            Net(), torch.ones(2, 2, dtype=F64), f64(0.0, 1.0), method=method, options=dict(wrong)
        )


@fast_by_adams
def test_ours_is_torchdiffeqs(method: str) -> None:
    by_keyword, by_option = (
        gradients(SOFT, method, 1e-5, backward="checkpoint"),
        gradients(SOFT, method, 1e-5, backward="checkpoint", interface=lambda *args, **how: by_keywords(*args, **how)),
    )
    torch.testing.assert_close(by_keyword, by_option, rtol=0, atol=0)


def by_keywords(*args: Any, options: dict[str, Any], **how: Any) -> Any:
    return torchdiffeq_lmm.odeint(*args, **how, **options)
