"""How a multistep method begins: deferred corrections, which evaluate func at the first nodes only.

The first K steps are made together. Euler steps, explicit or implicit as the method, give a first approximation at the
nodes t_1, ..., t_K. Every sweep after that integrates the polynomial through the slopes of the sweep before, node by
node, and adds an Euler step of the difference; that raises the order by one. After L sweeps the states at the K nodes,
a fixed number of them, have errors of order h^{L+1}.

Unlike a Runge–Kutta start it asks func for nothing between the nodes, where parameters that belong to steps or nodes
have no value; and it may be implicit, for stiff problems.

Source: Dutt, Greengard, Rokhlin, *Spectral deferred correction methods for ordinary differential equations* (BIT 2000),
here at the grid's own nodes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .polynomials import Number, integration_weights


class SweptState(NamedTuple):
    """How a state of one sweep is made.

    Attributes:
        sweep: s = 1, ..., L.
        node: n = 1, ..., K.
        base: the node whose state of the last sweep it is added to: 0, or n - 1 in the last sweep.
        slopes: weights by sweep and node, in the unit of time; the slope at node 0 has sweep 0.
        implicit: the weight of its own slope, 0 for an explicit start.
    """

    sweep: int
    node: int
    base: int
    slopes: dict[tuple[int, int], Number]
    implicit: Number


def deferred_corrections(
    times: Sequence[Number], sweeps: int, is_implicit: bool, uses_first_slope: bool
) -> Iterator[SweptState]:
    """The states of all sweeps, in the order in which they can be made.

    Args:
        times: t_0, ..., t_K.
        sweeps: L.
        is_implicit: whether the Euler steps are.
        uses_first_slope: whether f at t_0 takes part in the polynomials; always, where the start is explicit. Where it
            does not, a transient at t_0 is damped instead of integrated.
    """
    last = len(times) - 1
    first = 0 if uses_first_slope else 1
    steps = [times[n + 1] - times[n] for n in range(last)]
    # Quadrature over each step of the polynomial through the slopes at all nodes.
    quadrature = [integration_weights(times[first:], times[n], times[n + 1]) for n in range(last)]
    for sweep in range(1, sweeps + 1):
        for node in range(1, last + 1):
            base = node - 1 if sweep == sweeps else 0
            slopes: defaultdict[tuple[int, int], Number] = defaultdict(int)
            for n in range(base, node):
                at = n + 1 if is_implicit else n
                # At node 0 all sweeps have the same slope, and the difference vanishes.
                if at < node and (at > 0 or sweep == 1):
                    slopes[_slope(sweep, at)] += steps[n]
                if sweep > 1 and at > 0:
                    slopes[_slope(sweep - 1, at)] -= steps[n]
                if sweep > 1:
                    for i, weight in enumerate(quadrature[n], first):
                        slopes[_slope(sweep - 1, i)] += weight
            yield SweptState(sweep, node, base, dict(slopes), steps[node - 1] if is_implicit else 0)


def _slope(sweep: int, node: int) -> tuple[int, int]:
    return (sweep if node else 0, node)
