import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_oscillations_shows_that_the_filter_makes_the_gradient_converge(tmp_path):
    output = tmp_path / "made" / "by the example"
    command = [sys.executable, EXAMPLES / "oscillations.py", "--quick", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert str(output / "oscillations.png") in run.stdout
    assert (output / "oscillations.png").read_bytes().startswith(b"\x89PNG")

    figures = json.loads((output / "oscillations.json").read_text(encoding="utf-8"))
    assert len(figures["grids"]) == 5
    for grid, gradients in figures["grids"].items():
        plain, filtered = gradients["auto-differentiation"], gradients["filtered"]
        for gradient in (plain, filtered):
            assert len(gradient["errors"]) == len(figures["steps"]), grid
            assert all(f"{error:.2e}" in run.stdout for error in gradient["errors"]), grid
        assert abs(plain["order"]) < 0.3, grid
        assert filtered["order"] > 1.7, grid
        assert filtered["errors"] == sorted(filtered["errors"], reverse=True), grid
        assert filtered["errors"][-1] < plain["errors"][-1] / 10, grid
