"""Tensors that carry more than autograd's graph: tangents of forward mode, the marks of inference mode."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise a RuntimeError where forward-mode differentiation is going on."""
    for tensor in tensors:
        if unpack_dual(tensor).tangent is None:
            continue
        raise RuntimeError(
            "grad_filter does not support forward-mode automatic differentiation, nor do implicit methods or backward: "
            "they work on cotangents. Solve with an explicit method, and without grad_filter and backward, for tangents"
        )


def savable(tensor: Tensor) -> Tensor:
    """The tensor itself; outside inference mode, of one that was made inside, a copy, which autograd can save."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
