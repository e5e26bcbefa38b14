"""The private parts of torchsde, which nothing else touches: its list of methods, what chooses among them, its SDEs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torchsde

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
        f"({error}); install a version that DOCUMENTATION.md names as tested"
    ) from error


def warn_of_unused_sde_options(method: str, options: dict[str, Any]) -> None:
    """Warn of options that the method does not know, in torchsde's words."""
    _handle_unused_sde_kwargs(options, msg=f"options of method {method!r}")


@dataclass(frozen=True)
class HostedSDE:
    """The drift f and the noise g ΔW of an SDE, from whichever of torchsde's functions its author has defined.

    Attributes:
        drift: ``drift(t, x)``.
        noise: ``noise(t, x, dw)``.
        drift_and_noise: both in one call.
    """

    drift: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    noise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    drift_and_noise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def unwrap_sde(sde: ForwardSDE, dw: torch.Tensor) -> HostedSDE:
    """Find out what the SDE that `torchsde.sdeint` hands to a solver has.

    Args:
        sde: the SDE.
        dw: any ΔW, for its shape, dtype and device.
    """
    zero = torch.zeros_like(dw)
    has_drift = sde.f != sde.f_default
    has_diffusion = sde.g != sde.g_default or sde.g_prod != sde.g_prod_default
    return HostedSDE(
        sde.f if has_drift else lambda t, x: sde.f_and_g_prod(t, x, zero)[0],
        sde.g_prod if has_diffusion else lambda t, x, dw: sde.f_and_g_prod(t, x, dw)[1],
        sde.f_and_g_prod,
    )


def check_free_sde(names: Iterable[str]) -> None:
    """Check that torchsde's list of methods can take `names`.

    Raises:
        RuntimeError: a name is taken by a method that is not ours.
    """
    for name in names:
        if name in _SDE_METHODS and name not in _our_sde_names():
            raise RuntimeError(
                f"torchsde already has a method {name!r}, which is not torchdiffeq_lmm's; it is left as it is. Remove "
                f"it from torchsde.settings.METHODS before torchdiffeq_lmm is imported"
            )


def add_sde_solvers(solvers: Mapping[str, type]) -> None:
    """Enter `solvers` into torchsde's list of methods."""
    _sde_solvers().update(solvers)
    for name in solvers:
        setattr(_SDE_METHODS, _SDE_PREFIX + name, name)


def remove_sde_solvers(names: Iterable[str]) -> None:
    """Take those of `names` that are ours out of torchsde's list of methods; others' entries stay."""
    for name in names:
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
