"""From a method and a grid to the rows of a recurrence: the start, then the steps, with the weights of each."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .methods import Formula, MultistepMethod, Nodes
from .polynomials import Number, extrapolation_weights
from .recurrence import Keeps, Recurrence, Row
from .starting_procedure import SweptState, deferred_corrections
from .variable_step_stability import check_variable_step_stability

_PATTERNS = 4096
"""Of so many patterns of steps the weights are remembered, from solve to solve."""

_PREDICTED = "predicted"
"""What the state is named that a predictor gives."""


def memory(method: MultistepMethod) -> Keeps:
    """How many of the latest nodes' slopes, that of the last one included, and increments a step may use."""
    formula, closing = method.on_equal_steps, method.closing is not None
    slopes = (
        len(formula.slopes),
        0 if method.predictor is None else method.steps,
        method.order if method.is_implicit or closing else 0,
    )
    return Keeps(max(slopes), max(len(formula.increments), method.order - 1 if closing else 0))


def start_length(method: MultistepMethod) -> int:
    """K: the formula needs k - 1 steps behind it, and the start's polynomials enough slopes for the order."""
    slopes = method.order if method.closing is not None else method.order - 1
    return max(method.steps - 1, slopes - 1 if method.uses_first_slope else slopes)


def unroll(method: MultistepMethod, steps: Tensor) -> Recurrence:
    """The rows of a multistep method on a grid.

    Args:
        method: the method.
        steps: h, of shape (N,), N ≥ 1, positive, float64 on the CPU. Differentiable.

    Raises:
        ValueError: the method is for equal steps, and others than the last one differ; or the steps grow so that the
            method is not stable.
    """
    lengths = _lengths(method, steps)
    start = min(start_length(method), len(lengths))
    writer = _Writer(method, len(lengths))
    for swept in _swept_states(method, lengths):
        writer.write_sweep(swept)
    weights_of = _Coefficients(method, lengths)
    check_variable_step_stability(method, lengths, (weights_of.formula(n) for n in range(start, len(lengths))))
    n, equal = start, 0
    while n < len(lengths):
        writer.write_step(n, weights_of)
        equal = equal + 1 if n > 0 and lengths[n] == lengths[n - 1] else 0
        n += 1
        # Once a pattern of equal steps is all that a row knows of, the rows after it are the same.
        if n > start + writer.reach and equal > writer.reach:
            end = next((m for m in range(n, len(lengths)) if lengths[m] != lengths[n - 1]), len(lengths))
            writer.repeat(n, end - n)
            n = end
    weights = _differentiable_weights(method, steps, lengths, start) if steps.requires_grad else None
    return Recurrence(writer.rows, writer.positions, start, weights)


def _lengths(method: MultistepMethod, steps: Tensor) -> list[float]:
    """The steps as numbers; checked, and equal where they are but for rounding, for methods that need that."""
    lengths: list[float] = steps.tolist()
    if method.closing is None or len(lengths) <= start_length(method):
        return lengths
    lengths = [lengths[0] if math.isclose(length, lengths[0], rel_tol=1e-9) else length for length in lengths]
    for n, length in enumerate(lengths[:-1]):
        if length != lengths[0]:
            raise ValueError(
                f"method {method.name!r} is given by constant coefficients, which hold for equal steps (the last one "
                f"may differ); step {n} has length {length}, step 0 has {lengths[0]}. Use step_size, or a method with "
                f"variable coefficients: Adams, Nyström or BDF"
            )
    return lengths


def _sweeps(method: MultistepMethod, count: int) -> int:
    """L, in a solve of so many steps."""
    start = start_length(method)
    slopes = min(count, start) + method.uses_first_slope
    if method.is_implicit:
        # One more than raises the order, for the formula has a smaller error; through one slope more make nothing new.
        return min(method.order, slopes + 1 if slopes > 1 else 1)
    if count <= start:
        return slopes
    return min(method.order, slopes) if method.starts_above_its_order else max(1, method.order - 1)


def _swept_states(method: MultistepMethod, lengths: Sequence[Number]) -> Iterator[SweptState]:
    steps = lengths[: start_length(method)]
    if steps:
        times = list(accumulate(steps, initial=0 * lengths[0]))
        sweeps = _sweeps(method, len(lengths))
        yield from deferred_corrections(times, sweeps, method.is_implicit, method.uses_first_slope)


