"""The discrete adjoint of a multistep recurrence: what auto-differentiation computes, step by step backwards."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .combination import linear_combination
from .methods import Row


class AdjointStep(NamedTuple):
    """The cotangents around the n-th evaluation of f.

    Attributes:
        n: the evaluation.
        increment_cotangent: D_{n+1} = ∂E/∂d_{n+1}, of the increment x_{n+1} - x_n.
        window: P_n = Σ_{j ≥ n} (J_jᵀ μ_j + g_j) = ∂E/∂x_n with the increments held fixed: the derivative with respect
            to shifting the whole history at node n.
        next_window: P_{n+1}.
    """

    n: int
    increment_cotangent: Tensor
    window: Tensor
    next_window: Tensor


def discrete_adjoint(
    rows: Sequence[Row],
    node_cotangents: Sequence[Tensor | None],
    pull_back: Callable[[int, Tensor | None], Tensor | None],
    zero: Tensor,
) -> Iterator[AdjointStep]:
    """Run the adjoint of ``d_{n+1} = Σ e[n, i] d_{n-i} + Σ b[n, i] f_{n-i}``, ``x_{n+1} = x_n + d_{n+1}`` backwards.

        P_N = g_N,     D_{n+1} = P_{n+1} + Σ_i e[n+1+i, i] D_{n+2+i},     μ_n = Σ_i b[n+i, i] D_{n+1+i},
        P_n = P_{n+1} + J_nᵀ μ_n + g_n.

    ∂E/∂x_0 is the last step's `window`, P_0.

    Args:
        rows: the weights (e[n], b[n]) of the N steps, as numbers.
        node_cotangents: g_0, ..., g_N, None for a node that E does not see.
        pull_back: from n and μ_n (None at n = N, where the recurrence evaluates no f) to J_nᵀ times all that arrives
            at the evaluations of f at node n, None for zero.
        zero: a state of zeros.

    Yields:
        The steps n = N-1, ..., 0.
    """
    steps = len(rows)
    window = _sum(zero, pull_back(steps, None), node_cotangents[steps])
    reach_of_increments, reach_of_slopes = (len(weights) for weights in rows[0])
    later: tuple[Tensor, ...] = ()
    for n in reversed(range(steps)):
        weights = [row[0][i] for i, row in enumerate(rows[n + 1 : n + 1 + reach_of_increments])]
        latest = linear_combination((1.0, *weights), (window, *later[: len(weights)]))
        later = (latest, *later)[: max(reach_of_increments, reach_of_slopes)]
        weights = [row[1][i] for i, row in enumerate(rows[n : n + reach_of_slopes])]
        mu = linear_combination(weights, later[: len(weights)])
        next_window, window = window, _sum(window, pull_back(n, mu), node_cotangents[n])
        yield AdjointStep(n, latest, window, next_window)


def weight_gradients(
    backwards: Sequence[AdjointStep], states: Sequence[Tensor], slopes: Sequence[Tensor], increments: int, reach: int
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the weights: ∂E/∂e[n, i] = <D_{n+1}, d_{n-i}> and ∂E/∂b[n, i] = <D_{n+1}, f_{n-i}>.

    Args:
        backwards: the steps of `discrete_adjoint`.
        states: x_0, ..., x_{N-1}.
        slopes: f_0, ..., f_{N-1}.
        increments: how many weights e a step has.
        reach: how many weights b a step has.

    Returns:
        Tensors of shapes (N, increments) and (N, reach), float64 on the CPU; 0 where a weight has nothing to act on.
    """
    increment_grads = torch.zeros(len(states), increments, dtype=torch.float64)
    slope_grads = torch.zeros(len(states), reach, dtype=torch.float64)
    for n, cotangent, _, _ in backwards:
        for i in range(min(increments, n)):
            increment_grads[n, i] = _inner(cotangent, states[n - i] - states[n - i - 1])
        for i in range(min(reach, n + 1)):
            slope_grads[n, i] = _inner(cotangent, slopes[n - i])
    return increment_grads, slope_grads


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum().real


def _sum(total: Tensor, *terms: Tensor | None) -> Tensor:
    for term in terms:
        if term is not None:
            total = total + term
    return total
