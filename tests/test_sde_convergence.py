"""Orders of convergence on given Brownian paths: strong, weak, and for small noise."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import exp, log, sqrt

import pytest
import torch
import torchsde
from problems import orders
from sde_problems import Path
from torch import Tensor

METHODS = ("leapfrog", "ab2", "ab3", "bdf2")


class Linear:
    """dX = a X dt + b X dW, a geometric Brownian motion."""

    sde_type = "ito"
    noise_type = "diagonal"
    a, b = -0.8, 0.6

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.a * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b * y


class Additive:
    """A nonlinear drift with additive noise of size ε."""

    noise_type = "additive"

    def __init__(self, epsilon: float = 0.5, sde_type: str = "ito") -> None:
        self.epsilon = epsilon
        self.sde_type = sde_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -torch.sin(y[:, 0]) - 0.3 * y[:, 1] + torch.cos(2 * t)], 1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.epsilon * torch.ones(len(y), 2, 1, dtype=y.dtype)


def end(sde: object, path: Path, method: str, steps: int) -> Tensor:
    y0 = torch.ones(path.shape[0], 1 if sde.noise_type == "diagonal" else 2, dtype=torch.float64)
    times = torch.tensor([0.0, path.horizon], dtype=torch.float64)
    with torch.no_grad():
        return torchsde.sdeint(sde, y0, times, bm=path, method=method, dt=path.horizon / steps)[-1]


@cache
def fine(epsilon: float, paths: int) -> tuple[Path, Tensor]:
    """Paths, and the end of `Additive` on them by torchsde's midpoint, for which both calculi are the same."""
    path = Path(paths, 1, 4096)
    return path, end(Additive(epsilon, "stratonovich"), path, "midpoint", 4096)


def geometric(path: Path) -> Tensor:
    exponent = (Linear.a - Linear.b**2 / 2) * path.horizon + Linear.b * path.values[-1]
    return exponent.exp()


def strong_order(errors: list[Tensor]) -> tuple[float, float]:
    """The order by regression on the logarithms of mean squares, for steps that halve, and 2 standard errors of it."""
    means = [float(e.square().sum(1).mean()) for e in errors]
    relative = [float(e.square().sum(1).std()) / mean / sqrt(len(e)) for e, mean in zip(errors, means, strict=True)]
    centred = [i - (len(errors) - 1) / 2 for i in range(len(errors))]
    scale = sum(c * c for c in centred) * log(4)
    slope = -sum(c * log(mean) for c, mean in zip(centred, means, strict=True)) / scale
    # Errors on the same paths are correlated; this bound does not rely on how.
    return slope, 2 * sum(abs(c) * r for c, r in zip(centred, relative, strict=True)) / scale


@pytest.mark.parametrize("method", METHODS)
def test_strong_order_one_half_for_multiplicative_noise(method: str) -> None:
    path = Path(4000, 1, 256)
    exact = geometric(path)
    order, margin = strong_order([end(Linear(), path, method, n) - exact for n in (16, 32, 64, 128, 256)])
    assert margin < 0.12
    assert abs(order - 0.5) < 0.03 + margin


@pytest.mark.parametrize("method", METHODS)
def test_strong_order_one_for_additive_noise(method: str) -> None:
    path, reference = fine(0.5, 400)
    order, margin = strong_order([end(Additive(), path, method, n) - reference for n in (32, 64, 128, 256)])
    assert margin < 0.12
    assert abs(order - 1) < 0.05 + margin


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("moment", [1, 2])
def test_weak_order_one(method: str, moment: int) -> None:
    path = Path(40_000, 1, 32)
    exact = geometric(path) ** moment
    mean = exp(moment * Linear.a + moment * (moment - 1) / 2 * Linear.b**2)
    errors = []
    for steps in (4, 8, 16, 32):
        # With the exact solution on the same paths as a control variate.
        difference = end(Linear(), path, method, steps) ** moment - exact
        errors.append((abs(float(difference.mean())), 2 * float(difference.std()) / sqrt(len(exact))))
    (first, first_margin), (last, last_margin) = errors[0], errors[-1]
    # Of order 1 at least: from steps of 1/4 to steps of 1/32 it falls to an eighth, up to what chance may do.
    assert first + first_margin < 0.3 * mean
    assert last - last_margin < (first + first_margin) / 8 * 1.2
    assert last + last_margin < 0.03 * mean


SMALL: tuple[tuple[float, Callable[[list[float]], bool]], ...] = (
    (0.0, lambda p: min(p) > 1.85),
    (1e-4, lambda p: min(p) > 1.85),
    (0.03, lambda p: p[0] > 1.6 and p[-1] < 1.5),
    (0.5, lambda p: min(p) > 0.7 and max(p) < 1.3),
)


@pytest.mark.parametrize("method", ["leapfrog", "ab2", "bdf2"])
@pytest.mark.parametrize(("epsilon", "expected"), SMALL)
def test_small_noise(method: str, epsilon: float, expected: Callable[[list[float]], bool]) -> None:
    # The error is O(h² + ε h): of order 2 until the noise's term takes over.
    path, reference = fine(epsilon, 100)
    errors = [
        float((end(Additive(epsilon), path, method, n) - reference).square().mean().sqrt())
        for n in (16, 32, 64, 128, 256)
    ]
    assert expected(orders(errors))
    assert all(after < before for before, after in pairwise(errors))


def test_small_noise_beside_euler() -> None:
    path, reference = fine(1e-3, 100)
    euler, *ours = (
        float((end(Additive(1e-3), path, method, 128) - reference).square().mean().sqrt())
        for method in ("euler", "leapfrog", "ab2", "bdf2")
    )
    assert all(error < euler / 20 for error in ours)
