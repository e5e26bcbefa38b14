"""The theory of the methods against the book, and against what running them shows."""

from fractions import Fraction

import numpy as np
import pytest
from textbook import TEXTBOOK, Textbook

from torchdiffeq_lmm.schemes.methods import METHODS, Formula, MultistepMethod
from torchdiffeq_lmm.schemes.stability import (
    BoundaryLayer,
    boundary_layer_of,
    coefficients,
    defect,
    effective_weights,
    error_constant,
    is_strongly_stable,
    order,
    roots,
    unstable_root,
)

by_book = pytest.mark.parametrize("book", TEXTBOOK.values(), ids=TEXTBOOK)

# Their parasitic roots lie on the unit circle.
WEAKLY_STABLE = {"leapfrog", "nystrom3", "milne_simpson"}


def polynomial(*found: complex) -> tuple[Fraction, ...]:
    """The real coefficients, lowest first, of the monic polynomial with these roots, which are sixteenths."""
    return tuple(Fraction(round(16 ** len(found) * c.real), 16 ** len(found)) for c in np.poly(found)[::-1])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_coefficients_of_a_formula_in_increments(method: MultistepMethod) -> None:
    book = TEXTBOOK[method.name]
    assert coefficients(method.on_equal_steps, method.steps) == (book.alpha, book.beta)


def test_coefficients_of_a_formula_that_uses_fewer_than_all_steps() -> None:
    alpha, beta = coefficients(Formula((Fraction(1, 2),), (Fraction(3), Fraction(4)), Fraction(1, 3)), 4)
    assert alpha == (0, 0, Fraction(1, 2), Fraction(-3, 2), 1)
    assert beta == (0, 0, 4, 3, Fraction(1, 3))


@by_book
def test_order_and_error_constant(book: Textbook) -> None:
    assert order(book.alpha, book.beta) == book.order
    assert error_constant(book.alpha, book.beta) == book.error_constant


@by_book
def test_the_defect_is_what_a_monomial_misses(book: Textbook) -> None:
    for power in range(8):
        states = sum(a * j**power for j, a in enumerate(book.alpha))
        slopes = sum(b * (power * j ** (power - 1) if power else 0) for j, b in enumerate(book.beta))
        assert defect(book.alpha, book.beta, power) * np.prod(range(1, power + 1), dtype=object) == states - slopes
        if power <= book.order:
            assert states == slopes


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        ([1, 1], [0, 1], -1),
        ([-1, 1], [0, 2], 0),
        ([-1, 1], [Fraction(2, 5), Fraction(3, 5)], 1),
        # The method of highest order in three steps, 6, which no stable one has.
        ([-1, Fraction(-27, 11), Fraction(27, 11), 1], [Fraction(n, 11) for n in (3, 27, 27, 3)], 6),
    ],
)
def test_orders_of_other_formulas(alpha: list[Fraction], beta: list[Fraction], expected: int) -> None:
    exact = tuple(Fraction(a) for a in alpha), tuple(Fraction(b) for b in beta)
    assert order(*exact) == expected


def test_rounding_does_not_cost_an_order() -> None:
    book = TEXTBOOK["ab5"]
    alpha, beta = (tuple(Fraction(float(c)) for c in side) for side in (book.alpha, book.beta))
    assert beta != book.beta
    assert order(alpha, beta) == 5


@by_book
def test_roots_solve_the_equation(book: Textbook) -> None:
    found = roots(book.alpha)
    assert len(found) == len(book.alpha) - 1
    assert found[0] == pytest.approx(1, abs=1e-10)
    assert [abs(root) for root in found] == sorted((abs(root) for root in found), reverse=True) or found[1] == -1
    np.testing.assert_allclose(np.poly(found)[::-1], [float(a) for a in book.alpha], atol=1e-12)


