"""The examples that show what the filter is for, in their quick modes, and the help of all."""

import runpy
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from methods import slow_but
from programs import EXAMPLES, figures_of, run_here

from torchdiffeq_lmm import method_info
from torchdiffeq_lmm.schemes.methods import METHODS


@pytest.mark.slow
def test_oscillations_shows_that_the_filter_makes_the_gradient_converge(tmp_path: Path) -> None:
    output = tmp_path / "made" / "by the example"
    figures, printed = figures_of("oscillations", output)
    assert str(output / "oscillations.png") in printed
    assert len(figures["grids"]) == 5
    for grid, gradients in figures["grids"].items():
        plain, filtered = gradients["auto-differentiation"], gradients["filtered"]
        for gradient in (plain, filtered):
            assert len(gradient["errors"]) == len(figures["steps"]), grid
            assert all(f"{error:.2e}" in printed for error in gradient["errors"]), grid
        assert abs(plain["order"]) < 0.3, grid
        assert filtered["order"] > 1.7, grid
        assert filtered["errors"] == sorted(filtered["errors"], reverse=True), grid
        assert filtered["errors"][-1] < plain["errors"][-1] / 10, grid


@pytest.mark.slow
def test_method_gallery_shows_that_the_filter_makes_every_gradient_converge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, printed = figures_of(
        "method_gallery", tmp_path, changed=lambda of: {"QUICK_CELLS": (32, 64), "SHOWN_CELLS": 8}
    )
    monkeypatch.syspath_prepend(EXAMPLES)
    names = {method.name for method in METHODS} | {"midpoint", "heun2"}
    gallery = runpy.run_path(str(EXAMPLES / "method_gallery.py"))
    assert set(gallery["METHODS"]) == names
    assert set(figures["methods"]) == {name for name in names if gallery["theoretical_order"](name) <= 2}
    for name, method in figures["methods"].items():
        assert f"| {name} | {method['order']} | " in printed
        assert all(len(errors) == len(figures["cells"]) for errors in method["errors"].values()), name
        orders, error = method["orders"], {what: errors[-1] for what, errors in method["errors"].items()}
        assert abs(orders["forward"] - method["order"]) < 0.4, name
        if method["order"] == 1:
            assert min(orders["auto-differentiation"], orders["filtered"]) > 0.8, name
            continue
        assert abs(orders["auto-differentiation"]) < 0.5, name
        assert orders["filtered"] > 1.7, name
        assert error["filtered"] < error["auto-differentiation"] / 50, name


@pytest.mark.slow
def test_why_draws_weights_and_a_shift_of_the_past_that_are_what_the_text_says(tmp_path: Path) -> None:
    figures, printed = figures_of("why", tmp_path, pictures=("why_weights", "why_shift", "why_orders"))
    for picture in ("why_weights.png", "why_shift.png", "why_orders.png"):
        assert str(tmp_path / picture) in printed
        assert f"({picture})" in (EXAMPLES / "WHY.md").read_text(encoding="utf-8")

    assert figures["weights"]["leapfrog"][:4] == [0, 2, 0, 2]
    assert figures["weights"]["milne_simpson"][:4] == [1 / 3, 4 / 3, 2 / 3, 4 / 3]
    assert figures["weights"]["ab4"][4:] == [1, 1, 1, 1]

    unchanged, kicked, shifted = (figures["solutions"][change] for change in ("unchanged", "one slope", "whole past"))
    middle = len(unchanged) // 2
    assert kicked[: middle + 1] == unchanged[: middle + 1]
    distances = [b - a for a, b in zip(unchanged, kicked, strict=True)][middle + 1 :]
    assert all((b - a) * (-1) ** i < 0 for i, (a, b) in enumerate(pairwise(distances)))
    ratios = [b / a for a, b in zip(unchanged, shifted, strict=True)]
    assert max(ratios) - min(ratios) < 1e-12

    gradients = figures["gradients"]
    errors = {
        gradient: max(abs(a - b) for a, b in zip(gradients[gradient], gradients["costate"], strict=True))
        for gradient in ("auto-differentiation", "filtered")
    }
    assert errors["filtered"] < 0.02 < 0.5 < errors["auto-differentiation"]

    for case, of_case in figures["orders"].items():
        own = method_info(case.split(",")[0]).order
        for gradient, wanted in {"AD": 0, "order 2": 2, "order 3": 3, "the method's order": own}.items():
            reached = -np.polyfit(np.log(figures["steps"]), np.log(of_case[gradient]), 1)[0]
            assert abs(reached - wanted) < 0.5, (case, gradient)
            assert all(f"{error:.1e}" in printed for error in of_case[gradient]), (case, gradient)


