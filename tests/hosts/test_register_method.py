"""Methods of one's own: what is refused and why, and that what is accepted solves."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import slow_but
from problems import orders
from textbook import TEXTBOOK, Textbook, integral
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_lmm
from torchdiffeq_lmm import method_info, register_method
from torchdiffeq_lmm.hosts import registration

Coefficients = Sequence[float | Fraction]


pytestmark = pytest.mark.usefixtures("_method_tables")


def thirds(*numerators: int) -> list[Fraction]:
    return [Fraction(n, 3) for n in numerators]


# Stable methods that the package does not have, with their orders.
OWN: dict[str, tuple[Coefficients, Coefficients, int]] = {
    "theta": ([-1, 1], [0.4, 0.6], 1),
    "explicit, one strong parasitic root": ([Fraction(1, 2), Fraction(-3, 2), 1], [0, Fraction(1, 2), 0], 1),
    "extrapolated Gear": (thirds(1, -4, 3), thirds(-2, 4, 0), 2),
    "Nyström 4": ([0, 0, -1, 0, 1], thirds(-1, 4, -5, 8, 0), 4),
    "open Newton-Cotes": ([-1, 0, 0, 1], [0.75, 0, 2.25, 0], 3),
    "backward differences 3": ([Fraction(n, 11) for n in (-2, 9, -18, 11)], [0, 0, 0, Fraction(6, 11)], 3),
    "Milne-Simpson": ([-1, 0, 1], thirds(1, 4, 1), 4),
    "Adams-Moulton 5": (TEXTBOOK["am5"].alpha, TEXTBOOK["am5"].beta, 5),
}
by_own = pytest.mark.parametrize(("alpha", "beta", "order"), OWN.values(), ids=OWN)


def error_of(method: str, steps: int, last: float = 1.0) -> float:
    """The largest one for x' = x cos t, x(0) = 1, up to 2 by equal steps but for the last one, of another length."""
    t = torch.arange(steps + 1, dtype=torch.float64) * 2 / steps
    t[-1] -= (1 - last) * 2 / steps
    y = torchdiffeq.odeint(
        lambda time, y: y * torch.cos(time),
        torch.ones((), dtype=torch.float64),
        t,
        method=method,
        rtol=1e-11,
        atol=1e-13,
        options={"step_size": 2 / steps},
    )
    return float((y - t.sin().exp()).abs().max())


# -------------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("alpha", "beta", "order"),
    # Those that are implicit take ten times as long.
    [pytest.param(*own, id=name, marks=[pytest.mark.slow] * bool(own[1][-1])) for name, own in OWN.items()],
)
@pytest.mark.parametrize("last", slow_but([0.4], [1.0, 0.4]))
def test_they_solve_with_their_order_whatever_the_last_step(
    alpha: Coefficients, beta: Coefficients, order: int, last: float
) -> None:
    assert register_method("mine", alpha, beta).order == order
    errors = [error_of("mine", steps, last) for steps in (40, 80)]
    assert orders(errors) == pytest.approx([order], abs=0.3), errors


@pytest.mark.parametrize(
    ("name", "closing"), [("milne_simpson", slice(-4, None)), ("am3", slice(-3, None)), ("nystrom3", slice(-4, -1))]
)
def test_a_truncated_last_step_is_one_of_the_adams_method_of_the_same_order(name: str, closing: slice) -> None:
    register_method("mine", TEXTBOOK[name].alpha, TEXTBOOK[name].beta)
    t = torch.arange(11, dtype=torch.float64) / 10
    t[-1] = 0.94
    y = torchdiffeq.odeint(lambda t, y: torch.exp(t) + 0 * y, torch.zeros((), dtype=torch.float64), t, method="mine")
    nodes = t[closing].numpy()
    expected = integral(nodes, np.exp(nodes)[:, None], 0.9, 0.94)
    assert float(y[-1] - y[-2]) == pytest.approx(expected[0], rel=1e-11)


