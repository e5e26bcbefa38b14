"""Smooth problems without dissipation, each with an accurate solution to compare with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp


@dataclass(frozen=True)
class Problem:
    """y' = field(y) on [0, horizon].

    Args:
        name: the problem's name.
        field: ``field(xp, y)``, with torch, numpy or jax.numpy for xp.
        start: y(0).
        horizon: a power of two, as the numbers of steps are: then no step is rounded, also where a peer keeps the time
            in single precision.
        end: y(horizon).
    """

    name: str
    field: Callable[[Any, Any], Any]
    start: np.ndarray
    horizon: float
    end: np.ndarray

    def error(self, y: np.ndarray) -> float:
        """The relative error of a final state, in the Euclidean norm; infinite where the solve has exploded."""
        with np.errstate(over="ignore", invalid="ignore"):
            error = float(np.linalg.norm(y - self.end) / np.linalg.norm(self.end))
        return error if np.isfinite(error) else np.inf


def _problem(name: str, field: Callable[[Any, Any], Any], start: tuple[float, ...], horizon: float) -> Problem:
    """A small problem, solved by SciPy's DOP853 to near rounding."""
    flow = solve_ivp(lambda t, y: field(np, y), (0, horizon), start, method="DOP853", rtol=1e-13, atol=1e-14)
    return Problem(name, field, np.array(start), horizon, flow.y[:, -1])


def pendulum(xp: Any, y: Any) -> Any:
    """q'' = -sin q."""
    return xp.stack([y[1], -xp.sin(y[0])])


def lotka_volterra(xp: Any, y: Any) -> Any:
    """Prey and predator, all coefficients one."""
    meetings = y[0] * y[1]
    return xp.stack([y[0] - meetings, meetings - y[1]])


def kepler(xp: Any, y: Any) -> Any:
    """A body around a fixed one, in the plane."""
    cubed = (y[0] * y[0] + y[1] * y[1]) ** 1.5
    return xp.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])


WAVE_GRID = (50, 100)
WAVE_SPACING = 1 / 50


def wave(xp: Any, y: Any) -> Any:
    """u_tt = Δu on the torus of size 1 by 2, by second differences; y holds u and u_t."""
    u = y[0]
    neighbours = xp.roll(u, 1, 0) + xp.roll(u, -1, 0) + xp.roll(u, 1, 1) + xp.roll(u, -1, 1)
    return xp.stack([y[1], (neighbours - 4 * u) / WAVE_SPACING**2])


def _wave_problem() -> Problem:
    """A smooth hump at rest. Its Fourier modes are those of the semi-discretisation too, so that the end is exact."""
    horizon = 1.0
    x, y = (WAVE_SPACING * np.arange(size) for size in WAVE_GRID)
    hump = np.exp(np.cos(2 * np.pi * x)[:, None] + np.cos(np.pi * y))
    squares = [(2 / WAVE_SPACING * np.sin(np.pi * np.fft.fftfreq(size))) ** 2 for size in WAVE_GRID]
    frequency = np.sqrt(squares[0][:, None] + squares[1])
    modes = np.fft.fft2(hump)
    end = [modes * np.cos(frequency * horizon), -modes * frequency * np.sin(frequency * horizon)]
    return Problem(
        "wave equation", wave, np.stack([hump, np.zeros(WAVE_GRID)]), horizon, np.fft.ifft2(np.stack(end)).real
    )


def problems() -> tuple[Problem, ...]:
    """The pendulum, Lotka and Volterra's model, Kepler's problem with eccentricity 0.5, the wave equation."""
    return (
        _problem("pendulum", pendulum, (2.0, 0.0), 16.0),
        _problem("Lotka–Volterra", lotka_volterra, (1.5, 0.7), 16.0),
        _problem("Kepler, e = 0.5", kepler, (0.5, 0.0, 0.0, 3**0.5), 16.0),
        _wave_problem(),
    )
