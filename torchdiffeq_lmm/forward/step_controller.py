"""The order and the length of the next step, from the errors of the last one: no tensors here.

A step is accepted where its error, in terms of the tolerance, is at most 1. Order and length then stay as they are for
k + 1 steps, so that the past has equal steps where that is possible; after them the orders k - 1, k and k + 1 are
compared by how long a step each would allow.

Source: Byrne, Hindmarsh (1975) and Shampine, Gordon (1975), see `schemes.variable_order`; Hairer, Nørsett, Wanner,
*Solving Ordinary Differential Equations I*, II.4 for the factors, III.7 for the choice of the order.
"""

import math
from dataclasses import dataclass

from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily

_WORTH_IT = 1.2
"""A step becomes longer by this factor at least, or not at all."""

_SHORTER = 0.9
"""After a failure the next attempt is shorter by this factor at least, whatever dfactor is."""

_FAILURES = 3
"""After so many failures at one node order 1 begins anew, for the past may be what is wrong."""

_UNSOLVED = 0.5
"""The factor after an implicit equation that was not solved, where dfactor is no larger."""

_EQUAL = 0.01
"""Lengths that differ by this part are taken for equal: near the last place of a time they are rounded."""


@dataclass(frozen=True)
class StepControl:
    """What users can ask of the steps, with torchdiffeq's meanings.

    Attributes:
        first_step: the length of the first step; None to choose it.
        min_step: steps as short as this are accepted whatever their error.
        max_step: the longest.
        safety: a factor for steps that errors would just allow.
        ifactor: the largest factor from one step to the next.
        dfactor: the smallest.
        max_num_steps: the most attempts from one output to the next.
        max_order: the highest order.
    """

    first_step: float | None
    min_step: float
    max_step: float
    safety: float
    ifactor: float
    dfactor: float
    max_num_steps: int
    max_order: int


class StepController:
    """Chooses order and length, step after step.

    Args:
        family: the methods.
        control: what users ask for.
        first_step: the length of the first step.

    Attributes:
        order: of the next attempt.
        step: its length, if nothing cuts it short.
    """

    def __init__(self, family: VariableOrderFamily, control: StepControl, first_step: float) -> None:
        self.order = 1
        self.step = first_step
        self._family = family
        self._control = control
        self._equal = 0
        self._failures = 0
        self._last: float | None = None
        # At first the length rises with every step, until an error says otherwise; so does the order, until a lower one
        # would do better: the weights of a high order on steps that keep doubling are large.
        self._starts = True
        self._rises = True
        self._steps = 0

    def proposed(self) -> float:
        """The length of the next attempt."""
        control = self._control
        if self._last is not None:
            self.step = min(self.step, self._last * self._largest_growth(self.order))
        self.step = min(max(self.step, control.min_step), control.max_step)
        return self.step

    @property
    def compares(self) -> bool:
        """Whether the errors of the neighbouring orders will count after the next step."""
        return self._starts or self._equal >= self.order

    def accept(self, step: float, own: float, lower: float | None, higher: float | None) -> None:
        """Note that a step was accepted.

        Args:
            step: its length.
            own: its error, in terms of the tolerance.
            lower, higher: those of the neighbouring orders, where `compares`; None where there are none.
        """
        compares, self._failures = self.compares, 0
        is_equal = self._last is not None and math.isclose(step, self._last, rel_tol=_EQUAL)
        self._equal = self._equal + 1 if is_equal else 1
        self._last = step
        self._steps += 1
        if step < self.step * (1 - _EQUAL):
            # It was cut short, and tells little of the longer ones after it.
            self._equal = 0
            return
        if not compares:
            return
        factors = {
            self.order + change: self._factor(self.order + change, error)
            for change, error in ((0, own), (-1, lower), (1, higher))
            if error is not None and self.order + change <= self._control.max_order
        }
        best = max(factors, key=lambda order: factors[order])
        if self._starts:
            self._rises = self._rises and best >= self.order and self.order < self._control.max_order
            if self._rises:
                best = self.order + (self._steps > self.order or not self._family.is_implicit)
            else:
                best = min(best, self.order)
                self._starts = best < self._control.max_order and factors[best] >= self._largest_growth(best)
        factor = factors.get(best, factors[self.order])
        if best == self.order and 1 <= factor < _WORTH_IT:
            return
        self._change(best, max(self._control.dfactor, min(factor, self._largest_growth(best))))

    def reject(self, step: float, own: float, lower: float | None) -> None:
        """Note that an attempt was rejected; as `accept`."""
        self._failed()
        order = self.order
        if lower is not None and lower < own:
            order, own = order - 1, lower
        if self._failures >= _FAILURES:
            order = 1
        factor = self._factor(order, own) if math.isfinite(own) else 0.0
        self.step = step
        self._change(order, min(max(self._control.dfactor, factor), _SHORTER))

    def fail(self, step: float) -> None:
        """Note that an implicit equation was not solved."""
        self._failed()
        self.step = step
        factor = min(max(self._control.dfactor, _UNSOLVED), _SHORTER)
        self._change(1 if self._failures >= _FAILURES else self.order, factor)

    def _failed(self) -> None:
        self._failures += 1
        self._starts = False

    def resume(self) -> None:
        """Begin anew by the last length that was kept, after what asked for shorter steps has gone."""
        if self._last is not None:
            self.step = self._last
        self.order, self._equal, self._failures, self._steps = 1, 0, 0, 0
        self._starts = self._rises = True

    def _largest_growth(self, order: int) -> float:
        return min(self._control.ifactor, self._family.largest_growth(order))

    def _factor(self, order: int, error: float) -> float:
        return math.inf if error == 0 else float(self._control.safety * error ** (-1 / (order + 1)))

    def _change(self, order: int, factor: float) -> None:
        self.order = order
        self.step *= factor
        self._equal = 0
