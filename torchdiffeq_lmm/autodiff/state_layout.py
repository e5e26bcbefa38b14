"""How states lie in memory where they are passed from one compiled block to the next.

Where they have few components, samples are next to each other: then a loop over samples loads several of them at once.
"""

from torch import Tensor

MOST_COMPONENTS = 4
"""States of more components are not taken apart: what is traced grows by this factor."""


def component_axis(x: Tensor) -> int:
    """The dimension of the few components of a state, counted from the end, the last one being 1; 0 for none."""
    if x.ndim and x.device.type == "cpu":
        for axis in (1, x.ndim):
            size = x.shape[-axis]
            if isinstance(size, int) and 1 < size <= MOST_COMPONENTS:
                return axis
    return 0


def laid_out(states: Tensor, x: Tensor) -> Tensor:
    """States with that layout.

    Args:
        states: of shape (..., *x.shape).
        x: a state.
    """
    axis = component_axis(x)
    if axis in (0, x.ndim):
        return states.contiguous()
    dim, first = states.ndim - axis, states.ndim - x.ndim
    return states.movedim(dim, first).contiguous().movedim(first, dim)
