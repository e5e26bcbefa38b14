"""The noise of stochastic differential equations in the stepping loop: its increments between the rows of an ODE.

For dX = f dt + g dW (Itô), with noise increments K_n = g(t_n, X_n) (W(t_{n+1}) - W(t_n)), a stochastic linear
multistep (Maruyama) method is, with γ_j = Σ_{i>j} α_i,

    Σ_j α_j X_{n+j} = h Σ_j β_j f_{n+j} + Σ_{j<k} γ_j K_{n+j}.

Because ρ(1) = 0 the left side is Σ_j γ_j (X_{n+j+1} - X_{n+j}). So the formula says that what the drift alone adds,
D_{n+1} := X_{n+1} - X_n - K_n, obeys the recurrence in increments of the ODE method, on any grid; and

    X_{n+1} = X_n + K_n + D_{n+1}.

With g = 0 it is the ODE method. States that are not at the next node, which start a method, are the last node's with
the noise of all nodes in between, as far as it is known: each sweep of the start has noise increments of its own.

Source: Buckwar, Winkler, *Multistep methods for SDEs and their application to problems with small noise* (SIAM Journal
on Numerical Analysis, 2006).
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from torchdiffeq_lmm.schemes.recurrence import Recurrence, Row


class DriftAndNoise(Protocol):
    """f and K at the states of one solve, by their numbers."""

    def drift(self, state: int, x: Tensor) -> Tensor:
        """Return f."""

    def noise(self, state: int, x: Tensor) -> Tensor:
        """Return K."""

    def drift_and_noise(self, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and K."""


def noise_of_rows(recurrence: Recurrence) -> list[tuple[int, ...]]:
    """For each row, the states whose noise increments lead from the last node to the state that it makes."""
    of_rows = []
    node, latest = 0, {0: 0}
    for i, row in enumerate(recurrence.rows):
        position = int(recurrence.positions[i + 1])
        of_rows.append(tuple(latest[at] for at in range(node, position)))
        latest[position] = i + 1
        if row.is_node:
            node, latest = position, {position: i + 1}
    return of_rows


class NoiseTerm:
    """The noise increments of one solve, as the stepping loop adds them.

    Args:
        of_rows: which K, by the row's number; see `noise_of_rows`.
        field: f and K.
    """

    def __init__(self, of_rows: Sequence[tuple[int, ...]], field: DriftAndNoise) -> None:
        self._of_rows = of_rows
        self._field = field
        self._made: dict[int, Tensor] = {}

    def evaluate(self, state: int, x: Tensor) -> Tensor:
        """F at a state; K as well, by the same call, where it leads on from there."""
        # A state's noise is used at once or never.
        if state not in self._of_rows[state]:
            return self._field.drift(state, x)
        slope, self._made[state] = self._field.drift_and_noise(state, x)
        return slope

    def added(self, number: int, row: Row, node: Tensor, latest: Tensor) -> Tensor:
        """See `stepping.Noise`."""
        if number in self._of_rows[number] and not row.evaluates:
            self._made[number] = self._field.noise(number, latest)
        for state in self._of_rows[number]:
            node = node + self._made[state]
        if row.is_node:
            self._made.clear()
        return node
