"""A func that changes tensors of its own in place, compiled: values and gradients are those of an eager solve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_solves import NEEDS_TORCH, TRACED, UNEQUAL, assert_same, compiling, solved, start
from methods import slow_but
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torchdiffeq_lmm import GridParameter
from torchdiffeq_lmm.autodiff.mutations import changed_by, changes_of, functional

pytestmark = NEEDS_TORCH


def entries(y: Tensor, w: Tensor) -> Tensor:
    slope = torch.zeros_like(y)
    slope[:, 0] = y[:, 1] * w[0]
    slope[:, 1] = -y[:, 0].sin() * w[1]
    return slope


def slices(y: Tensor, w: Tensor) -> Tensor:
    slope = torch.empty_like(y)
    slope[..., :1] = y[..., 1:2] * w[0]
    slope[..., 1:] = -y[..., : y.shape[-1] - 1]
    return slope


def accumulated(y: Tensor, w: Tensor) -> Tensor:
    slope = y * w
    slope[:, 0] += y[:, 1]
    slope *= 2
    return slope.tanh()


def through_a_view(y: Tensor, w: Tensor) -> Tensor:
    slope = y.flip(-1) + 1
    slope.view(-1).mul_(w[1])
    return slope.tanh()


def beside_a_product(y: Tensor, w: Tensor) -> Tensor:
    hidden = 2 * torch.relu_(y @ torch.ones(y.shape[-1], 8, dtype=y.dtype) + 0.1)
    hidden[:, 1] = w[0]
    return hidden[:, : y.shape[-1]].sin() * w


def into_an_output(y: Tensor, w: Tensor) -> Tensor:
    slope = y * w
    slope.scatter_(1, torch.zeros(len(y), 1, dtype=torch.long), y[:, 1:2])
    slope.masked_fill_(y > 0.9, 0.5)
    return slope


class Func(nn.Module):
    def __init__(self, of: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.of = of
        self.weight = nn.Parameter(torch.linspace(0.7, -1.3, width, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.of(y, self.weight)


SOLVES = [
    (entries, 2, "leapfrog", "auto"),
    (slices, 2, "ab1", None),
    (accumulated, 2, "ab1", None),
    (through_a_view, 6, "ab1", None),
    (beside_a_product, 6, "ab1", None),
    (into_an_output, 2, "ab1", None),
]


@pytest.mark.parametrize(("of", "width", "method", "grad_filter"), slow_but([SOLVES[2], SOLVES[3]], SOLVES))
def test_values_and_gradients(of: Any, width: int, method: str, grad_filter: str | None) -> None:
    func = Func(of, width)
    compiled = solved(func, start(width=width), UNEQUAL, method, grad_filter=grad_filter, compile=TRACED)
    assert_same(compiled, solved(func, start(width=width), UNEQUAL, method, grad_filter=grad_filter))


def index_assigned(index: Tensor, y: Tensor) -> Tensor:
    rows = torch.zeros(1, dtype=torch.long)
    rows[0] = index[0]
    return rows


def index_added(index: Tensor, y: Tensor) -> Tensor:
    rows = torch.zeros(1, dtype=torch.long)
    rows += index
    return rows


def index_of_the_state(index: Tensor, y: Tensor) -> Tensor:
    return index.clone().add_((y.sum() > 0.1).long()).clamp_(0, 22)


def index_through_a_view(index: Tensor, y: Tensor) -> Tensor:
    rows = index.clone()
    rows.view(1).mul_(0)
    return rows


class LooksUp(nn.Module):
    """A row for each of 23 steps, by an index that is changed in place; the row is changed in place as well."""

    def __init__(self, index: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.index = index
        self.rows = nn.Parameter(torch.linspace(-1, 2, 46, dtype=torch.float64).reshape(23, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        index = (t * 22).round().long().reshape(1)
        row = self.rows.index_select(0, self.index(index, y))[0]
        row.mul_(2)
        return row * y.flip(-1)


@pytest.mark.slow
@pytest.mark.parametrize("index", [index_assigned, index_added, index_of_the_state, index_through_a_view])
def test_rows_that_are_looked_up_by_such_an_index(index: Callable[[Tensor, Tensor], Tensor]) -> None:
    func = LooksUp(index)
    compiled = solved(func, start(), UNEQUAL, "ab1", compile=TRACED)
    assert_same(compiled, solved(func, start(), UNEQUAL, "ab1"))


class Forced(nn.Module):
    """A value for each step, added in place."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        self.theta = GridParameter(torch.linspace(-1, 2, 2 * steps, dtype=torch.float64).reshape(steps, 2), nodes)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = torch.zeros_like(y)
        slope[:, 0] = -y[:, 1]
        slope.add_(self.theta(t))
        return slope


@pytest.mark.slow
def test_rows_of_a_grid_parameter_stay_inputs_of_blocks() -> None:
    func, more = Forced(23), Forced(31)
    compiled = solved(func, start(), UNEQUAL, "ab1", compile=TRACED)
    assert_same(compiled, solved(func, start(), UNEQUAL, "ab1"))
    func.theta = more.theta
    with compiling(0):
        compiled = solved(func, start(), UNEQUAL, "ab1", compile=TRACED)
    assert_same(compiled, solved(func, start(), UNEQUAL, "ab1"))


def test_a_graph_without_operations_in_place_is_the_same_function() -> None:
    y, w = start(width=6), torch.linspace(0.7, -1.3, 6, dtype=torch.float64)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(given) for given in (y, w)]
    with mode:
        traced = make_fx(accumulated)(*inputs)
        found = functional(traced, inputs)
    assert any(changed_by(node) for node in traced.graph.nodes)
    assert not any(changed_by(node) for node in found.graph.nodes)
    torch.testing.assert_close(found(y, w), accumulated(y, w))


def test_what_a_graph_changes_and_what_shares_memory_with_that() -> None:
    def func(y: Tensor, w: Tensor) -> Tensor:
        zeros = torch.zeros_like(y)
        first = zeros[0]
        product = w * 2
        first.add_(product)
        return zeros + y

    mode = FakeTensorMode()
    inputs = [mode.from_tensor(given) for given in (torch.ones(3, 2), torch.ones(2))]
    with mode:
        graph = make_fx(func)(*inputs)
    changes = changes_of(graph, inputs)
    assert [node.target for node in changes.operations] == [torch.ops.aten.add_.Tensor]
    touched = {node.target for node in changes.touched}
    assert touched == {torch.ops.aten.zeros_like.default, torch.ops.aten.select.int, torch.ops.aten.add_.Tensor}
