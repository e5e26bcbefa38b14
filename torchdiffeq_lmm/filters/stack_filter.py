"""Leapfrog's filter for a finished stack of gradients: for those with a loop of their own, on equal steps."""

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def filter_gradient(grad: Tensor, dim: int = 0) -> Tensor:
    """Filter a finished auto-differentiation gradient of leapfrog's per-step parameters.

    For N steps of equal size h, the first an Euler step, with step m the only one to use entry m:

        G̃_m = ¼ G_{m-1} + ½ G_m + ¼ G_{m+1}   (m ≥ 1),      G̃_0 = 2 G̃_1 - G̃_2,

    where G_0 counts twice on the right-hand sides and G_N = 0. ``G̃_m / h`` is second-order accurate for the density
    of the functional gradient, where the parameters sample a smooth function of t: the average mixes the ∂f/∂θ of three
    steps. Where they do not (freshly drawn weights), where an entry is used in more than one step, and on other grids
    use ``grad_filter="leapfrog"``, which mixes costates alone.

    Args:
        grad: the stack of gradients, of any shape; floating or complex.
        dim: the dimension that counts the steps; its size N must be at least 3.

    Returns:
        A new tensor of the shape, dtype and device of `grad`.

    Raises:
        TypeError: `grad` is not a floating or complex tensor, or `dim` not an int.
        ValueError: `dim` is no dimension of `grad`, or has fewer than 3 entries.

    Source: Xu, Chen, Li, Wright (arXiv 2306.02192).
    """
    _check_stack("grad", grad, dim)
    stack = grad.movedim(dim, 0)
    # In place, for a stack may be large, and memory is what takes the time.
    filtered = stack / 2
    filtered[:-1].add_(stack[1:], alpha=0.25)
    filtered[1:].add_(stack[:-1], alpha=0.25)
    # The Euler step that starts leapfrog has half the weight of the others.
    filtered[1].add_(stack[0], alpha=0.25)
    filtered[0] = 2 * filtered[1] - filtered[2]
    return filtered.movedim(0, dim)


def register_grad_filter(parameter: Tensor) -> RemovableHandle:
    """Have `filter_gradient` applied to every gradient that arrives at `parameter`.

    Args:
        parameter: a tensor whose leading dimension counts the leapfrog steps, at least 3, all of equal size; entry m is
            used in step m only.

    Returns:
        A handle; its ``remove()`` takes the filter off again. Registered twice, it filters twice; so it does beside
        ``grad_filter="leapfrog"``, with which it agrees to second order but not exactly. As any hook it stays with the
        tensor: a module that is given another one, as by conversion with
        ``torch.__future__.set_swap_module_params_on_conversion(True)``, needs the filter anew.

    Raises:
        TypeError: `parameter` is not a floating or complex tensor.
        ValueError: it does not require a gradient, or has fewer than 3 steps.
    """
    _check_stack("parameter", parameter, 0)
    if not parameter.requires_grad:
        raise ValueError("parameter must require a gradient, got one with requires_grad=False")
    handle: RemovableHandle = parameter.register_hook(filter_gradient)
    return handle


def _check_stack(name: str, stack: Tensor, dim: int) -> None:
    if not isinstance(stack, Tensor) or not (stack.is_floating_point() or stack.is_complex()):
        got = f"dtype {stack.dtype}" if isinstance(stack, Tensor) else type(stack).__name__
        raise TypeError(f"{name} must be a floating or complex tensor, got {got}")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not -stack.ndim <= dim < stack.ndim:
        raise ValueError(f"{name} must have a dimension {dim} that counts the steps, got shape {tuple(stack.shape)}")
    if stack.shape[dim] < 3:
        raise ValueError(
            f"{name} must have at least 3 steps along dimension {dim}, got shape {tuple(stack.shape)}; the filter's "
            f"first entry is extrapolated from the next two"
        )
