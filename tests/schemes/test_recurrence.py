"""Rows against an implementation that keeps the whole history, and their weights against those of the rows."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from methods import FAMILIES, slow_but
from textbook import TEXTBOOK, naive_solution, nodes_of, random_steps
from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import (
    METHODS,
    Formula,
    MultistepMethod,
    Nodes,
    adams_bashforth_formula,
    adams_moulton_formula,
    bdf_formula,
    constant_formula,
)
from torchdiffeq_lmm.schemes.recurrence import Keeps, Recurrence, Row
from torchdiffeq_lmm.schemes.unrolling import start_length, unroll
from torchdiffeq_lmm.schemes.weighted_sum import Weight

# The steps that the start makes: enough for the formula's memory and for polynomials of the method's order.
START_LENGTHS = {
    "leapfrog": 1,
    "nystrom3": 2,
    "milne_simpson": 2,
    **{f"ab{k}": k - 1 for k in range(1, 6)},
    **{f"abm{k}": k - 1 for k in range(2, 6)},
    **{f"am{k}": k - 2 for k in range(2, 6)},
    **{f"bdf{k}": k - 1 for k in range(1, 7)},
}


def sweeps_of(name: str, start: int, count: int) -> int:
    """How often the start of a solve of so many steps goes over its nodes, of which it makes up to `start`."""
    order = TEXTBOOK[name].order
    slopes = min(count, start) + (not name.startswith("bdf"))
    if name.startswith(("am", "bdf", "milne")) and not name.startswith("abm"):
        return 1 if slopes == 1 else min(order, slopes + 1)
    if count <= start:
        return slopes
    return order if name.startswith(("abm", "nystrom")) else max(1, order - 1)


FAST = [method for method in METHODS if method.name in FAMILIES]
by_method = pytest.mark.parametrize("method", slow_but(FAST, METHODS), ids=lambda method: method.name)


def constant(name: str) -> MultistepMethod:
    """A method of the textbook by constant coefficients."""
    book = TEXTBOOK[name]
    closing: Callable[[Nodes], Formula] = partial(adams_bashforth_formula, book.order)
    if book.beta[-1] != 0:
        closing = partial(adams_moulton_formula if any(book.beta[:-1]) else bdf_formula, book.order)
    formula = partial(constant_formula, book.alpha, book.beta)
    return MultistepMethod(f"constant {name}", book.order, len(book.alpha) - 1, formula, closing=closing)


CONSTANT = [constant(name) for name in ("leapfrog", "ab1", "ab4", "nystrom3", "am2", "milne_simpson", "bdf3")]
by_constant_method = pytest.mark.parametrize("method", CONSTANT, ids=lambda method: method.name)


def pendulum(t: float, x: np.ndarray) -> np.ndarray:
    return np.array([x[1] * (1 + 0.5 * np.sin(3 * t)), -np.sin(x[0]) * (1.5 + t) - 0.3 * x[1]])


def solve_by_substitution(
    slope: Callable[[int, Tensor], Tensor],
) -> Callable[[int, Tensor, Tensor | None, Weight, Tensor | None], tuple[Tensor, Tensor]]:
    def solve(
        state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c = torch.zeros_like(x) if known is None else known
        d = c
        for _ in range(100):
            d = c + weight * slope(state, x + d)
        return d, slope(state, x + d)

    return solve


def states_of(recurrence: Recurrence, steps: Tensor) -> np.ndarray:
    """The states at the nodes by `march`."""
    times = recurrence.times(torch.tensor(nodes_of(steps))).tolist()

    def slope(state: int, x: Tensor) -> Tensor:
        return torch.tensor(pendulum(times[state], x.numpy()))

    x0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    states = dict(march(History(x0), recurrence.rows, slope, solve_by_substitution(slope)))
    return torch.stack([x0, *(states[state] for state in recurrence.nodes[1:])]).numpy()


def reference(method: MultistepMethod, steps: Tensor, start: int) -> np.ndarray:
    name = method.name.removeprefix("constant ")
    sweeps = sweeps_of(name, start, len(steps))
    return naive_solution(name, nodes_of(steps), pendulum, np.array([1.0, 0.5]), start, sweeps)


def row_weights(rows: Sequence[Row]) -> list[float]:
    weights: list[Weight] = []
    for row in rows:
        weights += [e for _, e in row.increments] + [b for _, b in row.slopes]
        weights += [] if row.implicit is None else [row.implicit]
    return [float(weight.detach()) if isinstance(weight, Tensor) else weight for weight in weights]


# ------------------------------------------------------------------------------------------------------- the states


@pytest.mark.parametrize("count", [1, 2, 4, 14])
@by_method
@pytest.mark.one_in(3)
def test_states_on_any_grid(method: MultistepMethod, count: int) -> None:
    steps = random_steps(count, count)
    recurrence = unroll(method, steps)
    expected = reference(method, steps, START_LENGTHS[method.name])
    np.testing.assert_allclose(states_of(recurrence, steps), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("last", [1.0, 0.3])
@by_method
@pytest.mark.one_in(5)
def test_states_on_equal_steps_and_with_a_truncated_one(method: MultistepMethod, last: float) -> None:
    steps = torch.full((10,), 0.05, dtype=torch.float64)
    steps[-1] *= last
    expected = reference(method, steps, START_LENGTHS[method.name])
    np.testing.assert_allclose(states_of(unroll(method, steps), steps), expected, rtol=1e-9, atol=1e-10)


@by_constant_method
def test_constant_coefficients_are_the_variable_ones_on_equal_steps(method: MultistepMethod) -> None:
    steps = torch.full((10,), 0.05, dtype=torch.float64)
    recurrence = unroll(method, steps)
    # Explicit, or with f at t_0: as many slopes as the order; else one node more.
    assert recurrence.start == max(method.steps - 1, method.order - method.uses_first_slope)
    expected = reference(method, steps, recurrence.start)
    np.testing.assert_allclose(states_of(recurrence, steps), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "closing"), [("nystrom3", "ab3"), ("milne_simpson", "am4"), ("bdf3", "bdf3")])
def test_a_truncated_last_step_is_made_by_the_closing_formula(name: str, closing: str) -> None:
    steps = torch.full((10,), 0.05, dtype=torch.float64)
    steps[-1] = 0.02
    recurrence = unroll(constant(name), steps)
    before = reference(constant(name), steps[:-1], recurrence.start)
    made = states_of(recurrence, steps)
    np.testing.assert_allclose(made[:-1], before, rtol=1e-10)
    t = nodes_of(steps)
    (method,) = (method for method in METHODS if method.name == closing)
    formula = method.formula([(node - t[-2]) / 0.02 for node in t[::-1][: method.steps + 1]])
    increments = np.diff(before, axis=0)[::-1]
    slopes = [pendulum(time, x) for time, x in zip(t[:-1], before, strict=True)][::-1]
    step = sum(e * d for e, d in zip(formula.increments, increments, strict=False))
    step = step + sum(0.02 * b * f for b, f in zip(formula.slopes, slopes, strict=False))
    step = step + 0.02 * formula.implicit * pendulum(t[-1], made[-1])
    np.testing.assert_allclose(made[-1], before[-1] + step, rtol=1e-10)


@pytest.mark.parametrize("name", ["am2", "am3", "am5", "milne_simpson", "bdf1", "bdf3", "bdf6"])
def test_the_guess_extrapolates_the_slopes(name: str) -> None:
    """Exact for slopes that are polynomials of t of lower degree than the order."""
    (method,) = (method for method in METHODS if method.name == name)
    steps = random_steps(7, 12)
    recurrence = unroll(method, steps)
    times = recurrence.times(torch.tensor(nodes_of(steps))).tolist()
    slopes = np.polynomial.Polynomial(np.random.default_rng(7).normal(size=method.order))
    guesses: list[tuple[float, float]] = []

    def solve(
        state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        slope = torch.tensor(slopes(times[state]))
        if guess is not None:
            guesses.append((float(guess), float(slope)))
        return slope, slope

    x0 = torch.zeros((), dtype=torch.float64)
    assert (
        len(list(march(History(x0), recurrence.rows, lambda state, _: torch.tensor(slopes(times[state])), solve))) >= 12
    )
    for guess, slope in guesses[-6:]:
        assert guess == pytest.approx(slope, rel=1e-9)


# -------------------------------------------------------------------------------------------------------- the rows


@by_method
def test_the_start_is_as_long_as_it_must_be(method: MultistepMethod) -> None:
    start = START_LENGTHS[method.name]
    assert start_length(method) == start
    for count in (1, start + 1, start + 5):
        assert unroll(method, random_steps(0, count)).start == min(start, count)


@by_method
def test_states_are_numbered_as_they_are_made(method: MultistepMethod) -> None:
    steps = random_steps(0, 9)
    recurrence = unroll(method, steps)
    assert len(recurrence.positions) == len(recurrence.rows) + 1
    assert [recurrence.positions[state] for state in recurrence.nodes] == list(range(10))
    nodes = torch.tensor(nodes_of(steps))
    assert torch.equal(recurrence.times(nodes), nodes[[int(position) for position in recurrence.positions]])
    start = START_LENGTHS[method.name]
    sweeps = sweeps_of(method.name, start, 9)
    stages = 2 if method.predictor is not None else 1
    assert len(recurrence.rows) == sweeps * start + stages * (9 - start)


@by_method
def test_func_is_evaluated_where_the_method_says(method: MultistepMethod) -> None:
    """Once at each state that is not the last one of an explicit method."""
    recurrence = unroll(method, random_steps(0, 9))
    expected = [True] * len(recurrence.positions)
    expected[-1] = method.is_implicit
    assert recurrence.evaluated == expected


@pytest.mark.parametrize("method", slow_but([*FAST, *CONSTANT], [*METHODS, *CONSTANT]), ids=lambda method: method.name)
@pytest.mark.parametrize("last", [1.0, 0.3])
def test_rows_use_nothing_that_was_dropped(method: MultistepMethod, last: float) -> None:
    steps = torch.full((20,), 0.05, dtype=torch.float64)
    steps[-1] *= last
    slopes = increments = 0
    for row in unroll(method, steps).rows:
        slopes += row.evaluates
        assert all(lag < slopes for lag, _ in (*row.slopes, *row.guess))
        # The latest increment is at hand as a difference of states.
        assert all(lag < max(increments, 1) for lag, _ in row.increments)
        slopes += row.implicit is not None
        increments += row.is_node
        if row.keeps is not None:
            slopes, increments = min(slopes, row.keeps.slopes), min(increments, row.keeps.increments)


@pytest.mark.parametrize("method", slow_but([*FAST, *CONSTANT], [*METHODS, *CONSTANT]), ids=lambda method: method.name)
def test_memory_does_not_grow_with_the_steps(method: MultistepMethod) -> None:
    recurrence = unroll(method, torch.full((60,), 0.01, dtype=torch.float64))
    alive: list[weakref.ref[Tensor]] = []

    def slope(state: int, x: Tensor) -> Tensor:
        made = -x
        alive.append(weakref.ref(made))
        return made

    def solve(
        state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c = x if known is None else x + known
        made = -c / (1 + weight)
        alive.append(weakref.ref(made))
        return c + weight * made - x, made

    x0 = torch.ones((), dtype=torch.float64)
    counts = []
    for _, state in march(History(x0), recurrence.rows, slope, solve):
        assert torch.isfinite(state)
        counts.append(sum(made() is not None for made in alive))
    # Those of a predictor come between those of the nodes.
    assert max(counts[-40:]) <= 2 * max(method.order, method.steps)


@by_method
def test_only_the_start_keeps_everything(method: MultistepMethod) -> None:
    recurrence = unroll(method, random_steps(1, 12))
    kept = [row.keeps for row in recurrence.rows if row.is_node]
    start = START_LENGTHS[method.name]
    assert [keeps is None for keeps in kept] == [n + 1 < start for n in range(12)]
    assert len(set(kept[-3:])) == 1
    steady = kept[-1]
    assert isinstance(steady, Keeps)
    formula = method.on_equal_steps
    assert steady.increments == len(formula.increments)
    assert len(formula.slopes) - (not method.is_implicit) <= steady.slopes


def test_rows_that_are_equal_are_one() -> None:
    (method,) = (method for method in METHODS if method.name == "abm4")
    rows = unroll(method, torch.full((50,), 0.1, dtype=torch.float64)).rows
    assert len({id(row) for row in rows[-80:]}) == 2


# ------------------------------------------------------------------------------------------------- patterns of steps


@pytest.mark.parametrize(
    ("lengths", "patterns"),
    [
        ([1.0] * 12, 1),
        ([1.0] * 12 + [0.5], 2),
        ([1.0, 2.0] * 8, 2),
        ([1.0] * 8 + [0.5] * 8, 4),
        ([1.0, 1.0, 2.0] * 6, 3),
    ],
)
def test_the_formula_is_worked_out_once_for_every_pattern(lengths: list[float], patterns: int) -> None:
    calls: list[tuple[float, ...]] = []

    def formula(nodes: Nodes) -> Formula:
        calls.append(tuple(float(node) for node in nodes))
        return adams_bashforth_formula(3, nodes)

    method = MultistepMethod("counted", 3, 3, formula)
    assert method.on_equal_steps.implicit == 0
    calls.clear()
    unroll(method, torch.tensor(lengths, dtype=torch.float64))
    # Three steps make a pattern.
    assert len(calls) == patterns


def test_equal_steps_have_exact_weights() -> None:
    (method,) = (method for method in METHODS if method.name == "ab4")
    row = unroll(method, torch.full((9,), 0.25, dtype=torch.float64)).rows[-1]
    assert row.slopes == tuple(enumerate(0.25 * float(Fraction(b, 24)) for b in (55, -59, 37, -9)))


# -------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("count", [1, 3, 8])
@by_method
def test_the_weights_are_those_of_the_rows(method: MultistepMethod, count: int) -> None:
    steps = random_steps(3, count)
    assert unroll(method, steps).weights is None
    recurrence = unroll(method, steps.requires_grad_())
    assert recurrence.weights is not None
    assert recurrence.weights.requires_grad
    assert recurrence.weights.dtype is torch.float64
    expected = row_weights(recurrence.rows)
    assert recurrence.weights.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    differentiable = recurrence.differentiable_rows()
    assert row_weights(differentiable) == recurrence.weights.tolist()
    assert all(isinstance(weight, Tensor) for row in differentiable for weight in row.weights)
    assert [row.guess for row in differentiable] == [row.guess for row in recurrence.rows]
    assert [row._replace(increments=(), slopes=(), implicit=None) for row in differentiable] == [
        row._replace(increments=(), slopes=(), implicit=None) for row in recurrence.rows
    ]


def test_rows_without_a_gradient_are_themselves_differentiable() -> None:
    recurrence = unroll(METHODS[0], random_steps(3, 5))
    assert recurrence.differentiable_rows() is recurrence.rows


@pytest.mark.parametrize(
    "name", slow_but(["leapfrog", "abm3"], ["leapfrog", "ab4", "nystrom3", "abm3", "am4", "milne_simpson", "bdf4"])
)
def test_the_weights_are_differentiable(name: str) -> None:
    (method,) = (method for method in METHODS if method.name == name)
    steps = random_steps(5, START_LENGTHS[method.name] + 2, mean=1.0).requires_grad_()

    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(len(row_weights(unroll(method, steps).rows)), 2, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda steps: unroll(method, steps).weights @ mixing, (steps,))


def test_the_weights_are_differentiable_twice() -> None:
    steps = random_steps(5, 4, mean=1.0).requires_grad_()
    (method,) = (method for method in METHODS if method.name == "bdf2")
    assert torch.autograd.gradgradcheck(lambda steps: unroll(method, steps).weights, (steps,))


def test_times_between_nodes_are_differentiable() -> None:
    rows = unroll(METHODS[0], random_steps(0, 2)).rows
    recurrence = Recurrence(rows, [0.0, 0.5, 1.0, 1.25, 2.0], 0, None)
    nodes = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert recurrence.times(nodes).tolist() == [0.0, 0.5, 1.0, 1.5, 3.0]
    assert torch.autograd.gradcheck(recurrence.times, (nodes,))


# ----------------------------------------------------------------------------------------------- constant coefficients


@by_constant_method
@pytest.mark.parametrize("at", [0, 3, 7])
def test_constant_coefficients_need_equal_steps(method: MultistepMethod, at: int) -> None:
    steps = torch.full((9,), 0.1, dtype=torch.float64)
    steps[at] = 0.2
    with pytest.raises(ValueError, match="constant coefficients") as error:
        unroll(method, steps)
    message = str(error.value)
    assert method.name in message
    assert f"step {at or 1} has length {0.1 if at == 0 else 0.2}" in message
    assert f"step 0 has {0.2 if at == 0 else 0.1}" in message


@by_constant_method
def test_a_last_step_of_any_length_is_allowed(method: MultistepMethod) -> None:
    steps = torch.full((9,), 0.1, dtype=torch.float64)
    for last in (0.001, 0.07, 0.4):
        steps[-1] = last
        assert len(unroll(method, steps).nodes) == 10


def test_steps_of_the_start_may_differ() -> None:
    """On so few steps that the start makes them all, the constant coefficients are not used."""
    method = replace(constant("milne_simpson"), name="short")
    steps = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
    np.testing.assert_allclose(
        states_of(unroll(method, steps), steps), reference(constant("milne_simpson"), steps, 3), rtol=1e-10
    )


# --------------------------------------------------------------------------------------------------- growing steps

# Up to which ratio of all steps to the ones before the parasitic roots stay inside the unit circle.
LARGEST_GROWTH = {2: 1 + 2**0.5, 3: (1 + 5**0.5) / 2, 4: 1.280, 5: 1.127, 6: 1.044}


@pytest.mark.parametrize(("k", "limit"), LARGEST_GROWTH.items())
def test_a_bdf_method_is_refused_where_the_steps_grow_too_fast(k: int, limit: float) -> None:
    """The limits are those of Hairer, Nørsett, Wanner, III.5."""
    (method,) = (method for method in METHODS if method.name == f"bdf{k}")
    with pytest.raises(ValueError, match=f"method 'bdf{k}' is not stable on this grid") as error:
        unroll(method, 1e-3 * (1.1 * limit) ** torch.arange(300, dtype=torch.float64))
    stated = float(str(error.value).split("less than ")[1].split(" ")[0])
    assert stated == pytest.approx(limit, rel=2e-3)
    assert len(unroll(method, 1e-3 * (0.98 * limit) ** torch.arange(200, dtype=torch.float64)).nodes) == 201
