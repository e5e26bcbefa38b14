"""The discrete adjoint of a recurrence: what auto-differentiation computes, state by state backwards."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .combination import linear_combination
from .recurrence import Layout, Row

Contributions = list[tuple[float, Tensor]]
"""A sum of cotangents of increments, as weights and cotangents."""


class Linearisation(Protocol):
    """The Jacobians J of f at the states, transposed."""

    def pull_back(self, state: int, cotangent: Tensor | None) -> Tensor | None:
        """Return Jᵀ times a cotangent of the slope at a state. None is 0."""

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """Return the solution D of (1 - b* Jᵀ) D = rhs."""


class AdjointState(NamedTuple):
    """The cotangents around one state X. None stands for 0.

    Attributes:
        state: its number.
        node: its node, None if it is at none.
        mu: μ, the cotangent of the slope f(X) as far as the rows use it.
        later: what the rows after the one that made X contribute to μ; all of it where that row is explicit.
        pulled: Jᵀ later.
        rest: at a node, ∂E/∂X with its slope held fixed, by the rows after it: P_{n+1} + g_n, and with it P of the
            states in between.
        window: at a node, P_n = ∂E/∂X with all slopes and increments before it held fixed: the derivative with respect
            to shifting the whole history.
        increment: D, the cotangent of the increment that made X; None for x_0.
        slopes_before: what the rows after X contribute to the cotangents of the slopes before, by state.
        increments_before: the same for the increments up to X, by the node that they lead to.
    """

    state: int
    node: int | None
    mu: Tensor | None
    later: Contributions
    pulled: Tensor | None
    rest: Tensor
    window: Tensor
    increment: Tensor | None
    slopes_before: Mapping[int, Contributions]
    increments_before: Mapping[int, Contributions]


def discrete_adjoint(
    rows: Sequence[Row], node_cotangents: Sequence[Tensor | None], linearisation: Linearisation, zero: Tensor
) -> Iterator[AdjointState]:
    """Run the adjoint of X = x + Σ e d + Σ b f + b* f(X) backwards over the rows.

    With D the cotangent of an increment, a row adds e D to that of each earlier increment, b D to that of each slope,
    and D to that of x. For a multistep method on nodes alone that is

        P_n = P_{n+1} + g_n + J_nᵀ μ_n,
        D_n = P_n + Σ_i e[n+i, i] D_{n+1+i},
        μ_n = b* D_n + Σ_i b[n+i, i] D_{n+1+i}.

    Args:
        rows: the rows, with numbers for weights.
        node_cotangents: g_0, ..., g_N, None for a node that E does not see.
        linearisation: the Jacobians.
        zero: a state of zeros.

    Yields:
        All states, the last one first. The mappings are those of the moment.
    """
    layout = Layout(rows)
    slopes: dict[int, Contributions] = {}
    increments: dict[int, Contributions] = {}
    rest = zero
    for state in range(len(rows), -1, -1):
        row = rows[state - 1] if state else None
        is_node = row is None or row.is_node
        node = layout.node_before[state] if is_node else None
        later = slopes.pop(state, [])
        leading = [] if node is None else increments.get(node, [])
        mu = combine(later)
        pulled = linearisation.pull_back(state, mu)
        if node is not None:
            seen = node_cotangents[node]
            rest = rest if seen is None else rest + seen
            window = rest if pulled is None else rest + pulled
            increment = plus(window, combine(leading))
        else:
            window = zero if pulled is None else pulled
            increment = pulled
        if row is not None and row.implicit is not None and increment is not None:
            weight = float(row.implicit)
            increment = linearisation.solve(state, weight, increment)
            mu = combine([*later, (weight, increment)])
            # D = window + Σ e D, and the solution has all that Jᵀ b* D adds to the window.
            from_leading = combine(leading)
            window = increment if from_leading is None else increment - from_leading
        yield AdjointState(state, node, mu, later, pulled, rest, window, increment, slopes, increments)
        if node is not None:
            increments.pop(node, None)
        rest = window if is_node else rest + window
        if row is None or increment is None:
            continue
        for lag, e in row.increments:
            target = layout.node_before[state - 1] - lag
            increments.setdefault(target, []).append((float(e), increment))
        for lag, b in row.slopes:
            slopes.setdefault(layout.slope(state - 1, lag), []).append((float(b), increment))


def weight_gradients(
    rows: Sequence[Row], increments: Sequence[Tensor | None], states: Mapping[int, Tensor], slopes: Mapping[int, Tensor]
) -> Tensor:
    """The gradients with respect to all weights: <D, d> for e, <D, f> for b and b*.

    Args:
        rows: the rows.
        increments: D of every state, from `discrete_adjoint`; None for 0.
        states: all states.
        slopes: f at the states where it is evaluated.

    Returns:
        A tensor of shape (n,), float64 on the CPU, for the weights in the order of the rows; 0 where an increment
        before the first is meant.
    """
    layout = Layout(rows)
    at_node = [0, *(i + 1 for i, row in enumerate(rows) if row.is_node)]
    zero = torch.zeros((), dtype=torch.float64, device=states[0].device)
    gradients: list[Tensor] = []
    for i, row in enumerate(rows):
        cotangent = increments[i + 1]
        if cotangent is None:
            gradients.extend([zero] * len(row.weights))
            continue
        for lag, _ in row.increments:
            node = layout.node_before[i] - lag
            gradients.append(_inner(cotangent, states[at_node[node]] - states[at_node[node - 1]]))
        gradients.extend(_inner(cotangent, slopes[layout.slope(i, lag)]) for lag, _ in row.slopes)
        if row.implicit is not None:
            gradients.append(_inner(cotangent, slopes[i + 1]))
    return torch.stack(gradients).cpu()


def combine(contributions: Contributions) -> Tensor | None:
    """The weighted sum; None for nothing."""
    weights = [weight for weight, _ in contributions]
    return linear_combination(weights, (tensor for _, tensor in contributions)) if any(weights) else None


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, with None for 0."""
    return a if b is None else b if a is None else a + b


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum().real.double()
