"""Traced functions with the components of states apart: the same values, and one loop where they were many."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, TRACED, assert_same, solved, start
from methods import slow_but
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchdiffeq_lmm.autodiff.components import gains_apart, taken_apart
from torchdiffeq_lmm.autodiff.mutations import functional
from torchdiffeq_lmm.autodiff.state_layout import few_components, laid_out

pytestmark = NEEDS_TORCH

SHAPE = 5, 3
P = torch.tensor([0.7, -1.3, 0.4], dtype=torch.float64)
W = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


def lorenz(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    x0, x1, x2 = y.unbind(-1)
    return torch.stack([p[0] * (x1 - x0), x0 * (p[1] - x2) - x1, x0 * x1 - p[2] * x2], -1)


def joined(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    pull = (y[..., :2] ** 2).sum(-1, keepdim=True)
    return torch.cat([y[..., 1:] * pull, -y[..., :1]], dim=1) + p


def products(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(y @ w) @ w.t() + p


def layer(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(y, w.t(), w[0])
    return torch.sigmoid(hidden) @ w.mT * p[1]


def of_norms(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return (y / (1 + y.square().sum(dim=-1, keepdim=True).sqrt())).flip(-1) * p.sum()


def halves(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    q, v = y.split(2, dim=-1)
    return torch.cat([q.flip(-1) / q.norm(dim=-1, keepdim=True), v.sin()], -1) * p


def spread(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return y[:, :1].expand(5, 3) * p + y[:, 1].unsqueeze(1) + y.select(1, -1).reshape(5, 1)


def turned(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return torch.stack([-y.t()[1], y.transpose(0, 1)[0], y.permute(1, 0)[2]]).t() * torch.where(y > 0, p, y)


def in_place(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    slope = torch.stack([y[:, 1], y[:, 0], y.sum(-1)], -1)
    slope.mul_(p)
    return slope.add_(y)


def assigned(y: Tensor) -> Tensor:
    slope = torch.empty_like(y)
    slope[:, 0] = y[:, 1]
    slope[:, 1] = y[:, 0]
    return slope


FUNCTIONS = [lorenz, joined, products, layer, of_norms, halves, spread, turned, in_place]


def traced(func: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, Tensor]:
    """The graph of a function, and a state that it has been traced with."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(given) for given in inputs]
    with mode:
        return functional(make_fx(func)(*fakes), fakes), fakes[0]


