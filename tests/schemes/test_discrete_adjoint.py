"""The discrete adjoint against auto-differentiation of the recurrence it is the adjoint of."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.discrete_adjoint import (
    Contributions,
    Layout,
    combine,
    discrete_adjoint,
    plus,
    weight_gradients,
)
from torchdiffeq_lmm.schemes.methods import METHODS, MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Row
from torchdiffeq_lmm.schemes.unrolling import unroll
from torchdiffeq_lmm.schemes.weighted_sum import Weight


class Random:
    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=self._dtype) / 2

    def weights(self, count: int) -> list[float]:
        return (torch.rand(count, generator=self._generator, dtype=torch.float64) - 0.5).tolist()

    def up_to(self, most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=self._generator))


def random_rows(random: Random, count: int, implicit: bool, stages: bool) -> list[Row]:
    """Rows with random lags into all that there is: each evaluates, or not, and is a node, or not."""
    rows: list[Row] = []
    slopes = nodes = 0
    pending = True
    for i in range(count):
        solves = implicit and bool(random.up_to(2))
        evaluates = pending and (i == 0 or random.up_to(3) > 0)
        slopes += evaluates
        b = sorted({random.up_to(slopes - 1) for _ in range(random.up_to(3) + (not solves))}) if slopes else []
        e = sorted({random.up_to(nodes - 1) for _ in range(random.up_to(2))}) if nodes else []
        is_node = not stages or i == count - 1 or bool(random.up_to(1))
        rows.append(
            Row(
                evaluates,
                tuple(zip(e, random.weights(len(e)), strict=True)),
                tuple(zip(b, random.weights(len(b)), strict=True)),
                random.weights(1)[0] if solves else None,
                (),
                is_node,
                None,
            )
        )
        slopes += solves
        nodes += is_node
        pending = not solves
    return rows


@dataclass
class Linear:
    """f(X) = A X + c with an A and a c of every state, and E = Σ <g, x> over the nodes."""

    rows: list[Row]
    random: Random
    size: int = 2

    @cached_property
    def matrices(self) -> Tensor:
        return self.random.tensor(len(self.rows) + 1, self.size, self.size)

    @cached_property
    def forcing(self) -> list[Tensor]:
        return [c.requires_grad_() for c in self.random.tensor(len(self.rows) + 1, self.size).unbind()]

    @cached_property
    def x0(self) -> Tensor:
        return self.random.tensor(self.size).requires_grad_()

    @cached_property
    def cotangents(self) -> list[Tensor | None]:
        nodes = 1 + sum(row.is_node for row in self.rows)
        made = list(self.random.tensor(nodes, self.size).unbind())
        return [None if n % 3 == 1 and n < nodes - 1 else g for n, g in enumerate(made)]

    def slope(self, state: int, x: Tensor) -> Tensor:
        return self.matrices[state] @ x + self.forcing[state]

    def solve_step(
        self, state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c = x if known is None else x + known
        one = torch.eye(self.size, dtype=x.dtype)
        made = torch.linalg.solve(one - weight * self.matrices[state], c + weight * self.forcing[state])
        return made - x, self.slope(state, made)

    def states(self, rows: list[Row]) -> dict[int, Tensor]:
        return {0: self.x0, **dict(march(History(self.x0), rows, self.slope, self.solve_step))}

    def error(self, states: dict[int, Tensor]) -> Tensor:
        at = [0, *(i + 1 for i, row in enumerate(self.rows) if row.is_node)]
        seen = zip(at, self.cotangents, strict=True)
        return torch.stack([(g.conj() * states[state]).sum().real for state, g in seen if g is not None]).sum()

    # The protocol of `discrete_adjoint`.

    def vjp(self, state: int, cotangent: Contributions) -> Contributions:
        return [(weight, self.matrices[state].mH @ tensor) for weight, tensor in cotangent]

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(self.size, dtype=rhs.dtype) - weight * self.matrices[state].mH, rhs)


def total(contributions: Contributions | None, like: Tensor) -> Tensor:
    return sum((weight * tensor for weight, tensor in contributions or []), torch.zeros_like(like))


KINDS = {
    "explicit": (False, False),
    "with stages": (False, True),
    "implicit": (True, False),
    "implicit with stages": (True, True),
}
by_kind = pytest.mark.parametrize(("implicit", "stages"), KINDS.values(), ids=KINDS)


@by_kind
@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_autograd(seed: int, count: int, implicit: bool, stages: bool) -> None:
    random = Random(seed)
    problem = Linear(random_rows(random, count, implicit, stages), random)
    problem.error(problem.states(problem.rows)).backward()

    backwards = list(discrete_adjoint(problem.rows, problem.cotangents, problem, torch.zeros(2, dtype=torch.float64)))
    assert [step.state for step in backwards] == list(range(count, -1, -1))
    torch.testing.assert_close(backwards[-1].window, problem.x0.grad)
    assert backwards[-1].node == 0
    for step in backwards:
        expected = problem.forcing[step.state].grad
        found = total(step.mu, problem.x0.detach())
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("seed", range(3))
def test_weight_gradients_are_those_of_autograd(seed: int, implicit: bool, stages: bool, dtype: torch.dtype) -> None:
    random = Random(seed, dtype)
    problem = Linear(random_rows(random, 9, implicit, stages), random)
    numbers = torch.tensor([float(w) for row in problem.rows for w in row.weights], dtype=torch.float64)
    weights = numbers.requires_grad_()
    entries: Iterator[Tensor] = iter(weights.unbind())
    problem.error(problem.states([row.with_weights(entries) for row in problem.rows])).backward()

    with torch.no_grad():
        states = problem.states(problem.rows)
        slopes = {state: problem.slope(state, x) for state, x in states.items()}
        increments: list[Tensor | None] = [None] * len(states)
        for step in discrete_adjoint(problem.rows, problem.cotangents, problem, torch.zeros(2, dtype=dtype)):
            increments[step.state] = step.increment
    layout = Layout(problem.rows)
    at_node = [0, *(i + 1 for i, row in enumerate(problem.rows) if row.is_node)]
    found = []
    for i, row in enumerate(problem.rows):

        def difference(lag: int) -> Tensor:
            node = layout.node_before[i] - lag
            return states[at_node[node]] - states[at_node[node - 1]]

        def slope(lag: int) -> Tensor:
            return slopes[i + 1 if lag < 0 else layout.slope(i, lag)]

        found += weight_gradients(row, increments[i + 1], difference, slope)
    assert all(gradient.dtype is torch.float64 for gradient in found)
    torch.testing.assert_close(torch.stack(found), weights.grad)


@by_kind
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.one_in(3)
def test_cotangents_of_the_history_are_those_of_a_restart(seed: int, implicit: bool, stages: bool) -> None:
    """At a node, E depends on the state, the slopes and the increments so far: each of them a leaf here."""
    random = Random(seed)
    problem = Linear(random_rows(random, 10, implicit, stages), random)
    rows, layout = problem.rows, Layout(problem.rows)
    states = {state: x.detach() for state, x in problem.states(rows).items()}
    at_node = [0, *(i + 1 for i, row in enumerate(rows) if row.is_node)]
    for step in discrete_adjoint(rows, problem.cotangents, problem, torch.zeros(2, dtype=torch.float64)):
        if step.node is None:
            continue
        made = layout.node_before[step.state]
        slopes = {s: problem.slope(s, states[s]).detach().requires_grad_() for s in range(step.state + 1)}
        own = step.state > 0 and rows[step.state - 1].implicit is not None
        increments = {
            n: (states[at_node[n]] - states[at_node[n - 1]]).requires_grad_() for n in range(1, step.node + 1)
        }
        leaf = states[step.state].clone().requires_grad_()
        # By an explicit loop, with every state reached by its node.
        x, latest, slope_of, increment_of = leaf, leaf, dict(slopes), dict(increments)
        if not own:
            slope_of[step.state] = problem.slope(step.state, leaf)
        error = torch.zeros((), dtype=torch.float64)
        if problem.cotangents[step.node] is not None:
            error = error + problem.cotangents[step.node] @ leaf
        for i in range(step.state, len(rows)):
            row = rows[i]
            if row.evaluates and i > step.state:
                slope_of[i] = problem.slope(i, latest)
            d = torch.zeros(2, dtype=torch.float64)
            for lag, e in row.increments:
                d = d + e * increment_of[layout.node_before[i] - lag]
            for lag, b in row.slopes:
                d = d + b * slope_of[layout.slope(i, lag)]
            if row.implicit is not None:
                d, slope_of[i + 1] = problem.solve_step(i + 1, x, d, row.implicit, None)
            latest = x + d
            if row.is_node:
                x, made = latest, made + 1
                increment_of[made] = d
                if problem.cotangents[made] is not None:
                    error = error + problem.cotangents[made] @ latest
        leaves = [leaf, *slopes.values(), *increments.values()]
        grads = torch.autograd.grad(error, leaves, allow_unused=True)
        found = [
            step.shift - total(step.pulled, leaf) if own else step.window,
            *(total(step.slopes_before.get(s), leaf) for s in slopes if s < step.state),
            total(step.later if own else None, leaf),
            *(total(step.increments_before.get(n), leaf) for n in increments),
        ]
        for got, grad in zip(found, grads, strict=True):
            torch.testing.assert_close(got, torch.zeros(2, dtype=torch.float64) if grad is None else grad)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_gradients_of_the_methods_themselves(method: MultistepMethod) -> None:
    steps = torch.tensor([0.3, 0.5, 0.2, 0.4, 0.4, 0.7, 0.3, 0.1, 0.6], dtype=torch.float64)
    problem = Linear(unroll(method, steps).rows, Random(1))
    problem.error(problem.states(problem.rows)).backward()
    *_, last = discrete_adjoint(problem.rows, problem.cotangents, problem, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(last.window, problem.x0.grad)


def test_windows_are_the_running_sum() -> None:
    """P_n = P_{n+1} + g_n + J_nᵀ μ_n, with what is pulled back given."""
    rows = [
        Row(True, (), ((0, 0.1),), None, (), True, None),
        Row(True, ((0, -1.0),), ((0, 0.2),), None, (), True, None),
        Row(True, ((0, -4.0),), ((0, 0.6),), None, (), True, None),
    ]
    ones = torch.ones(1, dtype=torch.float64)
    pulled = {0: [(0.5, ones)], 1: [], 2: [(1.0, 0.25 * ones)], 3: []}

    class Given:
        def vjp(self, state: int, cotangent: Contributions) -> Contributions:
            return pulled[state]

        def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
            raise AssertionError

    steps = list(discrete_adjoint(rows, [None, ones, None, 3 * ones], Given(), 0 * ones))
    assert [float(step.window) for step in steps] == [3.0, 3.25, 4.25, 4.75]
    assert [float(step.shift) for step in steps] == [3.0, 3.25, 4.25, 4.75]


def test_lags_mean_the_latest_slopes() -> None:
    rows = [
        Row(True, (), ((0, 1.0),), None, (), False, None),
        Row(False, (), ((0, 1.0),), 1.0, (), True, None),
        Row(False, (), ((0, 1.0), (1, 1.0)), None, (), True, None),
        Row(True, (), ((0, 1.0), (1, 1.0), (2, 1.0)), None, (), False, None),
    ]
    layout = Layout(rows)
    assert [[layout.slope(i, lag) for lag, _ in row.slopes] for i, row in enumerate(rows)] == [
        [0],
        [0],
        [2, 0],
        [3, 2, 0],
    ]
    assert layout.node_before == [0, 0, 1, 2, 2]


def test_sums() -> None:
    one = torch.ones(2)
    assert torch.equal(combine([(2.0, one), (-0.5, one)]), 1.5 * one)
    assert plus(one, []) is one
    assert torch.equal(plus(one, [(2.0, one), (-0.5, one)]), 2.5 * one)
