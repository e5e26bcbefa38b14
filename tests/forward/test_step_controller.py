"""Order and length of the next step, from the errors of the last one."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from torchdiffeq_lmm.forward.step_controller import StepControl, StepController
from torchdiffeq_lmm.schemes.variable_order import FAMILIES, VariableOrderFamily

BDF, ADAMS = FAMILIES
FREE = StepControl(
    first_step=None,
    min_step=0.0,
    max_step=math.inf,
    safety=0.9,
    ifactor=10.0,
    dfactor=0.2,
    max_num_steps=1000,
    max_order=5,
)
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def begun(family: VariableOrderFamily = ADAMS, first_step: float = 1.0, **control: Any) -> StepController:
    return StepController(family, replace(FREE, **control), first_step)


def settled(order: int = 2, family: VariableOrderFamily = ADAMS, **control: Any) -> StepController:
    """After its start, at an order, with a step of length 1, of which one has been accepted."""
    controller = begun(family, **control)
    controller.order, controller.step = order, 1.0
    controller._starts = False
    controller.accept(controller.proposed(), 0.5, None, None)
    return controller


def take(controller: StepController, own: float, lower: float | None = None, higher: float | None = None) -> float:
    """Accept the step that is proposed, with errors that are given where they count."""
    step = controller.proposed()
    compares = controller.compares
    has_lower = compares and controller.order > 1
    controller.accept(step, own, lower if has_lower else None, higher if compares else None)
    return step


# --------------------------------------------------------------------------------------------------------- the start


@families
def test_it_begins_with_order_1(family: VariableOrderFamily) -> None:
    controller = begun(family, 0.125)
    assert controller.order == 1
    assert controller.proposed() == 0.125
    assert controller.compares


@pytest.mark.parametrize(
    ("family", "orders"), [(ADAMS, [1, 2, 3, 4, 5, 5]), (BDF, [1, 1, 2, 3, 4, 5])], ids=["adams", "bdf"]
)
def test_order_and_length_rise_with_every_step_at_first(family: VariableOrderFamily, orders: list[int]) -> None:
    controller = begun(family)
    taken, lengths = [], []
    for _ in orders:
        taken.append(controller.order)
        lengths.append(take(controller, 1e-6, 1e-3, 1e-9))
    assert taken == orders
    assert all(after > before for before, after in pairwise(lengths[:-1]))


def test_the_start_ends_where_a_lower_order_would_do_better() -> None:
    controller = begun(ADAMS)
    take(controller, 1e-6, None, 1e-8)
    assert controller.order == 2
    take(controller, 0.9, 0.3, 0.95)
    assert controller.order == 1
    assert not controller.compares


def test_the_step_doubles_every_time_as_long_as_errors_allow_it() -> None:
    """After a start whose order has risen, as in Shampine and Gordon's program."""
    controller = begun(ADAMS)
    lengths, taken = [], []
    # Here a lower order allows the longer step: 0.9 / 1e-8^(1/2) against 0.9 / 1e-8^(1/3), then 0.9 / 0.5^(1/2).
    for own, lower, higher in ((1e-6, None, 1e-9), (1e-8, 1e-8, 1e-9), (1e-8, None, 0.1), (1e-8, None, 1e-9)):
        taken.append(controller.order)
        lengths.append(take(controller, own, lower, higher))
        assert controller.compares
    assert taken == [1, 2, 1, 1]
    assert [after / before for before, after in pairwise(lengths)] == [2.0, 2.0, 2.0]
    take(controller, 0.5)
    assert not controller.compares


def test_the_start_ends_with_a_failure() -> None:
    controller = begun(ADAMS)
    controller.reject(controller.proposed(), 2.0, None)
    assert not controller.compares


# -------------------------------------------------------------------------------------------------------- acceptance


@families
@pytest.mark.parametrize("order", [1, 3, 5])
def test_order_and_length_stay_for_one_step_more_than_the_order(family: VariableOrderFamily, order: int) -> None:
    controller = settled(order, family)
    for _ in range(order - 1):
        assert not controller.compares
        assert take(controller, 1e-9) == 1.0
        assert controller.order == order
    assert controller.compares
    take(controller, 1e-9, 1.0, 1.0)
    assert controller.step > 1.0


