"""The examples of stochastic differential equations, in their quick modes."""

from pathlib import Path
from typing import Any

import pytest
from programs import figures_of

pytestmark = pytest.mark.slow


def test_where_the_noise_is_small_errors_fall_as_for_an_ode(tmp_path: Path) -> None:
    found, _ = figures_of("small_noise", tmp_path)
    small = found["0.001"]
    for method, factor in (("leapfrog", 4), ("ab2", 4), ("ab3", 8), ("bdf2", 4), ("euler", 2), ("milstein", 2)):
        errors = small[method]["errors"]
        assert 0.8 * factor < errors[1] / errors[2] < 1.2 * factor, method
    assert small["leapfrog"]["errors"][2] < 0.05 * small["euler"]["errors"][2]
    assert small["leapfrog"]["evaluations"] == small["leapfrog"]["steps"]
    large = found["0.1"]["ab3"]["errors"]
    assert large[1] / large[2] < 4


def test_a_filtered_gradient_converges_on_the_path_and_without_one_it_does_not(tmp_path: Path) -> None:
    def with_a_coarser_reference(of: dict[str, Any]) -> dict[str, Any]:
        """The more so for the additive noise: errors are larger there."""
        measure = of["measure"]
        return {
            "measure": lambda noise, grids, paths, finer, seed: measure(
                noise, grids, paths, 4 if noise.type == "additive" else 8, seed
            )
        }

    found, _ = figures_of("sde_gradients", tmp_path, changed=with_a_coarser_reference)
    for noise, falls_by in (("additive, 0.3", 2.0), ("multiplicative, 0.003", 3.0)):
        errors = found[noise]["errors"]
        assert min(errors["auto-differentiation"]) > 2, noise
        assert errors["filtered"][0] > falls_by * errors["filtered"][2], noise
        assert errors["filtered"][2] < 0.02, noise


def test_a_latent_sde_is_trained_through_a_multistep_method(tmp_path: Path) -> None:
    found, _ = figures_of("latent_sde", tmp_path, changed=lambda of: {"FINE_STEP": 4 * of["FINE_STEP"]})
    assert set(found) == {"ab2", "euler"}
    for method, (training,) in found.items():
        losses = training["losses"]
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), method
        assert training["bound, train"] < 0.6 * losses[0], method
