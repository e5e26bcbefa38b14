"""The times at which f jumps, and those that are to be nodes, as users give them: torchdiffeq's `jump_t` and `step_t`.

A multistep method remembers slopes that are gone after a jump. So a solve with jumps is one solve after the other, each
from a jump to the next, with f at its ends as seen from inside.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd_state import savable


class Jumps(NamedTuple):
    """The times at which f jumps.

    Attributes:
        times: of shape (m,), strictly increasing, float64 on the CPU; with the graph of what the user gave.
        eps: of the dtype in which the user gave them.
    """

    times: Tensor
    eps: float


def jumps_of(jump_t: Any, is_negated: bool, negate: bool, argument: str = "jump_t") -> Jumps | None:
    """The times that the user gives, in the solver's time, sorted; None where there are none.

    Args:
        jump_t: None, a tensor of shape (m,) or a sequence of m numbers.
        is_negated: whether `jump_t` is the negative of what the user gave, for messages.
        negate: whether the solver's time is the negative of that of `jump_t`.
        argument: as which the user knows it.

    Raises:
        TypeError: it does not hold real numbers.
        ValueError: it is not one-dimensional, a time is not finite, or one is repeated.
    """
    if jump_t is None:
        return None
    if isinstance(jump_t, list | tuple) and any(isinstance(time, Tensor) and time.requires_grad for time in jump_t):
        raise TypeError(
            f"{argument} must be one tensor where its times require a gradient, got a sequence; use torch.stack"
        )
    if isinstance(jump_t, list | tuple) and any(isinstance(time, bool) for time in jump_t):
        raise TypeError(f"{argument} must hold real numbers, got {jump_t!r}")
    try:
        # As torchdiffeq does, numbers are not rounded to float32.
        given = (
            savable(jump_t)
            if isinstance(jump_t, Tensor)
            else torch.as_tensor(jump_t, dtype=torch.float64, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"{argument} must be a one-dimensional tensor or a sequence of real numbers, got {jump_t!r} ({error})"
        ) from error
    if given.is_complex() or given.dtype is torch.bool:
        raise TypeError(f"{argument} must hold real numbers, got a tensor of dtype {given.dtype}")
    users = -given if is_negated else given
    if given.ndim != 1:
        raise ValueError(
            f"{argument} must be one-dimensional, got shape {tuple(given.shape)}; a single time is {argument}=[time]"
        )
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"{argument} must be finite, got {users.tolist()}")
    exact = given.to("cpu", torch.float64)
    times = torch.sort(-exact if negate else exact).values
    repeated = (times[1:] == times[:-1]).nonzero()
    if len(repeated):
        sign = -1 if negate != is_negated else 1
        raise ValueError(
            f"{argument} must not have any repeated elements, got {sign * float(times[int(repeated[0])])} more than "
            f"once"
        )
    eps = torch.finfo(given.dtype if given.is_floating_point() else torch.float64).eps
    return Jumps(times, eps) if len(times) else None
