"""The stepping loop: runs the rows of a recurrence, with the increments of a noise between them where there is one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, add

from torchdiffeq_lmm.schemes.recurrence import Row, Terms
from torchdiffeq_lmm.schemes.weighted_sum import Weight, weighted_sum

Evaluate = Callable[[int, Tensor], Tensor]
"""From the number of a state and the state to its slope."""

SolveImplicit = Callable[[int, Tensor, Tensor | None, Weight, Tensor | None], tuple[Tensor, Tensor]]
"""From the number of a state, x, Σ e d + Σ b f (None for 0), b* and a guess for the slope to increment and slope."""


class Noise(Protocol):
    """What the noise of a stochastic differential equation adds: see `sde_stepping.NoiseTerm`."""

    def added(self, number: int, row: Row, node: Tensor, latest: Tensor) -> Tensor:
        """Return the state of the last node with all noise up to the state that a row makes.

        Args:
            number: the number of the latest state.
            row: the row that makes the next one.
            node: the state of the last node.
            latest: the latest state.
        """


_MAX_RATIO = 16.0

_FORMS = 8
"""How many different rows of late are remembered; on most grids there are no more."""


@dataclass
class History:
    """What the rows to come know of the past, at a node.

    Attributes:
        x: its state.
        previous: the state of the node before it, None at the first one.
        increments: d, the latest one first, as far as they are kept.
        slopes: f, likewise.
    """

    x: Tensor
    previous: Tensor | None = None
    increments: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def copy(self) -> "History":
        """The same past, to go on from another time."""
        return History(self.x, self.previous, self.increments[:], self.slopes[:])


def march(
    history: History,
    rows: Iterable[Row],
    evaluate: Evaluate,
    solve_implicit: SolveImplicit,
    first: int = 0,
    noise: Noise | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Make one state after the other: X = x + Σ K + Σ e d + Σ b f + b* f(X), with x the state of the last node.

    Args:
        history: what the rows begin with, x_0 alone where they are all rows. It is kept up to date.
        rows: how each state is made.
        evaluate: f at a state.
        solve_implicit: the solution of an implicit row.
        first: the number of the state of `history`.
        noise: what makes the noise increments K; None for an ordinary differential equation. With it the increments d
            are those of the drift alone.

    Yields:
        The number of each state made, and the state.
    """
    latest = history.x
    increments, slopes = history.increments, history.slopes
    forms: dict[int, tuple[Row, _Form]] = {}
    for number, row in enumerate(rows, first):
        if id(row) not in forms:
            if len(forms) == _FORMS:
                forms.clear()
            # With the row, for its number is another's once it is gone.
            forms[id(row)] = row, _form_of(row) if noise is None else _GENERAL
        form = forms[id(row)][1]
        x, previous = history.x, history.previous
        if row.evaluates:
            slopes.insert(0, evaluate(number, latest))
        if noise is not None:
            x = noise.added(number, row, x, latest)
        if form.is_two_step and previous is not None:
            # x cancels, and one addition does for three.
            latest = _added(previous, form.terms, slopes)
            increments.clear()
        elif form.scale:
            latest = add(x, _added(slopes[form.lag], form.terms, slopes), alpha=form.scale)
        else:
            if previous is not None and row.increments and not increments:
                increments.append(x - previous)
            increment = _increment(row, number + 1, x, history, solve_implicit)
            latest = x + increment
            if row.is_node:
                increments.insert(0, increment)
        if row.is_node:
            history.previous, history.x = x, latest
        if row.keeps is not None:
            del slopes[row.keeps.slopes :], increments[row.keeps.increments :]
        yield number + 1, latest


def _increment(row: Row, state: int, x: Tensor, history: History, solve_implicit: SolveImplicit) -> Tensor:
    """What a row adds to x, by the past; the slope at an implicit row's state becomes the latest one.

    Args:
        row: the row.
        state: the number of the state that it makes.
        x: what the increment is added to.
        history: the past, of which the increments and slopes are used.
        solve_implicit: see `march`.
    """
    slopes = history.slopes
    terms = (*row.increments, *row.slopes)
    known = None
    # The weights of an implicit row may cancel to 0; an explicit one needs a slope.
    if row.implicit is None or any(_counts(weight) for _, weight in terms):
        tensors = (*_pick(history.increments, row.increments), *_pick(slopes, row.slopes))
        known = weighted_sum((weight for _, weight in terms), tensors)
    if row.implicit is None:
        assert known is not None
        return known
    guess = None
    if row.guess:
        guess = weighted_sum((weight for _, weight in row.guess), _pick(slopes, row.guess))
    elif row.predictor:
        # As a slope, by the row itself.
        predicted = weighted_sum((weight for _, weight in row.predictor), _pick(history.increments, row.predictor))
        guess = (predicted if known is None else predicted - known) / row.implicit
    increment, slope = solve_implicit(state, x, known, row.implicit, guess)
    slopes.insert(0, slope)
    return increment


class _Form(NamedTuple):
    """How a row is carried out with the fewest operations.

    Attributes:
        terms: lags of slopes, and weights.
        is_two_step: whether the row is X = x_{n-1} + Σ weight f.
        scale, lag: where it has slopes alone and nobody needs its increment, X = x + scale (f + Σ weight f), the first
            f being that of `lag`; else scale is 0.
    """

    terms: tuple[tuple[int, float], ...]
    is_two_step: bool = False
    scale: float = 0.0
    lag: int = 0


_GENERAL = _Form(())


def _form_of(row: Row) -> _Form:
    terms = tuple((lag, weight) for lag, weight in row.slopes if isinstance(weight, float) and weight != 0.0)
    # A tensor carries a gradient even where its value is 0 or -1.
    if row.implicit is not None or not terms or any(isinstance(weight, Tensor) for weight in row.weights):
        return _GENERAL
    if len(row.increments) == 1:
        return _Form(terms, is_two_step=bool(row.increments[0][1] == -1.0))
    (lag, scale), *others = terms
    # Where the first weight is small, others would overflow in half precision.
    is_small = any(abs(weight) > _MAX_RATIO * abs(scale) for _, weight in others)
    if row.increments or row.keeps is None or row.keeps.increments or is_small:
        return _GENERAL
    return _Form(tuple((other, weight / scale) for other, weight in others), scale=scale, lag=lag)


def _added(total: Tensor, terms: tuple[tuple[int, float], ...], slopes: list[Tensor]) -> Tensor:
    for lag, weight in terms:
        total = add(total, slopes[lag], alpha=weight)
    return total


def _pick(tensors: list[Tensor], terms: Terms) -> list[Tensor]:
    return [tensors[lag] for lag, _ in terms]


def _counts(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0
