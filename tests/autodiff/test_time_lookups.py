"""Rows that func looks up by the time: blocks are given them, and nothing depends on how many there are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, UNEQUAL, assert_same, compiling, solved, start
from methods import slow_but
from torch import Tensor, nn

from torchdiffeq_lmm import CostateFilter, GridParameter
from torchdiffeq_lmm.autodiff.mutations import Changes, changes_of
from torchdiffeq_lmm.autodiff.time_lookups import split_lookups

pytestmark = NEEDS_TORCH

STEPS = 23


def parameter(steps: int, kind: Any = "step", *shape: int) -> GridParameter:
    rows = steps + (kind == "linear")
    values = torch.sin(torch.arange(rows * 2 * max(1, *shape, 1), dtype=torch.float64)).reshape(rows, *shape, 2)
    return GridParameter(values, torch.linspace(0, 1, steps + 1, dtype=torch.float64), kind)


class Layers(nn.Module):
    """Matrices, vectors, two neighbours at once, a stack of one's own, and one that is used otherwise, too."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices, self.vectors = parameter(STEPS, "step", 2), parameter(STEPS, "linear")
        self.stack = nn.Parameter(torch.linspace(-1, 1, 2 * STEPS, dtype=torch.float64).reshape(STEPS, 2))
        self.scaled = nn.Parameter(self.stack.detach().cos())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        i = (t * STEPS + 0.01).long().clamp(0, STEPS - 1).reshape(1)
        own = self.stack.index_select(0, i) + self.scaled.index_select(0, i) * self.scaled.mean()
        return torch.tanh(y @ self.matrices(t)) + self.vectors(t) + own


class Few(nn.Module):
    """Matrices, and a stack of one's own, for methods that take long to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = parameter(STEPS, "step", 2)
        self.stack = nn.Parameter(torch.linspace(-1, 1, 2 * STEPS, dtype=torch.float64).reshape(STEPS, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        i = (t * STEPS + 0.01).long().clamp(0, STEPS - 1).reshape(1)
        return torch.tanh(y @ self.matrices(t)) + self.stack.index_select(0, i)


class ByState(nn.Module):
    """A lookup that the state decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # Not of all samples, whose sum is 0 at the start but for rounding.
        row = (y.detach()[0].sum() > 0).long().reshape(1)
        return t.cos() - self.stack.index_select(0, row) * y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "keywords"),
    [
        (Layers, {"method": "leapfrog", "grad_filter": "auto"}),
        (Layers, {"method": "leapfrog", "backward": "reversible", "options": REGULAR}),
        # Its filter looks up what func depends on before a block, too.
        (Few, {"method": "ab3", "grad_filter": CostateFilter("trapezoid", order="method")}),
        # The gradients of times as well.
        (Few, {"method": "abm2", "options": REGULAR}),
    ],
    ids=["filtered", "reversible", "order", "several evaluations"],
)
@pytest.mark.filterwarnings("ignore:a GridParameter of kind")
def test_values_and_gradients_are_those_of_an_eager_solve(
    made: Callable[[], nn.Module], keywords: dict[str, Any]
) -> None:
    func = made()
    t = (INSIDE if "options" in keywords else UNEQUAL).clone().requires_grad_(keywords["method"] == "abm2")
    compiled = solved(func, start(), t, compile=TRACED, **keywords)
    assert_same(compiled, solved(func, start(), t, **keywords))


def test_a_lookup_that_the_state_decides_on_is_left_to_the_blocks() -> None:
    func = ByState()
    compiled = solved(func, start(), INSIDE, "ab1", options=REGULAR, compile=TRACED)
    assert_same(compiled, solved(func, start(), INSIDE, "ab1", options=REGULAR))


class Forced(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.theta = parameter(steps)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.theta(t) - y


@pytest.mark.parametrize("grad_filter", slow_but((None,), (None, "auto")))
def test_another_number_of_rows_needs_no_compilation(grad_filter: Any) -> None:
    func = Forced(STEPS)
    keywords: dict[str, Any] = {"method": "leapfrog", "grad_filter": grad_filter}
    solved(func, start(), INSIDE, options=REGULAR, compile=TRACED, **keywords)
    func.theta = parameter(4 * STEPS)
    options = {"step_size": REGULAR["step_size"] / 4}
    with compiling(0):
        compiled = solved(func, start(), INSIDE, options=options, compile=TRACED, **keywords)
    assert_same(compiled, solved(func, start(), INSIDE, options=options, **keywords))


def test_a_frozen_stack_and_one_that_is_not_listed_get_no_gradient() -> None:
    func = Forced(STEPS)
    y0 = start().requires_grad_()
    for frozen, params in ((True, None), (False, (torch.zeros(1, requires_grad=True),))):
        func.theta.values.requires_grad_(not frozen)
        states = _solved_by_blocks(func, y0, params)
        (of_y0,) = torch.autograd.grad(states.sum(), (y0,), retain_graph=True)
        assert of_y0.abs().min() > 0
        if not frozen:
            (of_values,) = torch.autograd.grad(states.sum(), (func.theta.values,), allow_unused=True)
            assert of_values is None


def _solved_by_blocks(func: nn.Module, y0: Tensor, params: Any) -> Tensor:
    import torchdiffeq_lmm

    found = torchdiffeq_lmm.odeint(
        func, y0, INSIDE, method="ab1", options=REGULAR, adjoint_params=params, compile=TRACED
    )
    assert isinstance(found, Tensor)
    return found


def test_a_graph_in_parts() -> None:
    captured: list[torch.fx.GraphModule] = []

    changes: list[Changes] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(graph)
        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        changes.append(changes_of(graph, given))
        return graph

    stack = torch.arange(12.0).reshape(4, 3)

    def func(t: Tensor, x: Tensor, stack: Tensor) -> Tensor:
        return stack.index_select(0, (4 * t).long()) * x

    t, x = torch.tensor([0.3]), torch.ones(3)
    torch.compile(func, backend=keep, fullgraph=True)(t, x, stack)
    (graph,) = captured
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    time, state, of_stack = (
        next(i for i, name in enumerate(names) if f"_{own}_" in name) for own in ("t", "x", "stack")
    )
    rest, lookups = split_lookups(graph, *changes, time, state)
    assert lookups is not None
    assert lookups.stacks == (of_stack,)
    assert lookups.shapes == (torch.Size([1, 3]),)
    (rows,) = lookups.rows_at(torch.tensor([0.0, 0.3, 0.8]), [])
    torch.testing.assert_close(rows, torch.tensor([[0], [1], [3]]))
    given = [value for _, value in sorted(((time, t), (state, 2 * x)))]
    (found,) = rest(*given, stack[1:2])
    torch.testing.assert_close(found, 2 * stack[1:2])
