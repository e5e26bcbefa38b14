"""Leapfrog run backwards: the states of the forward pass once more, from the last ones."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.step_evaluator import StepEvaluator
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import Method, MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Keeps, Row

from .checkpoints import Checkpoint, Checkpoints, between
from .evaluation import Evaluation
from .rerun import Rerun, Snapshot, Snapshots, accepted_difference, check_tolerance, relative_difference
from .stored_evaluations import Gradients, Record, StoredEvaluations, WithEvaluations


class DriftError(RuntimeError):
    """A backward pass with ``backward="reversible"`` came back to other states than the solve had: see `Reversible`."""


OnDrift = Literal["raise", "checkpoint"]


@dataclass(frozen=True)
class Reversible:
    """Run leapfrog backwards: x_{n-1} from x_{n+1} and x_n, with no stored states but for a fixed few.

    The gradient is that of auto-differentiation but for rounding, from memory that does not grow with the number of
    steps. On the way back rounding errors grow as the parasitic mode of leapfrog does on the way forth: on dissipative
    problems exponentially. By how much is measured, in every backward pass: at the start and at a few states on the way
    that are kept, the drift is max |x reached - x known| / |x known| over the entries of the state, those smaller than
    ε^¼ max |x| counting as so large. From there it goes on with what is known.

    func must be deterministic; a func that draws random numbers, as dropout does, is refused. It must not keep what it
    computes from parameters, for the forward pass is without a graph.

    Args:
        tolerance: the largest drift that is accepted. By default √ε, ε being that of the state's dtype: 1.5e-8 for
            float64, 3.5e-4 for float32. The relative error of the gradient is mostly of the size of the drift, or of
            that of auto-differentiation's own, which on dissipative problems is more.
        on_drift: what to do where the drift is larger. ``"raise"``: raise a `DriftError`. ``"checkpoint"``: begin the
            backward pass again with `Checkpoint()`, at the cost of two more forward passes.
        report: is given the drift, the largest on the way, by every backward pass; with `jump_t` by that of every
            piece between jumps.
        anchors: how many states are kept on the way.

    Raises:
        TypeError: `tolerance` is not a real number, `report` cannot be called, or `anchors` is not an int.
        ValueError: `tolerance` or `anchors` is negative, or `on_drift` is unknown.

    Source: Zhuang, Dvornek, Tatikonda, Duncan, *MALI: A memory efficient and reverse accurate integrator for neural
    ODEs* (ICLR 2021), for another reversible method.
    """

    tolerance: float | None = None
    on_drift: OnDrift = "raise"
    report: Callable[[float], object] | None = None
    anchors: int = 8

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        if self.on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift must be one of {get_args(OnDrift)}, got {self.on_drift!r}")
        if self.report is not None and not callable(self.report):
            raise TypeError(f"report must be a callable that takes a float, or None, got {self.report!r}")
        if not isinstance(self.anchors, int) or isinstance(self.anchors, bool):
            raise TypeError(f"anchors must be an int, got {self.anchors!r}")
        if self.anchors < 0:
            raise ValueError(f"anchors must not be negative, got {self.anchors}")

    @property
    def evaluates_again(self) -> bool:
        """See `BackwardMode`."""
        return True

    def check(self, method: Method, given: object) -> None:
        """See `BackwardMode`."""
        if not (isinstance(method, MultistepMethod) and is_reversible(method)):
            raise ValueError(
                f"backward {given!r} needs a method that can be run backwards, as 'leapfrog' can, got method "
                f"{method.name!r}; use backward='checkpoint'"
            )

    def snapshots(self, steps: int, device: torch.device) -> Snapshots:
        """See `BackwardMode`."""
        # Run backwards, the last step may be ill-conditioned: what comes before it is kept.
        return Snapshots(self.stride(steps), steps - 1, device)

    def evaluations(self, record: Record) -> WithEvaluations:
        """See `BackwardMode`."""
        assert record.snapshots is not None
        last = record.snapshots.at(record.rerun.recurrence.nodes[-1], record.history)
        return _Backwards(record.rerun, [*record.snapshots.taken, last], self)

    def stride(self, steps: int) -> int:
        """The number of steps from one kept state to the next."""
        return math.ceil(steps / (self.anchors + 1))


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
        """See `StoredEvaluations`.

        Raises:
            DriftError: the drift is beyond the tolerance.
        """
        while self._state > state:
            self._state = next(self._back)
        return self._evaluation if self._state == state < self._anchors[-1].state else None

    def slope(self, state: int) -> Tensor:
        """See `StoredEvaluations`."""
        assert state == self._state
        return self._slope

    def increment(self, node: int) -> Tensor:
        """See `StoredEvaluations`."""
        assert node == self._state
        x, before = self._around
        return x - before

    def segment_graphs(self) -> None:
        """See `StoredEvaluations`."""
        return

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
        with self._rerun.context.restored():
            slope, self._evaluation = self._rerun.recorder.record(user_time, x)
        self._slope = slope.detach()
        return self._slope

    def _measure(self, reached: Tensor, known: Tensor) -> None:
        self.drift = larger_drift(self.drift, relative_difference(reached, known))
        check_drift(self.drift, self._tolerance)


def larger_drift(drift: float, other: float) -> float:
    """The larger one; one that is not a number stays."""
    return other if not other <= drift else drift


def check_drift(drift: float, tolerance: float) -> None:
    """Raise a DriftError where the drift is larger than is accepted."""
    if drift != drift:
        raise DriftError(
            "backward='reversible' ran the solution back to states that are not all numbers, or the solution has "
            "such states itself; look at the solution first, or use backward='checkpoint'"
        )
    if not drift <= tolerance:
        raise DriftError(
            f"backward='reversible' ran the solution back to a state that is off by {drift:.3g}, relative to "
            f"its entries, where {tolerance:.3g} is tolerated: rounding errors grow on the way back, as "
            f"they do on dissipative problems, or func is not deterministic. Use Reversible with "
            f"on_drift='checkpoint', more anchors or a larger tolerance, or backward='checkpoint'"
        )


def _downwards_from(top: int, steps: StepEvaluator) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x: steps(top - number, x)


class _Backwards:
    """The evaluations by reversal, or by checkpoints where it drifts.

    Raises:
        RuntimeError: func draws random numbers.
    """

    def __init__(self, rerun: Rerun, anchors: Sequence[Snapshot], backward: Reversible) -> None:
        if not anchors[0].rng.equals(anchors[-1].rng):
            raise RuntimeError(
                "backward='reversible' needs a deterministic func, got one that draws random numbers, as dropout does; "
                "use backward='checkpoint', which draws the same ones again"
            )
        self._rerun = rerun
        self._anchors = anchors
        self._backward = backward

    def __call__(self, gradients: Callable[[StoredEvaluations], Gradients]) -> Gradients:
        start = self._anchors[0]
        if len(self._rerun.recurrence.nodes) == 2:
            # A single step is not leapfrog's, and has nothing behind it to go back to.
            end = self._anchors[-1]
            found = gradients(Checkpoints(self._rerun, between([start], end.state, end.history.x)))
            if self._backward.report is not None:
                self._backward.report(0.0)
            return found
        tolerance = accepted_difference(self._backward.tolerance, start.history.x.dtype)
        reversal = Reversal(self._rerun, self._anchors, tolerance)
        try:
            found = gradients(reversal)
        except DriftError:
            if self._backward.on_drift == "raise":
                raise
            stride = Checkpoint().stride(len(self._rerun.recurrence.nodes) - 1)
            snapshots = self._rerun.snapshots(start, stride)
            end = self._anchors[-1]
            found = gradients(Checkpoints(self._rerun, between(snapshots, end.state, end.history.x)))
        finally:
            reversal.close()
            if self._backward.report is not None:
                self._backward.report(reversal.drift)
        return found