def test_famous_roots() -> None:
    assert roots(TEXTBOOK["leapfrog"].alpha) == pytest.approx([1, -1])
    assert roots(TEXTBOOK["nystrom3"].alpha) == pytest.approx([1, -1, 0])
    assert roots(TEXTBOOK["ab4"].alpha) == pytest.approx([1, 0, 0, 0])
    assert roots(TEXTBOOK["bdf2"].alpha) == pytest.approx([1, 1 / 3])
    root = (7 + 1j * 39**0.5) / 22
    bdf3 = roots(TEXTBOOK["bdf3"].alpha)
    assert bdf3[0] == pytest.approx(1)
    assert {round(z.imag, 6) for z in bdf3[1:]} == {round(root.imag, 6), -round(root.imag, 6)}
    assert [z.real for z in bdf3[1:]] == pytest.approx([root.real] * 2)


@pytest.mark.parametrize("name", TEXTBOOK)
def test_only_leapfrog_and_its_kin_are_weakly_stable(name: str) -> None:
    assert is_strongly_stable(TEXTBOOK[name].alpha) == (name not in WEAKLY_STABLE)
    assert unstable_root(TEXTBOOK[name].alpha) is None


def test_bdf_methods_are_unstable_from_seven_steps_on() -> None:
    """Σ_{j=1}^k ∇^j x_{n+1} / j = h f_{n+1}: Cryer's theorem."""
    difference = np.array([Fraction(1), Fraction(-1)])
    for k in range(1, 9):
        power, total = np.array([Fraction(1)]), np.array([Fraction(0)] * (k + 1))
        for j in range(1, k + 1):
            power = np.convolve(power, difference)
            total[: j + 1] += power / j
        alpha = tuple(total[::-1] / total[0])
        found = unstable_root(alpha)
        assert (found is None) == (k <= 6)
        if found is not None:
            assert abs(found[0]) > 1.01
            assert found[1] == 1
            assert np.polyval([float(a) for a in alpha[::-1]], found[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("found", "root", "multiplicity"),
    [
        ((1, 1.25), 1.25, 1),
        ((1, -2), -2, 1),
        ((1, 1), 1, 2),
        ((1, -1, -1), -1, 2),
        ((1, 1, 1), 1, 3),
        ((1, 1j, -1j, 1j, -1j), 1j, 2),
        ((1, 0.5, 1.5j, -1.5j), 1.5j, 1),
        ((1, -1, -1, -1), -1, 3),
    ],
)
def test_roots_that_violate_the_root_condition(found: tuple[complex, ...], root: complex, multiplicity: int) -> None:
    unstable = unstable_root(polynomial(*found))
    assert unstable is not None
    assert complex(unstable[0].real, abs(unstable[0].imag)) == pytest.approx(root, abs=1e-4)
    assert unstable[1] == multiplicity


@pytest.mark.parametrize(
    "found", [(1, 0.5, 0.5), (1, -0.75, -0.75, -0.75), (1, 0, 0, 0), (1, -1, 1j, -1j), (1, 0.5j, -0.5j, 0.5j, -0.5j)]
)
def test_multiple_roots_inside_and_simple_ones_on_the_circle_are_allowed(found: tuple[complex, ...]) -> None:
    assert unstable_root(polynomial(*found)) is None
    assert is_strongly_stable(polynomial(*found)) == (-1 not in found)


def fractions(*texts: str) -> list[Fraction]:
    return [Fraction(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("ab1", fractions("0", "1", "1", "1", "1")),
        ("ab2", fractions("0", "3/2", "1", "1", "1")),
        ("ab3", fractions("0", "23/12", "7/12", "1", "1")),
        ("am2", fractions("1/2", "1", "1", "1", "1")),
        ("am3", fractions("5/12", "13/12", "1", "1", "1")),
        ("am4", fractions("3/8", "7/6", "23/24", "1", "1")),
        ("abm2", fractions("1/2", "1", "1", "1", "1")),
        ("leapfrog", fractions("0", "2", "0", "2", "0")),
        ("nystrom3", fractions("0", "7/3", "-2/3", "8/3", "-2/3")),
        # Simpson's rule.
        ("milne_simpson", fractions("1/3", "4/3", "2/3", "4/3", "2/3")),
        ("bdf1", fractions("1", "1", "1", "1", "1")),
        ("bdf2", fractions("2/3", "8/9", "26/27", "80/81", "242/243")),
    ],
)
def test_effective_weights(name: str, weights: list[Fraction]) -> None:
    """Gregory's quadrature, for Adams methods."""
    book = TEXTBOOK[name]
    assert effective_weights(book.alpha, book.beta, 5) == weights


@by_book
def test_effective_weights_are_what_an_impulse_leaves_behind(book: Textbook) -> None:
    """x' = f(t) with f = 1 at one node and 0 at the others."""
    k, count = len(book.alpha) - 1, 12
    for back in range(count):
        f = [Fraction(0)] * (k + count)
        f[-1 - back] = Fraction(1)
        x = [Fraction(0)] * k
        for n in range(count):
            slopes = sum(b * f[n + j] for j, b in enumerate(book.beta))
            x.append(slopes - sum(a * x[n + j] for j, a in enumerate(book.alpha[:-1])))
        assert effective_weights(book.alpha, book.beta, count)[back] == x[-1]


@pytest.mark.parametrize("name", sorted(WEAKLY_STABLE))
def test_weakly_stable_methods_oscillate_without_end(name: str) -> None:
    assert boundary_layer_of(TEXTBOOK[name].alpha, TEXTBOOK[name].beta) is None


@pytest.mark.parametrize(
    ("name", "length"),
    # The weights of an Adams method are 1 behind its own length, their convolution with themselves behind twice that.
    [("ab1", 1), ("bdf1", 0), *((f"ab{k}", 2 * k - 1) for k in range(2, 6)), *((f"am{k}", 2 * k - 3) for k in (2, 4))],
)
def test_layers_of_adams_methods_end(name: str, length: int) -> None:
    layer = boundary_layer_of(TEXTBOOK[name].alpha, TEXTBOOK[name].beta)
    assert isinstance(layer, BoundaryLayer)
    assert layer.length == length


def convolved(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    return [sum((a[j] * b[i - j] for j in range(i + 1)), Fraction(0)) for i in range(len(a))]


@pytest.mark.parametrize(
    "name", [name for name, book in TEXTBOOK.items() if name[:2] in ("ab", "am") and book.order > 1]
)
def test_the_second_order_of_an_adams_method_settles_near_the_observation(name: str) -> None:
    """For x' = λ x the cotangents have the terms w, w * w, w * w * w, exact here; the costate's last one is i² / 2."""
    w = effective_weights(TEXTBOOK[name].alpha, TEXTBOOK[name].beta, 40)
    rest = [u - Fraction(i * i, 2) for i, u in enumerate(convolved(convolved(w, w), w))]
    assert len(set(rest[20:])) == 1
    layer = boundary_layer_of(TEXTBOOK[name].alpha, TEXTBOOK[name].beta)
    assert layer is not None
    assert layer.near == max((i + 1 for i in range(40) if abs(rest[i] - rest[-1]) > Fraction(1, 2)), default=0)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-10])
@pytest.mark.parametrize("k", range(2, 7))
def test_layers_of_bdf_methods_die_out_with_the_largest_parasitic_root(k: int, tolerance: float) -> None:
    book = TEXTBOOK[f"bdf{k}"]
    layer = boundary_layer_of(book.alpha, book.beta, tolerance)
    assert isinstance(layer, BoundaryLayer)
    modulus = sorted(np.abs(np.roots([float(a) for a in book.alpha[::-1]])))[-2]
    assert layer.length == pytest.approx(np.log(tolerance) / np.log(modulus), rel=0.3, abs=6)
    weights = effective_weights(book.alpha, book.beta, layer.length + 30)
    assert all(abs(weight - 1) <= tolerance * Fraction(1001, 1000) for weight in weights[layer.length :])
    assert layer.near < layer.length
