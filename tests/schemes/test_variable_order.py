"""Rows and errors of the methods of variable order: against the textbook, polynomials and closed forms."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from math import comb, prod

import numpy as np
import pytest
from numpy.polynomial import Polynomial
from textbook import TEXTBOOK

from torchdiffeq_lmm.schemes.recurrence import Row
from torchdiffeq_lmm.schemes.variable_order import FAMILIES, Estimate, VariableOrderFamily

BDF, ADAMS = FAMILIES
BDF_ORDERS, ADAMS_ORDERS = range(1, 6), range(1, 13)
SEEDS = range(2)


def random_lengths(count: int, seed: int) -> tuple[float, ...]:
    """The latest first, with ratios between 1/2 and 2, in a unit of time of their own."""
    return tuple(0.3 * 2 ** np.random.default_rng(seed).uniform(-0.5, 0.5, count))


def nodes_of(lengths: Sequence[float], end: float = 0.7) -> np.ndarray:
    """t_{n+1}, t_n, ..."""
    return end - np.concatenate([[0.0], np.cumsum(lengths)])


def monomial(degree: int, about: float = 0.25) -> Polynomial:
    """(t - about)^degree."""
    return Polynomial([-about, 1.0]) ** degree


def increments_of(x: Callable[[np.ndarray], np.ndarray], nodes: np.ndarray) -> np.ndarray:
    """d_{n+1}, d_n, ..."""
    values = x(nodes)
    return values[:-1] - values[1:]


def slopes_by_lag(slopes: np.ndarray, count: int) -> np.ndarray:
    """As an Adams solve has them after its corrector: at what was predicted, and after it at what was corrected."""
    return np.repeat(slopes, 2)[1 : count + 1]


def value(estimate: Estimate | None, increments: np.ndarray, slopes: np.ndarray) -> float:
    assert estimate is not None
    parts = [weight * increments[lag] for lag, weight in estimate.increments]
    return sum(parts) + sum(weight * slopes[lag] for lag, weight in estimate.slopes)


def bdf_step(row: Row, x: Polynomial, nodes: np.ndarray) -> float:
    """What the row makes d_{n+1}, of the exact past and the exact new slope."""
    past = increments_of(x, nodes)[1:]
    assert row.implicit is not None
    return sum(weight * past[lag] for lag, weight in row.increments) + row.implicit * x.deriv()(nodes[0])


# --------------------------------------------------------------------------------------------------- equal steps


@pytest.mark.parametrize("order", BDF_ORDERS)
def test_bdf_on_equal_steps_is_as_printed(order: int) -> None:
    (row,) = BDF.rows(order, [0.5] * (order + 3))
    printed = TEXTBOOK[f"bdf{order}"]
    sums = list(accumulate(printed.alpha[::-1]))[1:-1]
    assert [weight for _, weight in row.increments] == pytest.approx([float(-s) for s in sums], rel=1e-14)
    assert [lag for lag, _ in row.increments] == list(range(order - 1))
    assert row.implicit == pytest.approx(0.5 * float(printed.beta[-1]), rel=1e-14)
    assert not row.slopes


def gammas(count: int, total: int) -> list[Fraction]:
    """Those of Adams's methods in backward differences: Σ_i γ_{m-i} / (i + 1) is `total`, but 1 for m = 0."""
    found: list[Fraction] = []
    for m in range(count):
        found.append((1 if m == 0 else total) - sum(found[m - i] * Fraction(1, i + 1) for i in range(1, m + 1)))
    return found


def in_slopes(coefficients: Sequence[Fraction]) -> list[float]:
    """Σ_j γ_j ∇^j f in the slopes, the latest first. Hairer, Nørsett, Wanner I, III.1."""
    k = len(coefficients)
    return [float((-1) ** i * sum(coefficients[j] * comb(j, i) for j in range(i, k))) for i in range(k)]


def test_the_closed_forms_are_those_printed() -> None:
    for k in range(1, 6):
        assert in_slopes(gammas(k, 1)) == [float(b) for b in TEXTBOOK[f"ab{k}"].beta[-2::-1]]
    for k in range(2, 6):
        assert in_slopes(gammas(k, 0)) == [float(b) for b in TEXTBOOK[f"am{k}"].beta[::-1]]


@pytest.mark.parametrize("order", ADAMS_ORDERS)
def test_adams_on_equal_steps_is_as_its_closed_form(order: int) -> None:
    predicted, corrected = ADAMS.rows(order, [0.5] * (order + 2))
    assert [lag for lag, _ in predicted.slopes] == [2 * i for i in range(order)]
    wanted = [0.5 * b for b in in_slopes(gammas(order, 1))]
    assert [weight for _, weight in predicted.slopes] == pytest.approx(wanted, rel=1e-11)
    assert [lag for lag, _ in corrected.slopes] == [0, *(2 * i + 1 for i in range(order))]
    wanted = [0.5 * b for b in in_slopes(gammas(order + 1, 0))]
    assert [weight for _, weight in corrected.slopes] == pytest.approx(wanted, rel=1e-11)
    for row in (predicted, corrected):
        assert row.evaluates
        assert row.implicit is None
        assert not row.increments
    assert corrected.is_node
    assert not predicted.is_node