def compared(own: float, lower: float | None, higher: float | None, order: int = 2, **control: Any) -> StepController:
    """After the errors of a step have been compared."""
    controller = settled(order, **control)
    while not controller.compares:
        take(controller, 0.5)
    take(controller, own, lower, higher)
    return controller


@pytest.mark.parametrize(
    ("errors", "order"),
    [((0.1, 0.5, 0.4), 2), ((0.3, 0.1, 0.9), 1), ((0.3, 0.9, 0.05), 3), ((0.3, None, None), 2), ((0.3, None, 0.01), 3)],
)
def test_the_order_that_allows_the_longest_step_is_taken(
    errors: tuple[float, float | None, float | None], order: int
) -> None:
    """safety / error^{1 / (k + 1)}."""
    controller = compared(*errors)
    own, lower, higher = errors
    factors = {k: 0.9 / error ** (1 / (k + 1)) for k, error in ((1, lower), (2, own), (3, higher)) if error is not None}
    assert max(factors, key=factors.__getitem__) == order
    assert controller.order == order
    assert controller.step == pytest.approx(min(2.0, factors[order]), rel=1e-12)


def test_a_step_that_would_be_little_longer_stays() -> None:
    assert compared(0.45, 1.0, 1.0).step == 1.0
    assert compared(0.4, 1.0, 1.0).step == pytest.approx(0.9 / 0.4 ** (1 / 3), rel=1e-12)
    assert 0.9 / 0.45 ** (1 / 3) < 1.2 < 0.9 / 0.4 ** (1 / 3)


def test_a_step_becomes_shorter_at_once() -> None:
    controller = compared(0.9, 1.0, 1.0)
    assert controller.step == pytest.approx(0.9 / 0.9 ** (1 / 3), rel=1e-12)
    assert controller.order == 2


def test_an_error_of_0_allows_as_long_a_step_as_there_may_be() -> None:
    assert compared(0.0, 0.5, 0.5).step == 2.0


@pytest.mark.parametrize("safety", [0.5, 0.75])
def test_safety(safety: float) -> None:
    assert compared(0.01, 1.0, 1.0, safety=safety).step == pytest.approx(min(2.0, safety / 0.01 ** (1 / 3)), rel=1e-12)


def test_ifactor() -> None:
    assert compared(1e-12, 1.0, 1.0, ifactor=1.5).step == 1.5
    controller = begun(ADAMS, ifactor=1.25)
    lengths = [take(controller, 1e-9, 1.0, 1e-9) for _ in range(4)]
    assert lengths == pytest.approx([1.0, 1.25, 1.25**2, 1.25**3], rel=1e-12)


@families
@pytest.mark.parametrize("order", [2, 4])
def test_no_step_grows_by_more_than_the_method_bears(family: VariableOrderFamily, order: int) -> None:
    controller = settled(order, family)
    while not controller.compares:
        take(controller, 0.5)
    take(controller, 1e-15, 1.0, 1.0)
    assert controller.proposed() == pytest.approx(family.largest_growth(order), rel=1e-12)


def test_after_a_short_step_the_next_is_no_longer_than_the_method_bears() -> None:
    controller = settled(2)
    controller.accept(0.125, 0.5, None, None)
    assert controller.proposed() == 0.25


@families
def test_a_step_that_was_cut_short_changes_nothing(family: VariableOrderFamily) -> None:
    controller = settled(3, family)
    while not controller.compares:
        take(controller, 0.5)
    controller.accept(0.9 * controller.proposed(), 1e-12, 1e-15, 1e-15)
    assert (controller.order, controller.proposed()) == (3, 1.0)
    # Equal steps are counted anew.
    for _ in range(3):
        assert not controller.compares
        take(controller, 0.5)
    assert controller.compares


def test_the_start_goes_on_after_a_step_that_was_cut_short() -> None:
    controller = begun(ADAMS)
    controller.proposed()
    controller.accept(0.75, 1e-9, None, 1e-9)
    assert (controller.order, controller.compares) == (1, True)
    assert controller.proposed() == 1.0


# ---------------------------------------------------------------------------------------------- rejection and failure


def test_a_rejected_step_becomes_shorter_by_its_error() -> None:
    controller = settled(2)
    controller.reject(1.0, 8.0, None)
    assert controller.order == 2
    assert controller.proposed() == pytest.approx(0.9 / 2, rel=1e-12)


