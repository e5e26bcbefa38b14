"""The stepping loop for stochastic differential equations: the rows of an ODE's recurrence, with kicks between them.

For dX = f dt + g dW (Itô), with kicks K_n = g(t_n, X_n) (W(t_{n+1}) - W(t_n)), a stochastic linear multistep (Maruyama)
method is, with γ_j = Σ_{i>j} α_i,

    Σ_j α_j X_{n+j} = h Σ_j β_j f_{n+j} + Σ_{j<k} γ_j K_{n+j}.

Because ρ(1) = 0 the left side is Σ_j γ_j (X_{n+j+1} - X_{n+j}). So the formula says that what the drift alone adds,
D_{n+1} := X_{n+1} - X_n - K_n, obeys the recurrence in increments of the ODE method, on any grid; and

    X_{n+1} = X_n + K_n + D_{n+1}.

With g = 0 it is the ODE method. States that are not at the next node, which start a method, are the last node's with
the kicks of all nodes in between, as far as these are known: each sweep of the start has kicks of its own.

Source: Buckwar, Winkler, *Multistep methods for SDEs and their application to problems with small noise* (SIAM Journal
on Numerical Analysis, 2006).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from torchdiffeq_lmm.schemes.recurrence import Recurrence, Row

from .stepping import History, SolveImplicit, increment_of


class Kicked(Protocol):
    """f and K at the states of one solve, by their numbers."""

    def drift(self, state: int, x: Tensor) -> Tensor:
        """Return f."""

    def kick(self, state: int, x: Tensor) -> Tensor:
        """Return K."""

    def drift_and_kick(self, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and K."""


def kicks_of_rows(recurrence: Recurrence) -> list[tuple[int, ...]]:
    """For each row, the states whose kicks lead from the last node to the state that it makes."""
    kicks = []
    node, latest = 0, {0: 0}
    for i, row in enumerate(recurrence.rows):
        position = int(recurrence.positions[i + 1])
        kicks.append(tuple(latest[at] for at in range(node, position)))
        latest[position] = i + 1
        if row.is_node:
            node, latest = position, {position: i + 1}
    return kicks


def march_with_kicks(
    history: History,
    rows: Iterable[Row],
    kicks: Sequence[tuple[int, ...]],
    kicked: Kicked,
    solve_implicit: SolveImplicit,
    first: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Make one state after the other: X = x + Σ K + Σ e D + Σ b f + b* f(X), with x the state of the last node.

    Args:
        history: see `stepping.march`; its increments are D.
        rows: how each state is made.
        kicks: which K, by the row's number; see `kicks_of_rows`.
        kicked: f and K.
        solve_implicit: the solution of an implicit row.
        first: the number of the state of `history`.

    Yields:
        The number of each state made, and the state.
    """
    latest = history.x
    made: dict[int, Tensor] = {}
    for number, row in enumerate(rows, first):
        # A state's kick is used at once or never.
        is_kicked = number in kicks[number]
        if row.evaluates and is_kicked:
            slope, made[number] = kicked.drift_and_kick(number, latest)
            history.slopes.insert(0, slope)
        elif row.evaluates:
            history.slopes.insert(0, kicked.drift(number, latest))
        elif is_kicked:
            made[number] = kicked.kick(number, latest)
        x = history.x
        for state in kicks[number]:
            x = x + made[state]
        increment = increment_of(row, number + 1, x, history, solve_implicit)
        latest = x + increment
        if row.is_node:
            history.increments.insert(0, increment)
            history.x = latest
            made.clear()
        if row.keeps is not None:
            del history.slopes[row.keeps.slopes :], history.increments[row.keeps.increments :]
        yield number + 1, latest
