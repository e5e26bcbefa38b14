"""The tolerances that a user gives, checked where they are used: by implicit steps and by the search for an event."""

from math import inf
from numbers import Real

import torch
from torch import Tensor


def resolve_tolerance(argument: str, tolerance: object, like: Tensor) -> float | Tensor:
    """A tolerance that can be used beside a state.

    Args:
        argument: as which the user knows it.
        tolerance: a real number, or a real tensor that broadcasts with the state; torchdiffeq makes such a tensor, on
            the CPU, of a tuple of numbers.
        like: the state.

    Returns:
        The number, or the tensor on the device of the state.

    Raises:
        TypeError: it is neither.
        ValueError: it is negative, infinite or NaN, or does not broadcast with the state.
    """
    if isinstance(tolerance, Real) and not isinstance(tolerance, bool):
        number = float(tolerance)
        if not 0 <= number < inf:
            raise ValueError(f"{argument} must be finite and not negative, got {tolerance}")
        return number
    if not isinstance(tolerance, Tensor) or tolerance.is_complex() or tolerance.dtype is torch.bool:
        got = f"dtype {tolerance.dtype}" if isinstance(tolerance, Tensor) else repr(tolerance)
        raise TypeError(f"{argument} must be a real number, or a real tensor that broadcasts with y0, got {got}")
    if not _broadcasts(tolerance.shape, like.shape):
        raise ValueError(
            f"{argument} must broadcast with y0, of shape {tuple(like.shape)}, got shape {tuple(tolerance.shape)}"
        )
    if not bool(((tolerance >= 0) & (tolerance < inf)).all()):
        raise ValueError(f"{argument} must be finite and not negative, got {tolerance}")
    return tolerance.to(like.device)


def event_tolerance(atol: object, like: Tensor) -> float:
    """To how much of the time an event is to be found: the least entry of `atol`, which must be positive."""
    tolerance = resolve_tolerance("atol", atol, like)
    least = float(tolerance.min() if isinstance(tolerance, Tensor) else tolerance)
    if not least > 0:
        raise ValueError(f"atol must be positive where event_fn is given, got {least}")
    return least


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def check_max_num_steps(max_num_steps: object) -> None:
    """Raise a TypeError or a ValueError unless `max_num_steps` is None or a positive int."""
    if max_num_steps is None:
        return
    if not isinstance(max_num_steps, int) or isinstance(max_num_steps, bool):
        raise TypeError(f"max_num_steps must be an int or None, got {max_num_steps!r}")
    if max_num_steps < 1:
        raise ValueError(f"max_num_steps must be at least 1, got {max_num_steps}")


def check_steps(count: int, max_num_steps: int | None) -> None:
    """Raise a ValueError where a grid has more steps than `max_num_steps`, unless that is None."""
    if max_num_steps is not None and count > max_num_steps:
        raise ValueError(
            f"max_num_steps {max_num_steps} is exceeded: the grid has {count} steps; use larger steps, or a larger "
            f"max_num_steps"
        )


def check_equal(steps: Tensor) -> None:
    """Raise a ValueError unless steps, of shape (n,), are equal."""
    shortest, longest = float(steps.detach().min()), float(steps.detach().max())
    if shortest != longest:
        raise ValueError(
            f"grad_filter='smooth' is for equal steps, got steps from {shortest!r} to {longest!r}; use "
            f"grad_filter='leapfrog', which is for any grid, or a step_size of which the interval is a multiple"
        )