def test_a_rejected_step_becomes_shorter_by_a_tenth_at_least() -> None:
    controller = settled(2, safety=1.0)
    controller.reject(1.0, 1.0001, None)
    assert controller.proposed() == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_attempt_is_shorter_whatever_dfactor_is(fails: bool) -> None:
    controller = settled(2, BDF, dfactor=1.0)
    if fails:
        controller.fail(1.0)
    else:
        controller.reject(1.0, 1e9, None)
    assert controller.proposed() == 0.9


@pytest.mark.parametrize("error", [1e12, math.nan, math.inf])
def test_dfactor(error: float) -> None:
    controller = settled(2, dfactor=0.125)
    controller.reject(1.0, error, None)
    assert controller.proposed() == 0.125


def test_the_attempt_that_was_cut_short_is_what_becomes_shorter() -> None:
    controller = settled(2)
    controller.reject(0.5, 8.0, None)
    assert controller.proposed() == pytest.approx(0.9 / 4, rel=1e-12)


def test_a_lower_order_that_has_a_smaller_error_is_taken_after_a_rejection() -> None:
    controller = settled(3)
    controller.reject(1.0, 64.0, 8.0)
    assert controller.order == 2
    assert controller.proposed() == pytest.approx(0.9 / 2, rel=1e-12)
    controller = settled(3)
    controller.reject(1.0, 16.0, 20.0)
    assert controller.order == 3
    assert controller.proposed() == pytest.approx(0.9 / 2, rel=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_after_three_failures_order_1_begins_anew(fails: bool) -> None:
    controller = settled(4)
    orders = []
    for _ in range(3):
        step = controller.proposed()
        if fails:
            controller.fail(step)
        else:
            controller.reject(step, 2.0, None)
        orders.append(controller.order)
    assert orders == [4, 4, 1]


def test_failures_are_counted_at_one_node() -> None:
    controller = settled(4)
    for _ in range(2):
        controller.reject(controller.proposed(), 2.0, None)
    take(controller, 0.5)
    controller.reject(controller.proposed(), 2.0, None)
    assert controller.order == 4


@pytest.mark.parametrize(("dfactor", "factor"), [(0.2, 0.5), (0.7, 0.7)])
def test_an_equation_that_was_not_solved_halves_the_step(dfactor: float, factor: float) -> None:
    controller = settled(3, BDF, dfactor=dfactor)
    controller.fail(1.0)
    assert controller.order == 3
    assert controller.proposed() == pytest.approx(factor, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ limits


def test_min_step_and_max_step() -> None:
    assert begun(first_step=1e-3, min_step=0.01).proposed() == 0.01
    assert begun(first_step=5.0, max_step=2.0).proposed() == 2.0
    controller = settled(2, max_step=1.5)
    while not controller.compares:
        take(controller, 0.5)
    take(controller, 1e-12, 1.0, 1.0)
    assert controller.proposed() == 1.5
    controller = settled(2, min_step=0.5)
    controller.reject(1.0, 1e9, None)
    assert controller.proposed() == 0.5


@families
@pytest.mark.parametrize("max_order", [1, 3, None])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.one_in(5)
def test_whatever_the_errors_are(family: VariableOrderFamily, max_order: int | None, seed: int) -> None:
    """Random errors, failures and cuts: orders and lengths stay within their limits."""
    highest = max_order or family.max_order
    controller = begun(family, 0.1, max_order=highest, min_step=1e-4, max_step=7.0, ifactor=3.0)
    draw, last = np.random.default_rng(seed), None
    orders = set()
    for _ in range(800):
        assert 1 <= controller.order <= highest
        orders.add(controller.order)
        step = controller.proposed()
        assert 1e-4 <= step <= 7.0
        if last is not None:
            longest = min(3.0, family.largest_growth(controller.order)) * last
            assert step <= max(longest * (1 + 1e-12), 1e-4)
        own = float(10 ** draw.uniform(-4, 0.2))
        lower, higher = (own * float(10 ** draw.uniform(*between)) for between in ((-0.5, 2), (-2, 0.5)))
        compares = controller.compares
        kind = draw.integers(40)
        if kind == 0:
            controller.fail(step)
        elif own > 1:
            controller.reject(step, own, lower if compares and controller.order > 1 else None)
        else:
            last = step * (0.5 if kind == 1 else 1.0)
            controller.accept(
                last,
                own,
                lower if compares and controller.order > 1 else None,
                higher if compares and controller.order < family.max_order else None,
            )
    assert max(orders) == highest
