"""The private parts of torchdiffeq, which nothing else touches: its method table, its wrappers, its event search."""

from collections.abc import Callable, Mapping
from typing import Any

import torchdiffeq

from torchdiffeq_lmm.forward.vector_field import HostedFunction

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
        f"({error}); install a version that DOCUMENTATION.md names as tested"
    ) from error

MAX_EVENT_STEPS = 20_000
"""After how many steps torchdiffeq's fixed-step solvers give up the search for an event."""


def unwrap(func: Callable[..., Any]) -> HostedFunction:
    """Take the user's function out of the wrappers in which `torchdiffeq.odeint` hands it to a solver."""
    names = ("callback_step", "callback_accept_step", "callback_reject_step")
    callbacks = [getattr(func, name, _null_callback) for name in names]
    on_step, on_accept, on_reject = (None if callback is _null_callback else callback for callback in callbacks)
    func, backwards, calls = _without_time(func)
    shapes = None
    if isinstance(func, _TupleFunc):
        shapes, func = tuple(func.shapes), func.base_func
    is_adjoint = getattr(func, "__module__", None) == OdeintAdjointMethod.__module__
    # Every odeint wraps once; odeint_adjoint hands what it has wrapped to odeint.
    return HostedFunction(
        func,
        backwards,
        shapes,
        on_step,
        in_adjoint=calls > 1 or is_adjoint,
        is_adjoint=is_adjoint,
        options_reversed=is_adjoint and _without_time(_captured(func)["func"])[1],
        callback_accept_step=on_accept,
        callback_reject_step=on_reject,
    )


def _captured(func: Any) -> dict[str, Any]:
    """What a Python function takes from the function around it, by name."""
    cells = (cell.cell_contents for cell in func.__closure__)
    return dict(zip(func.__code__.co_freevars, cells, strict=True))


def _without_time(func: Callable[..., Any]) -> tuple[Callable[..., Any], bool, int]:
    """What is inside the wrappers that change the time, whether these turn it round, and how many perturb it."""
    backwards, calls = False, 0
    while isinstance(func, (_PerturbFunc, _ReverseFunc)):
        backwards |= isinstance(func, _ReverseFunc)
        calls += isinstance(func, _PerturbFunc)
        func = func.base_func
    return func, backwards, calls


def warn_of_unused_options(solver: object, options: dict[str, Any]) -> None:
    """Warn of options that the solver does not know, in torchdiffeq's words."""
    _handle_unused_kwargs(solver, options)


def is_ours(solver: type, other: object) -> bool:
    """Whether `other` is `solver`, or is the class of that name from an earlier import of this package."""
    if not isinstance(other, type) or other.__qualname__ != solver.__qualname__:
        return False
    return other.__module__.partition(".")[0] == solver.__module__.partition(".")[0]


def check_free(solvers: Mapping[str, type]) -> None:
    """Check that torchdiffeq's method table can take `solvers`.

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


def add_solvers(solvers: Mapping[str, type]) -> None:
    """Enter `solvers` into torchdiffeq's method table."""
    SOLVERS.update(solvers)


def remove_solvers(solvers: Mapping[str, type]) -> None:
    """Take `solvers` out of torchdiffeq's method table; others' entries stay."""
    for name, solver in solvers.items():
        if is_ours(solver, SOLVERS.get(name)):
            del SOLVERS[name]
