"""torchdiffeq's solve with leapfrog, without a filter: values, gradients and all that torchdiffeq promises."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from problems import GRIDS, PROBLEMS, Problem, Reference, orders
from torch import Tensor, nn

import torchdiffeq_lmm

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
INTERPS = ["linear", "cubic"]


def tensor(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def on(nodes: Tensor) -> Callable[..., Tensor]:
    """A grid_constructor for these nodes, cast to the dtype and device of t."""
    return lambda func, y0, t: nodes.to(t)


def solve(func: Callable[..., Any], y0: Any, t: Tensor, event_fn: Any = None, **options: Any) -> Any:
    return torchdiffeq.odeint(func, y0, t, method="leapfrog", options=options or None, event_fn=event_fn)


def loop(func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, nodes: Tensor) -> Tensor:
    """The reference: leapfrog in the form of states."""
    h = nodes.diff()
    slope = func(nodes[0], y0)
    x = [y0, y0 + h[0] * slope]
    if len(h) == 1:
        # A single step is Heun's.
        return torch.stack([y0, y0 + h[0] / 2 * (slope + func(nodes[1], x[1]))])
    for n in range(1, len(h)):
        r = h[n] / h[n - 1]
        x.append((1 - r**2) * x[n] + r**2 * x[n - 1] + h[n] * (1 + r) * func(nodes[n], x[n]))
    return torch.stack(x)


class Field(nn.Module):
    """A nonlinear, time-dependent field in three dimensions that counts its evaluations."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))
        self.times: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(t.item())
        return torch.tanh(y @ self.weight + t * self.bias) - 0.5 * y


# --------------------------------------------------------------------------------------- values, against the loop

