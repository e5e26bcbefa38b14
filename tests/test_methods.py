"""The coefficients of the methods."""

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.methods import LEAPFROG, Recurrence, leapfrog_recurrence


def random_steps(seed: int, count: int = 12, spread: float = 2.0) -> Tensor:
    """Steps whose ratios go up to exp(2 spread)."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.exp(spread * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1))


def nodes_of(steps: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])


def one_step_defects(recurrence: Recurrence, x: Tensor, slope: Tensor) -> Tensor:
    """By how much the formula misses x_{n+1}, from exact x_{n-1}, x_n and f_n, for n ≥ 1."""
    increments = x.diff()
    predicted = (
        recurrence.increment_weights[1:, 0] * increments[:-1] + recurrence.slope_weights[1:, 0] * slope[1 : len(x) - 1]
    )
    return increments[1:] - predicted


@pytest.mark.parametrize("seed", range(8))
def test_leapfrog_is_exact_for_quadratics_on_any_grid(seed: int) -> None:
    t = nodes_of(random_steps(seed))
    a, b, c = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, slope = a + b * t + c * t**2, b + 2 * c * t
    defects = one_step_defects(leapfrog_recurrence(t.diff()), x, slope)
    # The formula amplifies the rounding of x by the square of the ratio of steps.
    ratio = t.diff()[1:] / t.diff()[:-1]
    assert (defects.abs() <= 1e-14 * x.abs().max() * (1 + ratio) ** 2).all()


@pytest.mark.parametrize("seed", range(4))
def test_leapfrog_is_not_exact_for_cubics(seed: int) -> None:
    """The defect for t³ is h_n² (h_n + h_{n-1}): third order, so that the method is of second order and no better."""
    steps = random_steps(seed, spread=1.0)
    t = nodes_of(steps)
    defects = one_step_defects(leapfrog_recurrence(steps), t**3, 3 * t**2)
    torch.testing.assert_close(defects, steps[1:] ** 2 * (steps[1:] + steps[:-1]), rtol=1e-9, atol=1e-12)


def test_leapfrog_on_a_uniform_grid() -> None:
    recurrence = leapfrog_recurrence(torch.full((5,), 0.25, dtype=torch.float64))
    assert recurrence.increment_weights[1:].tolist() == [[-1.0]] * 4
    assert recurrence.slope_weights[1:].tolist() == [[0.5]] * 4


@pytest.mark.parametrize("count", [1, 2, 7])
def test_leapfrog_starts_with_an_euler_step(count: int) -> None:
    steps = random_steps(0, count)
    recurrence = leapfrog_recurrence(steps)
    assert recurrence.increment_weights.shape == recurrence.slope_weights.shape == (count, 1)
    assert recurrence.increment_weights[0, 0] == 0
    assert recurrence.slope_weights[0, 0] == steps[0]


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_the_weights(seed: int) -> None:
    steps = random_steps(seed, 5).requires_grad_()
    recurrence = leapfrog_recurrence(steps)
    assert recurrence.requires_grad
    ratio = steps.detach()[1:] / steps.detach()[:-1]
    h = steps.tolist()
    expected = [((0.0,), (h[0],))]
    expected += [((-(r**2),), (h[n + 1] * (1 + r),)) for n, r in enumerate(ratio.tolist())]
    for row, differentiable, wanted in zip(recurrence.rows(), recurrence.differentiable_rows(), expected, strict=True):
        assert row == tuple(tuple(weight.item() for weight in weights) for weights in differentiable)
        assert row[0] == pytest.approx(wanted[0], rel=1e-14)
        assert row[1] == pytest.approx(wanted[1], rel=1e-14)


def test_weights_are_differentiable_with_respect_to_the_steps() -> None:
    def weights(steps: Tensor) -> tuple[Tensor, Tensor]:
        recurrence = leapfrog_recurrence(steps)
        return recurrence.increment_weights, recurrence.slope_weights

    steps = random_steps(5, 6, spread=0.5).requires_grad_()
    assert torch.autograd.gradcheck(weights, (steps,))
    assert torch.autograd.gradgradcheck(weights, (steps,))


def test_weights_without_a_gradient_say_so() -> None:
    assert not leapfrog_recurrence(random_steps(0)).requires_grad


def test_leapfrog_describes_itself() -> None:
    assert (LEAPFROG.name, LEAPFROG.order, LEAPFROG.steps) == ("leapfrog", 2, 2)
    assert LEAPFROG.recurrence is leapfrog_recurrence
