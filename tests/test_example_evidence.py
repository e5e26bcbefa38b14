"""The examples that ask whether the right gradient trains better, in their quick modes."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, output: Path) -> tuple[dict, str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / f"{name}.json").read_text(encoding="utf-8")), done.stdout


def test_optimal_control_is_found_with_a_filter_and_missed_without(tmp_path):
    found, printed = run("optimal_control", tmp_path)
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


def test_digits_trained_with_a_filter_can_be_run_at_any_depth(tmp_path):
    found, printed = run("digits", tmp_path)
    ((_, by_depth),) = found.items()
    runs = by_depth["8"]
    plain, filtered = (runs[f"leapfrog, {name}"][0] for name in ("auto-differentiation", "filtered"))
    assert min(plain["accuracy"]["N"], filtered["accuracy"]["N"]) > 0.93
    assert filtered["accuracy"]["N/2"] > filtered["accuracy"]["N"] - 0.02
    assert plain["accuracy"]["N/2"] < plain["accuracy"]["N"] - 0.04
    assert filtered["roughness"] < plain["roughness"] / 2
    assert filtered["index"][-1] < 0.1 < plain["index"][-1]
    assert "test accuracy over 1 seeds" in printed


def test_shared_parameters_need_no_filter(tmp_path):
    found, _ = run("spiral", tmp_path)
    errors = found["gradient errors"]
    for name, order in (("auto-differentiation", 4), ("filter, trapezoid weights", 4), ("filter, step weights", 2)):
        ratio = errors[name][1] / errors[name][2]
        assert 0.75 * order < ratio < 1.4 * order, name
    assert errors["filter, step weights"][2] > 5 * errors["auto-differentiation"][2]
    last = {name: runs[0][-1] for name, runs in found["test errors"].items()}
    assert max(last.values()) < 1.2 * min(last.values())


def test_a_source_is_recovered_smoother_with_a_filter_and_hardly_better(tmp_path):
    found, printed = run("forcing", tmp_path)
    twin, real = (found[name]["0.3"]["160"] for name in ("twin", "Mauna Loa"))
    for runs in (twin, real):
        plain, filtered = runs["auto-differentiation"], runs["filtered"]
        assert plain["variation"] > 1.2 * filtered["variation"]
        assert plain["reported"] < filtered["reported"]
        assert plain["true"] > 1.01 * filtered["true"]
        assert abs(plain["held out, weeks"] / filtered["held out, weeks"] - 1) < 0.05
    assert filtered["held out, weeks"] < 0.5
    assert twin["filtered"]["error"] < twin["auto-differentiation"]["error"] < 0.3
    assert "held-out years" in printed
