"""The filtered gradient against the continuous adjoint, and the mathematics of the filter."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from methods import slow_but
from per_node import reference as adjoint
from problems import GRIDS, PENDULUM, PROBLEMS, Problem, Reference, derivative_of_a_shared_parameter, orders
from scipy.integrate import solve_ivp
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import LeapfrogFilter, filter_gradient, register_grad_filter
from torchdiffeq_lmm.filters.filter_plan import cell_widths

STEPS = (40, 80, 160)
FEW_GRIDS = ("growing",)


class PerStep:
    """f with its own parameter at every node, and the loss of `Reference`."""

    def __init__(self, problem: Problem, nodes: Tensor) -> None:
        self.problem = problem
        self.nodes = nodes
        self.theta = torch.tensor(problem.theta(nodes[:-1].numpy()).T).requires_grad_()
        # At the last node f is evaluated for interpolation alone.
        self.last = torch.tensor(problem.theta(nodes[-1].numpy()))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        index = int((self.nodes - t).abs().argmin())
        return self.problem.torch_f(x, self.theta[index] if index < len(self.theta) else self.last)

    def loss(self, states: Tensor) -> Tensor:
        return 0.5 * (states - torch.tensor(self.problem.target, dtype=torch.float64)).square().sum()

    def gradients(self, t: Tensor, grad_filter: object, weight: float = 1.0, interp: str = "linear") -> Tensor:
        """The gradient of every step's parameter, divided by the step, for observations at t[1:]."""
        options = {"grid_constructor": lambda func, y0, t: self.nodes, "interp": interp}
        x0 = torch.tensor(self.problem.x0, dtype=torch.float64)
        states = torchdiffeq_lmm.odeint(self, x0, t, method="leapfrog", options=options, grad_filter=grad_filter)
        (weight * self.loss(states[1:])).backward()
        return self.theta.grad / self.nodes.diff()[:, None]


def quarters(nodes: Tensor) -> Tensor:
    """Four nodes; with as many steps between them whatever the number of steps, they stay where they are."""
    steps = len(nodes) - 1
    return nodes[[steps // 4, steps // 2, 3 * steps // 4, steps]]


def assert_second_order(errors: list[float], scatter: float = 0.3) -> None:
    assert errors[-1] < 0.02
    assert np.mean(orders(errors)) > 2 - scatter / 2, errors
    assert min(orders(errors)) > 2 - scatter, errors


@pytest.mark.parametrize("grid", slow_but(FEW_GRIDS, GRIDS))
@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_second_order_at_every_node(problem: Problem, grid: str) -> None:
    reference = adjoint(problem, (problem.horizon,))
    filtered, unfiltered = [], []
    for steps in STEPS:
        nodes = GRIDS[grid](steps, problem.horizon)
        density = reference.density(nodes)
        for errors, grad_filter in ((filtered, "leapfrog"), (unfiltered, None)):
            gradients = PerStep(problem, nodes).gradients(nodes[[0, -1]], grad_filter)
            errors.append(float((gradients - density).abs().max()))
    assert_second_order(filtered)
    # The finding that this package is there for.
    assert min(unfiltered) > 0.15
    assert abs(np.mean(orders(unfiltered))) < 0.2


def test_first_order_where_long_and_short_steps_alternate() -> None:
    """There leapfrog's parasitic mode adds up, in the forward and in the adjoint solve."""
    reference = adjoint(PENDULUM, (PENDULUM.horizon,))
    errors, forward_errors = [], []
    for steps in STEPS:
        lengths = torch.tensor([1.0, 0.5], dtype=torch.float64).repeat(steps // 2)
        nodes = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])
        nodes *= PENDULUM.horizon / nodes[-1].clone()
        per_step = PerStep(PENDULUM, nodes)
        gradients = per_step.gradients(nodes[[0, -1]], "leapfrog")
        errors.append(float((gradients - reference.density(nodes)).abs().max()))
        x0 = torch.tensor(PENDULUM.x0, dtype=torch.float64)
        end = torchdiffeq_lmm.odeint(per_step, x0, nodes, method="leapfrog")[-1].detach()
        forward_errors.append(float((end - torch.tensor(reference.state(PENDULUM.horizon))).abs().max()))
    for measured in (orders(errors), orders(forward_errors)):
        assert np.mean(measured) == pytest.approx(1, abs=0.3), measured


@pytest.mark.slow
def test_steps_drawn_anew_keep_leapfrogs_own_order() -> None:
    """On them leapfrog's parasitic mode walks at random, so that forward and adjoint solve have order 3/2."""
    reference = adjoint(PENDULUM, (PENDULUM.horizon,))
    medians = []
    for steps in STEPS:
        errors = []
        for seed in range(7):
            generator = torch.Generator().manual_seed(seed)
            lengths = 0.8 + 0.4 * torch.rand(steps, generator=generator, dtype=torch.float64)
            nodes = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])
            nodes *= PENDULUM.horizon / nodes[-1].clone()
            gradients = PerStep(PENDULUM, nodes).gradients(nodes[[0, -1]], "leapfrog")
            errors.append(float((gradients - reference.density(nodes)).abs().max()))
        medians.append(float(np.median(errors)))
    assert np.mean(orders(medians)) > 1.25, medians


