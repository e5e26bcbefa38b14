"""Leapfrog run backwards: the states of the forward pass once more, from the last ones."""

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Keeps, Row

from .checkpoints import Rerun, Snapshot, Steps, relative_difference
from .evaluation import Evaluation


class DriftError(RuntimeError):
    """A backward pass with ``backward="reversible"`` came back to other states than the solve had: see `Reversible`."""


def is_reversible(method: MultistepMethod) -> bool:
    """Whether every step can be undone: x_{n+1} = x_n + e d_n + b f_n with e ≠ 0 gives d_n, and so x_{n-1}."""
    formula = method.on_equal_steps
    return (
        method.closing is None
        and method.predictor is None
        and not method.is_implicit
        and len(formula.increments) == 1
        and len(formula.slopes) == 1
    )


@lru_cache(1024)
def reversed_row(row: Row) -> Row:
    """The row that undoes one: with δ_n = x_n - x_{n+1} it is δ_{n-1} = δ_n / e + (b / e) f_n."""
    ((_, e),) = row.increments
    ((_, b),) = row.slopes
    return row._replace(increments=((0, 1 / e),), slopes=((0, b / e),), keeps=Keeps(0, 1))


class Reversal:
    """The evaluations of a leapfrog solve, made again from the last one to the first.

    Args:
        rerun: what it takes.
        anchors: the known states, by increasing number: from the first one to the last one of the solve.
        tolerance: the largest drift that is accepted.

    Attributes:
        drift: the largest so far.
    """

    def __init__(self, rerun: Rerun, anchors: Sequence[Snapshot], tolerance: float) -> None:
        self.drift = 0.0
        self._rerun = rerun
        self._anchors = anchors
        self._tolerance = tolerance
        self._back = self._way_back()
        self._state = anchors[-1].state
        self._evaluation: Evaluation | None = None
        self._slope: Tensor
        self._around: tuple[Tensor, Tensor]

    def evaluation(self, state: int) -> Evaluation | None:
        """See `Recollection`.

        Raises:
            DriftError: the drift is beyond the tolerance.
        """
        while self._state > state:
            self._state = next(self._back)
        return self._evaluation if self._state == state < self._anchors[-1].state else None

    def slope(self, state: int) -> Tensor:
        """See `Recollection`."""
        assert state == self._state
        return self._slope

    def increment(self, node: int) -> Tensor:
        """See `Recollection`."""
        assert node == self._state
        x, before = self._around
        return x - before

    def close(self) -> None:
        """Let go of all that it holds."""
        self._back.close()
        del self._back

    def _way_back(self) -> Generator[int, None, None]:
        """Go back state by state; each is yielded when f is evaluated there and the state before it is known."""
        rows = self._rerun.recurrence.rows
        steps = self._rerun.steps(self._evaluate)
        for below, above in reversed(list(pairwise(self._anchors))):
            top, past = above.state - 1, above.history
            assert past.previous is not None
            x, after = past.previous, past.x
            backwards = (reversed_row(rows[n]) for n in range(top, below.state, -1))
            turned = History(x, past.x, [-d for d in past.increments])
            evaluate = _downwards_from(top, steps)
            for number, before in march(turned, backwards, evaluate, steps.solve_implicit):
                self._around = x, before
                x, after = before, x
                yield top + 1 - number
            self._measure(x, below.history.x)
            past = below.history
            if past.previous is not None:
                self._around = past.x, past.previous
            # One step forth again, for nothing else tells whether func is what it was.
            row = rows[below.state : below.state + 1]
            for _, made in march(past.copy(), row, steps, steps.solve_implicit, below.state):
                self._measure(after, made)
            yield below.state

    def _evaluate(self, state: int, user_time: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        # Not for longer than that, for others evaluate while this waits.
        with self._rerun.circumstances.restored():
            slope, self._evaluation = self._rerun.recorder.record(user_time, x)
        self._slope = slope.detach()
        return self._slope

    def _measure(self, reached: Tensor, known: Tensor) -> None:
        drift = relative_difference(reached, known)
        # In this order, a drift that is not a number stays.
        self.drift = drift if not drift <= self.drift else self.drift
        if drift != drift:
            raise DriftError(
                "backward='reversible' ran the solution back to states that are not all numbers, or the solution has "
                "such states itself; look at the solution first, or use backward='checkpoint'"
            )
        if not drift <= self._tolerance:
            raise DriftError(
                f"backward='reversible' ran the solution back to a state that is off by {drift:.3g}, relative to "
                f"its entries, where {self._tolerance:.3g} is tolerated: rounding errors grow on the way back, as "
                f"they do on dissipative problems, or func is not deterministic. Use Reversible with "
                f"on_drift='checkpoint', more anchors or a larger tolerance, or backward='checkpoint'"
            )


def _downwards_from(top: int, steps: Steps) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x: steps(top - number, x)