# ------------------------------------------------------------------------------------------------- unequal steps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", BDF_ORDERS)
def test_bdf_is_exact_for_polynomials_of_its_order(order: int, seed: int) -> None:
    lengths = random_lengths(order + 1, seed)
    nodes = nodes_of(lengths)
    (row,) = BDF.rows(order, lengths)
    for degree in range(order + 1):
        x = monomial(degree)
        exact = increments_of(x, nodes)
        assert bdf_step(row, x, nodes) == pytest.approx(exact[0], abs=1e-12)
        predicted = sum(weight * exact[1:][lag] for lag, weight in row.predictor)
        assert predicted == pytest.approx(exact[0], abs=1e-12)
    x = monomial(order + 1)
    assert abs(bdf_step(row, x, nodes) - increments_of(x, nodes)[0]) > 1e-4 * lengths[0] ** (order + 1)


def test_the_first_bdf_step_is_guessed_by_its_slope() -> None:
    (row,) = BDF.rows(1, [0.3])
    assert row.evaluates
    assert row.guess == ((0, 1.0),)
    assert row.predictor == ()
    assert row.implicit == 0.3


def test_the_second_bdf_step_is_guessed_by_the_first() -> None:
    """Where the past reaches less far than the predictor would."""
    (row,) = BDF.rows(2, [0.3, 0.2])
    assert row.predictor == ((0, pytest.approx(1.5, rel=1e-14)),)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ADAMS_ORDERS)
def test_adams_is_exact_for_slopes_below_its_order(order: int, seed: int) -> None:
    lengths = random_lengths(order, seed)
    nodes = nodes_of(lengths)
    predicted, corrected = ADAMS.rows(order, lengths)
    for degree in range(order + 1):
        slope = monomial(degree)
        exact = float(slope.integ()(nodes[0]) - slope.integ()(nodes[1]))
        past = np.repeat(slope(nodes[1:]), 2)
        by_predictor = sum(weight * past[lag] for lag, weight in predicted.slopes)
        known = slopes_by_lag(slope(nodes), 2 * order)
        by_corrector = sum(weight * known[lag] for lag, weight in corrected.slopes)
        assert by_corrector == pytest.approx(exact, abs=1e-9 * max(map(abs, slope(nodes))))
        if degree < order:
            assert by_predictor == pytest.approx(exact, abs=1e-9 * max(map(abs, slope(nodes))))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_the_rows_keep_is_what_the_next_ones_and_the_errors_need(family: VariableOrderFamily) -> None:
    order = family.max_order
    lengths = (1.0,) * (order + 1)
    *_, last = family.rows(order, lengths)
    kept = last.keeps
    estimate = family.error(order, lengths)
    # Of the next step one slope is new before the first row, and another one before the second.
    for new, row in enumerate(family.rows(order, lengths), 1):
        assert max((lag for lag, _ in row.slopes), default=0) < kept.slopes + new
        assert max((lag for lag, _ in (*row.increments, *row.predictor)), default=0) < max(kept.increments, 1)
    assert max((lag for lag, _ in estimate.slopes), default=-1) < kept.slopes
    assert max((lag for lag, _ in estimate.increments), default=-1) < kept.increments


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", BDF_ORDERS)
def test_the_error_of_bdf(order: int, seed: int) -> None:
    """h Π (t_{n+1} - t_{n+1-i}) for t^{k+1}; and what the formula misses it by, in units of its implicit weight."""
    lengths = random_lengths(order + 1, seed)
    nodes = nodes_of(lengths)
    estimate = BDF.error(order, lengths)
    for degree in range(order + 1):
        assert value(estimate, increments_of(monomial(degree), nodes), np.array([])) == pytest.approx(0, abs=1e-12)
    x = monomial(order + 1)
    exact = increments_of(x, nodes)
    found = value(estimate, exact, np.array([]))
    assert found == pytest.approx(lengths[0] * prod(nodes[0] - nodes[1 : order + 1]), rel=1e-9)
    (row,) = BDF.rows(order, lengths)
    assert (exact[0] - bdf_step(row, x, nodes)) / (-row.implicit / lengths[0]) == pytest.approx(found, rel=1e-9)
    # It is the distance from the polynomial through the states before, in a part of it.
    distance = exact[0] - sum(weight * exact[1:][lag] for lag, weight in row.predictor)
    assert distance * lengths[0] / (nodes[0] - nodes[-1]) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("order", BDF_ORDERS)
def test_the_error_of_bdf_on_equal_steps_has_the_printed_constant(order: int) -> None:
    """k! h^{k+1} of t^{k+1}: -C (k + 1)! of the error constant C = -1 / (k + 1)."""
    h = 0.25
    found = value(BDF.error(order, [h] * 9), increments_of(monomial(order + 1), nodes_of([h] * 9)), np.array([]))
    wanted = -TEXTBOOK[f"bdf{order}"].error_constant * prod(range(1, order + 2)) * h ** (order + 1)
    assert found == pytest.approx(float(wanted), rel=1e-10)