NODES = {
    "uniform": torch.linspace(0, 1, 11, dtype=torch.float64),
    "truncated": tensor(0.0, 0.3, 0.6, 0.9, 1.0),
    "irregular": tensor(0.0, 0.01, 0.3, 0.31, 0.7, 0.75, 1.0),
    "mixed": tensor(0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.7, 0.8, 0.9, 1.0),
    "one step": tensor(0.0, 1.0),
    "two steps": tensor(0.0, 0.25, 1.0),
}


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("through", ["t", "grid_constructor"])
@pytest.mark.parametrize("name", NODES)
def test_values_and_gradients_are_those_of_the_loop(name: str, through: str, direction: int) -> None:
    nodes = direction * NODES[name]
    field = Field()
    y0 = tensor(0.3, -0.8, 1.1, requires_grad=True)
    cotangent = torch.randn(len(nodes), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = loop(field, y0, nodes)
    options = {} if through == "t" else {"grid_constructor": on(nodes)}
    actual = solve(field, y0, nodes, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = (y0, field.weight, field.bias)
    torch.testing.assert_close(
        torch.autograd.grad((actual * cotangent).sum(), inputs),
        torch.autograd.grad((expected * cotangent).sum(), inputs),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("start", [0.0, -2.0])
@pytest.mark.parametrize("step_size", [0.1, 0.3, 0.07, 1.0, 5.0])
@pytest.mark.parametrize("direction", [1, -1])
def test_step_size_is_the_loop_on_its_nodes(direction: int, step_size: float, start: float) -> None:
    t = tensor(start, start + direction)
    inner = start + direction * step_size * torch.arange(math.ceil(1 / step_size - 1e-9), dtype=torch.float64)
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    expected = loop(field, y0, torch.cat([inner, t[-1:]]))
    out = solve(field, y0, t, step_size=step_size)
    torch.testing.assert_close(out, torch.stack([y0, expected[-1]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step_size", [torch.tensor(0.1, dtype=torch.float64), np.float64(0.1), torch.tensor([0.1])])
def test_step_sizes_of_other_types(step_size: Any) -> None:
    field, y0, t = Field(), tensor(0.3, -0.8, 1.1), tensor(0.0, 1.0)
    torch.testing.assert_close(solve(field, y0, t, step_size=step_size), solve(field, y0, t, step_size=0.1))


def test_exact_for_a_quadratic_after_an_exact_start() -> None:
    """x' = 2 t from t = 0 with a first step that Euler makes exact, as far as its own length squared."""
    nodes = torch.cat([tensor(0.0, 1e-9), torch.linspace(0.1, 1, 7, dtype=torch.float64)])
    out = solve(lambda t, y: torch.zeros_like(y) + 2 * t, tensor(0.0), nodes)
    # The ratio 1e8 of the steps amplifies the 1e-18 of the start by its square.
    torch.testing.assert_close(out[:, 0], nodes**2, rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ orders, forward


def field_of(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: problem.torch_f(x, torch.as_tensor(problem.theta(np.array(t.item()))))


def exact(problem: Problem, t: Tensor) -> Tensor:
    reference = Reference(problem, [problem.horizon])
    return torch.as_tensor(np.stack([reference.state(s) for s in t.tolist()]))


def measured_order(problem: Problem, t: Tensor, options: Callable[[int], dict[str, Any]]) -> float:
    """The mean order over N = 40, 80, 160."""
    truth, errors = exact(problem, t), []
    for steps in (40, 80, 160):
        out = solve(field_of(problem), tensor(*problem.x0), t, **options(steps))
        errors.append((out - truth).abs().max().item())
    return float(np.mean(orders(errors)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_second_order_on_every_grid(problem: Problem, grid: str) -> None:
    t = tensor(0.0, problem.horizon)
    order = measured_order(problem, t, lambda n: {"grid_constructor": on(GRIDS[grid](n, problem.horizon))})
    assert 1.8 < order < 2.4


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_second_order_at_observations_between_nodes(problem: Problem, grid: str, interp: str) -> None:
    t = problem.horizon * tensor(0.0, 0.2347, 0.5113, 0.77701, 1.0)
    order = measured_order(
        problem, t, lambda n: {"grid_constructor": on(GRIDS[grid](n, problem.horizon)), "interp": interp}
    )
    assert 1.7 < order < 2.7


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_second_order_at_observations_on_nodes(problem: Problem) -> None:
    t = problem.horizon * tensor(0.0, 0.25, 0.5, 0.8, 1.0)
    order = measured_order(problem, t, lambda n: {"step_size": problem.horizon / n})
    assert 1.8 < order < 2.4


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_second_order_with_t_as_the_grid(problem: Problem) -> None:
    errors = []
    for steps in (40, 80, 160):
        t = GRIDS["growing"](steps, problem.horizon)
        out = solve(field_of(problem), tensor(*problem.x0), t)
        errors.append((out - exact(problem, t)).abs().max().item())
    assert 1.7 < np.mean(orders(errors)) < 2.4


# ----------------------------------------------------------------------------------------------- evaluation counts


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("end", "step_size", "count"), [(1.0, 0.1, 10), (1.1, 0.1, 11), (1.0, 0.3, 4), (0.5, 2.0, 1)])
def test_one_evaluation_per_step(end: float, step_size: float, count: int, grad: bool, interp: str) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=grad)
    t = tensor(0.0, *(step_size * n for n in range(1, count)), end, requires_grad=grad)
    out = solve(field, y0, t, step_size=step_size, interp=interp)
    # A single step takes one more, at its end.
    expected = [step_size * n for n in range(count)] if count > 1 else [0.0, end]
    assert field.times == pytest.approx(expected)
    if grad:
        out.sum().backward()
        assert len(field.times) == len(expected)


@pytest.mark.parametrize(("interp", "extra"), [("linear", 0), ("cubic", 1)])
def test_evaluations_for_outputs_between_nodes(interp: str, extra: int) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    solve(field, y0, tensor(0.0, 0.13, 0.14, 0.55, 1.0), step_size=0.1, interp=interp)
    assert len(field.times) == 10
    field.times.clear()
    # Only in the last step is there no next evaluation to take the slope from.
    solve(field, y0, tensor(0.0, 0.55, 0.93, 0.97, 1.0), step_size=0.1, interp=interp)
    assert len(field.times) == 10 + extra


@pytest.mark.parametrize("interp", INTERPS)
def test_evaluations_with_t_as_the_grid(interp: str) -> None:
    field = Field()
    solve(field, tensor(0.3, -0.8, 1.1), tensor(0.0, 0.1, 0.7, 1.0), interp=interp)
    assert field.times == [0.0, 0.1, 0.7]


def test_evaluations_up_to_an_event() -> None:
    for interp, extra in (("linear", 0), ("cubic", 1)):
        times: list[float] = []

        def func(t: Tensor, y: Tensor, times: list[float] = times) -> Tensor:
            times.append(t.item())
            return -torch.ones_like(y)

        solve(func, tensor(1.0), tensor(0.0, 9.0), lambda t, y: y[0] - 0.35, step_size=0.1, interp=interp)
        assert len(times) == 7 + extra


# -------------------------------------------------------------------------------------------------- kinds of state


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -0.5 * y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes(dtype: torch.dtype, t_dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=wide)
    eps = torch.finfo(dtype).eps
    for nodes in (torch.linspace(0, 1, 9), tensor(0.0, 0.125, 0.5, 0.75, 1.0)):
        for t_grad in (False, True):
            t = nodes.to(device, t_dtype).requires_grad_(t_grad)
            y0 = start.to(device, dtype).requires_grad_()
            for out in (
                solve(decay, y0, t),
                solve(decay, y0, t, grid_constructor=on(nodes), interp="cubic"),
            ):
                assert out.dtype is dtype
                assert out.shape == (len(nodes), *shape)
                assert out.device == y0.device
                expected = loop(decay, start.to(dtype).to(wide), nodes.double())
                torch.testing.assert_close(out.detach().cpu().to(wide), expected, rtol=30 * eps, atol=30 * eps)
                (grad,) = torch.autograd.grad(out[-1].abs().square().sum(), y0)
                assert grad.dtype is dtype
                wanted = start.requires_grad_()
                end = loop(decay, wanted, nodes.double())[-1]
                (wanted_grad,) = torch.autograd.grad(end.abs().square().sum(), wanted)
                torch.testing.assert_close(grad.cpu().to(wide), wanted_grad, rtol=60 * eps, atol=60 * eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_between_nodes_in_every_dtype(dtype: torch.dtype, interp: str, device: str) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    y0 = torch.tensor(1.5, device=device, dtype=dtype)
    t = torch.tensor([0.0, 0.3, 1.0], device=device, requires_grad=True)
    out = solve(decay, y0, t, step_size=0.25, interp=interp)
    x = loop(decay, torch.tensor(1.5, dtype=wide), torch.linspace(0, 1, 5, dtype=torch.float64))
    s, f = 0.2, -0.5 * x
    if interp == "linear":
        inside = (1 - s) * x[1] + s * x[2]
    else:
        ends = (1 + 2 * s) * (1 - s) ** 2 * x[1] + s**2 * (3 - 2 * s) * x[2]
        inside = ends + 0.25 * (s * (1 - s) ** 2 * f[1] - s**2 * (1 - s) * f[2])
    eps = max(torch.finfo(dtype).eps, torch.finfo(t.dtype).eps)
    assert out.dtype is dtype
    torch.testing.assert_close(
        out.detach().cpu().to(wide), torch.stack([x[0], inside, x[-1]]), rtol=20 * eps, atol=20 * eps
    )
    (grad,) = torch.autograd.grad(out.abs().sum(), t)
    assert grad.dtype is t.dtype
    assert torch.isfinite(grad).all()


def test_bfloat16_times() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.bfloat16)
    out = solve(decay, tensor(1.0), t, step_size=0.25)
    expected = loop(decay, tensor(1.0), torch.linspace(0, 1, 5, dtype=torch.float64))[[0, 1, 2, 4]]
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)


MIXED = ((), (3,), (2, 3), (0,))


def mixed_state(requires_grad: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for shape in MIXED
    )


def mixed_func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scalar, vector, matrix, empty = y
    return torch.sin(vector).sum() * t, matrix[0] * scalar, -matrix + vector, 2 * empty


def flat_func(t: Tensor, y: Tensor) -> Tensor:
    parts = (y[0], y[1:4], y[4:10].view(2, 3), y[10:])
    return torch.cat([part.reshape(-1) for part in mixed_func(t, parts)])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", ["uniform", "irregular"])
def test_tuple_states(name: str, direction: int) -> None:
    nodes = direction * NODES[name]
    y0 = mixed_state(requires_grad=True)
    out = solve(mixed_func, y0, nodes)
    expected = loop(flat_func, torch.cat([part.reshape(-1) for part in y0]), nodes)
    assert isinstance(out, tuple)
    assert [part.shape for part in out] == [(len(nodes), *shape) for shape in MIXED]
    actual = torch.cat([part.reshape(len(nodes), -1) for part in out], dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), y0),
        torch.autograd.grad(expected.square().sum(), y0),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("t_value", [0.0, 7.5])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.1}, {"interp": "cubic"}], ids=str)
def test_a_single_time(options: dict[str, Any], t_value: float) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=True)
    out = solve(field, y0, tensor(t_value), **options)
    assert field.times == []
    assert torch.equal(out, y0[None])
    (grad,) = torch.autograd.grad(out.sum(), y0)
    assert grad.tolist() == [1.0] * 3
    parts = solve(mixed_func, mixed_state(), tensor(t_value), **options)
    assert all(torch.equal(a[0], b) for a, b in zip(parts, mixed_state(), strict=True))


def test_the_result_is_no_view_of_the_initial_state() -> None:
    y0 = tensor(1.0, 2.0)
    for t in (tensor(0.0), tensor(0.0, 1.0)):
        solve(decay, y0, t).zero_()
        assert y0.tolist() == [1.0, 2.0]


def test_func_may_keep_and_change_what_it_returns() -> None:
    """One buffer for all slopes: f must have been used up by the time of the next evaluation."""
    buffer = torch.empty(3, dtype=torch.float64)
    field = Field()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return buffer.copy_(field(t, y))

    y0 = tensor(0.3, -0.8, 1.1)
    with torch.no_grad():
        out = solve(func, y0, NODES["irregular"])
        torch.testing.assert_close(out, loop(field, y0, NODES["irregular"]), rtol=1e-12, atol=1e-12)


def test_no_grad_makes_no_graph() -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1, requires_grad=True)
    t = tensor(0.0, 0.13, 1.0, requires_grad=True)
    with torch.no_grad():
        for options in ({}, {"step_size": 0.1}, {"step_size": 0.1, "interp": "cubic"}, {"grid_constructor": on(t)}):
            out = solve(field, y0, t, **options)
            assert not out.requires_grad
            assert out.grad_fn is None
    with torch.inference_mode():
        out = solve(field, y0, t, step_size=0.1)
    assert out.is_inference()


def test_no_graph_where_nothing_requires_a_gradient() -> None:
    assert not solve(decay, tensor(1.0), tensor(0.0, 1.0), step_size=0.1).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("step_size", [0.1, 0.3])
def test_what_is_not_finite_shows(step_size: float, interp: str, bad: float) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.55, bad, -1.0) * torch.ones_like(y)

    t = tensor(0.0, 0.15, 0.3, 0.9, 1.0)
    out = solve(func, torch.ones(2, dtype=torch.float64), t, step_size=step_size, interp=interp)
    assert torch.isfinite(out[:3]).all()
    assert not torch.isfinite(out[3:]).any()