@pytest.mark.parametrize("grid", slow_but(FEW_GRIDS, GRIDS))
@pytest.mark.parametrize("problem", slow_but([PENDULUM], PROBLEMS), ids=lambda problem: problem.name)
def test_second_order_with_observations_inside(problem: Problem, grid: str) -> None:
    errors = []
    for steps in STEPS:
        nodes = GRIDS[grid](steps, problem.horizon)
        observed = quarters(nodes)
        gradients = PerStep(problem, nodes).gradients(torch.cat([nodes[:1], observed]), "leapfrog")
        density = adjoint(problem, tuple(observed.tolist())).density(nodes)
        errors.append(float((gradients - density).abs().max()))
    assert_second_order(errors)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_second_order_with_an_observation_at_every_node(grid: str) -> None:
    errors = []
    for steps in STEPS:
        nodes = GRIDS[grid](steps, PENDULUM.horizon)
        gradients = PerStep(PENDULUM, nodes).gradients(nodes, "leapfrog", weight=1 / steps)
        density = adjoint(PENDULUM, tuple(nodes[1:].tolist()), weight=1 / steps).density(nodes)
        errors.append(float((gradients - density).abs().max()))
    assert_second_order(errors)


@cache
def density_of_running_cost(steps: int) -> Tensor:
    """That of the gradient of ∫ ½ |x - target|² dt, at steps + 1 nodes: of shape (steps + 1, 2)."""
    tight = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-12, "dense_output": True}
    target = np.array(PENDULUM.target)
    x = solve_ivp(lambda t, x: PENDULUM.f(x, PENDULUM.theta(t)), (0, 2), PENDULUM.x0, **tight).sol
    p = solve_ivp(
        lambda t, p: -PENDULUM.state_vjp(x(t), PENDULUM.theta(t), p) - (x(t) - target), (2, 0), np.zeros(2), **tight
    ).sol
    times = np.linspace(0, 2, steps + 1)
    return torch.tensor(np.stack([PENDULUM.theta_vjp(x(t), PENDULUM.theta(t), p(t)) for t in times]))


