"""The filtered backward pass: for any callable, exact where it must be, and a good citizen of autograd."""

import gc
import os
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import LeapfrogFilter

NODES = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.8, 1.0], dtype=torch.float64)
OBSERVED = torch.tensor([0.0, 0.3, 0.72, 1.0], dtype=torch.float64)
ON_NODES = {"grid_constructor": lambda func, y0, t: NODES.to(t)}
DIM = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(
    func: Callable, y0: Tensor, t: Tensor = OBSERVED, grad_filter: object = "leapfrog", **options: object
) -> Tensor:
    options = {**ON_NODES, **options}
    return torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, grad_filter=grad_filter)


def loss(states: Tensor) -> Tensor:
    return (states * draw(*states.shape, seed=9).to(states)).sum()


class Tanh(nn.Module):
    """A module with shared weights, a parameter that it does not use, and time in its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, 5, dtype=torch.float64)
        self.outer = nn.Linear(5, DIM, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)) * torch.cos(3 * t))


def index_of(t: Tensor) -> int:
    return int((NODES - t).abs().argmin())


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


class TestGoodCitizen:
    def test_hooks_see_the_whole_gradient_once(self) -> None:
        func = Tanh()
        seen: dict[str, list[Tensor]] = {"before": [], "after": []}
        func.inner.weight.register_hook(lambda grad: seen["before"].append(grad.clone()))
        func.inner.weight.register_post_accumulate_grad_hook(lambda p: seen["after"].append(p.grad.clone()))
        loss(solve(func, draw(2, DIM))).backward()
        assert [len(calls) for calls in seen.values()] == [1, 1]
        assert torch.equal(seen["before"][0], func.inner.weight.grad)
        assert torch.equal(seen["after"][0], func.inner.weight.grad)

    def test_gradients_accumulate(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        loss(solve(func, y0)).backward()
        once = func.outer.weight.grad.clone()
        loss(solve(func, y0)).backward()
        torch.testing.assert_close(func.outer.weight.grad, 2 * once)

    def test_frozen_and_unused_parameters_get_none(self) -> None:
        func = Tanh()
        func.inner.requires_grad_(False)
        loss(solve(func, draw(2, DIM))).backward()
        assert func.inner.weight.grad is None
        assert func.unused.grad is None
        free = Tanh()
        loss(solve(free, draw(2, DIM))).backward()
        assert torch.equal(func.outer.weight.grad, free.outer.weight.grad)

    @pytest.mark.parametrize("grad_filter", [None, "leapfrog"])
    def test_requires_a_gradient_only_where_something_does(self, grad_filter: object) -> None:
        func = Tanh().requires_grad_(False)
        assert not solve(func, draw(2, DIM), grad_filter=grad_filter).requires_grad
        assert solve(func, draw(2, DIM).requires_grad_(), grad_filter=grad_filter).requires_grad
        assert solve(func, draw(2, DIM), OBSERVED.clone().requires_grad_(), grad_filter=grad_filter).requires_grad
        func.outer.bias.requires_grad_()
        assert solve(func, draw(2, DIM), grad_filter=grad_filter).requires_grad

    def test_only_late_steps_have_parameters(self) -> None:
        theta = draw(DIM).requires_grad_()
        states = solve(lambda t, y: -y + theta if t > 0.45 else -y, draw(DIM))
        theta_everywhere = draw(len(NODES), DIM)
        theta_everywhere[:] = torch.where(NODES > 0.45, 1.0, 0.0)[:, None] * theta.detach()
        theta_everywhere.requires_grad_()
        everywhere = solve(lambda t, y: -y + theta_everywhere[index_of(t)], draw(DIM))
        (gradient,) = torch.autograd.grad(loss(states), theta)
        (gradients,) = torch.autograd.grad(loss(everywhere), theta_everywhere)
        torch.testing.assert_close(gradient, gradients[NODES > 0.45].sum(0))

    def test_autograd_grad_of_chosen_inputs(self) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        states = solve(func, y0)
        everything = torch.autograd.grad(loss(states), (y0, func.inner.weight), retain_graph=True)
        for chosen, wanted in zip((y0, func.inner.weight), everything, strict=True):
            assert torch.equal(torch.autograd.grad(loss(states), chosen, retain_graph=True)[0], wanted)
        assert func.inner.weight.grad is None
        loss(states).backward(inputs=[func.inner.weight])
        assert torch.equal(func.inner.weight.grad, everything[1])
        assert func.outer.weight.grad is None

    def test_backward_again_needs_retain_graph(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        states = solve(func, y0)
        loss(states).backward(retain_graph=True)
        once = func.outer.weight.grad.clone()
        loss(states).backward()
        torch.testing.assert_close(func.outer.weight.grad, 2 * once)
        with pytest.raises(RuntimeError, match="second time"):
            loss(states).backward()

    def test_no_grad_and_inference_mode(self) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        wanted = solve(func, y0).detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                states = solve(func, y0, OBSERVED.clone().requires_grad_())
            assert not states.requires_grad
            torch.testing.assert_close(states.clone(), wanted)

    @pytest.mark.parametrize("wrt", ["y0", "parameters"])
    def test_second_derivatives_are_refused(self, wrt: str) -> None:
        func, y0 = Tanh(), draw(2, DIM).requires_grad_()
        inputs = y0 if wrt == "y0" else func.inner.weight
        with pytest.raises(RuntimeError, match="grad_filter does not support create_graph=True"):
            torch.autograd.grad(loss(solve(func, y0)), inputs, create_graph=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_transforms_are_refused(self) -> None:
        func, y0 = Tanh(), draw(2, DIM)
        with pytest.raises(RuntimeError):
            torch.func.grad(lambda y: loss(solve(func, y)))(y0)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(lambda y: solve(func, y), (y0,), (y0,))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    @pytest.mark.parametrize("dual", ["y0", "parameter", "t"])
    def test_forward_mode_is_refused(self, dual: str) -> None:
        values = {"y0": draw(DIM), "parameter": draw(DIM), "t": OBSERVED.clone()}
        with torch.autograd.forward_ad.dual_level():
            values[dual] = torch.autograd.forward_ad.make_dual(values[dual], torch.ones_like(values[dual]))
            with pytest.raises(RuntimeError, match="grad_filter does not support forward-mode"):
                solve(lambda t, y: y * values["parameter"] * t, values["y0"], values["t"])

    def test_gradcheck_for_y0_and_t(self) -> None:
        func = Tanh()
        inputs = (draw(DIM).requires_grad_(), OBSERVED.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda y0, t: solve(func, y0, t, step_size=0.13, grid_constructor=None), inputs)

    def test_autocast(self) -> None:
        net = nn.Linear(DIM, DIM)
        gradients = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                states = solve(lambda t, y: net(y), draw(2, DIM).float(), OBSERVED.float())
            assert states.dtype is torch.float32
            gradients += torch.autograd.grad(states.sum(), net.weight)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=0.1)

    def test_parameters_of_another_dtype(self) -> None:
        weight = draw(DIM, DIM).float().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ weight.double()), draw(DIM))).backward()
        assert weight.grad.dtype is torch.float32
        wide = weight.detach().double().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ wide), draw(DIM))).backward()
        torch.testing.assert_close(weight.grad, wide.grad.float())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_parameters_on_another_device(self) -> None:
        weight = draw(DIM, DIM).requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ weight.cuda()), draw(DIM).cuda(), OBSERVED.cuda())).backward()
        here = weight.detach().clone().requires_grad_()
        loss(solve(lambda t, y: torch.tanh(y @ here), draw(DIM))).backward()
        torch.testing.assert_close(weight.grad, here.grad)

    @pytest.mark.parametrize(
        "func",
        [lambda t, y: y, lambda t, y: y.view_as(y), lambda t, y: torch.ones_like(y), lambda t, y: y.detach() * 2],
        ids=["identity", "view", "constant", "detached"],
    )
    def test_functions_without_parameters(self, func: Callable) -> None:
        gradients = []
        for grad_filter in (None, "leapfrog"):
            y0 = draw(2, DIM).requires_grad_()
            gradients += torch.autograd.grad(loss(solve(func, y0, grad_filter=grad_filter)), y0)
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
    def test_dtypes_and_shapes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        gradients = []
        for each in (dtype, wide):
            theta = torch.ones(shape, dtype=each).mul(0.5).requires_grad_()
            y0 = (draw(*shape).to(wide) * (1 + 0.3j if wide.is_complex else 1)).to(each)
            states = solve(lambda t, y: theta * torch.sin(y), y0)
            assert (states.shape, states.dtype) == ((len(OBSERVED), *shape), each)
            # The cotangent is the same number in every dtype.
            states.backward(torch.ones_like(states))
            gradients.append(theta.grad)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradients[0].to(wide), gradients[1], rtol=30 * eps, atol=30 * eps)

    def test_nan_is_not_hidden(self) -> None:
        theta = torch.zeros(len(NODES), dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            n = index_of(t)
            return -y + theta[n] * (torch.inf if n == 4 else 1.0)

        states = solve(func, draw(DIM))
        assert states[:2].isfinite().all()
        assert states[2:].isnan().all()
        loss(states).backward()
        assert not theta.grad[4].isfinite()

    def test_a_callback_sees_every_state(self) -> None:
        class WithCallback(Tanh):
            def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
                seen.append((float(t0), y0.clone(), float(dt), y0.requires_grad))

        seen: list[tuple] = []
        solve(WithCallback(), draw(2, DIM), grad_filter=None)
        plain, seen = seen, []
        solve(WithCallback(), draw(2, DIM))
        assert len(plain) == len(seen) == len(NODES) - 1
        for a, b in zip(plain, seen, strict=True):
            assert a[0] == b[0]
            assert a[2] == b[2]
            assert torch.equal(a[1], b[1])
            assert not b[3]


class Marked(torch.autograd.Function):
    """The identity; tells of the life of the graph that it is in."""

    class Mark:
        pass

    @staticmethod
    def forward(ctx: object, y: Tensor, alive: list[weakref.ref]) -> Tensor:
        ctx.mark = Marked.Mark()
        alive.append(weakref.ref(ctx.mark))
        return y.clone()

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


def test_many_steps() -> None:
    """Beyond Python's limit of recursion, in the forward pass, the backward pass and the end of the graph."""
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones((), dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    states = solve(lambda t, y: -rate * y, y0, t, LeapfrogFilter("trapezoid"), step_size=1e-4, grid_constructor=None)
    states[-1].backward()
    # y(1) = exp(-rate)
    torch.testing.assert_close(rate.grad, -torch.exp(-rate.detach()), rtol=1e-7, atol=0)


class TestMemory:
    @staticmethod
    def bytes_saved(func: Callable, y0: Tensor, grad_filter: object) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solve(func, y0, NODES, grad_filter)
        return total

    def test_saves_no_more_than_autograd_and_the_states(self) -> None:
        func, y0 = Tanh(), draw(50, DIM).requires_grad_()
        states = len(NODES) * y0.numel() * y0.element_size()
        plain = self.bytes_saved(func, y0, None)
        assert plain > states
        assert self.bytes_saved(func, y0, "leapfrog") <= plain + states

    def test_the_tape_holds_no_states_and_no_slopes(self) -> None:
        """What f itself does not save is gone as soon as the solver is through with it."""
        theta = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
        alive: list[weakref.ref] = []
        most = 0

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal most
            slope = y + theta
            alive.extend((weakref.ref(y), weakref.ref(slope)))
            most = max(most, sum(reference() is not None for reference in alive))
            return slope

        states = solve(func, draw(DIM), step_size=0.01, grid_constructor=None)
        assert len(alive) == 200
        assert most <= 4
        loss(states).backward()
        assert theta.grad.isfinite().all()

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("times_require_grad", [False, True])
    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_nothing_survives_the_last_reference(self, backward: bool, times_require_grad: bool, interp: str) -> None:
        alive: list[weakref.ref] = []

        class SolvesItself(Tanh):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                slope = Marked.apply(super().forward(t, y), alive)
                alive.extend((weakref.ref(y), weakref.ref(slope)))
                return slope

            def solve(self, y0: Tensor, t: Tensor) -> Tensor:
                self.states = solve(self, y0, t, interp=interp)
                return self.states

        gc.collect()
        gc.disable()
        try:
            func = SolvesItself()
            y0 = draw(2, DIM).requires_grad_()
            t = OBSERVED.clone().requires_grad_(times_require_grad)
            states = func.solve(y0, t)
            alive.append(weakref.ref(states))
            if backward:
                loss(states).backward()
            del states
            assert any(reference() is not None for reference in alive)
            del func.states
            assert not [reference() for reference in alive if reference() is not None]
            gone = weakref.ref(func)
            del func
            assert gone() is None
        finally:
            gc.enable()

    def test_backward_frees_the_states_while_the_solution_lives(self) -> None:
        seen: list[weakref.ref] = []

        class Watched(Tanh):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                seen.append(weakref.ref(y))
                return super().forward(t, y)

        states = solve(Watched(), draw(2, DIM))
        loss(states).backward()
        assert not [reference() for reference in seen if reference() is not None]
        assert states.grad_fn is not None


class DataParallelModel(nn.Module):
    """A model whose forward pass is a filtered solve."""

    def __init__(self) -> None:
        super().__init__()
        self.func = Tanh()
        del self.func.unused

    def forward(self, y0: Tensor) -> Tensor:
        return solve(self.func, y0)[-1]


def train_in_process(rank: int, path: str, batch: Tensor, results: str) -> None:
    # The processes meet in a file, so that no port is needed.
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(DataParallelModel())
    model(batch.chunk(2)[rank]).square().mean().backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_data_parallel_training_gives_the_gradient_of_one_process(tmp_path: os.PathLike) -> None:
    batch = draw(8, DIM)
    arguments = (str(tmp_path / "rendezvous"), batch, str(tmp_path / "gradients"))
    torch.multiprocessing.spawn(train_in_process, args=arguments, nprocs=2)
    alone = DataParallelModel()
    alone(batch).square().mean().backward()
    for rank in range(2):
        gradients = torch.load(f"{tmp_path / 'gradients'}.{rank}", weights_only=True)
        for gradient, parameter in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