def scaled_nodes(lengths: Sequence[Number]) -> list[Number]:
    """t_{n+1}, t_n, t_{n-1}, ... in units of h_n from t_n, by h_n, h_{n-1}, ...; exact where these are equal."""
    if all(isinstance(length, float) and length == lengths[0] for length in lengths):
        return [Fraction(1 - i) for i in range(len(lengths) + 1)]
    unit = lengths[0]
    return [unit / unit, 0 * unit, *(-s for s in accumulate(length / unit for length in lengths[1:]))]


class _Coefficients:
    """The weights of the steps after the start, as numbers."""

    def __init__(self, method: MultistepMethod, lengths: list[float]) -> None:
        self._method = method
        self._lengths = lengths

    def formula(self, n: int) -> Formula:
        """The weights of step n, in the unit of time."""
        formula, reach = _formula_of_step(self._method, self._lengths, n)
        return _formula_of_pattern(formula, self._pattern(n, reach))

    def predictor(self, n: int) -> Formula:
        """The weights of the predictor of step n, in the unit of time."""
        assert self._method.predictor is not None
        return _formula_of_pattern(self._method.predictor, self._pattern(n, self._method.steps))

    def guess(self, n: int, slopes: int) -> tuple[float, ...]:
        """The weights of the slopes at t_n, t_{n-1}, ... in a guess for f at t_{n+1}."""
        return _guess_of_pattern(self._pattern(n, slopes))

    def _pattern(self, n: int, count: int) -> tuple[float, ...]:
        return tuple(self._lengths[max(n + 1 - count, 0) : n + 1][::-1])


def _formula_of_step(
    method: MultistepMethod, lengths: Sequence[float], n: int
) -> tuple[Callable[[Nodes], Formula], int]:
    """The formula of step n and the number of steps that it reaches over."""
    if method.closing is not None and lengths[n] != lengths[0]:
        return method.closing, method.order
    return method.formula, method.steps


@lru_cache(_PATTERNS)
def _formula_of_pattern(formula: Callable[[Nodes], Formula], pattern: tuple[float, ...]) -> Formula:
    h, weights = pattern[0], formula(scaled_nodes(pattern))
    return Formula(
        tuple(float(weight) for weight in weights.increments),
        tuple(h * float(weight) for weight in weights.slopes),
        h * float(weights.implicit),
    )


@lru_cache(_PATTERNS)
def _guess_of_pattern(pattern: tuple[float, ...]) -> tuple[float, ...]:
    new, *nodes = scaled_nodes(pattern)
    return tuple(float(weight) for weight in extrapolation_weights(nodes, new))


