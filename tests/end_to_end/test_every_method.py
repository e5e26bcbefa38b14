"""Every method by one list of tests: orders forward and of the gradient, exact gradients, and the filter's promises."""

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import EVERY_METHOD, FAMILIES, FAST_EXPLICIT, IMPLICIT, NAMES, ORDER, in_turn, slow_but
from per_node import PerNode, density_errors, reference
from problems import (
    GRIDS,
    LOTKA_VOLTERRA,
    PENDULUM,
    derivative_of_a_shared_parameter,
    orders,
)
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter, method_info

HIGHEST = ("ab5", "abm5", "am5", "bdf6")
"""Of the families that have several orders."""
STRONGLY_STABLE = {name for name in NAMES if method_info(name).oscillation != "everywhere"}


def steps_of(name: str, grid: str = "uniform") -> tuple[int, int, int]:
    """Fewer for implicit methods, whose steps take several times as long; a quarter of them is even."""
    if name in ("ab1", "ab2", "ab4", "ab5"):
        return (20, 40, 80)
    if grid not in ("random", "abrupt"):
        return (8, 16, 32) if name in IMPLICIT else (24, 48, 96)
    if name == "am3":
        return (20, 40, 80)
    if name == "ab3":
        # Where the steps change, its errors pass from its own order to that of the filter later than others.
        return (80, 160, 320)
    return (60, 120, 240) if (name, grid) == ("bdf5", "random") else (40, 80, 160)


# --------------------------------------------------------------------------------------------------- orders, forward


@pytest.mark.parametrize(
    ("name", "grid"), in_turn(["uniform", "truncated", "growing", "random"], few=1, fast=("leapfrog", "ab3"))
)
def test_order_forward(name: str, grid: str) -> None:
    problem = LOTKA_VOLTERRA
    tolerance = 1e-9 if ORDER[name] < 4 else 1e-12
    errors = []
    for steps in (40, 80, 160) if grid == "random" and ORDER[name] > 3 else (20, 40, 80):
        nodes = GRIDS[grid](steps, problem.horizon)
        options = {"grid_constructor": lambda func, y0, t, nodes=nodes: nodes}

        def func(t: Tensor, x: Tensor) -> Tensor:
            return problem.torch_f(x, torch.as_tensor(problem.theta(t.numpy())))

        x0 = torch.tensor(problem.x0, dtype=torch.float64)
        with torch.no_grad():
            x = torchdiffeq.odeint(
                func, x0, nodes[[0, -1]], method=name, options=options, rtol=tolerance, atol=tolerance
            )
        exact = reference(problem, (problem.horizon,)).state(problem.horizon)
        errors.append(float(np.abs(x[-1].numpy() - exact).max()))
    assert orders(errors)[-1] > ORDER[name] - 0.35, errors
    assert errors[-1] < 0.05


# -------------------------------------------------------------------------------------------------- orders, gradient


@pytest.mark.parametrize(
    ("name", "grid", "observations"),
    [
        *in_turn(
            [
                *(("uniform", observations) for observations in ("at the end", "four", "at every node")),
                *((grid, "four") for grid in GRIDS if grid != "uniform"),
            ],
            few=1,
            fast=("leapfrog",),
        ),
        # Settings that none of the family has its turn with.
        *slow_but([], [("am3", "uniform", "at every node"), ("am3", "truncated", "four"), ("bdf2", "uniform", "four")]),
    ],
)
def test_gradient_is_second_order_at_every_node(name: str, grid: str, observations: str) -> None:
    errors = []
    for steps in steps_of(name, grid):
        error, nodes = density_errors(name, "auto", grid, observations, PENDULUM, steps)
        errors.append(float(error[nodes].max()))
    expected = min(2, ORDER[name])
    assert orders(errors)[-1] > expected - 0.2, errors
    assert np.mean(orders(errors)) > expected - 0.4, errors
    assert errors[-1] < (0.02 if expected == 2 else 0.1)


