"""The state between nodes: the polynomial through the latest states, as many as the order of the step asks for."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.polynomials import extrapolation_weights
from torchdiffeq_lmm.schemes.weighted_sum import Weight, weighted_sum


class Span(NamedTuple):
    """The states that a polynomial goes through.

    Attributes:
        node: the last one, at the end of the step.
        reach: how many nodes before it there are.
    """

    node: int
    reach: int

    @property
    def nodes(self) -> range:
        """All of them, the last one first."""
        return range(self.node, self.node - self.reach - 1, -1)


def interpolated(span: Span, times: Sequence[float], states: Mapping[int, Tensor], fraction: Weight) -> Tensor:
    """The state in the last step of a span.

    Args:
        span: see there.
        times: of all nodes.
        states: by node.
        fraction: from the end of the step, in steps: 0 there, -1 at the beginning.
    """
    end, h = times[span.node], times[span.node] - times[span.node - 1]
    weights = extrapolation_weights([(times[node] - end) / h for node in span.nodes], fraction)
    return weighted_sum(weights, [states[node] for node in span.nodes])