class _Writer:
    """Writes the rows, and keeps count of the slopes: which there are, and where in their order.

    States and their slopes are named by their node, the sweep and the node, or `_PREDICTED`.

    Attributes:
        reach: how many of the latest nodes a row may know of.
    """

    def __init__(self, method: MultistepMethod, count: int) -> None:
        self.rows: list[Row] = []
        self.positions = [0.0]
        self._method = method
        self._sweeps = _sweeps(method, count)
        self._slots: dict[Hashable, int] = {}
        self._count = 0
        self._latest: Hashable = 0
        self._shared: dict[Row, Row] = {}
        self._slopes, self._increments = memory(method)
        self.reach = max(method.steps, self._slopes)

    def write_sweep(self, swept: SweptState) -> None:
        """Write the row of a state of the start."""
        method = self._method
        name = self._name(swept.sweep, swept.node)
        guess = self._name(swept.sweep - 1, swept.node) if swept.sweep > 1 else self._name(1, swept.node - 1)
        if swept.node == 1 and swept.sweep == 1:
            guess = 0
        self._write(
            name,
            swept.node,
            evaluates=not method.is_implicit or not self._count,
            slopes={self._name(*key): weight for key, weight in swept.slopes.items()},
            implicit=swept.implicit if method.is_implicit else None,
            guess={guess: 1.0} if method.is_implicit else None,
            is_node=name == swept.node,
        )

    def write_step(self, n: int, coefficients: _Coefficients) -> None:
        """Write the rows of step n."""
        method = self._method
        formula = coefficients.formula(n)
        slopes: dict[Hashable, Number] = {n - i: weight for i, weight in enumerate(formula.slopes)}
        if method.is_implicit:
            # f at t_0 serves the guess, if nothing else.
            evaluates = n == 0
            known = [m for m in range(n, n - method.order, -1) if m in self._slots or (m == 0 and evaluates)]
            guess: dict[Hashable, Number] = {}
            if known:
                guess.update(zip(known, coefficients.guess(n, len(known)), strict=True))
            self._write(n + 1, n + 1, evaluates, slopes, formula.increments, implicit=formula.implicit, guess=guess)
            return
        if method.predictor is not None:
            predicted: dict[Hashable, Number] = {
                n - i: weight for i, weight in enumerate(coefficients.predictor(n).slopes)
            }
            self._write(_PREDICTED, n + 1, True, predicted, is_node=False)
            slopes = {_PREDICTED: formula.implicit, **slopes}
        self._write(n + 1, n + 1, True, slopes, formula.increments)

    def repeat(self, n: int, count: int) -> None:
        """Write the rows of `count` steps from step n on, which are those of the step before it."""
        period = 1 if self._method.predictor is None else 2
        self.rows += self.rows[-period:] * count
        self.positions += [float(m) for m in range(n + 1, n + count + 1) for _ in range(period)]
        self._slots = {
            name + count: slot + period * count for name, slot in self._slots.items() if isinstance(name, int)
        }
        self._count += period * count
        self._latest = n + count

    def _name(self, sweep: int, node: int) -> Hashable:
        return node if sweep in (0, self._sweeps) else (sweep, node)

    def _write(
        self,
        name: Hashable,
        position: int,
        evaluates: bool,
        slopes: Mapping[Hashable, Number],
        increments: Sequence[float] = (),
        implicit: Number | None = None,
        guess: Mapping[Hashable, Number] | None = None,
        is_node: bool = True,
    ) -> None:
        if evaluates:
            self._slots[self._latest] = self._count
            self._count += 1
        count = self._count
        terms, guess_terms = (
            tuple((count - 1 - self._slots[key], float(weight)) for key, weight in weights.items())
            for weights in (slopes, guess or {})
        )
        if implicit is not None:
            self._slots[name] = self._count
            self._count += 1
        row = Row(
            evaluates=evaluates,
            increments=tuple(enumerate(increments)),
            slopes=terms,
            implicit=None if implicit is None else float(implicit),
            guess=guess_terms,
            is_node=is_node,
            keeps=self._needed(position) if is_node else None,
        )
        self.rows.append(self._shared.setdefault(row, row))
        self.positions.append(float(position))
        self._latest = name

    def _needed(self, node: int) -> Keeps | None:
        """What the rows after the one of `node` may use."""
        in_start = node < start_length(self._method)
        later = [self._slots[m] for m in range(node + 1 - self._slopes, node + 1) if m in self._slots]
        self._slots.pop(node - self._slopes, None)
        if in_start:
            return None
        return Keeps(self._count - min(later, default=self._count), self._increments)


def _differentiable_weights(method: MultistepMethod, steps: Tensor, lengths: Sequence[float], start: int) -> Tensor:
    """The weights of all rows as one tensor with the graph of `steps`."""
    parts = []
    for swept in _swept_states(method, steps.unbind()):
        own = [swept.implicit] if method.is_implicit else []
        parts.append(torch.stack([*swept.slopes.values(), *own]))
    last = len(steps) - 1
    stop = last if start <= last and _formula_of_step(method, lengths, last)[0] is not method.formula else last + 1
    for begin, end in ((start, stop), (stop, last + 1)):
        if begin < end:
            formula, reach = _formula_of_step(method, lengths, begin)
            # The steps h_n, h_{n-1}, ..., each for all n at once.
            behind = [steps[begin - i : end - i] for i in range(reach)]
            nodes, h = scaled_nodes(behind), behind[0]
            weights = formula(nodes)
            increments = [torch.zeros_like(h) + _operand(e) for e in weights.increments]
            slopes = [h * _operand(b) for b in weights.slopes]
            own = [h * _operand(weights.implicit)] if method.is_implicit or method.predictor is not None else []
            rows = [*increments, *slopes, *own]
            if method.predictor is not None:
                rows = [*(h * b for b in method.predictor(nodes).slopes), *own, *increments, *slopes]
            parts.append(torch.stack(rows, dim=1).flatten())
    return torch.cat(parts)


def _operand(weight: Number) -> Number:
    # A constant formula keeps its exact weights, which tensors do not take.
    return float(weight) if isinstance(weight, Fraction) else weight
