"""From the cotangents of auto-differentiation to those of the underlying flow: the gradient filter.

For x' = f(t, x, θ(t)) and a loss E, the gradient in function space is the density (∂f/∂θ)ᵀ p, with the costate
p' = -Jᵀ p, J = ∂f/∂x. Auto-differentiation hands the parameter of the m-th evaluation (∂f_m/∂θ)ᵀ μ_m, μ_m = ∂E/∂f_m.
Through leapfrog, μ_m / h does not converge to p: the adjoint recursion decouples into two parities, which start at g
and at 0, so μ_m / h = p ± d with an oscillation d that does not shrink with h.

The sums P_m = Σ_{j ≥ m} (J_jᵀ μ_j + g_j), with g_j = ∂E/∂x_j where E observes x_j, do not oscillate: P_m is the
derivative of E with respect to shifting all of the recurrence's history at node m. Centred between two of them, they
give p to the order of leapfrog itself, on every grid. On a uniform one that is the average ¼, ½, ¼ of neighbouring
cotangents in Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv 2306.02192).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

CellWeights = Literal["step", "trapezoid"]


@dataclass(frozen=True)
class LeapfrogFilter:
    """The gradient filter for leapfrog, on any grid.

    With E the loss, p(t) its costate (the adjoint state, dE/dx at time t) and h_m the step from node m to the next, the
    parameters of the m-th evaluation of f receive the cotangent ``ω_m p̃_m``, where p̃_m is second-order accurate for
    p(t_m). The states keep the cotangents of auto-differentiation, so gradients with respect to y0 and t do not change.

    Where E observes a node, p jumps there, and p̃_m is the mean of its one-sided limits, weighted by the steps on either
    side. An observation between two nodes is spread over both. What E sees of y0 itself is no matter of the parameters.
    On grids where leapfrog itself is less than second order, so is p̃: see `Leapfrog`.

    Args:
        weights: ω_m, what one parameter owns.
            ``"step"``: ω_m = h_m. Every step has its own parameter, as in a network with its own layer per step;
            its gradient divided by h_m converges at second order, at every node, to the density of the gradient in
            function space, where the parameters sample a smooth function of t.
            ``"trapezoid"``: ω_m = (h_{m-1} + h_m) / 2, half a step at the ends. For models in which some parameters
            are shared by all steps (a hypernetwork, a basis in t): their gradient, a sum over m, converges at second
            order, where step weights would make it first order only. Where all parameters are shared no filter is
            needed: there the gradient of auto-differentiation converges at second order by itself.

    Raises:
        ValueError: `weights` is neither.

    Source: Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv 2306.02192) for step
    weights and uniform grids; the derivation for any grid heads grad_filter.py.
    """

    weights: CellWeights = "step"
    method: ClassVar[str] = "leapfrog"

    def __post_init__(self) -> None:
        if self.weights not in get_args(CellWeights):
            raise ValueError(f"weights must be one of {get_args(CellWeights)}, got {self.weights!r}")

    def window_weights(self, steps: Tensor) -> Tensor:
        """Return the weights of P_m and P_{m+1} in ω_m p̃_m, of shape (N, 2), for the steps h of shape (N,)."""
        widths = steps if self.weights == "step" else trapezoid_widths(steps)
        return widths[:, None] * leapfrog_costate_weights(steps)


GRAD_FILTERS = {"leapfrog": LeapfrogFilter()}


def resolve_grad_filter(grad_filter: object, method: str) -> LeapfrogFilter | None:
    """The filter that the user asks for, checked against the method that it is to work on.

    Args:
        grad_filter: None, the name of a filter, or a filter.
        method: the name of the method.

    Raises:
        ValueError: there is no filter of that name, or it is for another method.
        TypeError: `grad_filter` is something else.
    """
    if grad_filter is None:
        return None
    known = f"grad_filter must be None, {', '.join(map(repr, GRAD_FILTERS))} or a LeapfrogFilter, got {grad_filter!r}"
    if isinstance(grad_filter, str):
        if grad_filter not in GRAD_FILTERS:
            raise ValueError(known)
        grad_filter = GRAD_FILTERS[grad_filter]
    if not isinstance(grad_filter, LeapfrogFilter):
        raise TypeError(known)
    if grad_filter.method != method:
        raise ValueError(
            f"grad_filter {grad_filter!r} is for method {grad_filter.method!r}, got method {method!r}; use "
            f"method={grad_filter.method!r} or no grad_filter"
        )
    return grad_filter


def leapfrog_costate_weights(steps: Tensor) -> Tensor:
    """The weights of P_m and P_{m+1} in leapfrog's filtered costate p̃_m.

        p̃_m = (h_{m-1} P_m + h_m P_{m+1}) / (h_{m-1} + h_m)   (m ≥ 1),      p̃_0 = P_0

    Args:
        steps: h, of shape (N,).

    Returns:
        A tensor of shape (N, 2).

    Source: the docstring of this module.
    """
    weights = torch.zeros(len(steps), 2, dtype=steps.dtype, device=steps.device)
    weights[0, 0] = 1
    pairs = steps[:-1] + steps[1:]
    weights[1:, 0] = steps[:-1] / pairs
    weights[1:, 1] = steps[1:] / pairs
    return weights


def trapezoid_widths(steps: Tensor) -> Tensor:
    """The trapezoidal cells ω_m of the N evaluated nodes; the last one also takes the half cell up to the end.

    Args:
        steps: h, of shape (N,).

    Returns:
        A tensor of shape (N,) whose sum is that of `steps`.
    """
    widths = steps / 2
    widths[1:] += steps[:-1] / 2
    widths[-1] += steps[-1] / 2
    return widths


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
    # The Euler step that starts leapfrog has half the weight of the others.
    left = torch.cat([2 * stack[:1], stack[1:-1]])
    right = torch.cat([stack[2:], torch.zeros_like(stack[:1])])
    inner = left / 4 + stack[1:] / 2 + right / 4
    return torch.cat([2 * inner[:1] - inner[1:2], inner]).movedim(0, dim)


def register_grad_filter(parameter: Tensor) -> RemovableHandle:
    """Have `filter_gradient` applied to every gradient that arrives at `parameter`.

    Args:
        parameter: a tensor whose leading dimension counts the leapfrog steps, at least 3, all of equal size; entry m is
            used in step m only.

    Returns:
        A handle; its ``remove()`` takes the filter off again. Registered twice, it filters twice; so it does beside
        ``grad_filter="leapfrog"``, with which it agrees to second order but not exactly.

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