@pytest.mark.parametrize("in_state", slow_but([False], [False, True]))
@pytest.mark.parametrize("method", slow_but(["leapfrog"], ["leapfrog", "ab3", "abm3"]))
def test_a_running_cost_summed_over_the_nodes_is_first_order_at_its_ends(method: str, in_state: bool) -> None:
    """Σ w_j ℓ(x_j) by the trapezoid rule; as part of the state the same cost has no ends."""
    at_last_node = method == "abm3"
    target = torch.tensor(PENDULUM.target, dtype=torch.float64)
    inner, ends = [], []
    for steps in STEPS:
        nodes = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
        rows = nodes if at_last_node else nodes[:-1]
        theta = torch.tensor(PENDULUM.theta(rows.numpy()).T).requires_grad_()

        def func(t: Tensor, y: Tensor, theta: Tensor = theta, h: float = 2 / steps) -> Tensor:
            slope = PENDULUM.torch_f(y[:2], theta[int(t / h + 0.5)])
            return torch.cat([slope, (y[:2] - target).square().sum()[None] / 2])

        y0 = torch.tensor([*PENDULUM.x0, 0.0], dtype=torch.float64)
        y = torchdiffeq_lmm.odeint(func, y0, nodes, method=method, grad_filter="auto")
        summed = torch.trapezoid((y[:, :2] - target).square().sum(1) / 2, nodes)
        (y[-1, 2] if in_state else summed).backward()
        errors = theta.grad * (steps / 2) - density_of_running_cost(steps)[: len(rows)]
        inner.append(float((errors[1:-1] if at_last_node else errors[1:]).abs().max()))
        ends.append([float(errors[n].abs().max()) for n in ((0, -1) if at_last_node else (0,))])
    assert_second_order(inner)
    if in_state:
        assert_second_order([max(errors) for errors in ends])
    else:
        for errors in zip(*ends, strict=True):
            assert orders(list(errors)) == pytest.approx([1.0, 1.0], abs=0.2)
        # w_0 ∂ℓ/∂x, as the parameters feel it.
        jump = PENDULUM.theta_vjp(np.array(PENDULUM.x0), PENDULUM.theta(0.0), np.array(PENDULUM.x0) - target.numpy())
        assert ends[-1][0] == pytest.approx(np.abs(jump).max() / STEPS[-1], rel=0.1)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("grid", slow_but(FEW_GRIDS, GRIDS))
def test_second_order_with_observations_off_the_grid(grid: str, interp: str) -> None:
    observed = [0.61803, 1.23607, PENDULUM.horizon]
    reference = Reference(PENDULUM, observed)
    errors = []
    for steps in STEPS:
        nodes = GRIDS[grid](steps, PENDULUM.horizon)
        t = torch.tensor([0.0, *observed], dtype=torch.float64)
        gradients = PerStep(PENDULUM, nodes).gradients(t, "leapfrog", interp=interp)
        # The jump of the costate is spread over the two nodes around it.
        away = torch.ones(steps, dtype=torch.bool)
        for time in observed[:-1]:
            right = int(torch.searchsorted(nodes, time))
            away[right - 1 : right + 1] = False
        errors.append(float((gradients - reference.density(nodes))[away].abs().max()))
    # Where in its step an observation lies changes with the grid, and with it the constant of the error.
    assert_second_order(errors, scatter=1.0)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_an_observation_off_the_grid_is_spread_without_loss(interp: str) -> None:
    """For f = θ the gradient of x(t*) over θ is 1 up to t* and 0 after, whose integral is t* exactly."""
    nodes = torch.tensor([0.0, 0.1, 0.3, 0.4, 0.65, 1.0, 1.1, 1.3], dtype=torch.float64)
    for time in (0.04, 0.35, 0.5, 0.9):
        theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        states = torchdiffeq_lmm.odeint(
            lambda t, x: theta[int((nodes - t).abs().argmin())],
            torch.zeros((), dtype=torch.float64),
            torch.tensor([0.0, time, 1.3], dtype=torch.float64),
            method="leapfrog",
            options={"grid_constructor": lambda func, y0, t: nodes, "interp": interp},
            grad_filter=LeapfrogFilter(weights="trapezoid"),
        )
        states[1].backward()
        assert float(theta.grad.sum()) == pytest.approx(time, abs=1e-14)


