"""Leapfrog's oscillation prevented instead of filtered: observations that take both parities of the solution.

The cotangents of leapfrog's even and odd states run backwards beside one another, and an observation of x_j starts one
of the two alone. Gragg's smoothed value

    s_j = ½ (x_j + x_{j-1} + h f_j) = x_j + O(h²)

starts both. Taken for the gradient, with x_j for the value, it makes the cotangents of auto-differentiation themselves
smooth: those of the flow to second order, with trapezoid weights, and to be differentiated again. The price is f at the
last node. On steps of unequal length the parities part again on the way.

Source: Gragg, *On extrapolation algorithms for ordinary initial value problems* (1965), for the smoothed value.
"""

from torch import Tensor

from torchdiffeq_lmm.schemes.weighted_sum import Weight, weighted_sum


def observed(x: Tensor, before: Tensor, slope: Tensor, step: Weight) -> Tensor:
    """The state of a node, with the gradient of the smoothed value.

    Args:
        x, slope: x_j and f_j.
        before: x_{j-1}.
        step: h.
    """
    half = 0.5 * step
    smoothed = weighted_sum((0.5, 0.5, half), (x, before, slope))
    # The difference is 0, and the value exactly x.
    return x.detach() + (smoothed - smoothed.detach())
