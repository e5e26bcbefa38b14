"""Event functions, with every value checked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EventFunction = Callable[[Tensor, Any], Tensor]


def checked_event(event_fn: EventFunction) -> EventFunction:
    """The user's event function, with the kind of what it returns checked before torchdiffeq combines its entries.

    Raises:
        TypeError: it cannot be called; or, when called, returns no real tensor.
        ValueError: when called, it returns an empty tensor.
    """
    if not callable(event_fn):
        raise TypeError(f"event_fn must be a callable (t, y) -> tensor, got {event_fn!r}")

    def checked(t: Tensor, y: Any) -> Tensor:
        value = event_fn(t, y)
        if not isinstance(value, Tensor) or value.is_complex():
            got = f"dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"event_fn must return a real tensor, got {got}")
        if value.numel() == 0:
            raise ValueError(f"event_fn must return at least one number, got shape {tuple(value.shape)}")
        return value

    return checked


class EventSign:
    """The sign of an event function as torchdiffeq hands it to a solver: the least entry, each by its sign at t_0.

    Args:
        event_fn: ``event_fn(t, y)``, 0-d, in the solver's time and state.
        backwards: whether the solver's time is the negative of the user's, for messages.
    """

    def __init__(self, event_fn: EventFunction, backwards: bool) -> None:
        self._event_fn = event_fn
        self._direction = -1.0 if backwards else 1.0

    def __call__(self, t: Tensor, y: Tensor) -> float:
        """The sign at a time, which the host reads.

        Raises:
            ValueError: event_fn is not a number (NaN) there.
        """
        with torch.no_grad():
            value = float(self._event_fn(t, y))
        if value != value:
            cause = (
                "" if bool(torch.isfinite(y).all()) else ", where y is not finite itself; look at func and the steps"
            )
            raise ValueError(f"event_fn must return numbers, got NaN at t = {self._user_time(t):.6g}{cause}")
        return float((value > 0) - (value < 0))

    def at_beginning(self, t: Tensor, y: Tensor) -> float:
        """The sign at t_0.

        Raises:
            ValueError: event_fn is not a number there; or 0, whose sign torchdiffeq would wait for in vain to change.
        """
        sign = self(t, y)
        if sign == 0:
            raise ValueError(
                f"event_fn must not be 0 where the solve begins, got 0 (as an entry, if it has several) at t = "
                f"{self._user_time(t):.6g}: torchdiffeq multiplies it by its sign there, and so by 0 from then on. "
                f"Begin beside the event: where a ball has just bounced add 1e-7 to its height, say, or to t0"
            )
        return sign

    def as_tensor(self, t: Tensor, y: Tensor) -> Tensor:
        """The same, for torchdiffeq's search."""
        return t.new_tensor(self(t, y))

    def _user_time(self, t: Tensor) -> float:
        return self._direction * float(t)
