"""The filtered backward pass: for any callable, and exact where it must be."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torchdiffeq
from filtered import DIM, NODES, OBSERVED, Tanh, draw, index_of, loss, solve
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import LeapfrogFilter

# Callables of every kind: each returns func and the tensors whose gradients are asked for.


def module() -> tuple[Callable, Sequence[Tensor]]:
    func = Tanh()
    return func, [*func.inner.parameters(), *func.outer.parameters()]


def closure_over_steps() -> tuple[Callable, Sequence[Tensor]]:
    theta = draw(len(NODES), DIM, DIM).requires_grad_()
    return lambda t, y: torch.tanh(y @ theta[index_of(t)]), [theta]


def list_of_modules() -> tuple[Callable, Sequence[Tensor]]:
    modules = [Tanh() for _ in NODES]
    parameters = [parameter for each in modules[:-1] for parameter in each.inner.parameters()]
    return lambda t, y: modules[index_of(t)](t, y), parameters


def hypernetwork() -> tuple[Callable, Sequence[Tensor]]:
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, DIM * DIM)).double()
    for seed, parameter in enumerate(net.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed)
    return lambda t, y: torch.sin(y @ net(t.reshape(1)).reshape(DIM, DIM)), list(net.parameters())


def network_evaluated_before() -> tuple[Callable, Sequence[Tensor]]:
    z = draw(2).requires_grad_()
    theta = torch.tanh(torch.einsum("nijk,k->nij", draw(len(NODES), DIM, DIM, 2, seed=1), z))
    return lambda t, y: torch.tanh(y @ theta[index_of(t)]), [z]


def basis_in_time() -> tuple[Callable, Sequence[Tensor]]:
    coefficients = draw(4, DIM).requires_grad_()
    powers = torch.arange(4, dtype=torch.float64)
    return lambda t, y: -y * ((t**powers) @ coefficients), [coefficients]


def gradient_of_a_scalar() -> tuple[Callable, Sequence[Tensor]]:
    weight = draw(DIM, DIM).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        y = y.requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((torch.cos(y @ weight) * t).sum(), y, create_graph=True)[0]

    return func, [weight]


def a_parameter_alone() -> tuple[Callable, Sequence[Tensor]]:
    theta = draw(DIM).requires_grad_()
    return lambda t, y: theta, [theta]


CALLABLES = (
    module,
    closure_over_steps,
    list_of_modules,
    hypernetwork,
    network_evaluated_before,
    basis_in_time,
    gradient_of_a_scalar,
    a_parameter_alone,
)


def reference_gradients(
    func: Callable, parameters: Sequence[Tensor], x0: Tensor, node_cotangents: Tensor, weights: str
) -> list[Tensor]:
    """The filtered gradient from dense Jacobians: the adjoint in the states alone, then p̃, then a product per node."""
    h = NODES.diff()
    count = len(h)
    r = h[1:] / h[:-1]
    states = [x0, x0 + h[0] * func(NODES[0], x0).detach()]
    for n in range(1, count):
        slope = func(NODES[n], states[n]).detach()
        states.append((1 - r[n - 1] ** 2) * states[n] + r[n - 1] ** 2 * states[n - 1] + h[n] * (1 + r[n - 1]) * slope)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: func(NODES[n], x), states[n], create_graph=False)
        for n in range(count)
    ]
    costates = [torch.zeros(DIM, dtype=torch.float64)] * (count + 3)
    windows = [torch.zeros(DIM, dtype=torch.float64)] * (count + 2)
    costates[count] = windows[count] = node_cotangents[count]
    for n in range(count - 1, -1, -1):
        mu = h[n] * (1 + (r[n - 1] if n else 0)) * costates[n + 1]
        pulled = jacobians[n].T @ mu
        costates[n] = node_cotangents[n] + pulled
        costates[n] = costates[n] + (costates[n + 1] if n == 0 else (1 - r[n - 1] ** 2) * costates[n + 1])
        if n + 2 <= count:
            costates[n] = costates[n] + r[n] ** 2 * costates[n + 2]
        windows[n] = windows[n + 1] + pulled + node_cotangents[n]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for n in range(count):
        if n == 0:
            costate = costates[0] - node_cotangents[0]
        else:
            costate = (h[n - 1] * windows[n] + h[n] * windows[n + 1]) / (h[n - 1] + h[n])
        width = h[n]
        if weights == "trapezoid":
            width = ((h[n - 1] if n else 0) + h[n] + (h[n] if n == count - 1 else 0)) / 2
        slope = func(NODES[n], states[n])
        gradients = torch.autograd.grad(slope, parameters, width * costate, allow_unused=True, retain_graph=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                sum_ += gradient
    return total


@pytest.mark.parametrize("weights", ["step", "trapezoid"])
@pytest.mark.parametrize("make", CALLABLES)
@pytest.mark.one_in(3)
def test_any_callable_gets_the_filtered_cotangents(make: Callable, weights: str) -> None:
    func, parameters = make()
    y0 = draw(DIM, seed=3)
    observed = [0, 3, 5, 7]
    states = solve(func, y0, NODES[observed], LeapfrogFilter(weights=weights))
    cotangents = draw(len(observed), DIM, seed=4)
    gradients = torch.autograd.grad(states, parameters, cotangents, retain_graph=True)
    node_cotangents = torch.zeros(len(NODES), DIM, dtype=torch.float64)
    node_cotangents[observed] = cotangents
    expected = reference_gradients(func, parameters, y0, node_cotangents, weights)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"step_size": 0.1},
        {"step_size": 0.13},
        {"grid_constructor": lambda f, y, t: t[0] + (t[-1] - t[0]) * NODES.to(t)},
    ],
    ids=["times", "dividing", "truncated", "constructed"],
)
@pytest.mark.one_in(5)
def test_gradients_of_y0_and_t_stay_exact(steps: dict, interp: str, perturb: bool, reverse: bool) -> None:
    func = Tanh()
    results = []
    for grad_filter in (None, "leapfrog"):
        y0 = draw(2, DIM).requires_grad_()
        t = OBSERVED.clone()
        t = (t.flip(0) if reverse else t).requires_grad_()
        options = {**steps, "interp": interp, "perturb": perturb}
        states = torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, grad_filter=grad_filter)
        results.append((states, *torch.autograd.grad(loss(states), (y0, t, func.inner.weight))))
    for plain, filtered in list(zip(*results, strict=True))[:3]:
        torch.testing.assert_close(filtered, plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[0][3], results[1][3], rtol=1e-3)


def test_values_are_those_of_the_unfiltered_solve_bit_for_bit() -> None:
    func, y0 = Tanh(), draw(2, DIM)
    assert torch.equal(solve(func, y0), solve(func, y0, grad_filter=None))


def test_without_filter_no_node_of_ours_is_in_the_graph() -> None:
    states = solve(Tanh(), draw(2, DIM), grad_filter=None)
    pending, names = [states.grad_fn], set()
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    assert not [name for name in names if "Solve" in name or "CutOff" in name]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "tuple"])
def test_an_event_is_a_solve_with_an_output_off_the_grid(interp: str, reverse: bool, wrap: bool) -> None:
    func = Tanh()
    y0 = draw(DIM, seed=3).requires_grad_()
    t0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    start = func(t0, y0).detach()
    level = (y0 + (-0.33 if reverse else 0.33) * start).detach()
    options = {"step_size": 0.1, "interp": interp, "grad_filter": "leapfrog"}

    def crossing(t: Tensor, y: Tensor | tuple[Tensor]) -> Tensor:
        return ((y[0] if wrap else y) - level) @ start

    event_t, states = torchdiffeq.odeint(
        (lambda t, y: (func(t, y[0]),)) if wrap else func,
        (y0,) if wrap else y0,
        torch.stack([t0, t0.detach() + (-1 if reverse else 1)]),
        method="leapfrog",
        options=options,
        event_fn=crossing,
    )
    sign = -1 if reverse else 1
    elapsed = sign * float((event_t - t0).detach())
    assert 0.1 < elapsed < 1.0
    end = t0 + sign * (int(elapsed / 0.1) + 1) * 0.1
    inside = torchdiffeq.odeint(
        func, y0, torch.stack([t0, event_t, end]), method="leapfrog", options=options | {"step_size": 0.1}
    )
    cotangent = draw(DIM, seed=5)
    wanted = torch.autograd.grad(inside[1] @ cotangent, (y0, t0, *func.outer.parameters()))
    got = torch.autograd.grad((states[0] if wrap else states)[1] @ cotangent, (y0, t0, *func.outer.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("times_require_grad", [False, True])
def test_func_may_reuse_the_memory_that_it_returns(times_require_grad: bool) -> None:
    weight = draw(DIM, DIM).requires_grad_()
    reused = [torch.empty(DIM, dtype=torch.float64)]

    def fresh(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ weight) * t

    def reusing(t: Tensor, y: Tensor) -> Tensor:
        reused[0] = reused[0].detach() if times_require_grad else reused[0]
        return reused[0].copy_(fresh(t, y))

    results = []
    for func in (fresh, reusing):
        y0 = draw(DIM, seed=3).requires_grad_()
        t = OBSERVED.clone().requires_grad_(times_require_grad)
        inputs = (y0, weight, t) if times_require_grad else (y0, weight)
        results.append(torch.autograd.grad(loss(solve(func, y0, t)), inputs))
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(got, wanted)
