"""The only module that touches the private parts of torchdiffeq: its method table, its wrappers, its event search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq

try:
    from torchdiffeq._impl.adjoint import OdeintAdjointMethod
    from torchdiffeq._impl.event_handling import find_event as find_event
    from torchdiffeq._impl.misc import (
        _handle_unused_kwargs,
        _null_callback,
        _PerturbFunc,
        _ReverseFunc,
        _TupleFunc,
    )
    from torchdiffeq._impl.odeint import SOLVERS
except ImportError as error:
    raise ImportError(
        f"torchdiffeq {getattr(torchdiffeq, '__version__', 'of unknown version')} lacks what torchdiffeq_lmm builds on "
        f"({error}); install a version that the README names as tested"
    ) from error

MAX_EVENT_STEPS = 20_000
"""After how many steps torchdiffeq's fixed-step solvers give up the search for an event."""


@dataclass(frozen=True)
class HostedFunction:
    """The user's function and what torchdiffeq's wrappers around it do.

    Attributes:
        call: the user's ``func(t, y)``, in the user's time and with the user's structure of the state.
        reversed: whether the solver's time, always increasing, is the negative of the user's.
        shapes: the shapes of the components where the user's state is a tuple, else None.
        callback_step: ``callback_step(t, y, dt)`` in the solver's time and state, or None where the user has none.
        in_adjoint: whether it is `torchdiffeq.odeint_adjoint` that solves, and will find the gradient by itself.
        is_adjoint: whether `call` is the backward dynamics that odeint_adjoint made, whose components may have
            different dtypes.
    """

    call: Callable[[torch.Tensor, Any], Any]
    reversed: bool
    shapes: tuple[torch.Size, ...] | None
    callback_step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object] | None
    in_adjoint: bool
    is_adjoint: bool


def unwrap(func: Callable[..., Any]) -> HostedFunction:
    """Take the user's function out of the wrappers in which `torchdiffeq.odeint` hands it to a solver."""
    callback = getattr(func, "callback_step", None)
    if callback is _null_callback:
        callback = None
    backwards = False
    calls = 0
    while isinstance(func, (_PerturbFunc, _ReverseFunc)):
        backwards |= isinstance(func, _ReverseFunc)
        calls += isinstance(func, _PerturbFunc)
        func = func.base_func
    shapes = None
    if isinstance(func, _TupleFunc):
        shapes, func = tuple(func.shapes), func.base_func
    is_adjoint = getattr(func, "__module__", None) == OdeintAdjointMethod.__module__
    # Every odeint wraps once; odeint_adjoint hands what it has wrapped to odeint.
    return HostedFunction(func, backwards, shapes, callback, in_adjoint=calls > 1 or is_adjoint, is_adjoint=is_adjoint)


def warn_of_unused_options(solver: object, options: dict[str, Any]) -> None:
    """Warn of options that the solver does not know, in torchdiffeq's words."""
    _handle_unused_kwargs(solver, options)


def is_ours(solver: type, other: object) -> bool:
    """Whether `other` is `solver`, or is the same class from an earlier import of this package."""
    return (
        isinstance(other, type) and other.__module__ == solver.__module__ and other.__qualname__ == solver.__qualname__
    )


def add_solvers(solvers: dict[str, type]) -> None:
    """Enter `solvers` into torchdiffeq's method table, all or none.

    Raises:
        RuntimeError: a name is taken by a solver that is not ours.
    """
    for name, solver in solvers.items():
        taken = SOLVERS.get(name, solver)
        if not is_ours(solver, taken):
            raise RuntimeError(
                f"torchdiffeq already has a method {name!r}, {taken!r}, which is not torchdiffeq_lmm's; it is left as "
                f"it is. Remove it from torchdiffeq's method table before torchdiffeq_lmm is imported"
            )
    SOLVERS.update(solvers)


def remove_solvers(solvers: dict[str, type]) -> None:
    """Take `solvers` out of torchdiffeq's method table; entries that are not ours stay."""
    for name, solver in solvers.items():
        if is_ours(solver, SOLVERS.get(name)):
            del SOLVERS[name]