def operations(graph: GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def with_gradients(func: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The function, and the gradients of all of its arguments."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        with torch.enable_grad():
            value = func(func(*leaves), *leaves[1:])
        grads = torch.autograd.grad(value, leaves, value.detach().cos(), allow_unused=True)
        found = (value.detach(), *(g for g in grads if g is not None))
        return laid_out(found[0], 2, 1), laid_out(found[1], 2, 1), *(g.contiguous() for g in found[2:])

    return run


@pytest.mark.parametrize("func", FUNCTIONS, ids=lambda func: func.__name__)
def test_values_and_gradients_are_those_of_the_function(func: Callable[..., Tensor]) -> None:
    y = laid_out(torch.sin(torch.arange(15, dtype=torch.float64)).reshape(SHAPE), 2, 1)
    graph, x = traced(with_gradients(func), y, P, W)
    assert gains_apart(graph, x, 1)
    apart = taken_apart(graph, x, 1)
    found, expected = apart(y, P, W), with_gradients(func)(y, P, W)
    assert_same([value.detach() for value in found], [value.detach() for value in expected])
    assert [value.stride() for value in found] == [value.stride() for value in expected]


def test_nothing_but_the_results_is_put_together() -> None:
    """All between works on samples alone: so Inductor makes one loop of it."""
    y = laid_out(torch.ones(SHAPE, dtype=torch.float64), 2, 1)
    graph, x = traced(with_gradients(lorenz), y, P, W)
    stacks = [target for target in operations(taken_apart(graph, x, 1)) if "stack" in str(target)]
    # The value, and the gradients of y and p.
    assert len(stacks) == 3
    assert sum("stack" in str(target) for target in operations(graph)) > 3


def test_sums_over_samples_are_added_before_they_are_made() -> None:
    y = laid_out(torch.ones(SHAPE, dtype=torch.float64), 2, 1)
    graph, x = traced(with_gradients(lorenz), y, P, W)
    sums = [target for target in operations(taken_apart(graph, x, 1)) if "aten.sum" in str(target)]
    # Of three parameters, though each is used twice.
    assert len(sums) == 3


def test_a_nan_is_not_lost() -> None:
    def func(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return torch.stack([y[:, 0] * 0.0, y[:, 0].sqrt(), y[:, 2]], -1)

    y = laid_out(torch.zeros(SHAPE, dtype=torch.float64), 2, 1)
    graph, x = traced(with_gradients(func), y, P, W)
    found, expected = taken_apart(graph, x, 1)(y, P, W), with_gradients(func)(y, P, W)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-12, atol=1e-12)
    assert any(value.isnan().any() for value in expected)


@pytest.mark.parametrize(
    ("func", "shape"),
    [
        pytest.param(lambda y: y.sin() * 2, SHAPE, id="no component is made of another"),
        pytest.param(assigned, (5, 2), id="a part changed in place"),
        pytest.param(lambda y: y.roll(1, -1), SHAPE, id="an operation that needs them together"),
    ],
)
def test_what_gains_nothing_is_known(func: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    y = laid_out(torch.ones(shape, dtype=torch.float64), 2, 1)
    graph, x = traced(lambda y: (laid_out(func(y), 2, 1),), y)
    assert not gains_apart(graph, x, 1)
    assert_same([taken_apart(graph, x, 1)(y)[0]], [func(y)])


@pytest.mark.parametrize(
    ("shape", "axis"), [((), 0), ((2,), 1), ((1,), 0), ((7, 3), 1), ((3, 70), 2), ((7, 70), 0), ((6, 7, 4), 1)]
)
def test_components_are_the_last_dimension_or_the_first_one_if_they_are_few(shape: tuple[int, ...], axis: int) -> None:
    x = torch.rand(shape)
    assert few_components(x) == axis
    states = torch.rand(5, *shape)
    there = laid_out(states, x.ndim, axis)
    assert torch.equal(states, there)
    if axis:
        size = x.shape[-axis]
        samples = math.prod(shape) // size
        slices = there.movedim(-axis, 1)
        assert slices.reshape(5, size, -1).stride() == (size * samples, samples, 1)
        assert slices.is_contiguous()


class Rotation(nn.Module):
    """The dimension of the components is the first or the last one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.rate = nn.Parameter(torch.tensor([1.0, 0.3], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        u, v = y.unbind(self.dim)
        return torch.stack([self.rate[0] * v * t.cos(), -self.rate[1] * u * v], self.dim)


SOLVES = [
    (0, (2,), None),
    (0, (2, 6), "auto"),
    (-1, (6, 2), None),
    (-1, (2, 3, 2), "auto"),
    (1, (3, 2, 2), None),
]


@pytest.mark.parametrize(("dim", "shape", "grad_filter"), slow_but([SOLVES[0], SOLVES[3]], SOLVES))
def test_solves_of_states_of_any_shape(dim: int, shape: tuple[int, ...], grad_filter: str | None) -> None:
    y0 = start(3 * math.prod(shape) // 2)[: math.prod(shape) // 2].reshape(shape)
    keywords: dict[str, Any] = {"options": {"step_size": 1 / 13}, "grad_filter": grad_filter}
    compiled = solved(Rotation(dim), y0, INSIDE, "leapfrog", compile=TRACED, **keywords)
    assert all(value.is_contiguous() for value in compiled)
    assert_same(compiled, solved(Rotation(dim), y0, INSIDE, "leapfrog", **keywords))


class Padded(nn.Module):
    """It makes tensors of the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, 1:].sin() * self.rate, torch.ones(len(y), 1, dtype=y.dtype)], 1)


@pytest.mark.slow
def test_tensors_that_are_made_for_a_batch_of_any_size() -> None:
    func = Padded()
    for batch in (3, 5, 4):
        compiled = solved(func, start(batch), INSIDE, "ab1", options={"step_size": 1 / 13}, compile=TRACED)
        assert_same(compiled, solved(func, start(batch), INSIDE, "ab1", options={"step_size": 1 / 13}))
