"""The only module that touches the private parts of torchdiffeq and torchsde.

Of torchdiffeq: its method table, its wrappers, its event search. Of torchsde: its list of methods, what chooses among
them, and its wrapper of an SDE.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torchdiffeq
import torchsde

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

try:
    from torchsde._core import adjoint as _sde_adjoint
    from torchsde._core import methods as _sde_methods
    from torchsde._core.base_sde import ForwardSDE
    from torchsde._core.misc import handle_unused_kwargs as _handle_unused_sde_kwargs
    from torchsde.settings import METHODS as _SDE_METHODS

    _WRAPPED = ((_sde_methods, "select"), (_sde_adjoint, "_select_default_adjoint_method"))
    for _module, _function in _WRAPPED:
        getattr(_module, _function)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"torchsde {getattr(torchsde, '__version__', 'of unknown version')} lacks what torchdiffeq_lmm builds on "
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
        options_reversed: whether times in options that torchdiffeq negates, of which there are tensors alone, are the
            negative of the solver's even so: odeint_adjoint does not negate those of its backward solve where the
            user's time is decreasing.
    """

    call: Callable[[torch.Tensor, Any], Any]
    reversed: bool
    shapes: tuple[torch.Size, ...] | None
    callback_step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object] | None
    in_adjoint: bool
    is_adjoint: bool
    options_reversed: bool = False


def unwrap(func: Callable[..., Any]) -> HostedFunction:
    """Take the user's function out of the wrappers in which `torchdiffeq.odeint` hands it to a solver."""
    callback = getattr(func, "callback_step", None)
    if callback is _null_callback:
        callback = None
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
        callback,
        in_adjoint=calls > 1 or is_adjoint,
        is_adjoint=is_adjoint,
        options_reversed=is_adjoint and _without_time(_captured(func)["func"])[1],
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
    """Whether `other` is `solver`, or is the same class from an earlier import of this package."""
    return (
        isinstance(other, type) and other.__module__ == solver.__module__ and other.__qualname__ == solver.__qualname__
    )


def warn_of_unused_sde_options(method: str, options: dict[str, Any]) -> None:
    """Warn of options that the method does not know, in torchsde's words."""
    _handle_unused_sde_kwargs(options, msg=f"options of method {method!r}")


@dataclass(frozen=True)
class HostedSDE:
    """The drift f and the kicks g ΔW of an SDE, from whichever of torchsde's functions its author has defined.

    Attributes:
        drift: ``drift(t, x)``.
        kick: ``kick(t, x, dw)``.
        drift_and_kick: both in one call.
    """

    drift: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    kick: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    drift_and_kick: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def unwrap_sde(sde: ForwardSDE, noise: torch.Tensor) -> HostedSDE:
    """Find out what the SDE that `torchsde.sdeint` hands to a solver has.

    Args:
        sde: the SDE.
        noise: any ΔW, for its shape, dtype and device.
    """
    zero = torch.zeros_like(noise)
    has_drift = sde.f != sde.f_default
    has_diffusion = sde.g != sde.g_default or sde.g_prod != sde.g_prod_default
    return HostedSDE(
        sde.f if has_drift else lambda t, x: sde.f_and_g_prod(t, x, zero)[0],
        sde.g_prod if has_diffusion else lambda t, x, dw: sde.f_and_g_prod(t, x, dw)[1],
        sde.f_and_g_prod,
    )


def add_solvers(solvers: Mapping[str, type], sde_solvers: Mapping[str, type] | None = None) -> None:
    """Enter `solvers` into torchdiffeq's method table and `sde_solvers` into torchsde's, all or none.

    Raises:
        RuntimeError: a name is taken by a solver that is not ours.
    """
    sde_solvers = sde_solvers or {}
    for name, solver in solvers.items():
        taken = SOLVERS.get(name, solver)
        if not is_ours(solver, taken):
            raise RuntimeError(
                f"torchdiffeq already has a method {name!r}, {taken!r}, which is not torchdiffeq_lmm's; it is left as "
                f"it is. Remove it from torchdiffeq's method table before torchdiffeq_lmm is imported"
            )
    for name in sde_solvers:
        if name in _SDE_METHODS and name not in _our_sde_names():
            raise RuntimeError(
                f"torchsde already has a method {name!r}, which is not torchdiffeq_lmm's; it is left as it is. Remove "
                f"it from torchsde.settings.METHODS before torchdiffeq_lmm is imported"
            )
    SOLVERS.update(solvers)
    _sde_solvers().update(sde_solvers)
    for name in sde_solvers:
        setattr(_SDE_METHODS, _SDE_PREFIX + name, name)


def remove_solvers(solvers: Mapping[str, type], sde_solvers: Mapping[str, type] | None = None) -> None:
    """Take `solvers` out of torchdiffeq's method table, `sde_solvers` out of torchsde's; others' entries stay."""
    for name, solver in solvers.items():
        if is_ours(solver, SOLVERS.get(name)):
            del SOLVERS[name]
    for name in sde_solvers or {}:
        if name in _our_sde_names():
            delattr(_SDE_METHODS, _SDE_PREFIX + name)
    if not _our_sde_names():
        for module, function in _WRAPPED:
            wrapper = getattr(module, function)
            if hasattr(wrapper, _MARK):
                setattr(module, function, wrapper.__wrapped__)


_SDE_PREFIX = "torchdiffeq_lmm_"
"""So begin our entries in torchsde.settings.METHODS, of which the values are the names."""

_MARK = "torchdiffeq_lmm_solvers"
"""The attribute of our wrappers of torchsde's functions that holds our solvers by name."""


def _our_sde_names() -> set[str]:
    return {getattr(_SDE_METHODS, entry) for entry in dir(_SDE_METHODS) if entry.startswith(_SDE_PREFIX)}


def _sde_solvers() -> dict[str, type]:
    """Our solvers, by name, which torchsde's `select` looks up from now on."""
    solvers: dict[str, type] = getattr(_sde_methods.select, _MARK, {})
    wraps_of: tuple[Callable[..., Callable[..., Any]], ...] = (_wrapped_select, _wrapped_adjoint_select)
    for (module, function), wrapped in zip(_WRAPPED, wraps_of, strict=True):
        original = getattr(module, function)
        if not hasattr(original, _MARK):
            wrapper = wraps(original)(wrapped(original, solvers))
            setattr(wrapper, _MARK, solvers)
            setattr(module, function, wrapper)
    return solvers


def _wrapped_select(original: Callable[..., type], solvers: Mapping[str, type]) -> Callable[..., type]:
    def select(method: str, sde_type: str) -> type:
        is_ours = method in solvers and method in _our_sde_names()
        return solvers[method] if is_ours else original(method=method, sde_type=sde_type)

    return select


def _wrapped_adjoint_select(original: Callable[..., str], solvers: Mapping[str, type]) -> Callable[..., str]:
    """What sdeint_adjoint asks for its backward method is told both, before anything is solved."""

    def select(sde: ForwardSDE, method: str, adjoint_method: str | None) -> str:
        for argument, name in (("method", method), ("adjoint_method", adjoint_method)):
            if name in solvers and name in _our_sde_names():
                raise ValueError(
                    f"{argument} must be one of torchsde's own in sdeint_adjoint, got {name!r}: a multistep method "
                    f"cannot solve the adjoint SDE, nor go with one. Use torchsde.sdeint(..., method=...), whose "
                    f"gradient comes from auto-differentiation through the steps, or options={{'grad_filter': ...}}"
                )
        return original(sde, method, adjoint_method)

    return select