@pytest.mark.parametrize("name", slow_but(["leapfrog", "ab3"], ["ab1", "ab2", "bdf1", "am2", "abm4", *FAMILIES]))
def test_unfiltered_gradient_does_not_converge(name: str) -> None:
    """In the worst node, be it at the observation alone; Euler's methods have weights 1 everywhere."""
    errors = []
    for steps in (16, 32, 64) if name in IMPLICIT else steps_of(name):
        error, nodes = density_errors(name, None, "uniform", "at the end", PENDULUM, steps)
        errors.append(float(error[nodes].max()))
    if method_info(name).oscillation == "nowhere":
        assert np.mean(orders(errors)) == pytest.approx(1, abs=0.1)
    else:
        assert errors[-1] > 0.2
        assert abs(np.mean(orders(errors))) < 0.2


@pytest.mark.parametrize("name", slow_but(["ab3"], sorted(STRONGLY_STABLE)))
def test_far_from_observations_the_methods_own_accuracy_stays(name: str) -> None:
    # The errors of ab4, bdf4 and bdf6 are those of the filter, at fewer steps.
    late = {"ab4": 160, "bdf4": 64, "bdf6": 160}
    steps = late.get(name, 40 if name in IMPLICIT else 80)
    filtered, _ = density_errors(name, "auto", "uniform", "at the end", PENDULUM, steps, 1e-9)
    raw, _ = density_errors(name, None, "uniform", "at the end", PENDULUM, steps, 1e-9)
    inner = slice(10, steps // 2)
    assert filtered[inner].max() <= 1.01 * raw[inner].max()
    bound = {1: 0.05, 2: 5e-4, 3: 2e-6}.get(ORDER[name], 2e-7)
    assert filtered[inner].max() < bound * (320 / steps) ** min(3, ORDER[name])


@pytest.mark.parametrize("name", slow_but(["ab4"], ["ab4", "abm5", "am4", "bdf4"]))
def test_nodes_that_were_added_up_are_equally_spaced(name: str) -> None:
    """They differ by more than rounding from a linspace, and the accuracy between observations must not suffer."""
    steps = 80
    nodes = torch.full((steps,), PENDULUM.horizon / steps, dtype=torch.float64).cumsum(0)
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), nodes])
    exact = reference(PENDULUM, (float(nodes[-1]),)).density(nodes, last=True)
    inner = slice(10, steps // 2)
    errors = [
        float((PerNode(PENDULUM, nodes).gradients(name, [steps], grad_filter) - exact)[inner].abs().max())
        for grad_filter in ("auto", None)
    ]
    assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("name", slow_but(["abm2"], sorted(STRONGLY_STABLE & {*FAMILIES, *HIGHEST})))
def test_where_steps_change_the_filter_is_second_order_though_auto_differentiation_is_not(name: str) -> None:
    """Where the steps change abruptly the gradient of auto-differentiation is off far from any observation too."""

    def error(steps: int, grad_filter: str | None) -> float:
        around = slice(steps // 2 - 8, steps // 2 + 8)
        return float(density_errors(name, grad_filter, "abrupt", "at the end", PENDULUM, steps)[0][around].max())

    numbers = (16, 32, 64) if name in IMPLICIT else steps_of(name, "abrupt")
    filtered = [error(steps, "auto") for steps in numbers]
    assert orders(filtered)[-1] > min(2, ORDER[name]) - 0.2
    if ORDER[name] > 1:
        assert filtered[-1] < 0.05 * error(numbers[-1], None)


# ------------------------------------------------------------------------------------------------------------ totals


@pytest.mark.parametrize(("name", "grid"), in_turn(["uniform", "growing"], few=1, fast=("leapfrog", "abm2")))
def test_totals_of_shared_parameters_with_trapezoid_weights_are_second_order(name: str, grid: str) -> None:
    """θ_1(t) = 1 + φ sin 3t."""
    exact = derivative_of_a_shared_parameter(reference(PENDULUM, (PENDULUM.horizon,)))
    errors, numbers = [], (8, 16, 32) if name in IMPLICIT else (30, 60, 90)
    for steps in numbers:
        nodes = GRIDS[grid](steps, PENDULUM.horizon)
        phi = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, x: Tensor, phi: Tensor = phi) -> Tensor:
            return PENDULUM.torch_f(x, torch.stack([1 + phi * torch.sin(3 * t), 1.5 + t]))

        last = torchdiffeq_lmm.odeint(
            func,
            torch.tensor(PENDULUM.x0, dtype=torch.float64),
            nodes[[0, -1]],
            method=name,
            options={"grid_constructor": lambda func, y0, t, nodes=nodes: nodes},
            grad_filter=CostateFilter("trapezoid"),
        )[-1]
        (0.5 * (last - torch.tensor(PENDULUM.target, dtype=torch.float64)).square().sum()).backward()
        errors.append(abs(float(phi.grad) - exact))
    # The error may change its sign on the way, and then has no order between two steps.
    order = min(2, ORDER[name])
    assert all(error < 20 / steps**order for error, steps in zip(errors, numbers, strict=True))


# --------------------------------------------------------------------------------------------------- exact gradients


class Small(nn.Module):
    """A nonlinear field in two dimensions that depends on time."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + torch.cos(2 * t)) - 0.3 * y


TIMES = torch.tensor([0.0, 0.1, 0.22, 0.3, 0.45, 0.5, 0.62, 0.7, 0.8, 0.93, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(("name", "grid"), in_turn(["times", "step_size"], few=1, fast=("leapfrog", "abm2")))
def test_gradcheck_without_filter(name: str, grid: str) -> None:
    field = Small()
    options = {} if grid == "times" else {"step_size": 0.13, "interp": "cubic"}
    times = TIMES if grid == "times" else TIMES[[0, 3, 5, 10]]

    def solve(given: Tensor) -> Tensor:
        y0, weight, t = given.split((2, 4, len(times)))

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(field, {"weight": weight.reshape(2, 2)}, (t, y))

        return torchdiffeq.odeint(func, y0, t, method=name, options=options or None, rtol=1e-12, atol=1e-14)

    y0 = torch.tensor([0.4, -0.7], dtype=torch.float64)
    given = torch.cat([y0, field.weight.detach().flatten(), times]).requires_grad_()
    # Of most methods in a random direction, for each entry takes two solves; and what is undefined, once in a family.
    assert torch.autograd.gradcheck(
        solve, given, fast_mode=name not in ("leapfrog", "ab3"), check_undefined_grad=name in FAMILIES
    )


@pytest.mark.parametrize(
    ("name", "grid", "interp"), in_turn(list(itertools.product(("times", "step_size"), ("linear", "cubic"))), few=1)
)
def test_gradients_of_y0_and_t_stay_exact_with_the_filter(name: str, grid: str, interp: str) -> None:
    field = Small()
    options = {"interp": interp} if grid == "times" else {"step_size": 0.13, "interp": interp}
    times = TIMES if grid == "times" else TIMES[[0, 3, 5, 10]]
    results = []
    for grad_filter in (None, "auto"):
        y0 = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
        t = times.clone().requires_grad_()
        states = torchdiffeq_lmm.odeint(field, y0, t, method=name, options=options, grad_filter=grad_filter)
        cotangent = torch.randn(states.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        results.append((states.detach(), *torch.autograd.grad((states * cotangent).sum(), (y0, t))))
    for without, with_filter in zip(*results, strict=True):
        torch.testing.assert_close(with_filter, without, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_implicit_gradients_do_not_depend_on_how_the_equation_was_solved(name: str) -> None:
    """Loose tolerances need fewer iterations; the gradient changes with the solution and no more."""
    if name not in IMPLICIT:
        pytest.skip("explicit")
    gradients = []
    for rtol in (1e-4, 1e-12):
        field = Small()
        states = torchdiffeq.odeint(
            field, torch.ones(3, 2, dtype=torch.float64), TIMES, method=name, rtol=rtol, atol=1e-3 * rtol
        )
        states[-1].square().sum().backward()
        gradients.append(field.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- torchdiffeq's promises


@pytest.mark.parametrize(
    ("name", "dtype"), in_turn([torch.float32, torch.float64, torch.complex64, torch.complex128], few=1)
)
def test_dtypes_tuples_and_directions(name: str, dtype: torch.dtype) -> None:
    """A tuple backwards in time is the same solve as a tensor forwards."""
    field = Small(dtype if dtype.is_floating_point else torch.float64)
    weight = field.weight.detach().to(dtype)
    y0 = torch.tensor([0.4, -0.7]).to(dtype)
    if dtype.is_complex:
        y0 = y0 * (1 + 0.5j)
    t = torch.linspace(0, 1, 12, dtype=dtype.to_real())

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y @ weight) * torch.cos(t) - y * y.abs()

    forwards = torchdiffeq.odeint(func, y0, t, method=name)

    def mirrored(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slope = -func(-t, torch.cat([part.reshape(1) for part in y]))
        return slope[0], slope[1:]

    parts = torchdiffeq.odeint(mirrored, (y0[0], y0[1:]), -t, method=name)
    tolerance = 100 * torch.finfo(dtype).eps
    assert forwards.dtype is dtype
    torch.testing.assert_close(parts[0], forwards[:, 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(parts[1], forwards[:, 1:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_fewer_steps_than_the_method_reaches_over(name: str, steps: int) -> None:
    """A short solve is made by the start alone, whose order is that of its few nodes."""
    t = torch.linspace(0, 0.05 * steps, steps + 1, dtype=torch.float64)
    out = torchdiffeq.odeint(lambda t, y: -y * y, torch.ones(1, dtype=torch.float64), t, method=name)
    error = (out[:, 0] - 1 / (1 + t)).abs().max()
    assert error < steps * 0.05**2


@pytest.mark.parametrize(("name", "interp"), in_turn(["linear", "cubic"], few=1, fast=FAST_EXPLICIT))
def test_events(name: str, interp: str) -> None:
    """y = exp(-t), at 0.97 within the start of the longer methods, and at 0.7 well after it."""
    for level in (0.97, 0.7):
        y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
        event_t, states = torchdiffeq.odeint_event(
            lambda t, y: -y,
            y0,
            torch.tensor(0.0, dtype=torch.float64),
            event_fn=lambda t, y, level=level: y[0] - level,
            odeint_interface=torchdiffeq.odeint,
            method=name,
            options={"step_size": 0.01, "interp": interp},
        )
        accuracy = 0.02 if ORDER[name] == 1 else 2e-4
        assert float(event_t.detach()) == pytest.approx(-np.log(level), abs=accuracy)
        assert float(states[-1, 0].detach()) == pytest.approx(level, abs=1e-6)
        (gradient,) = torch.autograd.grad(event_t, y0)
        # The event moves by 1 / y0 with y0.
        assert float(gradient[0]) == pytest.approx(1.0, abs=10 * accuracy)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_callbacks_come_before_every_step(name: str) -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[float, float, float]] = []

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.seen.append((float(t), float(y), float(dt)))

    field = Field()
    out = torchdiffeq.odeint(field, torch.ones((), dtype=torch.float64), TIMES, method=name)
    expected = [(float(a), float(y), float(b - a)) for (a, b), y in zip(pairwise(TIMES), out, strict=False)]
    np.testing.assert_allclose(field.seen, expected, rtol=1e-12)


@pytest.mark.parametrize("name", slow_but(FAST_EXPLICIT, NAMES))
def test_odeint_adjoint(name: str) -> None:
    gradients, steps = [], 32 if ORDER[name] < 3 else 16
    for odeint in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
        field = Small()
        t, options = torch.tensor([0.0, 1.0], dtype=torch.float64), {"step_size": 1 / steps}
        last = odeint(field, torch.ones(2, dtype=torch.float64), t, method=name, options=options)[-1]
        last.square().sum().backward()
        gradients.append(field.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0.1 if ORDER[name] == 1 else 4e-3)


CUBIC = {"step_size": 0.07, "interp": "cubic", "perturb": True}


@pytest.mark.parametrize(
    ("name", "grad_filter", "options"), in_turn([(None, None), ("auto", CUBIC), (None, CUBIC), ("auto", None)], few=1)
)
def test_func_may_return_the_same_memory_again(name: str, grad_filter: str | None, options: dict | None) -> None:
    buffer = torch.empty(2, dtype=torch.float64)
    rate = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def fresh(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y

    results = [
        torchdiffeq_lmm.odeint(
            func, torch.ones(2, dtype=torch.float64), times, method=name, options=options, grad_filter=grad_filter
        )
        # Implicit steps take many times as long.
        for times in (TIMES, torch.tensor([0.0, 1.0, 1.5, 1.8], dtype=torch.float64))[: 1 if name in IMPLICIT else 2]
        for func in (fresh, lambda t, y: buffer.copy_(fresh(t, y)))
    ]
    for expected, found in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_gradient_to_t_changes_nothing_else(name: str) -> None:
    """Equal steps are equal steps also where they carry a gradient."""
    results = []
    for requires_grad in (False, True):
        field = Small()
        t = torch.linspace(0, 1, 13, dtype=torch.float64).requires_grad_(requires_grad)
        states = torchdiffeq_lmm.odeint(field, torch.ones(2, dtype=torch.float64), t, method=name, grad_filter="auto")
        states.square().sum().backward()
        results.append((states.detach(), field.weight.grad))
    for without, with_gradient in zip(*results, strict=True):
        torch.testing.assert_close(with_gradient, without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", ["step", "trapezoid"])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_an_event_within_the_start_can_be_filtered(name: str, weights: str) -> None:
    """The event is at a fixed time, so that the gradient of the state there is that of exp(-k t)."""
    k = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    event_t, states = torchdiffeq_lmm.odeint(
        lambda t, y: -k * y,
        torch.ones(1, dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        event_fn=lambda t, y: t - 0.055,
        method=name,
        options={"step_size": 0.02},
        grad_filter=CostateFilter(weights),
    )
    assert float(event_t) == pytest.approx(0.055, abs=1e-6)
    states[-1].sum().backward()
    # Step weights count up to the end of the last step.
    assert float(k.grad) == pytest.approx(-0.055 * np.exp(-0.9 * 0.055), rel=0.05 if weights == "trapezoid" else 0.6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_states_of_any_number_of_elements(name: str, shape: tuple[int, ...]) -> None:
    y0 = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    states = torchdiffeq_lmm.odeint(lambda t, y: -y, y0, TIMES, method=name, grad_filter="auto")
    assert states.shape == (len(TIMES), *shape)
    states.sum().backward()
    assert y0.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1.0, 100.0])
@pytest.mark.parametrize("name", slow_but(FAMILIES, sorted(IMPLICIT)))
def test_implicit_methods_in_half_precision(name: str, rate: float, dtype: torch.dtype) -> None:
    if rate > 1 and not name.startswith("bdf"):
        pytest.skip("not for stiff problems")
    y0 = torch.ones(2, dtype=dtype, requires_grad=True)
    states = torchdiffeq.odeint(lambda t, y: -rate * y, y0, torch.linspace(0, 1, 9), method=name)
    states[-1].sum().backward()
    assert states.dtype is dtype
    assert states[-1].tolist() == pytest.approx([np.exp(-rate)] * 2, abs=0.05)
    assert y0.grad.tolist() == pytest.approx([np.exp(-rate)] * 2, abs=0.05)


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.startswith("bdf")))
def test_stiff_float32_states_may_start_at_zero(name: str) -> None:
    t = torch.linspace(0, 1, 11)
    states = torchdiffeq.odeint(lambda t, y: -1000 * (y - torch.cos(t)), torch.zeros(1), t, method=name)
    torch.testing.assert_close(states[5:, 0], torch.cos(t[5:]), rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_autocast(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    y0 = torch.ones(3, 4)
    t = torch.linspace(0, 1, 11)
    exact = torchdiffeq.odeint(lambda t, y: net(y), y0, t, method=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = torchdiffeq.odeint(lambda t, y: net(y), y0, t, method=name)
    states[-1].square().sum().backward()
    torch.testing.assert_close(states, exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", ["abm2", "abm4", "am2", "bdf2"])
def test_perturb_sees_a_jump_of_f_from_the_side_of_the_step(name: str, direction: int) -> None:
    """What is evaluated at the end of a step is before the jump there, what begins a step is after it."""
    sides: dict[str, set[bool]] = {"at the jump": set()}

    def func(t: Tensor, y: Tensor) -> Tensor:
        if abs(float(t) - direction * 0.5) < 1e-9:
            sides["at the jump"].add(direction * float(t) < 0.5)
        return -y * (1.0 if direction * t < 0.5 else 3.0)

    t = direction * torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"step_size": 0.125, "perturb": True}
    torchdiffeq.odeint(func, torch.ones(1, dtype=torch.float64), t, method=name, options=options)
    assert sides["at the jump"] == ({True} if name in IMPLICIT else {True, False})