@by_own
def test_other_grids_are_refused(alpha: Coefficients, beta: Coefficients, order: int) -> None:
    info = register_method("mine", alpha, beta)
    assert not info.any_grid
    assert "equal steps; the last one may differ" in str(info)
    t = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9])
    with pytest.raises(ValueError, match="'mine' is given by constant coefficients"):
        torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), t, method="mine")


@pytest.mark.parametrize("book", TEXTBOOK.values(), ids=TEXTBOOK)
def test_what_is_known_of_them(book: Textbook) -> None:
    if book.alpha[0] == book.beta[0] == 0:
        book = Textbook(book.order, book.alpha[1:], book.beta[1:], book.error_constant)
    info = register_method("mine", book.alpha, book.beta)
    assert (info.name, info.order, info.error_constant) == ("mine", book.order, book.error_constant)
    assert (info.alpha, info.beta, info.steps) == (book.alpha, book.beta, len(book.alpha) - 1)
    assert info.kind == ("implicit" if book.beta[-1] else "explicit")
    assert info == method_info("mine")


@pytest.mark.parametrize("name", ["ab3", "am4", "bdf5", "bdf6", "nystrom3"])
def test_floats_are_the_fractions_they_mean(name: str) -> None:
    book = TEXTBOOK[name]
    info = register_method("mine", [float(a) for a in book.alpha], [float(b) for b in book.beta])
    assert (info.alpha, info.beta, info.error_constant) == (book.alpha, book.beta, book.error_constant)


def test_numbers_of_numpy_are_real_numbers() -> None:
    info = register_method("mine", np.array([1, -4, 3]) / 3, [np.float32(0), 0, np.float64(2 / 3)])
    assert info.alpha == TEXTBOOK["bdf2"].alpha
    assert info.beta == TEXTBOOK["bdf2"].beta


def test_an_irrational_coefficient_is_kept_to_the_last_digit() -> None:
    theta = math.pi / 7
    info = register_method("mine", [-1, 1], [1 - theta, theta])
    assert info.order == 1
    assert [float(b) for b in info.beta] == [1 - theta, theta]


@pytest.mark.parametrize("factor", [3, -2, Fraction(5, 7), 0.1])
def test_a_common_factor_does_not_matter(factor: float | Fraction) -> None:
    book = TEXTBOOK["bdf3"]
    info = register_method("mine", [factor * a for a in book.alpha], [factor * b for b in book.beta])
    assert (info.alpha, info.beta) == (book.alpha, book.beta)


# ----------------------------------------------------------------------------------------------------------- the tables


def test_registering_the_same_method_again_changes_nothing() -> None:
    first = register_method("mine", [-1, 0, 1], thirds(1, 4, 1))
    tables = dict(SOLVERS), dict(registration.ODE_SOLVERS)
    assert register_method("mine", [-3.0, 0.0, 3.0], [1, 4, 1]) == first
    assert (dict(SOLVERS), dict(registration.ODE_SOLVERS)) == tables


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        ("mine", [-1, 0, 1], [0, 2, 0]),
        ("ab2", [0, -1, 1], [Fraction(-1, 3), Fraction(4, 3), 0]),
        ("filtered_heun2", [-1, 1], [1, 0]),
    ],
)
def test_a_name_is_not_given_twice(name: str, alpha: Coefficients, beta: Coefficients) -> None:
    register_method("mine", [-1, 0, 1], thirds(1, 4, 1))
    tables = dict(SOLVERS), dict(registration.ODE_SOLVERS)
    with pytest.raises(ValueError, match=f"name must be new, got '{name}'"):
        register_method(name, alpha, beta)
    assert (dict(SOLVERS), dict(registration.ODE_SOLVERS)) == tables


def test_a_method_of_the_package_registered_as_ones_own_stays_what_it_is() -> None:
    assert register_method("ab2", [0, -1, 1], [-0.5, 1.5, 0]).any_grid
    assert method_info("ab2").any_grid