def test_the_error_of_the_first_bdf_step() -> None:
    """h² / 2 x'' of t², by the slope at its beginning."""
    nodes, x = nodes_of([0.3]), monomial(2)
    found = value(BDF.error(1, [0.3]), increments_of(x, nodes), np.array([np.nan, x.deriv()(nodes[1])]))
    assert found == pytest.approx(0.3**2 / 2, rel=1e-12)
    linear = monomial(1)
    found = value(BDF.error(1, [0.3]), increments_of(linear, nodes), np.array([np.nan, 1.0]))
    assert found == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ADAMS_ORDERS)
def test_the_error_of_adams(order: int, seed: int) -> None:
    """∫ Π (t - t_{n+1-i}), i < k, for x' = t^k: what the polynomial through one slope more adds to the integral."""
    lengths = random_lengths(order, seed)
    nodes = nodes_of(lengths)
    estimate = ADAMS.error(order, lengths)
    for degree in range(order):
        slopes = monomial(degree)(nodes)
        found = value(estimate, np.array([]), slopes_by_lag(slopes, 2 * order))
        assert found == pytest.approx(0, abs=1e-9 * max(map(abs, slopes)))
    through = Polynomial.fromroots(nodes[:order] - nodes[1])
    wanted = float(through.integ()(lengths[0]))
    slopes = (nodes - nodes[1]) ** order
    found = value(estimate, np.array([]), slopes_by_lag(slopes, 2 * order))
    assert found == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_errors_of_orders_that_there_are_not(family: VariableOrderFamily) -> None:
    long = [1.0] * (family.max_order + 3)
    assert family.error(0, long) is None
    assert family.error(family.max_order + 1, long) is None
    assert family.error(family.max_order, long) is not None
    assert family.error(3, long[:2]) is None


def test_errors_as_far_as_the_past_reaches() -> None:
    """BDF need one state more than their formula, but in the first step."""
    assert [BDF.error(k, [1.0] * 3) is None for k in (1, 2, 3)] == [False, False, True]
    assert [BDF.error(k, [1.0]) is None for k in (1, 2)] == [False, True]
    assert [ADAMS.error(k, [1.0] * 3) is None for k in (1, 2, 3, 4)] == [False, False, False, True]


# ----------------------------------------------------------------------------------------------- growth, reach, kind


def bdf_increment_weights(order: int, lengths: Sequence[float]) -> np.ndarray:
    """e_0, e_1, ..., by differentiating the polynomial through the states numerically exactly."""
    nodes = nodes_of(lengths[:order], 0.0)
    slopes = np.linalg.solve(np.vander(nodes, increasing=True).T, np.eye(order + 1)[1])
    sums = np.cumsum(slopes)
    return -sums[1:-1] / sums[0]


def amplified(order: int, ratio: float, steps: int = 40) -> float:
    """The largest norm of the map of k - 1 increments over any run of steps, after which steps are longer for good."""
    lengths = [1.0] * order
    companions = []
    for _ in range(steps):
        lengths.insert(0, ratio)
        companion = np.eye(order - 1, k=-1)
        companion[0] = bdf_increment_weights(order, lengths)
        companions.append(companion)
    largest = 0.0
    for begin in range(order):
        product = np.eye(order - 1)
        for companion in companions[begin:]:
            product = companion @ product
            largest = max(largest, float(np.linalg.norm(product, 2)))
    return largest


def test_the_growth_of_bdf_amplifies_within_limits() -> None:
    growths = [BDF.largest_growth(order) for order in BDF_ORDERS]
    assert growths == sorted(growths, reverse=True)
    assert growths[0] == 10.0
    assert growths[-1] > 1.2
    for order, growth in zip(BDF_ORDERS, growths, strict=True):
        if order == 1:
            continue
        assert amplified(order, growth) <= 10.0
        if growth < 10.0:
            # Not much less than could be; the norms of a matrix differ by the root of its size.
            assert amplified(order, 1.1 * growth) > 10.0 / order**0.5


def test_the_growth_of_adams() -> None:
    """Shampine and Gordon's."""
    assert [ADAMS.largest_growth(order) for order in ADAMS_ORDERS] == [2.0] * 12


def test_what_the_families_are() -> None:
    assert (BDF.name, BDF.order, BDF.is_implicit, BDF.remembers_slopes, BDF.uses_first_slope) == (
        "bdf",
        5,
        True,
        False,
        False,
    )
    assert (ADAMS.name, ADAMS.order, ADAMS.is_implicit, ADAMS.remembers_slopes, ADAMS.uses_first_slope) == (
        "adams",
        12,
        False,
        True,
        True,
    )
    assert [BDF.reach(k) for k in BDF_ORDERS] == [1, 2, 3, 4, 5]
    assert [ADAMS.reach(k) for k in (1, 2, 12)] == [2, 3, 13]
