"""f along one solve, as the stepping loop asks for it: slopes at states, and the solutions of implicit rows."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .implicit_equation import Equation

EvaluateAt = Callable[[int, Tensor, Tensor], Tensor]
"""From the number of a state, what func is given for its time, and the state to the slope."""


class SolvesSteps(Protocol):
    """See `implicit.ImplicitSolver`."""

    def solve(self, equation: Equation, guess: Tensor | None, where: Callable[[], str]) -> tuple[Tensor, Tensor]:
        """Return d and f(x + d)."""


class StepEvaluator:
    """What `march` needs to know of f.

    Args:
        f: from what func is given for a time, and a state, to the slope; nothing is recorded.
        implicit: makes what solves implicit rows.
        name: the method's, for messages.
        user_time: from the number of a state to what func is given for its time.
        evaluate: f at a state of the recurrence.
        records: whether that does more than to return f.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        implicit: Callable[[], SolvesSteps],
        name: str,
        user_time: Callable[[int], Tensor],
        evaluate: EvaluateAt,
        records: bool = True,
    ) -> None:
        self._f = f
        self._make_implicit = implicit
        self._implicit = implicit()
        self._name = name
        self._user_time = user_time
        self._evaluate = evaluate
        self._records = records

    def __call__(self, state: int, x: Tensor) -> Tensor:
        """F at a state."""
        return self._evaluate(state, self._user_time(state), x)

    def restart(self) -> None:
        """Forget what implicit rows have learned from those before."""
        self._implicit = self._make_implicit()

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The increment and the slope of an implicit row.

        Raises:
            RuntimeError: its equation was not solved.
        """
        user_time = self._user_time(state)
        equation = Equation(
            x,
            torch.zeros_like(x) if known is None else known,
            float(weight),
            slope=lambda y: self._f(user_time, y),
            iterate=lambda y: self._evaluate(state, user_time, y),
            time=user_time,
            records=self._records,
        )
        return self._implicit.solve(equation, guess, lambda: f"of method {self._name!r} at t = {float(user_time):.6g}")
