"""The discrete adjoint of a recurrence: what auto-differentiation computes, state by state backwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .recurrence import Layout, Row

Contributions = list[tuple[float, Tensor]]
"""A sum of cotangents, as weights and cotangents; nothing is 0."""


class TransposedJacobians(Protocol):
    """The Jacobians J of f at the states, transposed."""

    def vjp(self, state: int, cotangent: Contributions) -> Contributions:
        """Return Jᵀ times a cotangent of the slope at a state. Called once for every state, the last one first."""

    def solve(self, state: int, weight: float, rhs: Tensor) -> Tensor:
        """Return the solution D of (1 - b* Jᵀ) D = rhs."""


class AdjointState(NamedTuple):
    """The cotangents around one state X. None, and no contributions, stand for 0.

    Attributes:
        state: its number.
        node: its node, None if it is at none.
        mu: μ, the cotangent of the slope f(X) as far as the rows use it.
        later: what the rows after the one that made X contribute to μ; all of it where that row is explicit.
        pulled: Jᵀ later.
        shift: at a node, ∂E/∂X by the rows after it and what E sees of it: P_{n+1} + g_n + Jᵀ later.
        window: at a node, P_n = ∂E/∂X with all slopes and increments before it held fixed: the derivative with respect
            to shifting the whole history. It is `shift` where the row that made X is explicit.
        increment: D, the cotangent of the increment that made X; None for x_0.
        slopes_before: what the rows after X contribute to the cotangents of the slopes before, by state.
        increments_before: the same for the increments up to X, by the node that they lead to.
    """

    state: int
    node: int | None
    mu: Contributions
    later: Contributions
    pulled: Contributions
    shift: Tensor
    window: Tensor
    increment: Tensor | None
    slopes_before: Mapping[int, Contributions]
    increments_before: Mapping[int, Contributions]


def discrete_adjoint(
    rows: Sequence[Row],
    node_cotangents: Sequence[Tensor | None],
    jacobians: TransposedJacobians,
    zero: Tensor,
    noise_vjp: Callable[[int], Tensor | None] | None = None,
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
        jacobians: of f at the states.
        zero: a state of zeros.
        noise_vjp: what a state receives besides, by the noise increment that is made of it, where there are any: asked
            for after the state before it in this order has been yielded. It belongs to P.

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
        pulled = jacobians.vjp(state, later)
        mu = later
        by_noise = None if noise_vjp is None else noise_vjp(state)
        window: Tensor | None
        shift: Tensor | None
        increment: Tensor | None
        leading: Contributions = []
        if node is not None:
            seen = node_cotangents[node]
            rest = rest if seen is None else rest + seen
            rest = rest if by_noise is None else rest + by_noise
            leading = increments.get(node, [])
            window = shift = plus(rest, pulled)
            increment = plus(window, leading)
        else:
            received = pulled if by_noise is None else [*pulled, (1.0, by_noise)]
            window = shift = increment = combine(received) if received else None
        if row is not None and row.implicit is not None and increment is not None:
            weight = float(row.implicit)
            increment = jacobians.solve(state, weight, increment)
            mu = [*later, (weight, increment)]
            # D = window + Σ e D, and the solution has all that Jᵀ b* D adds to the window.
            window = plus(increment, [(-e, cotangent) for e, cotangent in leading])
        yield AdjointState(
            state,
            node,
            mu,
            later,
            pulled,
            zero if shift is None else shift,
            zero if window is None else window,
            increment,
            slopes,
            increments,
        )
        if node is not None:
            increments.pop(node, None)
        if is_node and window is not None:
            rest = window
        elif window is not None:
            rest = rest + window
        if row is None or increment is None:
            continue
        pass_on(row, state, increment, layout, slopes, increments)


def pass_on(
    row: Row,
    state: int,
    increment: Tensor,
    layout: Layout,
    slopes: dict[int, Contributions],
    increments: dict[int, Contributions],
) -> None:
    """Add what the row that makes a state adds to the cotangents before it, D being that of its increment."""
    for lag, e in row.increments:
        if e != 0.0:
            increments.setdefault(layout.node_before[state - 1] - lag, []).append((float(e), increment))
    for lag, b in row.slopes:
        if b != 0.0:
            slopes.setdefault(layout.slope(state - 1, lag), []).append((float(b), increment))


def weight_gradients(
    row: Row,
    increment: Tensor | None,
    difference: Callable[[int], Tensor],
    slope: Callable[[int], Tensor],
) -> list[Tensor]:
    """The gradients with respect to the weights of a row: <D, d> for e, <D, f> for b and b*.

    Args:
        row: the row.
        increment: D of the state that it makes, from `discrete_adjoint`; None for 0.
        difference: from a lag to the increment that it means.
        slope: from a lag to the slope that it means; -1 is the one at the state that the row makes.

    Returns:
        One for every weight, in their order, 0-d, float64.
    """
    if increment is None:
        return [torch.zeros((), dtype=torch.float64, device="cpu")] * len(row.weights)
    lags = [lag for lag, _ in row.slopes] + ([] if row.implicit is None else [-1])
    tensors = [*(difference(lag) for lag, _ in row.increments), *map(slope, lags)]
    return [(increment.conj() * tensor).sum().real.double() for tensor in tensors]


def combine(contributions: Contributions) -> Tensor:
    """The sum of one contribution or more, a new tensor."""
    (weight, first), *others = contributions
    return plus(first * weight if weight != 1.0 or not others else first, others)


def plus(value: Tensor, contributions: Contributions) -> Tensor:
    """The sum of a tensor and contributions."""
    for weight, tensor in contributions:
        value = torch.add(value, tensor, alpha=weight)
    return value
