"""The stepping loop: runs the recurrence of a multistep method."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from .combination import Weight, linear_combination
from .methods import Row


def march(
    y0: Tensor, rows: Iterable[Row], slope: Callable[[int, Tensor], Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run ``d_{n+1} = Σ e[n, i] d_{n-i} + Σ b[n, i] f_{n-i}``, ``x_{n+1} = x_n + d_{n+1}``.

    Args:
        y0: x_0.
        rows: the weights (e[n], b[n]) of each step, all of the same lengths.
        slope: from n and x_n to f_n; called once per step.

    Yields:
        n, f_n and x_{n+1}.
    """
    previous, x = y0, y0
    increments: tuple[Tensor, ...] = ()
    slopes: tuple[Tensor, ...] = ()
    for n, (increment_weights, slope_weights) in enumerate(rows):
        slopes = (slope(n, x), *slopes)[: len(slope_weights)]
        if n > 0 and _is_leapfrog_between_equal_steps(increment_weights):
            # x_n cancels, and one addition does for three.
            following = linear_combination((1.0, *slope_weights[: len(slopes)]), (previous, *slopes))
            increments = ()
        else:
            if n > 0 and increment_weights and not increments:
                increments = (x - previous,)
            weights = (*increment_weights[: len(increments)], *slope_weights[: len(slopes)])
            increment = linear_combination(weights, (*increments, *slopes))
            increments = (increment, *increments)[: len(increment_weights)]
            following = x + increment
        previous, x = x, following
        yield n, slopes[0], x


def _is_leapfrog_between_equal_steps(increment_weights: tuple[Weight, ...]) -> bool:
    # A tensor carries a gradient even where its value is -1.
    return len(increment_weights) == 1 and isinstance(increment_weights[0], float) and increment_weights[0] == -1.0