NAMES = {path.stem for path in EXAMPLES.glob("*.py")} - {"harness"}


# What they import takes seconds.
@pytest.mark.parametrize("example", slow_but({"processes"}, sorted(NAMES)))
def test_help_tells_how_to_run_an_example_fast_and_where_it_writes(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{example}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "--quick" in printed
    assert "--output" in printed


@pytest.mark.slow
def test_sampling_compares_methods_by_their_evaluations(tmp_path: Path) -> None:
    figures, printed = figures_of("sampling", tmp_path)
    for data in ("checkerboard", "digits"):
        assert f"{data}: root mean square error" in printed
        errors = {name: dict(map(tuple, points)) for name, points in figures[data].items()}
        for name, points in errors.items():
            assert points[max(points)] < 0.1 * points[min(points)], name
        # A step of Adams–Bashforth takes one evaluation, but for those of the start.
        assert 96 <= max(errors["ab4"]) < 110
        assert errors["ab4"][max(errors["ab4"])] < 0.2 * errors["midpoint"][max(errors["midpoint"])]


@pytest.mark.slow
def test_neural_cde_is_most_accurate_where_methods_know_of_the_times(tmp_path: Path) -> None:
    pytest.importorskip("torchcde", reason="torchcde is optional")
    figures, printed = figures_of("neural_cde", tmp_path)
    # A linear path has jumps there, a cubic one bends.
    for kind, factor in {"cubic": 1.0, "linear": 0.3}.items():
        assert f"{kind}: loss {figures[kind]['loss']:.3f}" in printed
        least = {name: min(error for _, error in points) for name, points in figures[kind]["errors"].items()}
        for method, known in {"ab4": "jump_t", "abm4": "jump_t", "rk4": "steps end there"}.items():
            assert least[f"{method}, {known}"] < factor * least[f"{method}, equal steps"], (kind, method)
        for method in ("adams", "dopri5"):
            assert least[f"{method}, jump_t"] < factor * least[method], (kind, method)


def test_neural_cde_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcde", None)
    with pytest.raises(SystemExit, match="pip install torchcde"):
        run_here(EXAMPLES / "neural_cde.py", "--quick")


@pytest.mark.slow
def test_normalising_flow_reports_the_likelihood_of_the_flow(tmp_path: Path) -> None:
    figures, printed = figures_of("normalising_flow", tmp_path)
    assert {"dopri5", "rk4", "leapfrog, filtered", "ab4", "adams"} <= set(figures)
    for name, found in figures.items():
        assert f"| {name} | {found['evaluations']} | {found['reported']:.3f} | {found['exact']:.3f} |" in printed
        assert found["error"] < 0.05, name
        # Less than the standard normal distribution has, of which the moons fill a part.
        assert -3.5 < found["exact"] < -2, name


@pytest.mark.slow
def test_latent_ode_is_judged_by_a_fine_solve_and_finds_the_same_again(tmp_path: Path) -> None:
    figures, printed = figures_of("latent_ode", tmp_path)
    assert {"dopri5", "rk4", "leapfrog", "ab4", "adams"} <= set(figures)
    for name, found in figures.items():
        assert f"| {name} | {found['evaluations']:.0f} | {found['loss']:.3f} |" in printed
        assert found["reported"] == pytest.approx(found["exact"], rel=0.01), name
        assert found["of the method"] < 0.05, name
    # It finds the same again, but for the time: by one of torchdiffeq's methods, and two of this package.
    ways = ("rk4", "adams", "ab2")
    again, _ = figures_of(
        "latent_ode", tmp_path / "again", changed=lambda of: {"WAYS": {name: of["WAYS"][name] for name in ways}}
    )
    assert again.keys() == set(ways)
    for name, found in again.items():
        assert found.pop("seconds") > 0
        assert found == {what: value for what, value in figures[name].items() if what != "seconds"}, name