def test_infinities_keep_their_sign() -> None:
    out = solve(lambda t, y: torch.full_like(y, -math.inf), tensor(1.0), tensor(0.0, 1.0))
    assert out[-1].item() == -math.inf


@pytest.mark.parametrize("t_grad", [False, True])
def test_what_is_not_finite_does_not_go_back_in_time(t_grad: bool) -> None:
    """The state at a node does not depend on f there, whether or not t requires a gradient."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.45, math.nan, -1.0) * y

    out = solve(func, tensor(1.0), tensor(0.0, 0.5, 1.0).requires_grad_(t_grad), step_size=0.1)
    assert torch.isfinite(out[1]).all()
    assert torch.isnan(out[2]).all()


# -------------------------------------------------------------------------------------------------------- callbacks


class WithCallback(nn.Module):
    """x' = -w x, with callbacks that record all that happens."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor(0.5))
        self.log: list[tuple[Any, ...]] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        self.log.append(("func", t.item()))
        return tuple(-self.w * part for part in y) if isinstance(y, tuple) else -self.w * y

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append(("step", t0.item(), y0, dt.item()))

    def callback_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append(("adjoint", t0.item(), y0, dt.item()))


@pytest.mark.parametrize("direction", [1, -1])
def test_callback_before_every_evaluation(direction: int) -> None:
    func, y0 = WithCallback(), tensor(1.0, 2.0)
    nodes = direction * NODES["irregular"]
    x = loop(lambda t, y: -0.5 * y, y0, nodes)
    solve(func, y0, nodes)
    assert [entry[0] for entry in func.log] == ["step", "func"] * (len(nodes) - 1)
    for n, (step, evaluation) in enumerate(zip(func.log[::2], func.log[1::2], strict=True)):
        assert step[1] == evaluation[1] == nodes[n].item()
        torch.testing.assert_close(step[2], x[n])
        # torchdiffeq's dt is positive in both directions.
        assert step[3] == pytest.approx(abs(nodes[n + 1] - nodes[n]).item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.25}, {"step_size": 0.3, "interp": "cubic"}], ids=str)
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_callbacks_as_eulers(is_tuple: bool, direction: int, options: dict[str, Any]) -> None:
    """The same calls, with the same times and steps, as torchdiffeq's own method makes."""
    y0 = (tensor(1.0), torch.ones(2, 2, dtype=torch.float64)) if is_tuple else tensor(1.0, 2.0)
    t = direction * tensor(0.0, 0.5, 1.0)
    logs = {}
    for method in ("euler", "leapfrog"):
        func = WithCallback()
        torchdiffeq.odeint(func, y0, t, method=method, options=options or None)
        logs[method] = [entry for entry in func.log if entry[0] == "step"]
    assert len(logs["leapfrog"]) == len(logs["euler"])
    for ours, theirs in zip(logs["leapfrog"], logs["euler"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=1e-12)
        assert ours[3] == pytest.approx(theirs[3], abs=1e-12)
        assert isinstance(ours[2], tuple) == is_tuple
        if is_tuple:
            assert [part.shape for part in ours[2]] == [part.shape for part in theirs[2]]
    first = logs["leapfrog"][0][2]
    assert all(torch.equal(a, b) for a, b in zip(first, y0, strict=True))


def test_adjoint_callback() -> None:
    func = WithCallback()
    t = tensor(0.0, 0.5, 1.0)
    out = torchdiffeq.odeint_adjoint(func, tensor(1.0, 2.0), t, method="leapfrog", options={"step_size": 0.25})
    assert [entry[0] for entry in func.log] == ["step", "func"] * 4
    func.log.clear()
    out[-1].sum().backward()
    steps = [entry for entry in func.log if entry[0] == "adjoint"]
    assert [entry[1] for entry in steps] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [entry[3] for entry in steps] == pytest.approx([0.25] * 4)
    assert all(isinstance(entry[2], tuple) for entry in steps)
    assert not [entry for entry in func.log if entry[0] == "step"]


def test_callbacks_that_fixed_steps_do_not_have_are_warned_of() -> None:
    func = WithCallback()
    func.callback_accept_step = lambda t0, y0, dt: None
    with pytest.warns(UserWarning, match="does not support callbacks .*callback_accept_step"):
        solve(func, tensor(1.0), tensor(0.0, 1.0))


# ---------------------------------------------------------------------------------------------------------- perturb


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_evaluates_on_the_inner_side_of_nodes(dtype: torch.dtype, direction: int) -> None:
    times: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        times.append(t)
        return -y

    t = direction * torch.tensor([0.0, 0.25, 0.5, 1.0])
    solve(func, torch.ones(2, dtype=dtype), t, perturb=True)
    inward = torch.tensor([direction * 9.0], dtype=dtype)
    assert [s.item() for s in times] == torch.nextafter(t[:-1].to(dtype), inward.expand(3)).tolist()
    assert all(s.dtype is dtype for s in times)


@pytest.mark.parametrize("direction", [1, -1])
def test_perturb_at_a_jump(direction: int) -> None:
    """f jumps at a node. Beside the node f takes the value of the step that begins there, exactly at it another one."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        later, at = direction * t > 0.5, t == direction * 0.5
        return direction * torch.where(at, 100.0, torch.where(later, 3.0, 1.0)) * torch.ones_like(y)

    nodes = direction * torch.linspace(0, 1, 5, dtype=torch.float64)
    slopes = [1.0, 1.0, 3.0, 3.0]
    expected = loop(lambda t, y: direction * slopes[round(4 * abs(t.item()))] * torch.ones_like(y), tensor(0.0), nodes)
    torch.testing.assert_close(solve(func, tensor(0.0), nodes, perturb=True), expected)
    slopes[2] = 100.0
    expected = loop(lambda t, y: direction * slopes[round(4 * abs(t.item()))] * torch.ones_like(y), tensor(0.0), nodes)
    torch.testing.assert_close(solve(func, tensor(0.0), nodes), expected)


@pytest.mark.parametrize("direction", [1, -1])
def test_perturb_takes_the_end_of_a_cubic_from_the_left(direction: int) -> None:
    times: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        times.append(t.item())
        return torch.ones_like(y)

    solve(func, tensor(0.0), direction * tensor(0.0, 0.3, 1.0), step_size=0.25, interp="cubic", perturb=True)
    begin = [math.nextafter(direction * s, direction * 9) for s in (0.0, 0.25, 0.5, 0.75)]
    end = math.nextafter(direction * 0.5, 0)
    assert sorted(times, key=abs) == sorted([*begin, end], key=abs)


# ----------------------------------------------------------------------------------------------------------- events

GRAVITY = 9.81


class Fall(nn.Module):
    """Free fall; the state is (height, velocity), as one tensor or as a tuple."""

    def __init__(self, is_tuple: bool = False) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(GRAVITY, dtype=torch.float64))
        self.is_tuple = is_tuple

    def forward(self, t: Tensor, y: Any) -> Any:
        velocity = y[1]
        slopes = velocity, -self.gravity.expand(velocity.shape)
        return slopes if self.is_tuple else torch.stack(slopes)

    def ground(self, t: Tensor, y: Any) -> Tensor:
        return y[0]


def landing(height: Tensor, velocity: Tensor, gravity: Tensor, backwards: bool) -> Tensor:
    """How long after the start the height is 0; negative where `backwards`."""
    root = torch.sqrt(velocity**2 + 2 * gravity * height)
    return (velocity - root if backwards else velocity + root) / gravity


@pytest.mark.parametrize("interface", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("backwards", [False, True])
def test_event_and_its_gradients(backwards: bool, interp: str, is_tuple: bool, interface: Any) -> None:
    fall = Fall(is_tuple)
    height, velocity = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.6))
    t0 = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y0 = (height, velocity) if is_tuple else torch.stack([height, velocity])
    event_t, solution = torchdiffeq.odeint_event(
        fall,
        y0,
        t0,
        event_fn=fall.ground,
        reverse_time=backwards,
        odeint_interface=interface,
        method="leapfrog",
        options={"step_size": 0.0005, "interp": interp},
    )
    expected = t0 + landing(height, velocity, fall.gravity, backwards)
    torch.testing.assert_close(event_t, expected, rtol=1e-4, atol=1e-4)
    inputs = (height, velocity, fall.gravity, t0)
    torch.testing.assert_close(
        torch.autograd.grad(event_t, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs, retain_graph=True),
        rtol=1e-2,
        atol=1e-2,
    )
    final_height, final_velocity = (solution[0][-1], solution[1][-1]) if is_tuple else solution[-1]
    duration = expected - t0
    torch.testing.assert_close(final_height.item(), 0.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(final_velocity, velocity - fall.gravity * duration, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.autograd.grad(final_velocity, inputs, allow_unused=True, materialize_grads=True, retain_graph=True),
        torch.autograd.grad(
            velocity - fall.gravity * duration, inputs, allow_unused=True, materialize_grads=True, retain_graph=True
        ),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("interp", INTERPS)
@pytest.mark.parametrize("backwards", [False, True])
def test_event_times_are_of_second_order(backwards: bool, interp: str) -> None:
    fall = Fall()
    expected = landing(tensor(1.7), tensor(0.6), tensor(GRAVITY), backwards).item()
    for step_size in (0.04, 0.02, 0.01, 0.005):
        t = tensor(0.0, -1.0 if backwards else 1.0)
        event_t, _ = solve(fall, tensor(1.7, 0.6), t, fall.ground, step_size=step_size, interp=interp)
        # A multiple of the square, no order between neighbours: how the event lies to the nodes plays a part.
        assert event_t.item() == pytest.approx(expected, abs=step_size**2)


@pytest.mark.parametrize("direction", [1, -1])
def test_event_time_with_time_in_func_and_event(direction: int) -> None:
    """x' = 2 t from t0, until x = t² + c: the event function sees the user's time."""
    t0 = torch.tensor(direction * 0.5, dtype=torch.float64)

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        return direction * t - 1.234 + 0 * y[0]

    event_t, solution = torchdiffeq.odeint_event(
        lambda t, y: 2 * t + 0 * y,
        tensor(0.25),
        t0,
        event_fn=event_fn,
        reverse_time=direction < 0,
        method="leapfrog",
        options={"step_size": 0.001, "interp": "cubic"},
    )
    assert event_t.item() == pytest.approx(direction * 1.234, abs=1e-8)
    assert solution[-1].item() == pytest.approx(1.234**2, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_dtypes_of_events(dtype: torch.dtype) -> None:
    event_t, solution = solve(
        lambda t, y: -torch.ones_like(y),
        torch.ones(2, dtype=dtype),
        torch.tensor([0.0, 1.0]),
        lambda t, y: y[0].real - 0.33,
        step_size=0.1,
    )
    assert event_t.dtype is torch.float32
    assert event_t.item() == pytest.approx(0.67, abs=1e-5)
    assert solution.dtype is dtype
    assert solution.shape == (2, 2)


def test_an_event_in_the_first_step() -> None:
    event_t, solution = solve(
        lambda t, y: -torch.ones_like(y),
        tensor(1.0, requires_grad=True),
        tensor(0.0, 1.0),
        lambda t, y: y[0] - 0.75,
        step_size=1.0,
        interp="cubic",
    )
    assert event_t.item() == pytest.approx(0.25, abs=1e-8)
    assert solution[:, 0].tolist() == pytest.approx([1.0, 0.75], abs=1e-8)


def test_no_event() -> None:
    with pytest.raises(RuntimeError, match=r"event_fn did not change its sign within 20000 steps of step_size 0.1"):
        solve(lambda t, y: 0 * y, tensor(1.0), tensor(0.0, 1.0), lambda t, y: y[0], step_size=0.1)


def test_an_event_needs_a_step_size() -> None:
    with pytest.raises(ValueError, match=r"step_size must be given .*event_fn.*None"):
        solve(decay, tensor(1.0), tensor(0.0, 1.0), lambda t, y: y[0] + 1)


def test_an_event_takes_the_smallest_of_the_tolerances_of_a_tuple() -> None:
    event_t, _ = torchdiffeq.odeint(
        lambda t, y: (torch.ones_like(y[0]), torch.ones_like(y[1])),
        (tensor(0.0), tensor(0.0)),
        tensor(0.0, 1.0),
        atol=(1e-2, 1e-9),
        method="leapfrog",
        options={"step_size": 0.25},
        event_fn=lambda t, y: y[0].sum() - 0.6,
    )
    assert float(event_t) == pytest.approx(0.6, abs=2e-9)


def test_an_event_needs_finite_times() -> None:
    with pytest.raises(ValueError, match="t must be finite, got"):
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(-math.inf, 1.0),
            method="leapfrog",
            options={"step_size": 0.25},
            event_fn=lambda t, y: y.sum() - 0.6,
        )


def test_an_event_needs_a_positive_tolerance() -> None:
    with pytest.raises(ValueError, match=r"atol must be positive .*event_fn.* 0\.0"):
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(0.0, 1.0),
            method="leapfrog",
            atol=0.0,
            options={"step_size": 0.1},
            event_fn=lambda t, y: y[0] - 0.7,
        )


# --------------------------------------------------------------------------------------------------- odeint_adjoint


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("method", ["leapfrog", "rk4"])
def test_odeint_adjoint_is_of_second_order(method: str, direction: int, is_tuple: bool) -> None:
    """Gradients with respect to y0, parameters and t, against those of a fine solve by another method."""
    field = Field()
    func: Any = field
    if is_tuple:
        func = nn.Module()
        func.add_module("field", field)
        func.forward = lambda t, y: tuple(field(t, torch.cat(y)).split([2, 1]))
    start = tensor(0.3, -0.8, 1.1)

    def gradients(interface: Any, **keywords: Any) -> Tensor:
        y0 = start.clone().requires_grad_()
        t = (direction * tensor(0.0, 0.5, 1.0)).requires_grad_()
        out = interface(func, tuple(y0.split([2, 1])) if is_tuple else y0, t, **keywords)
        out = torch.cat(out, dim=-1) if is_tuple else out
        grads = torch.autograd.grad((out**2).sum() + out[1].prod(), (y0, t, field.weight, field.bias))
        return torch.cat([grad.reshape(-1) for grad in grads])

    expected = gradients(torchdiffeq.odeint, method="dopri5", rtol=1e-9, atol=1e-10)
    errors = []
    for step_size in (1 / 16, 1 / 32, 1 / 64):
        actual = gradients(
            torchdiffeq.odeint_adjoint,
            method=method,
            options={"step_size": step_size},
            adjoint_method="leapfrog",
            adjoint_options={"step_size": step_size},
        )
        errors.append((actual - expected).abs().max().item())
    assert errors[-1] < 1e-2
    assert np.mean(orders(errors)) > 1.7


class Decay(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.w * y


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_odeint_adjoint_in_other_dtypes(dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """The precision of the parameter beside that of the state: torchdiffeq's augmented state mixes the two."""
    func = Decay(w_dtype.to_complex() if dtype.is_complex else w_dtype)
    y0 = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    out = torchdiffeq.odeint_adjoint(func, y0, torch.tensor([0.0, 1.0]), method="leapfrog", options={"step_size": 0.01})
    assert out.dtype is dtype
    grads = torch.autograd.grad(out[-1].abs().square().sum(), (y0, func.w))
    assert grads[1].dtype is func.w.dtype
    factor = math.exp(-0.5)
    torch.testing.assert_close(out[-1], y0 * factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads[0], 2 * y0 * factor**2, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grads[1], torch.full_like(func.w, -10 * factor**2), rtol=2e-3, atol=2e-3)


# -------------------------------------------------------------------------------------------------------- gradcheck


def curved(func: Any, y0: Any, t: Tensor) -> Tensor:
    """A grid that moves with t, with steps that grow."""
    return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 7, dtype=t.dtype) ** 1.5