def test_second_order_backwards_in_time_with_a_tuple_state() -> None:
    backwards = Problem(
        name="backwards",
        horizon=2.0,
        x0=PENDULUM.x0,
        target=PENDULUM.target,
        torch_f=lambda x, th: -PENDULUM.torch_f(x, th),
        theta=lambda t: PENDULUM.theta(-t),
        f=lambda x, th: -PENDULUM.f(x, th),
        state_vjp=lambda x, th, p: -PENDULUM.state_vjp(x, th, p),
        theta_vjp=lambda x, th, p: -PENDULUM.theta_vjp(x, th, p),
    )
    errors = []
    for steps in STEPS:
        nodes = GRIDS["truncated"](steps, 2.0)
        observed = quarters(nodes)
        reference = Reference(backwards, observed.tolist())
        per_step = PerStep(backwards, nodes)

        def func(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            slope = -per_step(-t, torch.cat([state[0].reshape(1), state[1].reshape(1)]))
            return slope[0], slope[1:].reshape(1, 1)

        x0 = torch.tensor(backwards.x0, dtype=torch.float64)
        states = torchdiffeq_lmm.odeint(
            func,
            (x0[0], x0[1:].reshape(1, 1)),
            -torch.cat([nodes[:1], observed]),
            method="leapfrog",
            options={"grid_constructor": lambda func, y0, t: -nodes},
            grad_filter="leapfrog",
        )
        per_step.loss(torch.stack([states[0][1:], states[1][1:, 0, 0]], dim=1)).backward()
        gradients = per_step.theta.grad / nodes.diff()[:, None]
        errors.append(float((gradients - reference.density(nodes)).abs().max()))
    assert_second_order(errors)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["uniform", "truncated", "growing", "abrupt"])
def test_orders_of_the_total_of_shared_parameters(grid: str) -> None:
    """θ_1(t) = 1 + φ sin 3t: what sums over the steps converges at second order but for step weights."""
    exact = derivative_of_a_shared_parameter(adjoint(PENDULUM, (PENDULUM.horizon,)))

    def total(nodes: Tensor, grad_filter: object) -> float:
        phi = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, x: Tensor) -> Tensor:
            return PENDULUM.torch_f(x, torch.stack([1 + phi * torch.sin(3 * t), 1.5 + t]))

        x0 = torch.tensor(PENDULUM.x0, dtype=torch.float64)
        options = {"grid_constructor": lambda func, y0, t: nodes}
        states = torchdiffeq_lmm.odeint(
            func, x0, nodes[[0, -1]], method="leapfrog", options=options, grad_filter=grad_filter
        )
        (0.5 * (states[-1] - torch.tensor(PENDULUM.target, dtype=torch.float64)).square().sum()).backward()
        return float(phi.grad)

    measured = {}
    for name, grad_filter in (
        ("none", None),
        ("step", LeapfrogFilter()),
        ("trapezoid", LeapfrogFilter(weights="trapezoid")),
    ):
        errors = [abs(total(GRIDS[grid](steps, PENDULUM.horizon), grad_filter) - exact) for steps in (80, 160, 320)]
        measured[name] = float(np.mean(orders(errors)))
    assert measured["none"] > 1.75
    assert measured["trapezoid"] > 1.75
    assert measured["step"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_trapezoid_widths_are_those_of_the_trapezoidal_rule(count: int) -> None:
    steps = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) + 0.1
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    widths = torch.tensor(cell_widths(nodes[:-1].tolist(), float(nodes[-1]), "trapezoid"), dtype=torch.float64)
    values = torch.cos(nodes)
    values[-1] = values[-2]  # the last half cell takes its value from the left
    torch.testing.assert_close((widths * values[:-1]).sum(), torch.trapezoid(values, nodes))


