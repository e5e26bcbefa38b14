"""Orders of convergence on given Brownian paths: strong, weak, and for small noise."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import log, sqrt

import pytest
import torch
import torchsde
from methods import slow_but
from problems import orders
from sde_problems import Path
from torch import Tensor

METHODS = ("leapfrog", "ab2", "ab3", "bdf2")


class Linear:
    """dX = a X dt + b X dW, a geometric Brownian motion."""

    sde_type = "ito"
    a, b = -0.8, 0.6

    def __init__(self, noise_type: str = "diagonal") -> None:
        self.noise_type = noise_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.a * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b * (y if self.noise_type == "diagonal" else y.unsqueeze(2))


class Turning:
    """Two states and two channels of noise whose diffusions do not commute."""

    sde_type = "ito"
    noise_type = "general"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -torch.sin(y[:, 0]) - 0.3 * y[:, 1]], 1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        stretch = torch.stack([0.5 * y[:, 0], -0.5 * y[:, 1]], 1)
        turn = torch.stack([-0.4 * y[:, 1], 0.4 * torch.cos(y[:, 0])], 1)
        return torch.stack([stretch, turn], 2)


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
    y0 = torch.ones(path.shape[0], 1 if isinstance(sde, Linear) else 2, dtype=torch.float64)
    times = torch.tensor([0.0, path.horizon], dtype=torch.float64)
    with torch.no_grad():
        return torchsde.sdeint(sde, y0, times, bm=path, method=method, dt=path.horizon / steps)[-1]


@cache
def fine(epsilon: float, paths: int) -> tuple[Path, Tensor]:
    """Paths, and the end of `Additive` on them by torchsde's midpoint, for which both calculi are the same."""
    path = Path(paths, 1, 1024)
    return path, end(Additive(epsilon, "stratonovich"), path, "midpoint", 1024)


def geometric(path: Path) -> Tensor:
    exponent = (Linear.a - Linear.b**2 / 2) * path.horizon + Linear.b * path.values[-1]
    return exponent.exp()


@cache
def finest() -> tuple[Path, Tensor]:
    """Paths, and the end of `Turning` on them by torchsde's euler."""
    path = Path(400, 2, 4096)
    return path, end(Turning(), path, "euler", 4096)


def regression(errors: list[float], margins: list[float]) -> tuple[float, float]:
    """The order of errors for steps that halve, and a margin of it, from margins of the errors."""
    centred = [i - (len(errors) - 1) / 2 for i in range(len(errors))]
    scale = sum(c * c for c in centred) * log(2)
    slope = -sum(c * log(error) for c, error in zip(centred, errors, strict=True)) / scale
    # Errors on the same paths are correlated; this bound does not rely on how.
    relative = (margin / error for margin, error in zip(margins, errors, strict=True))
    return slope, sum(abs(c) * r for c, r in zip(centred, relative, strict=True)) / scale


def strong_order(differences: list[Tensor]) -> tuple[float, float]:
    """The order of the root mean squares, and 2 standard errors of it."""
    squares = [d.square().sum(1) for d in differences]
    errors = [sqrt(float(s.mean())) for s in squares]
    margins = [float(s.std()) / sqrt(len(s)) / error for s, error in zip(squares, errors, strict=True)]
    return regression(errors, margins)


def weak_order(differences: list[Tensor]) -> tuple[float, float]:
    """The order of the means, and 2 standard errors of it."""
    return regression(
        [abs(float(d.mean())) for d in differences], [2 * float(d.std()) / sqrt(len(d)) for d in differences]
    )


@pytest.mark.parametrize("method", slow_but(["ab2"], METHODS))
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_strong_order_one_half_for_multiplicative_noise(method: str, noise: str) -> None:
    path = Path(4000, 1, 128)
    exact = geometric(path)
    order, margin = strong_order([end(Linear(noise), path, method, n) - exact for n in (16, 32, 64, 128)])
    assert margin < 0.12
    assert abs(order - 0.5) < 0.03 + margin


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_strong_order_one_half_for_noises_that_do_not_commute(method: str) -> None:
    path, reference = finest()
    order, margin = strong_order([end(Turning(), path, method, n) - reference for n in (8, 16, 32, 64)])
    assert margin < 0.2
    assert abs(order - 0.5) < 0.05 + margin


@pytest.mark.parametrize("method", slow_but([], METHODS))
def test_strong_order_one_for_additive_noise(method: str) -> None:
    path, reference = fine(0.5, 400)
    order, margin = strong_order([end(Additive(), path, method, n) - reference for n in (16, 32, 64, 128)])
    assert margin < 0.12
    assert abs(order - 1) < 0.05 + margin


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_weak_order_one(method: str) -> None:
    # The second moment; the first one obeys an ODE here, whose order is another.
    path = Path(120_000, 1, 64)
    exact = geometric(path).square()
    # Minus the exact solution on the same paths, so that chance is mostly the same in both.
    # The errors of leapfrog come to their order late.
    numbers = (8, 16, 32, 64) if method == "leapfrog" else (8, 16, 32)
    order, margin = weak_order([end(Linear(), path, method, n).square() - exact for n in numbers])
    assert margin < 0.2
    assert abs(order - 1) < 0.1 + margin


SMALL: tuple[tuple[float, Callable[[list[float]], bool]], ...] = (
    (0.0, lambda p: min(p) > 1.85),
    (1e-4, lambda p: min(p) > 1.85),
    (0.03, lambda p: p[0] > 1.6 and p[-1] < 1.5),
    (0.5, lambda p: min(p) > 0.7 and max(p) < 1.3),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "epsilon", "expected"),
    # The steps of bdf2 take many times as long.
    [*((method, *of) for method in ("leapfrog", "ab2") for of in SMALL), *(("bdf2", *of) for of in SMALL[::2])],
)
def test_small_noise(method: str, epsilon: float, expected: Callable[[list[float]], bool]) -> None:
    # The error is O(h² + ε h): of order 2 until the noise's term takes over.
    path, reference = fine(epsilon, 100)
    errors = [
        float((end(Additive(epsilon), path, method, n) - reference).square().mean().sqrt())
        for n in (16, 32, 64, 128, 256)
    ]
    assert expected(orders(errors))
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.slow
def test_small_noise_beside_euler() -> None:
    path, reference = fine(1e-3, 100)
    euler, *ours = (
        float((end(Additive(1e-3), path, method, 128) - reference).square().mean().sqrt())
        for method in ("euler", "leapfrog", "ab2", "bdf2")
    )
    assert all(error < euler / 20 for error in ours)