def small_field(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.tanh(weight * y.flip(0)) + t * y.conj() * weight[0]


# A truncated last step, so that the number of steps does not jump. Outputs on nodes lie between equal steps, where the
# broken line of linear interpolation has f as the mean of its two slopes.
GRADCHECKS: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "t is the grid": ((0.1, 0.2, 0.5, 0.55, 1.0), {}),
    "t is the grid, uniform": ((0.0, 0.25, 0.5, 0.75, 1.0), {}),
    "one step": ((0.1, 0.8), {}),
    "on nodes, linear": ((0.1, 0.3, 0.5, 0.95), {"step_size": 0.1}),
    "on nodes, cubic": ((0.1, 0.3, 0.5, 0.95), {"step_size": 0.1, "interp": "cubic"}),
    "between nodes, linear": ((0.1, 0.37, 0.44, 0.46, 0.93, 0.95), {"step_size": 0.1}),
    "between nodes, cubic": ((0.1, 0.37, 0.44, 0.46, 0.93, 0.95), {"step_size": 0.1, "interp": "cubic"}),
    "constructed": ((0.1, 0.83, 1.0), {"grid_constructor": curved}),
    "constructed, cubic": ((0.1, 0.4, 0.83, 1.0), {"grid_constructor": curved, "interp": "cubic"}),
    "perturbed": ((0.1, 0.37, 0.95), {"step_size": 0.1, "interp": "cubic", "perturb": True}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name: str, direction: int, dtype: torch.dtype) -> None:
    times, options = GRADCHECKS[name]
    generator = torch.Generator().manual_seed(0)
    y0, weight = (torch.randn(2, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    t = (direction * tensor(*times)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y0, weight, t: solve(small_field(weight), y0, t, **options), (y0, weight, t), eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["t is the grid", "on nodes, linear", "between nodes, cubic", "constructed"])
def test_gradcheck_of_a_tuple(name: str) -> None:
    times, options = GRADCHECKS[name]
    a, b = tensor(0.4, -0.3, requires_grad=True), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.sin(y[0] * y[1]) * t, y[0].sum() - y[1] ** 2

    assert torch.autograd.gradcheck(
        lambda a, b, t: solve(func, (a, b), t, **options), (a, b, tensor(*times, requires_grad=True)), atol=1e-6
    )


@pytest.mark.parametrize("name", ["t is the grid", "between nodes, linear", "between nodes, cubic", "constructed"])
@pytest.mark.parametrize("direction", [1, -1])
def test_gradgradcheck(direction: int, name: str) -> None:
    times, options = GRADCHECKS[name]
    y0, weight = tensor(0.4, -0.3, requires_grad=True), tensor(0.8, 1.2, requires_grad=True)
    t = (direction * tensor(*times)).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda y0, weight, t: solve(small_field(weight), y0, t, **options), (y0, weight, t), atol=1e-5
    )


@pytest.mark.parametrize("interp", INTERPS)
def test_the_value_does_not_depend_on_whether_t_requires_a_gradient(interp: str) -> None:
    field, y0 = Field(), tensor(0.3, -0.8, 1.1)
    for t in (tensor(0.0, 0.1, 0.2, 0.47, 1.05), torch.tensor([0.0, 0.1, 0.2, 0.47, 1.05])):
        for options in ({}, {"step_size": 0.1}, {"grid_constructor": curved}):
            plain = solve(field, y0, t, interp=interp, **options)
            differentiable = solve(field, y0, t.clone().requires_grad_(), interp=interp, **options)
            torch.testing.assert_close(differentiable, plain, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_output_time_is_the_slope() -> None:
    """Moving an output inside the solve moves it along the interpolation; at a node, along f."""
    t = tensor(0.0, 0.3, 0.42, 1.05, requires_grad=True)
    out = solve(lambda t, y: torch.cos(t) + 0 * y, tensor(0.0), t, step_size=0.1)
    x = loop(lambda t, y: torch.cos(t) + 0 * y, tensor(0.0), torch.linspace(0, 0.5, 6, dtype=torch.float64))[:, 0]
    (at_node,) = torch.autograd.grad(out[1, 0], t, retain_graph=True)
    assert at_node[1].item() == pytest.approx(math.cos(0.3), rel=1e-12)
    (between,) = torch.autograd.grad(out[2, 0], t)
    assert between[2].item() == pytest.approx(((x[5] - x[4]) / 0.1).item(), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- bad input


def refuses(func: Any, y0: Any, t: Tensor, **options: Any) -> tuple[Exception, int]:
    """The exception that a solve raises, and how often func was evaluated before."""
    count = 0

    def counted(t: Tensor, y: Any) -> Any:
        nonlocal count
        count += 1
        return func(t, y)

    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        solve(counted, y0, t, **options)
    return error.value, count


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"step_size": 0.0}, ValueError, ("step_size", "0.0", "positive")),
        ({"step_size": -0.1}, ValueError, ("step_size", "-0.1", "positive", "decreasing")),
        ({"step_size": math.nan}, ValueError, ("step_size", "nan", "finite")),
        ({"step_size": math.inf}, ValueError, ("step_size", "inf", "finite")),
        ({"step_size": "0.1"}, TypeError, ("step_size", "'0.1'", "number")),
        ({"step_size": True}, TypeError, ("step_size", "True", "number")),
        ({"step_size": [0.1]}, TypeError, ("step_size", "[0.1]", "number")),
        ({"step_size": torch.ones(2)}, TypeError, ("step_size", "tensor([1., 1.])", "number")),
        ({"step_size": 1e-8}, ValueError, ("step_size", "1e-08", "10000000")),
        ({"step_size": 0.1, "grid_constructor": curved}, ValueError, ("step_size", "grid_constructor", "exclusive")),
        ({"grid_constructor": on(tensor(0.0, 0.5, 0.5, 1.0))}, ValueError, ("grid_constructor", "0.5", "monotonic")),
        ({"grid_constructor": on(tensor(0.0, 0.5))}, ValueError, ("grid_constructor", "0.5", "t[-1]")),
        ({"grid_constructor": on(tensor(0.5, 1.0))}, ValueError, ("grid_constructor", "0.5", "t[0]")),
        ({"grid_constructor": on(tensor(0.0, math.inf))}, ValueError, ("grid_constructor", "inf")),
        ({"grid_constructor": on(tensor(0.0, math.nan, 1.0))}, ValueError, ("grid_constructor", "nan")),
        ({"interp": "quadratic"}, ValueError, ("interp", "'quadratic'", "cubic")),
        ({"grad_filter": "midpoint"}, ValueError, ("grad_filter", "'midpoint'", "leapfrog")),
        ({"grad_filter": 3}, TypeError, ("grad_filter", "3", "leapfrog")),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    error, count = refuses(decay, tensor(1.0), tensor(0.0, 1.0), **options)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    assert count == 0


@pytest.mark.parametrize("made", [None, [0.0, 1.0], 3.0])
@pytest.mark.parametrize("direction", [1, -1])
def test_a_grid_constructor_that_returns_no_tensor(direction: int, made: Any) -> None:
    error, count = refuses(decay, tensor(1.0), direction * tensor(0.0, 1.0), grid_constructor=lambda func, y0, t: made)
    assert isinstance(error, TypeError)
    assert "grid_constructor must return a floating-point tensor of times" in str(error)
    assert type(made).__name__ in str(error)
    assert count == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_integer_states(is_tuple: bool, dtype: torch.dtype) -> None:
    y0 = torch.ones(2, dtype=dtype)
    error, count = refuses(decay, (y0, y0) if is_tuple else y0, tensor(0.0, 1.0))
    assert isinstance(error, TypeError)
    assert "y0" in str(error)
    assert str(dtype) in str(error)
    assert "float" in str(error)
    assert count == 0


def test_empty_times() -> None:
    error, count = refuses(decay, tensor(1.0), tensor())
    assert isinstance(error, ValueError)
    assert "t must" in str(error)
    assert "empty" in str(error)
    assert count == 0


@pytest.mark.parametrize("times", [(0.0, math.inf), (-math.inf, 0.0), (math.nan,), (0.0, -math.inf)])
def test_times_that_are_not_finite(times: tuple[float, ...]) -> None:
    error, count = refuses(decay, tensor(1.0), tensor(*times))
    assert isinstance(error, ValueError)
    assert "t must be finite" in str(error)
    assert count == 0


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (lambda y: y[:1], ValueError, ("func", "(1,)", "(2,)")),
        (lambda y: y[None], ValueError, ("func", "(1, 2)", "(2,)")),
        (lambda y: y.sum(), ValueError, ("func", "()", "(2,)")),
        (lambda y: y.float(), TypeError, ("func", "float32", "float64")),
        (lambda y: y + 0j, TypeError, ("func", "complex128", "float64")),
        (lambda y: y.to("meta"), ValueError, ("func", "meta", "cpu")),
        (lambda y: y.tolist(), TypeError, ("func", "list", "tensor")),
        (lambda y: (y,), TypeError, ("func", "tuple", "tensor")),
        (lambda y: None, TypeError, ("func", "NoneType", "tensor")),
    ],
)
@pytest.mark.parametrize("grad_filter", [None, "leapfrog"])
def test_bad_answers_of_func(
    grad_filter: str | None, bad: Callable[[Tensor], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    error, count = refuses(lambda t, y: bad(y), tensor(1.0, 2.0), tensor(0.0, 1.0, 2.0), grad_filter=grad_filter)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    # Before any step is taken.
    assert count == 1


def test_a_filter_for_another_method() -> None:
    for method in ("rk4", "dopri5", None):
        with pytest.raises(ValueError, match=rf"grad_filter .*'leapfrog'.*{method or 'dopri5'}"):
            torchdiffeq_lmm.odeint(decay, tensor(1.0), tensor(0.0, 1.0), method=method, grad_filter="leapfrog")


def test_unknown_options_are_warned_of_in_torchdiffeqs_words() -> None:
    t = tensor(0.0, 1.0)
    with pytest.warns(UserWarning, match=r"Leapfrog: Unexpected arguments \{'stepsize': 0.1, 'first': 2\}") as record:
        out = solve(decay, tensor(1.0), t, stepsize=0.1, first=2)
    assert len(record) == 1
    assert torch.equal(out, solve(decay, tensor(1.0), t))


def test_known_options_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(0.0, 1.0),
            rtol=1e-3,
            atol=1e-4,
            method="leapfrog",
            options={"step_size": 0.5, "interp": "cubic", "perturb": True, "norm": torch.linalg.norm},
        )
