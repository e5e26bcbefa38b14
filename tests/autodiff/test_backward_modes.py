"""The ways of the backward pass, end to end: the gradient of auto-differentiation, or an error, never another one."""

import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, DriftError, Reversible
from torchdiffeq_lmm.autodiff.backward_modes import BACKWARDS, resolve_backward
from torchdiffeq_lmm.schemes.methods import METHODS

NAMES = [method.name for method in METHODS]
EXPLICIT = ["leapfrog", "nystrom3", "ab1", "ab4", "abm3"]
DIM = 3
STEPS = 19
AGAIN = ["checkpoint", "reversible"]
COUNTS = [Checkpoint(1), Checkpoint(7), Checkpoint(1000)]
OBSERVED = (0.0, 0.4, 0.87, 1.0)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Time, shared weights, one weight per step, a frozen and an unused parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, 4, dtype=torch.float64)
        self.outer = nn.Linear(4, DIM, dtype=torch.float64)
        self.per_step = nn.ParameterList(torch.zeros(DIM, dtype=torch.float64) for _ in range(STEPS + 1))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(0.7, dtype=torch.float64))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.6 * draw(*parameter.shape, seed=seed))
        self.inner.bias.requires_grad_(False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        step = min(round(abs(float(t.detach())) * STEPS), STEPS)
        return self.scale * self.outer(torch.tanh(self.inner(y)) * torch.cos(2 * t)) - 0.3 * y * self.per_step[step]


class Plain(nn.Module):
    """A small network and nothing else."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, dtype=dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * torch.cos(t)


def growing(func: object, y0: Tensor, t: Tensor) -> Tensor:
    nodes = torch.exp(0.8 * torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)) - 1
    return (t[0] + (t[-1] - t[0]) * nodes / nodes[-1]).to(t)


GRIDS: dict[str, dict[str, Any]] = {
    "uniform": {"step_size": 1 / STEPS},
    "truncated": {"step_size": 1.06 / STEPS},
    "growing": {"grid_constructor": growing},
}


def solve(
    func: Callable[..., Any],
    y0: Any,
    backward: Any = "checkpoint",
    t: Sequence[float] | Tensor = (0.0, 1.0),
    steps: int = STEPS,
    method: str = "leapfrog",
    grad_filter: Any = None,
    params: Any = None,
    **options: Any,
) -> Any:
    like = y0[0] if isinstance(y0, tuple) else y0
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype.to_real())
    if "grid_constructor" not in options:
        options = {"step_size": float(abs(t[-1] - t[0]).detach()) / steps} | options
    given = {} if backward == "autograd" else {"adjoint_params": params}
    return torchdiffeq_lmm.odeint(
        func, y0, t, method=method, options=options, grad_filter=grad_filter, backward=backward, **given, **TIGHT
    )


def loss(states: Tensor) -> Tensor:
    return (states * draw(*states.shape, seed=9).to(states)).sum().real


def assert_same(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float = 1e-11) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        if one is None or other is None:
            assert one is other or not bool((other if one is None else one).any())
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def ways(method: str) -> list[Checkpoint | Reversible | str]:
    reversible = ["reversible", Reversible(anchors=0)] if method == "leapfrog" else []
    return ["checkpoint", *COUNTS, *reversible]


# ------------------------------------------------------------------------------------------------------- the policies


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Checkpoint(0), ValueError, "count must be at least 1, got 0"),
        (lambda: Checkpoint(-3), ValueError, "count must be at least 1, got -3"),
        (lambda: Checkpoint(2.0), TypeError, "count must be an int or None, got 2.0"),
        (lambda: Checkpoint(True), TypeError, "count must be an int or None, got True"),
        (lambda: Checkpoint("3"), TypeError, "count must be an int or None, got '3'"),
        (lambda: Reversible(tolerance="1"), TypeError, "tolerance must be a real number or None, got '1'"),
        (lambda: Reversible(tolerance=1j), TypeError, "tolerance must be a real number"),
        (lambda: Reversible(tolerance=True), TypeError, "tolerance must be a real number"),
        (lambda: Reversible(tolerance=-1e-9), ValueError, "tolerance must not be negative, got -1e-09"),
        (lambda: Reversible(tolerance=float("nan")), ValueError, "tolerance must not be negative, got nan"),
        (lambda: Reversible(on_drift="ignore"), ValueError, "on_drift must be one of ('raise', 'checkpoint')"),
        (lambda: Reversible(report="drift"), TypeError, "report must be a callable that takes a float"),
        (lambda: Reversible(anchors=1.5), TypeError, "anchors must be an int, got 1.5"),
        (lambda: Reversible(anchors=False), TypeError, "anchors must be an int, got False"),
        (lambda: Reversible(anchors=-1), ValueError, "anchors must not be negative, got -1"),
    ],
)
def test_a_way_refuses_what_it_cannot_mean(make: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 99, 100, 101, 5000])
@pytest.mark.parametrize("count", [None, 1, 2, 7, 10**6])
def test_a_checkpoint_keeps_no_more_states_than_it_says(steps: int, count: int | None) -> None:
    stride = Checkpoint(count).stride(steps)
    kept = len(range(0, steps, stride))
    assert stride >= 1
    assert kept <= (count or np.ceil(np.sqrt(steps)))
    assert Checkpoint(steps).stride(steps) == 1
    assert Checkpoint(1).stride(steps) == steps


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
@pytest.mark.parametrize("anchors", [0, 1, 8, 10**6])
def test_a_reversible_keeps_no_more_anchors_than_it_says(steps: int, anchors: int) -> None:
    stride = Reversible(anchors=anchors).stride(steps)
    assert stride >= 1
    assert len(range(stride, steps, stride)) <= anchors
    assert Reversible(anchors=0).stride(steps) == steps


def test_names_stand_for_ways() -> None:
    assert list(BACKWARDS.values()) == [None, Reversible(), Checkpoint()]
    for name, way in BACKWARDS.items():
        assert resolve_backward(name, "leapfrog", is_reversible=True) == way
    assert resolve_backward(Checkpoint(4), "ab3", is_reversible=False) == Checkpoint(4)


@pytest.mark.parametrize(
    ("backward", "error", "message"),
    [
        ("adjoint", ValueError, "backward must be 'autograd', 'reversible', 'checkpoint', a Checkpoint or a Rev"),
        (3, TypeError, "got 3"),
        (Checkpoint, TypeError, "got <class"),
        (["checkpoint"], TypeError, "got ['checkpoint']"),
        ("reversible", ValueError, "needs a method that can be run backwards, as 'leapfrog' can, got method 'ab3'"),
        (Reversible(anchors=2), ValueError, "use backward='checkpoint'"),
    ],
)
def test_resolve_backward_names_what_is_wrong(backward: object, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        resolve_backward(backward, "ab3", is_reversible=False)
    with pytest.raises(error, match=re.escape(message)):
        solve(Plain(), draw(DIM), backward, method="ab3")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_only_leapfrog_runs_backwards() -> None:
    for name in NAMES:
        if name == "leapfrog":
            solve(Plain(), draw(DIM), "reversible", method=name)
        else:
            with pytest.raises(ValueError, match="can be run backwards"):
                solve(Plain(), draw(DIM), "reversible", method=name)


@pytest.mark.parametrize("method", [None, "dopri5", "rk4", "midpoint"])
def test_methods_of_others_have_no_such_way(method: str | None) -> None:
    func, y0, t = Plain(), draw(DIM), torch.tensor([0.0, 1.0], dtype=torch.float64)
    name = method or "dopri5"
    with pytest.raises(ValueError, match=f"backward is for the methods of torchdiffeq_lmm, got method '{name}'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, backward="checkpoint")
    with pytest.raises(ValueError, match=f"adjoint_params is for the methods of torchdiffeq_lmm, got method '{name}'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, adjoint_params=tuple(func.parameters()))
    with pytest.raises(ValueError, match="backward must be 'autograd'"):
        torchdiffeq_lmm.odeint(func, y0, t, method=method, backward="nonsense")


def test_two_answers_to_one_question_are_refused() -> None:
    func, y0, t = Plain(), draw(DIM), torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="backward is given twice"):
        torchdiffeq_lmm.odeint(func, y0, t, method="ab2", backward="checkpoint", options={"backward": "autograd"})
    with pytest.raises(ValueError, match="adjoint_params is given twice"):
        torchdiffeq_lmm.odeint(
            func, y0, t, method="ab2", backward="checkpoint", adjoint_params=(), options={"adjoint_params": ()}
        )


def test_adjoint_params_are_asked_for_where_they_are_needed_and_only_there() -> None:
    func, y0 = Plain(), draw(DIM)
    for callable_ in (func.forward, lambda t, y: func(t, y)):
        with pytest.raises(ValueError, match="adjoint_params must be given where func is not"):
            solve(callable_, y0)
    with pytest.raises(ValueError, match="adjoint_params must not be given where backward is 'autograd'"):
        torchdiffeq_lmm.odeint(func, y0, torch.tensor([0.0, 1.0]).double(), method="ab2", adjoint_params=())
    with pytest.raises(TypeError, match="must be an iterable of tensors, got a tensor"):
        solve(func, y0, params=func.layer.weight)
    with pytest.raises(TypeError, match="must be an iterable of tensors, got 3 as number 1"):
        solve(func, y0, params=[func.layer.weight, 3])


@pytest.mark.parametrize("backward", AGAIN)
def test_a_module_must_list_what_it_does_not_own(backward: str) -> None:
    func, outside = Plain(), draw(DIM).requires_grad_()

    class More(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func = func

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.func(t, y) * outside

    with pytest.raises(ValueError, match="adjoint_params must be given where func depends on more than the parameters"):
        loss(solve(More(), draw(2, DIM), backward)).backward()
    listed = [*func.parameters(), outside]
    got = torch.autograd.grad(loss(solve(More(), draw(2, DIM), backward, params=listed)), listed)
    assert_same(got, torch.autograd.grad(loss(solve(More(), draw(2, DIM), "autograd")), listed))


@pytest.mark.parametrize("backward", AGAIN)
def test_a_module_that_uses_another_tensor_late_must_list_it_too(backward: str) -> None:
    outside = draw(DIM).requires_grad_()

    class Late(Plain):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(t, y) * (outside if t > 0.5 else 1.0)

    with pytest.raises(ValueError, match="adjoint_params must be given"):
        loss(solve(Late(), draw(2, DIM), backward)).backward()


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(3), Reversible(anchors=1)])
def test_odeint_adjoint_has_its_own_way(backward: object) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="backward must be 'autograd' in odeint_adjoint"):
        torchdiffeq.odeint_adjoint(Plain(), draw(DIM), t, method="leapfrog", options={"backward": backward})


@pytest.mark.parametrize("backward", AGAIN)
def test_second_derivatives_are_refused(backward: str) -> None:
    y0 = draw(DIM).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss(solve(Plain(), y0, backward)), y0, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("backward", AGAIN)
def test_forward_mode_and_transforms_are_refused(backward: str) -> None:
    func = Plain()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not support forward-mode"),
    ):
        solve(func, torch.autograd.forward_ad.make_dual(draw(DIM), draw(DIM)), backward)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: loss(solve(func, y, backward)))(draw(DIM))
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda y: loss(solve(func, y, backward)))(draw(2, DIM))


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
        (method, *setting)
        for method in (*NAMES, "midpoint", "heun2")
        for setting in SETTINGS
        if method in NAMES or setting[-1] is not None
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


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("method", ["leapfrog", "nystrom3", "ab5", "abm5", "milne_simpson", "bdf6", "am5"])
def test_few_steps(method: str, steps: int) -> None:
    func, y0 = Plain(), draw(2, DIM).requires_grad_()
    inputs = [y0, *func.parameters()]
    wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", (0.0, 0.6), steps, method)), inputs)
    for backward in ways(method):
        states = solve(func, y0, backward, (0.0, 0.6), steps, method)
        assert_same(torch.autograd.grad(loss(states), inputs), wanted, 1e-10)


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(3)])
def test_a_step_longer_than_the_interval(backward: object) -> None:
    func, y0 = Plain(), draw(2, DIM).requires_grad_()
    inputs = [y0, *func.parameters()]
    wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", step_size=3.0)), inputs)
    assert_same(torch.autograd.grad(loss(solve(func, y0, backward, step_size=3.0)), inputs), wanted)


@pytest.mark.parametrize("backward", ["checkpoint", Checkpoint(2)])
@pytest.mark.parametrize("method", ["leapfrog", "ab3", "bdf2"])
def test_gradcheck(method: str, backward: object) -> None:
    func, t = Plain(), torch.tensor([0.0, 0.37, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y0, t: solve(func, y0, backward, t, method=method, step_size=0.13, interp="cubic"),
        (draw(DIM).requires_grad_(), t),
    )


def test_gradcheck_run_backwards() -> None:
    func, t = Plain(), torch.tensor([0.0, 0.37, 0.8], dtype=torch.float64, requires_grad=True)
    for grid in ({"step_size": 0.13}, {"grid_constructor": growing}):
        assert torch.autograd.gradcheck(
            lambda y0, t, grid=grid: solve(func, y0, Reversible(anchors=0), t, **grid),
            (draw(DIM).requires_grad_(), t),
        )


@pytest.mark.parametrize("method", EXPLICIT)
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


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["leapfrog", "nystrom3", "ab4", "abm3", "am3", "bdf3"])
def test_events(method: str, reverse: bool, interp: str) -> None:
    for elapsed, grad_filter in itertools.product((0.02, 0.12, 0.61), (None, "auto")):

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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
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


# ----------------------------------------------------------------------------------------------- a citizen of autograd


@pytest.mark.parametrize("backward", AGAIN)
class TestGoodCitizen:
    def test_hooks_see_the_whole_gradient_once(self, backward: str) -> None:
        func, seen = Plain(), []
        func.layer.weight.register_hook(lambda grad: seen.append(grad.clone()))
        func.layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss(solve(func, draw(2, DIM), backward)).backward()
        assert len(seen) == 2
        assert torch.equal(seen[0], func.layer.weight.grad)
        assert torch.equal(seen[1], func.layer.weight.grad)

    def test_hooks_and_retained_gradients_of_tensors_that_are_no_leaves(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            weight, seen = draw(DIM, DIM).requires_grad_(), []
            theta = 2 * weight
            theta.retain_grad()
            theta.register_hook(seen.append)
            loss(solve(lambda t, y, theta=theta: torch.tanh(y @ theta), draw(2, DIM), way, params=[theta])).backward()
            assert len(seen) == 1
            grads.append([weight.grad, theta.grad, seen[0]])
        assert_same(grads[1], grads[0])

    def test_backward_again_needs_retain_graph(self, backward: str) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward)
        loss(states).backward(retain_graph=True)
        once = func.layer.weight.grad.clone()
        states[-1].sum().backward(retain_graph=True)
        other = func.layer.weight.grad - once
        loss(states).backward()
        torch.testing.assert_close(func.layer.weight.grad, 2 * once + other)
        with pytest.raises(RuntimeError, match="second time"):
            loss(states).backward()

    def test_solves_follow_one_another_and_stand_side_by_side(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            func, other, y0 = Plain(), Net(), draw(2, DIM).requires_grad_()
            middle = solve(func, y0, way)[-1]
            ends = [solve(func, middle, way)[-1] for _ in range(2)]
            total = loss(ends[0]) + loss(ends[1] * solve(other, middle, way)[-1])
            grads.append(torch.autograd.grad(total, [y0, *func.parameters(), other.outer.weight]))
        assert_same(grads[1], grads[0])

    def test_gradients_are_for_the_inputs_asked_for(self, backward: str) -> None:
        func, y0 = Plain(), draw(2, DIM).requires_grad_()
        states = solve(func, y0, backward)
        loss(states).backward(inputs=[func.layer.bias], retain_graph=True)
        assert func.layer.weight.grad is None
        (grad,) = torch.autograd.grad(loss(states), func.layer.bias)
        assert torch.equal(grad, func.layer.bias.grad)

    def test_nothing_requires_a_gradient(self, backward: str) -> None:
        func = Plain().requires_grad_(False)
        assert not solve(func, draw(2, DIM), backward).requires_grad
        assert solve(func, draw(2, DIM).requires_grad_(), backward).requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not solve(Plain(), draw(2, DIM).requires_grad_(), backward).requires_grad

    def test_torchdiffeqs_odeint_has_the_option(self, backward: str) -> None:
        t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        func, y0 = Plain(), draw(2, DIM)
        parameters = list(func.parameters())
        got = torchdiffeq.odeint(
            lambda t, y: func(t, y),
            y0,
            t,
            method="leapfrog",
            options={"backward": backward, "adjoint_params": func.parameters()},
        )
        wanted = torch.autograd.grad(loss(solve(func, y0, "autograd", t)), parameters)
        assert_same(torch.autograd.grad(loss(got), parameters), wanted)

    def test_all_memory_is_freed_without_a_collector(self, backward: str) -> None:
        gc.collect()
        gc.disable()
        try:
            func = Plain()
            alive = weakref.ref(func)
            states = solve(func, draw(2, DIM), backward)
            loss(states).backward()
            del states, func
            assert alive() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("end", ["nothing", "retained", "raised"])
    def test_all_memory_is_freed_whatever_becomes_of_the_solution(self, backward: str, end: str) -> None:
        gc.collect()
        gc.disable()
        try:
            func, y0 = Plain(), draw(2, DIM)
            alive = weakref.ref(func)
            states = solve(func, y0, backward)
            if end == "retained":
                loss(states).backward(retain_graph=True)
            elif end == "raised":
                y0.zero_()
                with pytest.raises(RuntimeError, match="must not be modified in place"):
                    loss(states).backward()
            del states, func, y0
            assert alive() is None
        finally:
            gc.enable()

    def test_a_checkpoint_around_it(self, backward: str) -> None:
        grads = []
        for way in ("autograd", backward):
            func, y0 = Plain(), draw(2, DIM).requires_grad_()
            states = torch.utils.checkpoint.checkpoint(
                lambda y, func=func, way=way: solve(func, y, way), y0, use_reentrant=False
            )
            grads.append(torch.autograd.grad(loss(states), [y0, *func.parameters()]))
        assert_same(grads[1], grads[0])

    def test_the_solution_may_change_afterwards(self, backward: str) -> None:
        grads = []
        for change in (False, True):
            func = Plain()
            states = solve(func, draw(2, DIM), backward)
            if change:
                states.detach().zero_()
            grads.append(torch.autograd.grad(loss(states), list(func.parameters())))
        assert_same(grads[1], grads[0])


# --------------------------------------------------------------------------------------- evaluations, memory and time


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(DIM, DIM))
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(y @ self.weight)


@pytest.mark.parametrize("grad_filter", [None, "auto"])
@pytest.mark.parametrize(
    ("method", "backward"),
    [
        *itertools.product(EXPLICIT, ["checkpoint", Checkpoint(1), Checkpoint(40)]),
        ("leapfrog", "reversible"),
        ("leapfrog", Reversible(anchors=0)),
    ],
)
def test_at_most_one_extra_forward_pass(method: str, backward: object, grad_filter: str | None) -> None:
    steps = 100
    func = Counting()
    states = solve(func, draw(2, DIM), backward, steps=steps, method=method, grad_filter=grad_filter)
    forward = func.calls
    per_step = torchdiffeq_lmm.method_info(method).evaluations
    assert per_step * steps <= forward <= per_step * steps + 12
    loss(states).backward()
    assert per_step * (steps - 1) <= func.calls - forward <= forward


@pytest.mark.parametrize("method", ["bdf2", "am3"])
def test_implicit_steps_are_solved_once_more(method: str) -> None:
    func = Counting()
    states = solve(func, draw(2, DIM), method=method, steps=100)
    forward = func.calls
    loss(states).backward()
    assert func.calls <= 2.1 * forward


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self._meet(each.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:

            def gone(_: object) -> None:
                self.alive -= size
                del self._known[key]

            self._known[key] = weakref.ref(storage, gone)
            self.alive += size
            self.bytes = max(self.bytes, self.alive)


def peak(backward: object, steps: int, method: str = "leapfrog", grad_filter: str | None = None) -> int:
    weight = draw(20_000).requires_grad_()
    y0 = draw(20_000, seed=1)
    with Peak() as measured:
        states = solve(
            lambda t, y: torch.cos(weight * y), y0, backward, (0.0, 1.0), steps, method, grad_filter, [weight]
        )
        states[-1].sum().backward()
    assert measured.bytes > y0.nbytes
    return measured.bytes


@pytest.mark.parametrize("grad_filter", [None, "auto"])
def test_reversal_needs_no_more_memory_for_more_steps(grad_filter: str | None) -> None:
    few, many = (peak("reversible", steps, grad_filter=grad_filter) for steps in (100, 1000))
    assert many <= 1.1 * few
    assert peak("autograd", 100, grad_filter=grad_filter) > 2 * few


@pytest.mark.parametrize("method", ["leapfrog", "ab3"])
def test_checkpoints_need_memory_like_the_root_of_the_steps(method: str) -> None:
    bytes_ = [peak("checkpoint", steps, method) for steps in (100, 400, 1600)]
    orders = np.diff(np.log2(bytes_)) / 2
    assert np.all(orders > 0.2)
    assert np.all(orders < 0.53)
    assert bytes_[-1] < peak("autograd", 400, method)


def test_the_number_of_checkpoints_is_the_users() -> None:
    few, root, many = (peak(Checkpoint(count), 400) for count in (2, 20, 400))
    assert root < 0.5 * few
    assert root < 0.5 * many


@pytest.mark.parametrize("backward", ["autograd", *AGAIN])
def test_many_steps(backward: str) -> None:
    steps = 20_000
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    states = solve(lambda t, y: rate * (y @ turn), y0, backward, (0.0, 2.0), steps, params=[rate])
    states[-1][0].backward()
    assert float(states[-1][0].detach()) == pytest.approx(np.cos(1.0), abs=1e-7)
    assert float(rate.grad) == pytest.approx(-2 * np.sin(1.0), abs=1e-7)


# ------------------------------------------------------------------------------------------------------------- drift


def decay(rate: Tensor, steps: int, backward: object, start: Sequence[float] = (1.0,)) -> Tensor:
    y0 = torch.tensor(start, dtype=rate.dtype)
    return solve(lambda t, y: -rate * y, y0, backward, (0.0, 1.0), steps, params=[rate])


def of_rate(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 15.0), (torch.float64, 25.0)])
def test_drift_raises_and_is_reported(dtype: torch.dtype, value: float) -> None:
    seen: list[float] = []
    states = decay(of_rate(value, dtype), 500, Reversible(anchors=0, report=seen.append))
    with pytest.raises(DriftError, match="backward='reversible' ran the solution back to a state that is off by"):
        states[-1].sum().backward()
    assert len(seen) == 1
    assert seen[0] > torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 15.0), (torch.float64, 25.0)])
@pytest.mark.parametrize("grad_filter", [None, "auto"])
def test_drift_falls_back_to_checkpoints(dtype: torch.dtype, value: float, grad_filter: str | None) -> None:
    grads, seen = [], []
    for backward in ("autograd", Reversible(anchors=0, on_drift="checkpoint", report=seen.append)):
        rate, y0 = of_rate(value, dtype), torch.ones(2, dtype=dtype, requires_grad=True)
        states = solve(
            lambda t, y, rate=rate: -rate * y, y0, backward, steps=500, params=[rate], grad_filter=grad_filter
        )
        grads.append(torch.autograd.grad(states[-1].sum(), (rate, y0)))
    assert_same(grads[1], grads[0], 3e-4 if dtype is torch.float32 else 1e-11)
    assert len(seen) == 1
    assert seen[0] > torch.finfo(dtype).eps ** 0.5


def test_anchors_keep_the_drift_small() -> None:
    drifts: dict[int, float] = {}
    for anchors in (0, 1, 8):
        rate = of_rate(15.0, torch.float64)
        way = Reversible(tolerance=1.0, anchors=anchors, report=lambda drift, n=anchors: drifts.update({n: drift}))
        decay(rate, 300, way)[-1].sum().backward()
    assert drifts[1] < 0.1 * drifts[0]
    assert drifts[8] < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_is_right_or_an_error(dtype: torch.dtype) -> None:
    outcomes = []
    for value in range(4, 30, 2):
        wanted = of_rate(value, dtype)
        decay(wanted, 300, "autograd")[-1].sum().backward()
        rate = of_rate(value, dtype)
        try:
            decay(rate, 300, Reversible(anchors=0))[-1].sum().backward()
        except RuntimeError:
            outcomes.append("raised")
            continue
        outcomes.append("right")
        error = float((rate.grad - wanted.grad).abs() / wanted.grad.abs())
        assert error < 100 * torch.finfo(dtype).eps ** 0.5, value
    assert set(outcomes) == {"right", "raised"}


def test_the_tolerance_is_that_of_the_user() -> None:
    seen: list[float] = []
    decay(of_rate(9.0), 500, Reversible(tolerance=10.0, anchors=0, report=seen.append))[-1].sum().backward()
    drift = seen[0]
    assert 1e-6 < drift < 10
    decay(of_rate(9.0), 500, Reversible(tolerance=1.01 * drift, anchors=0))[-1].sum().backward()
    with pytest.raises(RuntimeError, match="is tolerated"):
        decay(of_rate(9.0), 500, Reversible(tolerance=0.99 * drift, anchors=0))[-1].sum().backward()


def test_reports_are_made_of_every_backward_pass() -> None:
    seen: list[float] = []
    states = solve(Plain(), draw(2, DIM), Reversible(report=seen.append))
    assert seen == []
    for _ in range(2):
        loss(states).backward(retain_graph=True)
    assert len(seen) == 2
    assert seen[0] == seen[1] <= 1e-14


@pytest.mark.parametrize("on_drift", ["raise", "checkpoint"])
def test_what_is_not_a_number_drifts(on_drift: str) -> None:
    rate, seen = of_rate(1.0), []
    way = Reversible(tolerance=float("inf"), on_drift=on_drift, report=seen.append)
    states = solve(lambda t, y: torch.sqrt(0.5 - rate * t) * y, torch.ones(2), way, steps=40, params=[rate])
    if on_drift == "raise":
        with pytest.raises(RuntimeError, match="not all numbers"):
            states[-1].sum().backward()
    else:
        states[-1].sum().backward()
        assert rate.grad.isnan()
    assert len(seen) == 1
    assert np.isnan(seen[0])


def test_a_large_component_hides_no_drift_of_a_small_one() -> None:
    def gradient(backward: object) -> float:
        rate = of_rate(15.0)
        only_second = torch.tensor([0.0, 1.0])
        y0 = torch.tensor([1e6, 1.0])
        states = solve(lambda t, y: -rate * y * only_second, y0, backward, steps=300, params=[rate])
        states[-1][1].backward()
        return float(rate.grad)

    assert gradient(Reversible()) == pytest.approx(gradient("autograd"), rel=1e-4)
    with pytest.raises(RuntimeError, match="off by"):
        gradient(Reversible(anchors=0))


# ----------------------------------------------------------------------------- func is another in the backward pass


ELSEWHERE = r"func gave other values|ran the solution back"
FEW_AND_MANY = [1, 2, 3, 9, 40]


@pytest.mark.parametrize("steps", FEW_AND_MANY)
@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(1), Reversible(anchors=0)])
class TestAnotherFunc:
    def test_a_parameter_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward, steps=steps)
        with torch.no_grad():
            func.layer.bias.add_(1)
        with pytest.raises(RuntimeError, match="must not be modified in place before the backward pass"):
            loss(states).backward()

    def test_an_initial_state_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        y0 = draw(2, DIM)
        states = solve(Plain(), y0, backward, steps=steps)
        y0.add_(1)
        with pytest.raises(RuntimeError, match="must not be modified in place before the backward pass"):
            loss(states).backward()

    def test_other_data_of_a_parameter_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM), backward, steps=steps)
        func.layer.weight.data = func.layer.weight.data * 2
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_randomness_from_elsewhere_is_an_error(self, backward: object, steps: int) -> None:
        rng, weight = np.random.default_rng(0), draw(DIM, DIM).requires_grad_()
        states = solve(
            lambda t, y: torch.tanh(y @ weight) * rng.normal(), draw(2, DIM), backward, steps=steps, params=[weight]
        )
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_a_mode_that_changed_is_an_error(self, backward: object, steps: int) -> None:
        func = nn.BatchNorm1d(DIM, dtype=torch.float64)
        hosted = nn.Module()
        hosted.norm = func
        hosted.forward = lambda t, y: torch.tanh(func(y))
        states = solve(hosted, draw(4, DIM), backward, steps=steps)
        hosted.eval()
        with pytest.raises(RuntimeError, match=ELSEWHERE):
            loss(states).backward()

    def test_other_tensors_of_the_same_values_are_an_error(self, backward: object, steps: int) -> None:
        func = Plain()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.func = func

            def forward(self, y0: Tensor) -> Tensor:
                return solve(self.func, y0, backward, steps=steps)

        model = Model()
        copies = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
        states = torch.func.functional_call(model, copies, (draw(2, DIM),))
        with pytest.raises(ValueError, match="func uses another tensor"):
            loss(states).backward()

    def test_a_parameter_that_was_frozen_is_an_error(self, backward: object, steps: int) -> None:
        func = Plain()
        states = solve(func, draw(2, DIM).requires_grad_(), backward, steps=steps)
        func.requires_grad_(False)
        with pytest.raises(RuntimeError):
            loss(states).backward()


# ------------------------------------------------------------------------------------------ dropout, autocast, modules


class Dropping(Plain):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.4, training=True)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("grad_filter", [None, "auto"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_dropout_drops_the_same_again(method: str, grad_filter: str | None, interp: str) -> None:
    def gradients(backward: object, steps: int) -> list[Tensor]:
        func, y0 = Dropping(), draw(4, DIM).requires_grad_()
        t = torch.tensor(OBSERVED, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        states = solve(func, y0, backward, t, steps, method=method, grad_filter=grad_filter, interp=interp)
        torch.rand(5)
        before = torch.get_rng_state()
        grads = torch.autograd.grad(loss(states), [y0, t, *func.parameters()])
        assert torch.equal(torch.get_rng_state(), before)
        return [states.detach(), *grads]

    for steps in (1, 2, STEPS):
        wanted = gradients("autograd", steps)
        for backward in ("checkpoint", Checkpoint(1), Checkpoint(5)):
            assert_same(gradients(backward, steps), wanted)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_dropout_does_not_run_backwards(steps: int) -> None:
    with pytest.raises(RuntimeError, match="needs a deterministic func, got one that draws random numbers"):
        solve(Dropping(), draw(2, DIM), "reversible", steps=steps)
    solve(Dropping().eval(), draw(2, DIM), "checkpoint", steps=steps)


@pytest.mark.parametrize("backward", [*AGAIN, Checkpoint(1)])
def test_a_func_that_seeds_a_fork_is_deterministic(backward: object) -> None:
    weight = draw(DIM, DIM).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return torch.tanh(y @ weight) * torch.rand(DIM)

    grads = [
        torch.autograd.grad(loss(solve(func, draw(2, DIM), way, params=[weight])), weight)
        for way in ("autograd", backward)
    ]
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("outside", [None, torch.float16])
@pytest.mark.parametrize("backward", ["checkpoint", Checkpoint(1), Reversible(tolerance=1e-3)])
def test_autocast_is_the_same_again(backward: object, outside: torch.dtype | None) -> None:
    grads, kinds = [], []
    for way in ("autograd", backward):
        func, y0 = Plain(torch.float32), draw(2, DIM).float().requires_grad_()
        func.layer.register_forward_hook(lambda module, args, made: kinds.append(made.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = solve(func, y0, way)
        with torch.autocast("cpu", dtype=outside or torch.bfloat16, enabled=outside is not None):
            loss(states).backward()
        grads.append([states.detach(), y0.grad, *(parameter.grad for parameter in func.parameters())])
    assert set(kinds) == {torch.bfloat16}
    assert torch.equal(grads[0][0], grads[1][0])
    scale = max(float(grad.abs().max()) for grad in grads[0])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        assert float((got - wanted).abs().max()) < 0.02 * scale


def test_buffers_are_updated_by_every_evaluation() -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(DIM, dtype=torch.float64)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.norm(super().forward(t, y))

    grads = []
    for backward in ("autograd", "checkpoint", "reversible"):
        func = Normed()
        loss(solve(func, draw(4, DIM), backward)).backward()
        grads.append([parameter.grad for parameter in func.parameters()])
        assert int(func.norm.num_batches_tracked) == STEPS * (1 if backward == "autograd" else 2)
    assert_same(grads[1], grads[0])
    assert_same(grads[2], grads[0])


def test_parameters_of_another_dtype() -> None:
    grads: list[Iterator[Tensor] | tuple[Tensor, ...]] = []
    for backward in ("autograd", "checkpoint", "reversible"):
        weight = draw(DIM, DIM).float().requires_grad_()
        states = solve(lambda t, y, w=weight: torch.tanh(y @ w.double()), draw(2, DIM), backward, params=[weight])
        grads.append(torch.autograd.grad(loss(states), weight))
        assert grads[-1][0].dtype is torch.float32
    for grad in grads[1:]:
        assert_same(grad, grads[0], 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", ["checkpoint", Checkpoint(1)])
def test_dropout_on_a_gpu_drops_the_same_again(backward: object) -> None:
    grads = []
    for way in ("autograd", backward):
        func, y0 = Dropping().cuda(), draw(4, DIM).cuda().requires_grad_()
        torch.manual_seed(3)
        states = solve(func, y0, way)
        torch.rand(5, device="cuda")
        before = torch.cuda.get_rng_state()
        grads.append(torch.autograd.grad(loss(states.cpu()), [y0, *func.parameters()]))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert_same(grads[1], grads[0])
