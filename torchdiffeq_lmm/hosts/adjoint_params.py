"""What func depends on, as `adjoint_params` tells, for backward modes that evaluate it again."""

from collections.abc import Iterable

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.solve_recorder import Parameters
from torchdiffeq_lmm.autodiff.stored_evaluations import BackwardMode
from torchdiffeq_lmm.parameters.grid_parameter import parameters_of


def resolve_adjoint_params(
    func: object, adjoint_params: Iterable[Tensor] | None, mode: BackwardMode
) -> Parameters | None:
    """The tensors whose gradients are wanted; None where the mode finds them by itself.

    Args:
        func: the user's function.
        adjoint_params: what the user has given.
        mode: the backward mode.

    Raises:
        ValueError: they are given where they are not used, or not where they are needed.
        TypeError: they are no tensors.
    """
    if not mode.evaluates_again:
        if adjoint_params is not None:
            raise ValueError(
                "adjoint_params must not be given where backward is 'autograd', which finds all parameters by itself; "
                "got some"
            )
        return None
    if adjoint_params is None:
        if not isinstance(func, torch.nn.Module):
            raise ValueError(
                f"adjoint_params must be given where func is not an nn.Module, got None and {func!r}; list the tensors "
                f"that func depends on and whose gradients are wanted, or give () if there are none"
            )
        return Parameters(parameters_of(func), are_all=True)
    if isinstance(adjoint_params, Tensor):
        raise TypeError("adjoint_params must be an iterable of tensors, got a tensor; use a tuple of it alone")
    if not isinstance(adjoint_params, Iterable):
        raise TypeError(f"adjoint_params must be an iterable of tensors, got {adjoint_params!r}")
    given = tuple(adjoint_params)
    for i, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"adjoint_params must be an iterable of tensors, got {parameter!r} as number {i}")
    # Tied weights may be listed twice.
    return Parameters(tuple({id(p): p for p in given if p.requires_grad}.values()), are_all=False)
