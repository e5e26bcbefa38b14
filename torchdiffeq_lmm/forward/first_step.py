"""The length of a first step, from the sizes of the state, of its slope, and of the change of that."""

from collections.abc import Callable

from torch import Tensor

from .error_norm import ErrorNorm

_SMALL = 1e-6
"""A step for a state or a slope of which nothing is known, in the unit of t, or of a shorter interval."""


def first_step(later: Callable[[float], Tensor], x: Tensor, slope: Tensor, errors: ErrorNorm, interval: float) -> float:
    """A length for which a step of order 1 will most likely be accurate enough.

    Args:
        later: from a length h to f at x + h f(x), a time h later.
        x: the first state.
        slope: f there.
        errors: how large errors are.
        interval: the length of the solve, or infinity.

    Source: Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, II.4.
    """
    scale = errors.scale(x)
    state, speed = errors.size(x, scale), errors.size(slope, scale)
    small = min(_SMALL, _SMALL * interval)
    trial = small if state < 1e-5 or speed < 1e-5 else min(0.01 * state / speed, interval)
    if not 0 < trial < float("inf"):
        return small
    change = errors.size(later(trial) - slope, scale) / trial
    if not change < float("inf"):
        return 1e-3 * trial
    largest = max(speed, change)
    step = max(small, 1e-3 * trial) if largest <= 1e-15 else (0.01 / largest) ** 0.5
    return min(100 * trial, step, interval)