@pytest.mark.parametrize("name", ["euler", "dopri5"])
def test_methods_of_torchdiffeq_are_not_replaced(name: str) -> None:
    before = SOLVERS[name]
    with pytest.raises(RuntimeError, match=f"torchdiffeq already has a method '{name}'"):
        register_method(name, [-1, 1], [1, 0])
    assert SOLVERS[name] is before
    assert name not in registration.ODE_SOLVERS


def test_they_come_and_go_with_the_others() -> None:
    register_method("mine", [-1, 1], [Fraction(2, 5), Fraction(3, 5)])
    before = error_of("mine", 10)
    torchdiffeq_lmm.unregister()
    with pytest.raises(ValueError, match='Invalid method "mine"'):
        error_of("mine", 10)
    assert method_info("mine").order == 1
    torchdiffeq_lmm.register()
    assert error_of("mine", 10) == before


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(alpha: object, beta: object, error: type[Exception], *parts: str, name: object = "mine") -> None:
    tables = dict(SOLVERS), dict(registration.ODE_SOLVERS)
    with pytest.raises(error) as raised:
        register_method(name, alpha, beta)
    for part in parts:
        assert part in str(raised.value)
    assert (dict(SOLVERS), dict(registration.ODE_SOLVERS)) == tables


@pytest.mark.parametrize("name", [None, 3, b"mine", ["mine"]])
def test_names_of_another_type(name: object) -> None:
    refused([-1, 1], [1, 0], TypeError, "name must be a string", repr(name), name=name)


def test_the_empty_name() -> None:
    refused([-1, 1], [1, 0], ValueError, "name must not be empty", name="")


@pytest.mark.parametrize("wrong", ["1", None, 1j, True, torch.tensor(1.0), [1.0]], ids=repr)
@pytest.mark.parametrize("argument", ["alpha", "beta"])
def test_coefficients_that_are_not_real_numbers(argument: str, wrong: object) -> None:
    coefficients = {"alpha": [-1, 1], "beta": [0, 1], argument: [-1, wrong]}
    refused(coefficients["alpha"], coefficients["beta"], TypeError, f"{argument}[1] must be a real number", repr(wrong))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["alpha", "beta"])
def test_coefficients_that_are_not_finite(argument: str, wrong: float) -> None:
    coefficients = {"alpha": [-1, 1], "beta": [0, 1], argument: [wrong, 1]}
    refused(coefficients["alpha"], coefficients["beta"], ValueError, f"{argument}[0] must be finite", str(wrong))


@pytest.mark.parametrize(("alpha", "beta"), [([-1, 1], [1]), ([-1, 1], [0, 1, 0]), ([1], [1]), ([], [])])
def test_wrong_lengths(alpha: Coefficients, beta: Coefficients) -> None:
    refused(alpha, beta, ValueError, "the same length", "at least 2", f"got {len(alpha)} and {len(beta)}")


def test_a_last_alpha_of_zero() -> None:
    refused([-1, 1, 0], [0, 1, 0], ValueError, "alpha[-1] must not be 0")


def test_a_method_of_fewer_steps() -> None:
    refused([0, -1, 1], [0, 1, 0], ValueError, "alpha[0] and beta[0] must not both be 0", "fewer steps")


@pytest.mark.parametrize(
    ("alpha", "beta", "total"),
    [([1, 1], [0, 1], "2"), ([0, 0, 3], [1, 1, 1], "1"), ([-1.25, 0.5, 0.5], [0, 1, 0], "-0.5")],
)
def test_inconsistency_of_alpha(alpha: Coefficients, beta: Coefficients, total: str) -> None:
    refused(alpha, beta, ValueError, "rho(1) = 0", f"got {total}")


@pytest.mark.parametrize(
    ("alpha", "beta", "derivative", "total"),
    [([-1, 1], [1, 1], "1", "2"), ([-2, 0, 2], [0, 1, 0], "2", "0.5"), ([-1, 0, 0, 1], [0, 0, 0, 1], "3", "1")],
)
def test_inconsistency_of_beta(alpha: Coefficients, beta: Coefficients, derivative: str, total: str) -> None:
    refused(alpha, beta, ValueError, "rho'(1) = sigma(1)", f"is {derivative},", f"of beta {total}")


