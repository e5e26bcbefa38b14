"""Weighted sums of tensors, the one operation that every multistep formula is made of."""

from collections.abc import Iterable

from torch import Tensor, add

Weight = float | Tensor


def weighted_sum(weights: Iterable[Weight], tensors: Iterable[Tensor]) -> Tensor:
    """Return ``Σ w_i v_i``.

    Args:
        weights: real numbers, or 0-d real tensors where the weights carry a gradient. At least one must
            differ from the number 0.
        tensors: as many floating or complex tensors of one shape, dtype and device.

    Returns:
        A new tensor of that shape, dtype and device.

    Raises:
        ValueError: all weights are the number 0, or there are not as many weights as tensors.
    """
    total: Tensor | None = None
    is_new = False
    for weight, tensor in zip(weights, tensors, strict=True):
        if isinstance(weight, Tensor):
            # A 0-d state would otherwise be promoted to the dtype of the weight.
            term = (weight * tensor).to(tensor.dtype)
            total = term if total is None else total + term
        elif weight == 0.0:
            continue
        elif total is None:
            # A first term of weight 1 costs no operation of its own.
            total, is_new = (tensor, False) if weight == 1.0 else (tensor * weight, True)
            continue
        else:
            total = add(total, tensor, alpha=weight)
        is_new = True
    if total is None:
        raise ValueError("weights must hold one that is not the number 0, got none")
    return total if is_new else total.clone()