class TestFilterGradient:
    @staticmethod
    def euler_started_gradients(steps: int) -> tuple[PerStep, Tensor]:
        nodes = GRIDS["uniform"](steps, PENDULUM.horizon)
        return PerStep(PENDULUM, nodes), nodes

    def test_second_order_from_finished_gradients(self) -> None:
        reference = adjoint(PENDULUM, (PENDULUM.horizon,))
        errors = []
        for steps in STEPS:
            per_step, nodes = self.euler_started_gradients(steps)
            gradients = filter_gradient(per_step.gradients(nodes[[0, -1]], None))
            errors.append(float((gradients - reference.density(nodes)).abs().max()))
        assert_second_order(errors)

    def test_registered_on_a_parameter(self) -> None:
        per_step, nodes = self.euler_started_gradients(20)
        plain = per_step.gradients(nodes[[0, -1]], None)
        per_step, nodes = self.euler_started_gradients(20)
        handle = register_grad_filter(per_step.theta)
        torch.testing.assert_close(per_step.gradients(nodes[[0, -1]], None), filter_gradient(plain))
        per_step.theta.grad = None
        handle.remove()
        assert torch.equal(per_step.gradients(nodes[[0, -1]], None), plain)

    def test_registered_on_a_tensor_that_is_no_leaf(self) -> None:
        source = torch.ones(4, 2, requires_grad=True)
        stack = source * 2
        register_grad_filter(stack)
        cotangent = torch.arange(8.0).reshape(4, 2)
        stack.backward(cotangent)
        assert torch.equal(source.grad, 2 * filter_gradient(cotangent))

    def test_formula(self) -> None:
        matrix = torch.tensor(
            # G̃_0 = 2 G̃_1 - G̃_2; column 0 is doubled, column 4 looks at G_5 = 0.
            [
                [1.0, 0.75, 0.0, -0.25, 0.0],
                [0.5, 0.5, 0.25, 0.0, 0.0],
                [0.0, 0.25, 0.5, 0.25, 0.0],
                [0.0, 0.0, 0.25, 0.5, 0.25],
                [0.0, 0.0, 0.0, 0.25, 0.5],
            ]
        )
        assert torch.equal(filter_gradient(torch.eye(5)), matrix)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128])
    @pytest.mark.parametrize("dim", [0, 1, -1, -3])
    def test_any_dtype_and_dimension(self, dtype: torch.dtype, dim: int) -> None:
        grad = torch.randn(4, 5, 6, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
        given = grad.clone()
        filtered = filter_gradient(grad, dim=dim)
        assert (filtered.shape, filtered.dtype) == (grad.shape, dtype)
        assert torch.equal(grad, given)
        expected = filter_gradient(grad.transpose(0, dim)).transpose(0, dim)
        torch.testing.assert_close(filtered, expected)

    def test_nan_stays(self) -> None:
        grad = torch.zeros(6)
        grad[4] = torch.nan
        assert filter_gradient(grad).isnan().tolist() == [False, False, False, True, True, True]

    @pytest.mark.parametrize("function", [filter_gradient, register_grad_filter])
    @pytest.mark.parametrize(
        ("stack", "error", "message"),
        [
            (torch.ones(2, 3), ValueError, r"at least 3 steps along dimension 0, got shape \(2, 3\)"),
            (torch.ones(()), ValueError, r"must have a dimension 0 .* got shape \(\)"),
            (torch.ones(4, dtype=torch.long), TypeError, r"floating or complex tensor, got dtype torch.int64"),
            ([1.0, 2.0, 3.0], TypeError, r"floating or complex tensor, got list"),
        ],
    )
    def test_bad_input(
        self, function: Callable[[object], object], stack: object, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            function(stack)

    def test_a_dimension_that_is_no_int(self) -> None:
        with pytest.raises(TypeError, match=r"dim must be an int, got 0\.5"):
            filter_gradient(torch.ones(4), dim=0.5)

    def test_bad_dimension(self) -> None:
        with pytest.raises(ValueError, match="must have a dimension 2"):
            filter_gradient(torch.ones(4, 4), dim=2)

    def test_a_parameter_without_gradient(self) -> None:
        with pytest.raises(ValueError, match="parameter must require a gradient"):
            register_grad_filter(torch.ones(4))
