"""What compiled solves ask of func: what they notice, what they refuse, when they compile, what they hold."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, Field, assert_same, compiling, solved, start
from methods import slow_but
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdiffeq_lmm
from torchdiffeq_lmm import Compile
from torchdiffeq_lmm.autodiff import block_schedule
from torchdiffeq_lmm.schemes.block_rows import Block, blocks_of

pytestmark = NEEDS_TORCH


@pytest.mark.slow
def test_it_is_compiled_once_for_all_steps_times_values_and_batches() -> None:
    class Own(Field):
        """Of no other test, which would have left compiled functions."""

    func = Own()

    def check(batch: int, t: Tensor, step_size: float) -> None:
        keywords = {"options": {"step_size": step_size}}
        compiled = solved(func, start(batch), t, "ab2", compile=TRACED, **keywords)
        assert_same(compiled, solved(func, start(batch), t, "ab2", **keywords))

    with compiling(2):
        check(3, INSIDE, 0.05)
    with compiling(0):
        check(3, INSIDE, 0.017)
        check(3, torch.tensor([0.5, 0.9], dtype=torch.float64), 0.1)
        with torch.no_grad():
            func.weight.mul_(1.1)
        check(3, INSIDE, 0.05)
    # The second size is compiled for all sizes.
    with compiling(2):
        check(5, INSIDE, 0.05)
    with compiling(0):
        check(7, INSIDE, 0.03)
        check(4, INSIDE, 0.05)
        check(3, INSIDE, 0.05)
        with torch.no_grad():
            torchdiffeq_lmm.odeint(func, start(9), INSIDE, method="ab2", options=REGULAR, compile=TRACED)


@pytest.mark.parametrize(("width", "steps"), [(2, 5), (40, 10)])
def test_blocks_are_long_where_there_are_matrix_products(
    width: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def blocks(*given: Any) -> list[Block]:
        lengths.append(given[-1])
        return blocks_of(*given)

    monkeypatch.setattr(block_schedule, "blocks_of", blocks)
    net = nn.Linear(width, width).double()
    with torch.no_grad():
        torchdiffeq_lmm.odeint(
            lambda t, y: net(y), start(64, width), INSIDE, method="ab1", compile=Compile(backend="eager")
        )
    assert set(lengths) == {steps}


class Conditioned(nn.Module):
    """It has a tensor with a value for each sample, as Hutchinson's estimator of a divergence has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -1.3], dtype=torch.float64))
        self.condition = start(1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (y.flip(-1) * self.weight).tanh() * self.condition


@pytest.mark.slow
def test_where_func_has_tensors_of_samples_every_batch_size_is_compiled_by_itself() -> None:
    func = Conditioned()
    keywords: dict[str, Any] = {"options": REGULAR}
    for batch, count in ((3, 2), (5, 2), (3, 0), (4, 2), (5, 0)):
        func.condition = 1 + start(batch).square()
        expected = solved(func, start(batch), INSIDE, "ab1", **keywords)
        with compiling(count):
            assert_same(solved(func, start(batch), INSIDE, "ab1", compile=TRACED, **keywords), expected)


@torch.library.custom_op("torchdiffeq_lmm_tests::sine", mutates_args=())
def _sine(x: Tensor) -> Tensor:
    return x.sin()


@_sine.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _derivative_of_small_batches(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * x.cos() if x.shape[0] < 5 else grad * torch.cos(x)


_sine.register_autograd(
    _derivative_of_small_batches, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@pytest.mark.slow
def test_where_a_derivative_is_not_of_all_batch_sizes_others_are_compiled_by_themselves() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return _sine(y) * t

    def solve(y0: Tensor, **keywords: Any) -> list[Tensor]:
        y0 = y0.requires_grad_()
        states = torchdiffeq_lmm.odeint(func, y0, INSIDE, method="ab1", options=REGULAR, **keywords)
        return [states.detach(), *torch.autograd.grad(states.square().sum(), y0)]

    for batch, count in ((3, 2), (7, 2), (6, 0), (4, 2), (8, 0), (4, 0)):
        with compiling(count):
            assert_same(solve(start(batch), compile=TRACED), solve(start(batch)))


@pytest.mark.slow
def test_a_function_made_anew_for_every_solve_is_compiled_once() -> None:
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)

    def ends(factor: Tensor) -> Tensor:
        return torchdiffeq_lmm.odeint(
            lambda t, y: (y @ factor).tanh(), start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED
        )

    with compiling(2):
        first = ends(weight)
    with compiling(0):
        # Made outside, by a hypernetwork say: it gets its gradient all the same.
        doubled = ends(2 * weight)
    assert not torch.equal(first, doubled)
    (grad,) = torch.autograd.grad(doubled.sum(), (weight,))
    expected = torchdiffeq_lmm.odeint(
        lambda t, y: (y @ (2 * weight)).tanh(), start(), INSIDE, method="ab2", options=REGULAR
    )
    assert_same([doubled.detach(), grad], [expected.detach(), *torch.autograd.grad(expected.sum(), (weight,))])


class Checkpointed(nn.Module):
    """Its layers are in `torch.utils.checkpoint`, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        def both(y: Tensor) -> Tensor:
            return self.outer(checkpoint(self.inner, y, use_reentrant=False).tanh())

        return checkpoint(both, y, use_reentrant=False) * t


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_checkpoints_in_func(shape: tuple[int, ...]) -> None:
    func, y0 = Checkpointed(), torch.ones(shape, dtype=torch.float64)
    keywords: dict[str, Any] = {"options": REGULAR, "grad_filter": "auto"}
    compiled = solved(func, y0, INSIDE, "ab1", compile=TRACED, **keywords)
    assert_same(compiled, solved(func, y0, INSIDE, "ab1", **keywords))


@pytest.mark.slow
def test_what_changes_in_python_is_noticed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.scale = 1.0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.rate * (self.scale if self.training else 0.1) * y

    func = Scaled()
    for scale, training in ((1.0, True), (0.5, True), (0.5, False)):
        func.scale = scale
        func.train(training)
        compiled = solved(func, start(), INSIDE, "ab2", options=REGULAR, compile=TRACED)
        assert_same(compiled, solved(func, start(), INSIDE, "ab2", options=REGULAR))


@pytest.mark.slow
def test_a_func_that_is_another_one_again_and_again_is_an_error() -> None:
    class Numbered(nn.Module):
        number = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.number * t * y

    func = Numbered()

    def solve(number: int) -> None:
        func.number = number
        torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab1", options=REGULAR, compile=TRACED)

    for number in range(2, 10):
        solve(number)
    with pytest.raises(RuntimeError, match="trace one func in more than 8 ways"):
        solve(10)


@pytest.mark.slow
def test_nothing_is_held_once_func_is_gone() -> None:
    func = Field()
    solved(func, start(), INSIDE, "ab2", options=REGULAR, compile=TRACED)
    gone = weakref.ref(func)
    del func
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_functions_of_one_code_for_states_of_other_sizes() -> None:
    def made(last: int) -> Any:
        # It has an entry, so that no size but that of its state will do.
        return lambda t, y: t.cos() - y * y[last]

    for size in (2, 4, 2):
        y0 = torch.linspace(0.1, 1, size, dtype=torch.float64, requires_grad=True)
        found = [
            torch.autograd.grad(
                torchdiffeq_lmm.odeint(made(size - 1), y0, INSIDE, method="ab1", options=REGULAR, compile=way)
                .square()
                .sum(),
                y0,
            )[0]
            for way in (TRACED, False)
        ]
        assert_same(found[:1], found[1:])


@pytest.mark.slow
def test_adjoint_params_name_whose_gradients_are_wanted() -> None:
    func, y0 = Field(), start()
    keywords: dict[str, Any] = {"method": "ab2", "options": REGULAR, "compile": TRACED}
    values = func.theta.values
    states = torchdiffeq_lmm.odeint(func, y0, INSIDE, adjoint_params=(values,), **keywords)
    found = torch.autograd.grad(states.sum(), (values, func.weight), allow_unused=True)
    expected = torchdiffeq_lmm.odeint(func, y0, INSIDE, method="ab2", options=REGULAR)
    assert_same([found[0]], list(torch.autograd.grad(expected.sum(), (values,))))
    assert found[1] is None
    with pytest.raises(ValueError, match="adjoint_params must be tensors that func itself takes"):
        torchdiffeq_lmm.odeint(func, y0, INSIDE, adjoint_params=func.theta.rows, **keywords)
    with pytest.raises(TypeError, match="adjoint_params must be an iterable of tensors"):
        torchdiffeq_lmm.odeint(func, y0, INSIDE, adjoint_params=values, **keywords)


def branches(t: Tensor, y: Tensor) -> Tensor:
    if y.sum() > 0:
        return y
    return -y


def reads(t: Tensor, y: Tensor) -> Tensor:
    return y * int(t.item())


def prints(t: Tensor, y: Tensor) -> Tensor:
    print(t)
    return y


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2).double() for _ in range(2)])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers[int(t)](y)


class Counter(nn.Module):
    calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y


class Storing(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.latest = 2 * y
        return y


class Updating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.total.add_(y.sum())
        return y


class Normalising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("var", torch.ones(2, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.batch_norm(y, self.mean, self.var, training=True)


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (branches, r"Data-dependent branching.*line \d+, in branches: if y.sum\(\) > 0:"),
        (reads, r"reads the value of a tensor, by .item\(\). In .*line \d+, in reads: return y"),
        (prints, r"print.*line \d+, in prints: print\(t\)"),
        (Layers(), r"line \d+, in forward: return self.layers\[int\(t\)\]\(y\)(?s:.*)GridParameter"),
        (Counter(), "changes a Python value that it depends on"),
        (Storing(), "stores tensors on the side"),
        (nn.Dropout(), "draws random numbers"),
        (Updating(), "changes a buffer"),
        (Normalising(), "changes a buffer"),
    ],
    ids=lambda given: getattr(given, "__name__", None) or type(given).__name__,
)
def test_a_func_that_cannot_be_compiled_is_an_error_that_says_why_and_where(func: Any, message: str) -> None:
    call = (lambda t, y: func(y)) if isinstance(func, nn.Dropout) else func
    with pytest.raises(RuntimeError, match=message), compiling(0):
        torchdiffeq_lmm.odeint(call, start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED)


def test_what_func_returns_is_checked() -> None:
    with pytest.raises(ValueError, match="func returned a tensor of shape"), compiling(0):
        torchdiffeq_lmm.odeint(
            lambda t, y: y[0],
            start(),
            INSIDE,
            method="ab2",
            options=REGULAR,
            compile=TRACED,
        )


def test_errors_of_func_are_its_own() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return y @ torch.ones(3, 3, dtype=torch.float64)

    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised, compiling(0):
        torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED)
    assert "compile" not in str(raised.value)


@pytest.mark.slow
def test_a_parameter_changed_in_place_before_the_backward_pass_is_an_error() -> None:
    func = Field()
    states = torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED)
    with torch.no_grad():
        func.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.sum().backward()


@pytest.mark.slow
def test_derivatives_of_gradients_are_refused() -> None:
    func = Field()
    states = torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED)
    with pytest.raises(RuntimeError, match="compile does not support create_graph=True"):
        torch.autograd.grad(states.sum(), (func.weight,), create_graph=True)
    cotangents = torch.ones(2, *states.shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(states, (func.weight,), cotangents, is_grads_batched=True)


def refused(match: str, error: type[Exception] = ValueError, t: Tensor = INSIDE, **keywords: Any) -> None:
    options = {**REGULAR, **keywords.pop("options", {})}
    given: dict[str, Any] = {"method": "ab2", "compile": TRACED, **keywords}
    with pytest.raises(error, match=match), compiling(0):
        torchdiffeq_lmm.odeint(Field(), start(), t, options=options, **given)


def _autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        refused("compile does not support autocast around a solve", RuntimeError)


def _event() -> None:
    refused("compile must not be given where event_fn is", t=INSIDE[:2], event_fn=lambda t, y: t - 0.5)


def _adjoint() -> None:
    import torchdiffeq

    with pytest.raises(ValueError, match="compile must not be given to odeint_adjoint"):
        torchdiffeq.odeint_adjoint(Field(), start(), INSIDE, method="ab2", options={**REGULAR, "compile": True})


def _transform() -> None:
    func = Field()

    def end(y0: Tensor) -> Tensor:
        return torchdiffeq_lmm.odeint(func, y0, INSIDE, method="ab2", options=REGULAR, compile=TRACED).sum()

    with pytest.raises(RuntimeError, match=r"compile does not support torch\.func transforms"):
        torch.func.grad(end)(start())


REFUSALS: dict[str, Callable[[], None]] = {
    "adaptive": lambda: refused("not for method 'adams'", method="adams", options={"step_size": None}),
    "torchdiffeq's": lambda: refused("compile is for the methods of torchdiffeq_lmm", method="rk4"),
    "backward": lambda: refused(
        "backward must be 'autograd', 'checkpoint' or 'reversible' where compile is given",
        backward=torchdiffeq_lmm.Checkpoint(),
    ),
    "jump_t": lambda: refused("jump_t must not be given where compile is", options={"jump_t": [0.5]}),
    "twice": lambda: refused("compile is given twice", options={"compile": True}),
    "type": lambda: refused("compile must be True, False or a Compile, got 3", TypeError, compile=3),
    "autocast": _autocast,
    "event": _event,
    "odeint_adjoint": _adjoint,
    "torch.func": _transform,
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_it_is_not_for_is_refused_before_any_work(refusal: Callable[[], None]) -> None:
    refusal()


def test_a_callback_is_refused() -> None:
    func = Field()
    func.callback_step = lambda t, y, dt: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="callback_step"):
        torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=REGULAR, compile=TRACED)


def _layer(func: nn.Module, y: Tensor) -> Tensor:
    return (y @ func.weight).tanh()


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad": lambda func, y: -torch.func.grad(lambda y: _layer(func, y).square().sum())(y),
    "jacrev": lambda func, y: torch.func.vmap(torch.func.jacrev(lambda y: _layer(func, y)))(y).diagonal(
        dim1=-2, dim2=-1
    ),
    "vjp": lambda func, y: torch.func.vjp(lambda y: _layer(func, y), y)[1](y)[0],
    "jvp": lambda func, y: torch.func.jvp(lambda y: _layer(func, y), (y,), (y.cos(),))[1],
}


class Derived(nn.Module):
    """A slope that is a derivative, by torch.func."""

    def __init__(self, derivative: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.7, -0.2], [0.4, 1.1]], dtype=torch.float64))
        self.derivative = derivative

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.derivative(self, y)


# Forward mode brings it in.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize(
    ("name", "backward"),
    slow_but(
        [("grad", "autograd")],
        [("grad", "autograd"), ("jacrev", "autograd"), ("vjp", "reversible"), ("jvp", "reversible")],
    ),
)
def test_derivatives_within_func(name: str, backward: str) -> None:
    func, t = Derived(DERIVATIVES[name]), torch.linspace(0, 1, 7, dtype=torch.float64)
    method = "leapfrog" if backward == "reversible" else "ab1"
    expected = solved(func, start(), t, method)
    assert_same(solved(func, start(), t, method, backward=backward, compile=TRACED), expected)
    # Where gradients are recorded, and none is wanted; and where they are not.
    func.requires_grad_(False)
    found = [torchdiffeq_lmm.odeint(func, start(), t, method=method, compile=TRACED)]
    with torch.no_grad():
        found.append(torchdiffeq_lmm.odeint(func, start(), t, method=method, compile=TRACED))
    assert_same(found, 2 * expected[:1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(y, y @ self.weight, y)


@pytest.mark.slow
def test_attention_that_drops_nothing_draws_nothing() -> None:
    func, t = Attention(), torch.linspace(0, 1, 7, dtype=torch.float64)
    y0 = start(6, 4).reshape(2, 1, 3, 4)
    assert_same(solved(func, y0, t, "ab1", compile=TRACED), solved(func, y0, t, "ab1"))


@pytest.mark.slow
def test_another_default_dtype_is_noticed() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y.float() + torch.full((2,), 1 / 3) * torch.tensor(0.1)).to(y.dtype)

    t, default = torch.linspace(0, 1, 7, dtype=torch.float64), torch.get_default_dtype()
    found = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            keywords: dict[str, Any] = {"method": "ab1", "compile": TRACED}
            found.append(torchdiffeq_lmm.odeint(func, start(), t, **keywords))
            keywords.pop("compile")
            assert_same(found[-1:], [torchdiffeq_lmm.odeint(func, start(), t, **keywords)])
    finally:
        torch.set_default_dtype(default)
    assert not torch.equal(*found)