def consistent(*roots: complex) -> tuple[list[float], list[float]]:
    """α with these roots, and β = (0, ..., ρ'(1), 0)."""
    alpha = np.poly(roots).real[::-1].tolist()
    slope = sum(j * a for j, a in enumerate(alpha))
    return alpha, [0.0] * (len(alpha) - 2) + [slope, 0.0]


@pytest.mark.parametrize(
    ("roots", "shown", "multiplicity"),
    [
        ((1, 1.5), "1.5", 1),
        ((1, -2), "-2", 1),
        ((1, 0.5, -1.25), "-1.25", 1),
        ((1, 2j, -2j), "2j", 1),
        ((1, 3, 3), "3", 2),
    ],
)
def test_a_root_outside_the_unit_circle(roots: tuple[complex, ...], shown: str, multiplicity: int) -> None:
    alpha, beta = consistent(*roots)
    parts = ("root condition", shown, f"multiplicity {multiplicity}", "lies outside the unit circle")
    refused(alpha, beta, ValueError, *parts)


@pytest.mark.parametrize(
    ("roots", "shown", "modulus"),
    [
        ((1, -1, -1), "root -1 of", "1"),
        ((1, 1j, 1j, -1j, -1j), "1j", "1"),
        ((1, 0.6 + 0.8j, 0.6 + 0.8j, 0.6 - 0.8j, 0.6 - 0.8j), "0.6", "1"),
    ],
)
def test_a_double_root_on_the_unit_circle(roots: tuple[complex, ...], shown: str, modulus: str) -> None:
    alpha, beta = consistent(*roots)
    refused(alpha, beta, ValueError, "root condition", shown, "multiplicity 2", "lies on the unit circle")


def test_a_double_root_at_one() -> None:
    refused([1, -2, 1], [-1, 1, 0], ValueError, "root condition", "root 1 of", "multiplicity 2", "on the unit circle")


@pytest.mark.parametrize("k", [7, 8])
def test_backward_differences_of_seven_steps_and_more(k: int) -> None:
    """Σ_{j=1}^k ∇^j x_{n+1} / j = h f_{n+1} is unstable."""
    alpha = np.zeros(k + 1)
    power = np.ones(1)
    for j in range(1, k + 1):
        power = np.convolve(power, [-1.0, 1.0])
        alpha[k - j :] += power / j
    refused(alpha, [*[0.0] * k, 1.0], ValueError, "root condition", "outside the unit circle")


@pytest.mark.parametrize("options", [None, {"step_size": 0.2}, {"step_size": 0.13}])
def test_a_method_of_ones_own_with_a_gradient_to_t(options: dict[str, float] | None) -> None:
    register_method("own", [-1, 0, 1], [0, 2, 0])
    results = []
    for requires_grad in (False, True):
        t = torch.linspace(0, 1, 6, dtype=torch.float64).requires_grad_(requires_grad)
        y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, method="own", options=options)
        results.append(y.detach())
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)
    y[-1].sum().backward()
    assert torch.isfinite(t.grad).all()


def test_integers_of_numpy_are_integers() -> None:
    assert register_method("own", np.array([-1, 0, 1]), np.array([0, 2, 0])).alpha == (-1, 0, 1)


def test_what_is_no_sequence_is_refused() -> None:
    with pytest.raises(TypeError, match="alpha must be a sequence of real numbers, got None"):
        register_method("own", None, [1, 0])


def test_registered_again_after_unregister_it_is_back() -> None:
    register_method("own", [-1, 0, 1], [0, 2, 0])
    torchdiffeq_lmm.unregister()
    register_method("own", [-1, 0, 1], [0, 2, 0])
    torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), torch.linspace(0, 1, 5), method="own")
