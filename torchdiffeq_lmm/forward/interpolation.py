"""Outputs off the nodes: from the states and slopes at both ends of a step to the state inside it."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.weighted_sum import Weight, weighted_sum

Interpolation = Literal["linear", "cubic"]


def check_interpolation(interp: object) -> None:
    """Raise a ValueError unless `interp` names an interpolation."""
    if interp not in get_args(Interpolation):
        raise ValueError(f"interp must be one of {get_args(Interpolation)}, got {interp!r}")


def linear_interpolation(fraction: Weight, x0: Tensor, x1: Tensor) -> Tensor:
    """The straight line from x0 to x1 at `fraction` of the way."""
    return weighted_sum((1 - fraction, fraction), (x0, x1))


def cubic_hermite(fraction: Weight, step: Weight, x0: Tensor, f0: Tensor, x1: Tensor, f1: Tensor) -> Tensor:
    """The cubic through x0 and x1 with the slopes f0 and f1, at `fraction` of the way over a step of length `step`.

    Source: Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, II.6 (6.7).
    """
    s, rest = fraction, 1 - fraction
    weights = (
        (1 + 2 * s) * rest * rest,
        step * s * rest * rest,
        s * s * (3 - 2 * s),
        -step * s * s * rest,
    )
    return weighted_sum(weights, (x0, f0, x1, f1))


def slide(x: Tensor, shift: Tensor, f: Tensor) -> Tensor:
    """The state at a node, free to slide along f: the value is x, the derivatives are those of ``x + shift f``.

    Args:
        x: the state at the node.
        shift: the output time minus that of the node, a 0-d real tensor, 0 but for rounding.
        f: the slope at the node; where it is not finite, the value still is x.
    """
    slid: Tensor = _Slide.apply(x, shift, f)  # type: ignore[no-untyped-call]
    return slid


class _Slide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, f: Tensor) -> Tensor:
        ctx.save_for_backward(shift, f)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, f = ctx.saved_tensors
        along = (cotangent * f.conj()).sum().real
        return cotangent, along.to(shift), (shift * cotangent).to(f.dtype)
