"""The stepping loop: runs the rows of a recurrence."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from .combination import Weight, linear_combination
from .recurrence import Row, Terms

Evaluate = Callable[[int, Tensor], Tensor]
"""From the number of a state and the state to its slope."""

SolveImplicit = Callable[[int, Tensor, Tensor | None, Weight, Tensor | None], tuple[Tensor, Tensor]]
"""From the number of a state, x, Σ e d + Σ b f (None for 0), b* and a guess for the slope to increment and slope."""


def march(
    y0: Tensor, rows: Iterable[Row], evaluate: Evaluate, solve_implicit: SolveImplicit
) -> Iterator[tuple[int, Tensor]]:
    """Make one state after the other: X = x + Σ e d + Σ b f + b* f(X), with x the state of the last node.

    Args:
        y0: x_0, state 0.
        rows: how each state is made.
        evaluate: f at a state.
        solve_implicit: the solution of an implicit row.

    Yields:
        The number of each state from 1 on, and the state.
    """
    previous: Tensor | None = None
    latest = x = y0
    increments: list[Tensor] = []
    slopes: list[Tensor] = []
    for number, row in enumerate(rows):
        if row.evaluates:
            slopes.insert(0, evaluate(number, latest))
        if previous is not None and row.implicit is None and _is_two_step(row.increments):
            # x cancels, and one addition does for three.
            latest = linear_combination((*(b for _, b in row.slopes), 1.0), (*_pick(slopes, row.slopes), previous))
            increments = []
        else:
            if previous is not None and row.increments and not increments:
                increments = [x - previous]
            terms = (*row.increments, *row.slopes)
            known = None
            # The weights of an implicit row may cancel to 0; an explicit one needs a slope.
            if row.implicit is None or any(_counts(weight) for _, weight in terms):
                tensors = (*_pick(increments, row.increments), *_pick(slopes, row.slopes))
                known = linear_combination((weight for _, weight in terms), tensors)
            if row.implicit is None:
                assert known is not None
                increment = known
            else:
                guess = None
                if row.guess:
                    guess = linear_combination((weight for _, weight in row.guess), _pick(slopes, row.guess))
                increment, slope = solve_implicit(number + 1, x, known, row.implicit, guess)
                slopes.insert(0, slope)
            latest = x + increment
            if row.is_node:
                increments.insert(0, increment)
        if row.is_node:
            previous, x = x, latest
        if row.keeps is not None:
            del slopes[row.keeps.slopes :], increments[row.keeps.increments :]
        yield number + 1, latest


def _pick(tensors: list[Tensor], terms: Terms) -> list[Tensor]:
    return [tensors[lag] for lag, _ in terms]


def _counts(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0


def _is_two_step(increments: Terms) -> bool:
    # A tensor carries a gradient even where its value is -1.
    return len(increments) == 1 and isinstance(increments[0][1], float) and increments[0][1] == -1.0
