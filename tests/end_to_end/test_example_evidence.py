"""The examples that ask whether the right gradient trains better, in their quick modes."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import EXAMPLES, figures_of

from torchdiffeq_lmm import GridParameter

pytestmark = pytest.mark.slow


def test_optimal_control_is_found_with_a_filter_and_missed_without(tmp_path: Path) -> None:
    def with_fewer_iterations(of: dict[str, Any]) -> dict[str, Any]:
        """But for the gradient that does not converge."""
        learn, plain = of["learn"], of["GRADIENTS"]["auto-differentiation"]

        def learn_in_few(problem: Any, gradient: Any, optimiser: Any, steps: int, fine_steps: int) -> Any:
            iterations = optimiser.iterations if gradient is plain else min(12, optimiser.iterations)
            return learn(problem, gradient, optimiser._replace(iterations=iterations), steps, fine_steps)

        return {"learn": learn_in_few}

    found, printed = figures_of("optimal_control", tmp_path, changed=with_fewer_iterations)
    problem = found["linear–quadratic"]
    best, learned = problem["optimal cost"], problem["learned"]
    errors = {name: [learned[n][name]["L-BFGS"]["error"] for n in ("10", "20")] for name in learned["10"]}
    for name in ("filtered", "smooth", "midpoint", "odeint_adjoint"):
        assert 2.8 < errors[name][0] / errors[name][1] < 5.5, name
        assert learned["20"][name]["L-BFGS"]["true"] < 1.001 * best, name
        assert learned["20"][name]["L-BFGS"]["true"] >= best, name
    plain = learned["20"]["auto-differentiation"]["L-BFGS"]
    assert errors["auto-differentiation"][1] > 1.5 * errors["auto-differentiation"][0]
    assert plain["true"] > 1.05 * best
    assert plain["reported"] < 0.97 * best
    # A line search on a number whose derivative the gradient is not stops early.
    searched = learned["20"]["filtered"]["L-BFGS, line search"]["error"]
    assert searched > 3 * errors["filtered"][1]
    assert f"{errors['filtered'][1]:.3g}" in printed


def test_a_control_is_trained_more_accurately_with_every_order_of_the_filter_and_not_at_all_without(
    tmp_path: Path,
) -> None:
    # The errors are more than 1e-4, and change by 4 % at most.
    found, printed = figures_of("control", tmp_path, changed=lambda of: {"TOLERANCE": 1e-5})
    learned = found["learned"]["growing"]
    first, second, third, fourth = (
        learned[name][-1]["error"]
        for name in ("ab3, no filter", "ab4, order 2", "ab4, order 3", "ab4, the method's order")
    )
    assert first > 5 * second > 25 * third > 50 * fourth
    assert f"{fourth:.1e}" in printed
    assert all(of["error"] is None for of in learned["ab4, no filter"])
    curvature = found["least curvature"]["growing"]
    assert curvature["ab4, no filter"] < -0.1
    assert curvature["ab3, no filter"] > 0.1


@pytest.mark.parametrize(
    ("way", "wanted"), [("ab3, no filter", 1), ("ab4, order 2", 2), ("ab4, order 3", 3), ("ab4, the method's order", 4)]
)
def test_a_control_trained_by_ab4_converges_to_the_optimal_one_at_the_order_of_the_filter(
    way: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    control = runpy.run_path(str(EXAMPLES / "control.py"))
    optimum, grids = control["optimal_control"](), (24, 34, 48) if wanted < 3 else (40, 56, 80)
    # The errors are hundreds of times as large, or 80 times by the method's order.
    tolerance = control["learn"].__globals__["TOLERANCE"] = {1: 1e-5, 2: 1e-5, 3: 1e-6, 4: 1e-7}[wanted]
    learned = []
    for nodes in (control["grid"](n, 3.0) for n in grids):
        # Training begins near to where it ends, as it takes less time.
        begin = GridParameter(torch.from_numpy(optimum(nodes[:-1].numpy())), nodes)
        learned.append(control["learn"](control["WAYS"][way], begin, optimum))
    assert all(of.density < tolerance for of in learned)
    order = -np.polyfit(np.log(grids), np.log([of.error for of in learned]), 1)[0]
    assert wanted - 0.5 < order < wanted + 0.6


def test_digits_trained_with_a_filter_can_be_run_at_any_depth(tmp_path: Path) -> None:
    found, printed = figures_of("digits", tmp_path)
    ((_, by_depth),) = found.items()
    runs = by_depth["8"]
    plain, filtered = (runs[f"leapfrog, {name}"][0] for name in ("auto-differentiation", "filtered"))
    assert min(plain["accuracy"]["N"], filtered["accuracy"]["N"]) > 0.93
    assert filtered["accuracy"]["N/2"] > filtered["accuracy"]["N"] - 0.02
    assert plain["accuracy"]["N/2"] < plain["accuracy"]["N"] - 0.04
    assert filtered["roughness"] < plain["roughness"] / 2
    assert filtered["index"][-1] < 0.1 < plain["index"][-1]
    assert f"{plain['accuracy']['N/2']:.3f} ± 0.000" in printed


def test_shared_parameters_need_no_filter(tmp_path: Path) -> None:
    spiral, _ = figures_of("spiral", tmp_path)
    assert spiral["ms per iteration"].keys() == spiral["test errors"].keys()
    errors = spiral["gradient errors"]
    for name, order in (("auto-differentiation", 4), ("filter, trapezoid weights", 4), ("filter, step weights", 2)):
        ratio = errors[name][1] / errors[name][2]
        assert 0.75 * order < ratio < 1.4 * order, name
    assert errors["filter, step weights"][2] > 5 * errors["auto-differentiation"][2]
    last = {name: runs[0][-1] for name, runs in spiral["test errors"].items()}
    assert max(last.values()) < 1.2 * min(last.values())


def test_a_source_is_fitted_as_by_an_accurate_solver_with_a_filter_and_with_a_zigzag_without(tmp_path: Path) -> None:
    found, printed = figures_of("forcing", tmp_path)
    for name in ("twin", "Mauna Loa"):
        for penalty, runs in found[name].items():
            plain, filtered = runs["160"]["auto-differentiation"], runs["160"]["filtered"]
            assert plain["variation"] > 1.08 * filtered["variation"], penalty
            assert plain["true"] - plain["reported"] > 3 * (filtered["true"] - filtered["reported"]) > 0, penalty
            # What is held out does not tell them apart.
            assert abs(plain["held-out weeks"] / filtered["held-out weeks"] - 1) < 0.02, penalty
            assert f"{plain['variation']:.1f} | {plain['reported']:.1f}" in printed
    on_slope, on_size = (found["twin"][penalty]["160"] for penalty in ("3 on the slope", "10 on the size"))
    assert on_slope["filtered"]["distance"] < 0.3 * on_slope["auto-differentiation"]["distance"]
    assert on_size["filtered"]["error"] < 0.7 * on_size["auto-differentiation"]["error"]
    assert on_size["auto-differentiation"]["variation"] > 2 * on_size["filtered"]["variation"]


def test_rates_of_a_stiff_reaction_are_fitted_and_an_explicit_method_gets_nowhere(tmp_path: Path) -> None:
    def from_nearer_by(of: dict[str, Any]) -> dict[str, Any]:
        """Seven of the nine factors of ten in time: these the rates are found by, and the grid has fewer steps."""
        fit = of["fit"]

        def fit_in_few(known: Any, offsets: Any, method: str, per_decade: int, iterations: tuple[int, int]) -> Any:
            return fit(known, offsets, method, per_decade, (min(4, iterations[0]), iterations[1]))

        begin = tuple(np.add(of["LOG_RATES"], np.log([1.5, 2 / 3, 1.5])))
        few = {"DECADES": (-4, 3), "fit": fit_in_few}
        return {**few, "GUESSED_LOG_RATES": begin, "GUESSED_ENERGIES": of["ENERGIES"]}

    found, printed = figures_of("stiff", tmp_path, changed=from_nearer_by)
    (fitted,) = found["fits"]
    # From 3/2 and 2/3 of the truth.
    assert max(abs(error) for error in fitted["errors of rates"]) < 0.25
    assert fitted["loss"] < fitted["losses"][0] / 5
    assert f"{fitted['loss']:.4f}" in printed
    ours, *by_scipy = found["gradients"]
    assert ours["error of gradient"] < 0.03
    accurate = [row for row in by_scipy if "rtol 1e-06" in row["by"]]
    assert len(accurate) == 3
    assert all(row["error of gradient"] < 0.01 and row["error of states"] < 1e-3 for row in accurate)
    first, *_, last = found["dopri5"]
    assert first["steps"] < first["most steps"]
    assert "max_num_steps exceeded" in last["raises"]
