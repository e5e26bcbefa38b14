"""torchdiffeq's two-stage Runge–Kutta methods, so that their gradients can be filtered too."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import ClassVar

from torch import Tensor

from .recurrence import Keeps, Recurrence, Row


@dataclass(frozen=True)
class TwoStageMethod:
    """X = x_n + c h f_n at t_n + c h, then x_{n+1} = x_n + h (b_1 f_n + b_2 f(X)), of second order.

    That determines the weights: b_1 + b_2 = 1, b_2 c = ½.

    Attributes:
        name: the name of its solver in torchdiffeq's method table.
        substitutes: torchdiffeq's name for the same method.
        stage: c.
    """

    name: str
    substitutes: str
    stage: Fraction
    order: ClassVar[int] = 2
    steps: ClassVar[int] = 1
    is_implicit: ClassVar[bool] = False
    remembers_slopes: ClassVar[bool] = True

    def unroll(self, steps: Tensor) -> Recurrence:
        """The rows on a grid: see `unrolling.unroll`."""
        second = 1 / (2 * self.stage)
        weights = steps[:, None] * steps.new_tensor([self.stage, second, 1 - second])
        rows, shared = [], {}
        for to_stage, of_stage, of_node in weights.tolist():
            if to_stage not in shared:
                shared[to_stage] = (
                    Row(True, (), ((0, to_stage),), None, (), False, None),
                    Row(True, (), ((0, of_stage), (1, of_node)), None, (), True, Keeps(0, 0)),
                )
            rows.append(shared[to_stage])
        positions = chain.from_iterable((n + float(self.stage), n + 1.0) for n in range(len(steps)))
        return Recurrence(
            list(chain.from_iterable(rows)), [0.0, *positions], 0, weights.flatten() if steps.requires_grad else None
        )


TWO_STAGE_METHODS = (
    TwoStageMethod("filtered_midpoint", "midpoint", Fraction(1, 2)),
    TwoStageMethod("filtered_heun2", "heun2", Fraction(1)),
)
