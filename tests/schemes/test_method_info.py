"""What is told of a method, against the book."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from methods import FAMILIES, slow_but
from textbook import TEXTBOOK

import torchdiffeq_lmm
from torchdiffeq_lmm import MethodInfo, method_info

by_name = pytest.mark.parametrize("name", TEXTBOOK)
by_solves = pytest.mark.parametrize("name", slow_but(FAMILIES, TEXTBOOK))
"""For tests that solve by every method."""

OSCILLATION = {
    **dict.fromkeys(("leapfrog", "nystrom3", "milne_simpson"), "everywhere"),
    **dict.fromkeys(("ab1", "bdf1"), "nowhere"),
}


@by_name
def test_the_theory_is_that_of_the_book(name: str) -> None:
    info, book = method_info(name), TEXTBOOK[name]
    assert info.name == name
    assert (info.order, info.error_constant) == (book.order, book.error_constant)
    assert (info.alpha, info.beta, info.steps) == (book.alpha, book.beta, len(book.alpha) - 1)
    assert info.roots[0] == pytest.approx(1, abs=1e-9)
    assert len(info.roots) == info.steps
    assert info.any_grid


@by_name
def test_kind_and_evaluations(name: str) -> None:
    info = method_info(name)
    if name.startswith("abm"):
        assert (info.kind, info.evaluations) == ("predictor-corrector", 2)
    elif name.startswith(("am", "bdf", "milne")):
        assert (info.kind, info.evaluations) == ("implicit", None)
    else:
        assert (info.kind, info.evaluations) == ("explicit", 1)


@by_solves
@pytest.mark.one_in(3)
def test_evaluations_are_those_of_a_step(name: str) -> None:
    evaluations = method_info(name).evaluations
    counts = []
    for end in (1.0, 1.5):
        calls: list[float] = []

        def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            calls.append(float(t))
            return torch.sin(y) * torch.cos(t)

        t = torch.linspace(0, end, round(20 * end) + 1, dtype=torch.float64)
        torchdiffeq.odeint(func, torch.ones(2, dtype=torch.float64), t, method=name)
        counts.append(len(calls))
    per_step = (counts[1] - counts[0]) / 10
    if evaluations is None:
        assert 1 <= per_step <= 6
    else:
        assert per_step == evaluations


@by_solves
def test_weights_and_oscillation(name: str) -> None:
    """For constant f, the weights are what auto-differentiation gives to a parameter of every node."""
    info, steps = method_info(name), 40
    assert info.oscillation == OSCILLATION.get(name, "near observations")
    theta = torch.zeros(steps + 1, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, steps, steps + 1, dtype=torch.float64)
    y = torchdiffeq.odeint(
        lambda time, y: theta[round(float(time))] + 0 * y, torch.zeros((), dtype=torch.float64), t, method=name
    )
    (grad,) = torch.autograd.grad(y[-1], theta)
    backwards = grad.flip(0).tolist()
    if not name.startswith("abm"):
        assert [float(weight) for weight in info.weights] == pytest.approx(backwards[: len(info.weights)], abs=1e-9)
    inside = [weight - 1 for weight in backwards[15:25]]
    if info.oscillation == "everywhere":
        assert min(inside) < -0.1
        assert max(inside) > 0.1
    elif not name.startswith("bdf"):
        assert inside == pytest.approx([0] * 10, abs=1e-9)
    near = [weight - 1 for weight in backwards[1:15]]
    if info.oscillation == "nowhere":
        assert near == pytest.approx([0] * 14, abs=1e-9)


@by_name
def test_a_parasitic_solution_is_found_where_a_small_decay_makes_a_root_grow(name: str) -> None:
    """The roots of ρ(z) + h σ(z), which the method goes by in y' = -y."""
    book, h = TEXTBOOK[name], 1e-5
    combined = [float(a + Fraction(1, 10**5) * b) for a, b in zip(book.alpha, book.beta, strict=True)]
    rates = sorted(np.log(np.maximum(np.abs(np.roots(combined[::-1])), 1e-9)) / h)
    rate = method_info(name).parasitic_rate
    assert rates[-1 if rate is None else -2] == pytest.approx(-1, rel=1e-3)
    if rate is None:
        assert len(rates) == 1 or rates[-2] < -1000
    else:
        assert rates[-1] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", slow_but(["leapfrog"], ["leapfrog", "nystrom3", "milne_simpson"]))
def test_the_parasitic_solution_grows_as_it_is_told(name: str) -> None:
    t = torch.linspace(0, 30, 301, dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, method=name, rtol=1e-9, atol=0.0)
    middle, end = y[150].abs().log(), y[-1].abs().log()
    assert (end - middle).item() / 15 == pytest.approx(method_info(name).parasitic_rate, rel=0.1)


@pytest.mark.usefixtures("_method_tables")
def test_a_method_of_ones_own_is_told_to_be_weakly_stable() -> None:
    """x[n+2] - x[n] = h (f[n+2] + f[n]): of the parasitic root -1 it makes -1 - h λ, as leapfrog does."""
    torchdiffeq_lmm.register_method("averaged", alpha=[-1, 0, 1], beta=[1, 0, 1])
    assert method_info("averaged").parasitic_rate == pytest.approx(-1)


def test_leapfrog_in_print() -> None:
    assert str(method_info("leapfrog")).splitlines() == [
        "leapfrog",
        "  order:                2",
        "  error constant:       1/6",
        "  formula:              x[n+2] - x[n] = h (2 f[n+1])",
        "  kind:                 explicit, 2 steps",
        "  evaluations per step: 1",
        "  roots of rho:         1, -1",
        "  effective weights:    0, 2, 0, 2, 0, 2, 0, 2, ...",
        "  gradient by AD:       oscillates everywhere",
        "  decaying solutions:   not for these: where y goes as exp(-t), a parasitic solution goes as exp(1 t)",
        "  grids:                any",
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("bdf1", "formula: x[n+1] - x[n] = h (f[n+1])"),
        ("bdf1", "kind: implicit, 1 step"),
        ("bdf1", "evaluations per step: as many as its equation takes"),
        ("bdf1", "gradient by AD: does not oscillate"),
        ("bdf2", "formula: x[n+2] - 4/3 x[n+1] + 1/3 x[n] = h (2/3 f[n+2])"),
        ("bdf2", "roots of rho: 1, 0.3333"),
        ("bdf3", "roots of rho: 1, 0.3182+0.2839i, 0.3182-0.2839i"),
        ("ab2", "formula: x[n+2] - x[n+1] = h (3/2 f[n+1] - 1/2 f[n])"),
        ("ab2", "gradient by AD: oscillates in a layer before every observation"),
        ("ab2", "decaying solutions: decay, with steps that are short enough"),
        ("am3", "error constant: -1/24"),
        ("abm3", "kind: predictor-corrector, 3 steps"),
    ],
)
def test_lines_in_print(name: str, line: str) -> None:
    assert line in [" ".join(printed.split()) for printed in str(method_info(name)).splitlines()]


@pytest.mark.parametrize("name", ["euler", "filtered_midpoint", "", "AB2", None])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="name must be one of 'leapfrog', 'ab1'") as error:
        method_info(name)
    assert f"got {name!r}" in str(error.value)
    assert "filtered_midpoint" not in str(error.value).split("got")[0]


def test_it_is_immutable() -> None:
    info = method_info("ab2")
    assert isinstance(info, MethodInfo)
    assert isinstance(info.error_constant, Fraction)
    with pytest.raises(AttributeError):
        info.order = 3
    assert torchdiffeq_lmm.MethodInfo is MethodInfo
