"""How states lie in memory where they are passed from one compiled block to the next.

Where they have few components, samples are next to each other: then a loop over samples loads several of them at once.
"""

from torch import Tensor

MOST_COMPONENTS = 4
"""States of more components are not taken apart: what is traced grows by this factor."""


def few_components(x: Tensor) -> int:
    """The dimension of the components of a state, counted from the end, the last one being 1; 0 where they are many."""
    if x.ndim and x.device.type == "cpu":
        for axis in (1, x.ndim):
            size = x.shape[-axis]
            if isinstance(size, int) and 1 < size <= MOST_COMPONENTS:
                return axis
    return 0


def laid_out(states: Tensor, ndim: int, axis: int) -> Tensor:
    """States with that layout.

    Args:
        states: of shape (..., *x.shape).
        ndim: the number of dimensions of a state x.
        axis: of its components, counted from the end; 0 for a layout without gaps in the order of the dimensions.
    """
    if axis in (0, ndim):
        return states.contiguous()
    dim, first = states.ndim - axis, states.ndim - ndim
    return states.movedim(dim, first).contiguous().movedim(first, dim)
