"""Every backward mode has the gradient of auto-differentiation, for every method and every kind of func."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward import AGAIN, DIM, EXPLICIT, OBSERVED, STEPS, TIGHT, Net, Plain, assert_same, draw, loss, solve
from methods import FAST_EXPLICIT, IMPLICIT, NAMES, in_turn, slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, Reversible

COUNTS = [Checkpoint(1), Checkpoint(7), Checkpoint(1000)]


def growing(func: object, y0: Tensor, t: Tensor) -> Tensor:
    nodes = torch.exp(0.8 * torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)) - 1
    return (t[0] + (t[-1] - t[0]) * nodes / nodes[-1]).to(t)


GRIDS: dict[str, dict[str, Any]] = {
    "uniform": {"step_size": 1 / STEPS},
    "truncated": {"step_size": 1.06 / STEPS},
    "growing": {"grid_constructor": growing},
}


def ways(method: str) -> list[Checkpoint | Reversible | str]:
    reversible = ["reversible", Reversible(anchors=0)] if method == "leapfrog" else []
    return ["checkpoint", *COUNTS, *reversible]


# ------------------------------------------------------------------------------------------------ the same gradients


SETTINGS = [
    ("uniform", False, "linear", False, None),
    ("truncated", True, "cubic", False, None),
    ("growing", False, "cubic", True, None),
    ("uniform", True, "linear", True, "auto"),
    ("growing", False, "cubic", False, "auto"),
]
"""Grid, reverse, interp, perturb, grad_filter."""


@pytest.mark.parametrize(
    ("method", "grid", "reverse", "interp", "perturb", "grad_filter"),
    [
        *in_turn(SETTINGS, few=1, fast=FAST_EXPLICIT),
        *((method, *setting) for method in ("midpoint", "heun2") for setting in SETTINGS if setting[-1] is not None),
    ],
)
def test_every_method_has_the_gradient_of_auto_differentiation(
    method: str, grid: str, reverse: bool, interp: str, perturb: bool, grad_filter: str | None
) -> None:
    if method == "bdf6" and grid == "growing":
        grid = "truncated"

    def gradients(backward: object) -> list[Tensor | None]:
        func, y0 = Net(), draw(2, DIM, seed=5).requires_grad_()
        t = torch.tensor(OBSERVED, dtype=torch.float64)
        t = (-t if reverse else t).requires_grad_()
        options = {**GRIDS[grid], "interp": interp, "perturb": perturb}
        states = solve(func, y0, backward, t, method=method, grad_filter=grad_filter, **options)
        loss(states).backward()
        return [states.detach(), y0.grad, t.grad, *(parameter.grad for parameter in func.parameters())]

    wanted = gradients("autograd")
    assert sum(grad is not None and bool(grad.any()) for grad in wanted) > STEPS
    tolerance = 1e-9 if method in NAMES and torchdiffeq_lmm.method_info(method).kind == "implicit" else 1e-11
    for backward in ["checkpoint", "reversible"] if method == "leapfrog" else ["checkpoint"]:
        got = gradients(backward)
        assert_same(got, wanted, tolerance)
        assert [grad is None for grad in got] == [grad is None for grad in wanted]


def test_leapfrog_has_the_gradient_of_a_loop() -> None:
    func, y0 = Net(), draw(2, DIM).requires_grad_()
    h = 1 / STEPS
    states = [y0, y0 + h * func(torch.zeros((), dtype=torch.float64), y0)]
    for n in range(1, STEPS):
        states.append(states[-2] + 2 * h * func(torch.tensor(n * h, dtype=torch.float64), states[-1]))
    used = [parameter for parameter in func.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(loss(torch.stack(states)), [y0, *used], allow_unused=True)
    t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    for backward in ways("leapfrog"):
        states = solve(func, y0, backward, t)
        assert_same(torch.autograd.grad(loss(states), [y0, *used], allow_unused=True), wanted)


@pytest.mark.parametrize(
    ("method", "steps"),
    slow_but(
        [("leapfrog", 1), ("leapfrog", 3), ("ab5", 3), ("ab5", 11)],
        [
            *itertools.product(["leapfrog", "ab5", "abm5"], [1, 2, 3, 4, 11]),
            # Implicit methods take many times as long, and nystrom3 is made as leapfrog is: they take turns.
            *(("nystrom3", 2), ("nystrom3", 4), ("milne_simpson", 1), ("milne_simpson", 3)),
            *(("bdf6", 4), ("am5", 11)),
        ],
    ),
)
def test_few_steps(method: str, steps: int) -> None:
    func, y0 = Plain(), draw(2, DIM).requires_grad_()
    inputs = [y0, *func.parameters()]
    wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", (0.0, 0.6), steps, method)), inputs)
    # How checkpoints are laid out is no matter of the method; implicit ones take many times as long.
    for backward in ways(method)[: 2 if method in IMPLICIT else None]:
        states = solve(func, y0, backward, (0.0, 0.6), steps, method)
        assert_same(torch.autograd.grad(loss(states), inputs), wanted, 1e-10)


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(3)])
def test_a_step_longer_than_the_interval(backward: object) -> None:
    func, y0 = Plain(), draw(2, DIM).requires_grad_()
    inputs = [y0, *func.parameters()]
    wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", step_size=3.0)), inputs)
    assert_same(torch.autograd.grad(loss(solve(func, y0, backward, step_size=3.0)), inputs), wanted)


@pytest.mark.parametrize(
    ("method", "backward"),
    slow_but(
        [("leapfrog", "checkpoint")],
        itertools.product(["leapfrog", "ab3", "bdf2"], ["checkpoint", Checkpoint(2)]),
    ),
)
def test_gradcheck(method: str, backward: object) -> None:
    func, t = Plain(), torch.tensor([0.0, 0.37, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y0, t: solve(func, y0, backward, t, method=method, step_size=0.13, interp="cubic"),
        (draw(DIM).requires_grad_(), t),
        fast_mode=method == "bdf2",
    )


@pytest.mark.parametrize("grid", slow_but([{"step_size": 0.13}], [{"step_size": 0.13}, {"grid_constructor": growing}]))
def test_gradcheck_run_backwards(grid: dict[str, Any]) -> None:
    func, t = Plain(), torch.tensor([0.0, 0.37, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y0, t: solve(func, y0, Reversible(anchors=0), t, **grid), (draw(DIM).requires_grad_(), t)
    )


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.one_in(2)
def test_tuples_and_complex_states(method: str) -> None:
    matrix = torch.complex(0.4 * draw(DIM, DIM), 0.4 * draw(DIM, DIM, seed=1)).requires_grad_()

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.sin(y[0] @ matrix) + y[0].conj() * t, y[1] * y[0].abs().sum()

    def gradients(backward: object) -> tuple[Tensor, ...]:
        first = torch.complex(0.1 * draw(2, DIM), 0.1 * draw(2, DIM, seed=2)).requires_grad_()
        second = torch.ones((), dtype=torch.complex128, requires_grad=True)
        states = solve(func, (first, second), backward, OBSERVED, method=method, params=[matrix])
        return torch.autograd.grad(loss(states[0]) + loss(states[1]), (first, second, matrix))

    wanted = gradients("autograd")
    for backward in ways(method):
        assert_same(gradients(backward), wanted)


@pytest.mark.parametrize(
    ("method", "reverse", "interp"),
    in_turn(
        [(False, "linear"), (True, "cubic"), (True, "linear"), (False, "cubic")],
        few=1,
        fast=("leapfrog", "ab3"),
        names=["leapfrog", "nystrom3", "ab3", "ab4", "abm3", "am3", "bdf2", "bdf3"],
    ),
)
def test_events(method: str, reverse: bool, interp: str) -> None:
    turns = itertools.cycle((None, "auto") if interp == "linear" else ("auto", None))
    for elapsed, grad_filter in zip((0.02, 0.12, 0.46), turns, strict=False):

        def gradients(backward: object, elapsed: float = elapsed, grad_filter: Any = grad_filter) -> list[Tensor]:
            func, y0 = Net(), draw(2, DIM).requires_grad_()
            t0 = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
            event_t, states = torchdiffeq_lmm.odeint(
                func,
                y0,
                torch.stack([t0, t0.detach() + (-1 if reverse else 1)]),
                method=method,
                options={"step_size": 0.05, "interp": interp},
                event_fn=lambda t, y: t.abs() - elapsed,
                grad_filter=grad_filter,
                backward=backward,
                **TIGHT,
            )
            wanted = (y0, t0, func.inner.weight, func.outer.weight, func.per_step[0])
            found = torch.autograd.grad(loss(states[1]), wanted, allow_unused=True)
            return [event_t.detach(), states.detach(), *found]

        wanted = gradients("autograd")
        for backward in (way for way in ways(method) if way not in COUNTS):
            assert_same(gradients(backward), wanted, 1e-9)


def test_the_times_of_an_event_may_change_afterwards() -> None:
    results = []
    for backward in ("autograd", "checkpoint", "reversible"):
        func, t = Plain(), torch.tensor([0.0, 1.0], dtype=torch.float64)
        _, states = torchdiffeq_lmm.odeint(
            func,
            draw(DIM),
            t,
            method="leapfrog",
            options={"step_size": 0.05},
            event_fn=lambda t, y: t - 0.52,
            backward=backward,
        )
        t.add_(1)
        loss(states[1]).backward()
        results.append(func.layer.weight.grad)
    assert_same(results[1:], results[:1] * 2)


# ----------------------------------------------------------------------------------------------- funcs of every kind


def hypernetwork() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    net = nn.Linear(2, DIM * DIM, dtype=torch.float64)
    net.weight.data, net.bias.data = draw(DIM * DIM, 2), draw(DIM * DIM, seed=1)
    theta = torch.tanh(net(torch.ones(2, dtype=torch.float64))).view(DIM, DIM)
    return lambda t, y: torch.tanh(y @ theta) * t, [net.weight], [theta]


def hypernetwork_by_its_leaves() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    func, leaves, _ = hypernetwork()
    return func, leaves, leaves


def rows_of_one_tensor() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    stack = draw(2, DIM, DIM).requires_grad_()
    first, second = stack.unbind()
    return lambda t, y: torch.tanh(y @ first) @ second, [stack], [first, second]


def listed_twice() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(DIM, DIM).requires_grad_()
    return lambda t, y: torch.tanh(y @ weight), [weight], [weight, weight]


def more_than_a_few() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    rows = [draw(DIM, seed=seed).requires_grad_() for seed in range(2 * STEPS + 40)]
    return lambda t, y: torch.sin(y) * rows[round(float(t) * STEPS)], rows, rows


def late_parameter() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(DIM).requires_grad_()
    return lambda t, y: torch.sin(y) * (weight if t > 0.6 else 1.0), [weight], [weight]


def parameter_alone() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(2, DIM).requires_grad_()
    return lambda t, y: weight, [weight], [weight]


def reused_memory() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(DIM, DIM).requires_grad_()
    memory = [torch.empty(2, DIM, dtype=torch.float64)]

    def func(t: Tensor, y: Tensor) -> Tensor:
        memory[0] = memory[0].detach()
        return memory[0].copy_(torch.tanh(y @ weight) * torch.cos(t))

    return func, [weight], [weight]


def gradient_of_a_scalar() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(DIM, DIM).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.requires_grad_()
            return torch.autograd.grad((torch.cos(y @ weight) * t).sum(), y, create_graph=True)[0]

    return func, [weight], [weight]


def checkpointed_inside() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    weight = draw(DIM, DIM).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(y @ weight) * t, y, use_reentrant=False)

    return func, [weight], [weight]


def solve_inside() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    func = Plain()
    return lambda t, y: solve(func, y, "checkpoint", steps=3)[-1] - y, list(func.parameters()), list(func.parameters())


def parametrized() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    func = Plain()
    nn.utils.parametrizations.weight_norm(func.layer)
    return func, list(func.parameters()), list(func.parameters())


def tied() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    first, second = Plain(), Plain()
    second.layer.weight = first.layer.weight
    both = nn.ModuleList([first, second])
    parameters = list(both.parameters())
    return lambda t, y: second(t, first(t, y)), parameters, parameters


def sparse() -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    table = nn.Embedding(5, DIM, sparse=True, dtype=torch.float64)
    table.weight.data = draw(5, DIM)
    return lambda t, y: torch.sin(y * table(torch.tensor([1, 3]))), [table.weight], [table.weight]


KINDS = (
    hypernetwork,
    hypernetwork_by_its_leaves,
    rows_of_one_tensor,
    listed_twice,
    more_than_a_few,
    late_parameter,
    parameter_alone,
    reused_memory,
    gradient_of_a_scalar,
    checkpointed_inside,
    solve_inside,
    parametrized,
    tied,
)


@pytest.mark.parametrize("kind", slow_but(set(KINDS) - {solve_inside}, KINDS), ids=lambda kind: kind.__name__)
@pytest.mark.one_in(2)
def test_any_func(kind: Callable[[], tuple[Callable[..., Any], list[Tensor], list[Tensor]]]) -> None:
    for method, backward in (("leapfrog", "checkpoint"), ("leapfrog", "reversible"), ("abm2", Checkpoint(2))):

        def gradients(backward: object, method: str = method) -> tuple[Tensor, ...]:
            func, leaves, params = kind()
            y0 = draw(2, DIM, seed=7).requires_grad_()
            states = solve(func, y0, backward, OBSERVED, method=method, params=params)
            return torch.autograd.grad(loss(states), [*leaves, y0], allow_unused=True)

        wanted = gradients("autograd")
        assert wanted[0] is not None
        assert_same(gradients(backward), wanted)


@pytest.mark.parametrize("backward", AGAIN)
def test_sparse_gradients(backward: str) -> None:
    func, leaves, params = sparse()
    grads = [
        torch.autograd.grad(loss(solve(func, draw(2, DIM), way, params=params)), leaves)[0].to_dense()
        for way in (backward, "autograd")
    ]
    assert_same(grads[:1], grads[1:])


@pytest.mark.parametrize("backward", AGAIN)
def test_a_list_restricts_the_gradient_to_it(backward: str) -> None:
    func, y0 = Plain(), draw(2, DIM).requires_grad_()
    wanted = torch.autograd.grad(loss(solve(func, y0, "autograd")), (y0, func.layer.bias))
    loss(solve(func, y0, backward, params=iter([func.layer.bias]))).backward()
    assert func.layer.weight.grad is None
    assert_same([y0.grad, func.layer.bias.grad], wanted)
    y0.grad = None
    loss(solve(func, y0, backward, params=())).backward()
    assert_same([y0.grad], wanted[:1])


@pytest.mark.parametrize("backward", AGAIN)
def test_frozen_parameters_and_unused_ones_get_none(backward: str) -> None:
    func = Net()
    loss(solve(func, draw(2, DIM), backward)).backward()
    assert func.inner.bias.grad is None
    assert func.unused.grad is None
    assert func.outer.weight.grad is not None


@pytest.mark.parametrize("backward", AGAIN)
def test_a_captured_initial_state_is_a_parameter_as_well(backward: str) -> None:
    leaf = draw(2, DIM).requires_grad_()
    grads = []
    for way in ("autograd", backward):
        y0 = leaf * 1.0
        states = solve(lambda t, y, y0=y0: torch.sin(y) * y0, y0, way, params=[y0])
        grads.append(torch.autograd.grad(loss(states), leaf))
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("backward", AGAIN)
def test_float32_and_batches(backward: str) -> None:
    grads = []
    for way, dtype in ((backward, torch.float32), ("autograd", torch.float64)):
        func, y0 = Plain(dtype), draw(5, 2, DIM).to(dtype).requires_grad_()
        states = solve(func, y0, way, OBSERVED, steps=40)
        assert states.dtype is dtype
        grads.append([g.double() for g in torch.autograd.grad(loss(states), [y0, *func.parameters()])])
    assert_same(grads[0], grads[1], 3e-5)


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(1)])
@pytest.mark.parametrize("shape", [(), (0,), (0, DIM), (1,)])
def test_states_of_any_shape(backward: object, shape: tuple[int, ...]) -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    grads = []
    for way in ("autograd", backward):
        states = solve(lambda t, y: torch.sin(weight * y), draw(*shape), way, params=[weight])
        grads.append(torch.autograd.grad(loss(states), weight))
    assert_same(grads[1], grads[0])


def test_values_do_not_depend_on_the_way() -> None:
    for method in EXPLICIT:
        for options in ({}, {"interp": "cubic", "perturb": True}):
            wanted = solve(Net(), draw(2, DIM), "autograd", OBSERVED, method=method, grad_filter="auto", **options)
            for backward in ways(method):
                got = solve(Net(), draw(2, DIM), backward, OBSERVED, method=method, **options)
                assert torch.equal(got, wanted)


def test_the_sign_of_zero_is_kept() -> None:
    factor = torch.ones((), dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([complex(-1.0, -0.0)], dtype=torch.complex128)
    for backward in ("autograd", "checkpoint", "reversible"):
        states = solve(lambda t, y: factor * torch.sqrt(y), y0, backward, params=[factor])
        assert float(states[-1].imag.detach()) < 0
