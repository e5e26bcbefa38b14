"""Steps whose lengths and orders follow the local errors: attempts, of which the accurate ones are kept."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.recurrence import Recurrence, Row
from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily

from .error_norm import ErrorNorm
from .first_step import first_step
from .implicit import NotSolvedError
from .lost_samples import LostSamples
from .solve_report import SolveReport
from .step_controller import StepControl, StepController
from .step_source import Made
from .stepping import Evaluate, History, SolveImplicit, march
from .vector_field import Callback, VectorField

_SHORTEST = 8
"""No step is shorter than so many units in the last place of its time."""

_SHORTEST_OF_FIRST = 1e-20
"""Nor is one shorter than so much of the first one: near t = 0 the last place limits nothing."""

_ROUNDED = 1e-9
"""By so much of their length steps that add up to an interval may miss it."""

_EQUAL = 1e-4
"""The end of a step may be rounded by so much of its length."""


class Callbacks(NamedTuple):
    """Functions of the user's, of t, x and the length of a step; None where there is none.

    Attributes:
        step: called before every attempt.
        accept, reject: called after it.
    """

    step: Callback | None = None
    accept: Callback | None = None
    reject: Callback | None = None


class AdaptiveSteps:
    """The steps of one piece of a solve, found on the way; see `step_source.StepSource`.

    Args:
        family: the methods.
        control: what users ask for.
        errors: how large errors are.
        t0: the time of the first node, 0-d, in the dtype and on the device of times.
        end: the time of the last one, as a number; infinite where an event is waited for.
        stops: times on the way that are to be nodes, increasing.
        jumps: whether f jumps at the first node, and at the last one, where it is seen from inside.
        vector_field: f.
        callbacks: see there.
        report: is told what happens.
        lost: the samples that are given up where no step is short enough for them; None to raise an error.

    Attributes:
        times: of the nodes, as numbers.
        orders: of the steps.
        end: see above.
        attempts: how many there have been, since this was set to 0.
    """

    def __init__(
        self,
        family: VariableOrderFamily,
        control: StepControl,
        errors: ErrorNorm,
        t0: Tensor,
        end: float,
        stops: Sequence[float],
        jumps: tuple[bool, bool],
        vector_field: VectorField,
        callbacks: Callbacks,
        report: SolveReport,
        lost: LostSamples | None = None,
    ) -> None:
        self.requires_grad = t0.requires_grad
        self.times = [float(t0.detach())]
        self.orders: list[int] = []
        self._family = family
        self._control = control
        self._errors = errors
        self._t0 = t0
        self.end = end
        begin = self.times[0]
        self._stops = [stop for stop in stops if begin < stop < end]
        self._jumps = jumps
        self._field = vector_field
        self._callbacks = callbacks
        self._report = report
        self._lost = lost
        self._rows: list[Row] = []
        self._positions = [0.0]
        self._lengths: list[float] = []
        self._is_node = [True]
        self.attempts = 0
        self._shortest = 0.0

    @property
    def count(self) -> int | None:
        """See `StepSource`."""
        return len(self.orders) if self.times[len(self.orders)] >= self.end else None

    def is_node(self, state: int) -> bool:
        """See `StepSource`."""
        return self._is_node[state]

    def time_of(self, node: float) -> Tensor:
        """See `StepSource`."""
        offset = self.times[int(node)] - self.times[0]
        return self._t0 + offset if self.requires_grad else self._t0.new_tensor(self.times[int(node)])

    def user_time(self, state: int) -> Tensor:
        """See `StepSource`."""
        node = int(self._positions[state])
        return self._field.beside(self.time_of(node), self._side(node))

    def user_time_at_end(self, node: int, state: int) -> Tensor:  # noqa: ARG002
        """See `StepSource`."""
        return self.user_time(state)

    @property
    def memory(self) -> int:
        """How many of the latest nodes a polynomial may go through."""
        return self._family.reach(self._family.max_order) + 1

    def reach(self, node: int) -> int:
        """Through how many states before it the polynomial of the step to a node goes."""
        return min(node, self._family.reach(self.orders[node - 1]))

    def until(self, state: int, node: int) -> Made:
        """See `StepSource`."""
        recurrence = Recurrence(self._rows[:state], self._positions[: state + 1], 0, None)
        at = [int(position) for position in recurrence.positions]
        numbers = [self.times[node] for node in at]
        times = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(self._t0)
        if self.requires_grad:
            times = times + (self._t0 - self._t0.detach())
        sides = [self._side(node) for node in at]
        return Made(recurrence, self._lengths[:node], self._lengths[:node], self._field.beside(times, sides))

    def states(
        self,
        history: History,
        evaluate: Evaluate,
        solve_implicit: SolveImplicit,
        differentiable: bool,  # noqa: ARG002
    ) -> Iterator[tuple[int, Tensor]]:
        """See `StepSource`.

        Raises:
            RuntimeError: there are too many steps, or they become too short.
        """
        state, known = 0, dict[int, Tensor]()

        def slope(number: int, x: Tensor) -> Tensor:
            # Once where all attempts at a step begin.
            if number not in known:
                value = evaluate(number, x)
                if number != state:
                    return value
                known[number] = value
            return known[number]

        if not self._report.times:
            self._report.times.append(self._shown(self.times[0]))
        first_step = self._first_step(slope(0, history.x), history.x)
        self._shortest = _SHORTEST_OF_FIRST * first_step
        controller = StepController(self._family, self._control, first_step)
        while self.count is None:
            state = len(self._rows)
            made = self._attempt(history, controller, slope, solve_implicit)
            if made is not None:
                known.clear()
                yield from made

    def _attempt(
        self, history: History, controller: StepController, slope: Evaluate, solve_implicit: SolveImplicit
    ) -> list[tuple[int, Tensor]] | None:
        """Try one step; return its states, and bring the history up to date, if it is accurate enough."""
        node, t, x = len(self.orders), self.times[-1], history.x
        order = controller.order
        step, end = self._next(controller.proposed(), t)
        self._count_attempt(t, step)
        self._call(self._callbacks.step, node, x, step)
        lengths = (step, *self._lengths[: -self._family.max_order - 2 : -1])
        rows = self._family.rows(order, lengths)
        first = len(self._rows)
        self._extend(rows, node, end)
        trial = history.copy()
        failure: NotSolvedError | None = None
        own: float | None = None
        neighbours: tuple[float | None, ...] = (None, None)
        try:
            made = list(march(trial, rows, slope, solve_implicit, first))
        except NotSolvedError as error:
            failure = error
        else:
            wanted = (order, order - 1, order + 1) if controller.compares else (order,)
            with torch.no_grad():
                own, *others = self._errors.ratios([self._family.error(k, lengths) for k in wanted], trial)
            neighbours = tuple(others) or neighbours
        if own is not None and (own <= 1 or (step <= self._control.min_step * (1 + _ROUNDED) and own < math.inf)):
            self._call(self._callbacks.accept, node, x, step)
            controller.accept(step, own, *neighbours)
            self.orders.append(order)
            self._lengths.append(step)
            self._report.accept(self._shown(end), order)
            history.x, history.previous = trial.x, trial.previous
            history.increments[:], history.slopes[:] = trial.increments, trial.slopes
            return made
        self._call(self._callbacks.reject, node, x, step)
        is_lost = self._is_shortest(step, t) and self._loses(history, trial, failure, lengths, order)
        if not is_lost:
            self._check_length(step, t, failure, trial, lengths, order)
        del self._rows[first:], self._positions[first + 1 :], self._is_node[first + 1 :], self.times[-1]
        if is_lost:
            controller.resume()
        elif failure is not None:
            self._report.unsolved += 1
            controller.fail(step)
        else:
            assert own is not None
            self._report.rejected += 1
            controller.reject(step, own, neighbours[0])
        return None

    def _side(self, node: int) -> int:
        """From which side f is seen at a node: 1 for the right, -1 for the left, 0 for neither."""
        if node == 0:
            return int(self._jumps[0])
        return -int(self._jumps[1] and self.times[node] >= self.end)

    def _first_step(self, slope: Tensor, x: Tensor) -> float:
        control, begin = self._control, self.times[0]
        if control.first_step is not None:
            return control.first_step

        def later(h: float) -> Tensor:
            time = self._t0.detach() + h
            return self._field(self._field.beside(time), x.detach() + h * slope.detach())

        with torch.no_grad():
            found = first_step(later, x.detach(), slope.detach(), self._errors, self.end - begin)
        return min(max(found, control.min_step), control.max_step)

    def _next(self, step: float, t: float) -> tuple[float, float]:
        """The length and the end of a step: cut short at the next stop; two where one would leave a short rest."""
        stop = next((stop for stop in self._stops if stop > t), self.end)
        rest = stop - t
        # A little more than a step is one that has been rounded.
        if rest <= step * (1 + _ROUNDED):
            return rest, stop
        if rest < 2 * step:
            step = rest / 2
        end = t + step
        # Equal but for the rounding of times, steps are to be equal.
        return (step if math.isclose(end - t, step, rel_tol=_EQUAL) else end - t), end

    def _extend(self, rows: Sequence[Row], node: int, end: float) -> None:
        self._rows += rows
        self._positions += [float(node + 1)] * len(rows)
        self._is_node += [row.is_node for row in rows]
        self.times.append(end)

    def _call(self, callback: Callback | None, node: int, x: Tensor, step: float) -> None:
        if callback is not None:
            callback(self.time_of(node), x, self._t0.new_tensor(step))

    def _count_attempt(self, t: float, step: float) -> None:
        self.attempts += 1
        if self.attempts > self._control.max_num_steps:
            hint = "" if self._family.is_implicit else ", or method 'bdf' if the problem is stiff"
            raise RuntimeError(
                f"max_num_steps {self._control.max_num_steps} is exceeded at t = {self._shown(t):.6g}, where the step "
                f"is {step:.3g}; use a larger max_num_steps, or larger rtol and atol{hint}"
            )

    def _check_length(
        self,
        step: float,
        t: float,
        failure: NotSolvedError | None,
        trial: History,
        lengths: tuple[float, ...],
        order: int,
    ) -> None:
        """Raise a RuntimeError where a step that was not accurate enough must not be shorter."""
        if not self._is_shortest(step, t):
            return
        if failure is not None:
            raise RuntimeError(
                f"method {self._family.name!r} found no step whose equation can be solved at t = {self._shown(t):.6g}: "
                f"the step has become {step:.3g}. func may have returned NaN or infinity, or the solution or func may "
                f"have a singularity or a jump there (say where in jump_t)"
            ) from failure
        with torch.no_grad():
            sizes = self._ratios(order, lengths, trial).abs().reshape(-1).nan_to_num(nan=math.inf)
            worst = int(sizes.argmax())
            value = trial.x.reshape(-1)[worst].item()
        raise RuntimeError(
            f"method {self._family.name!r} found no step that is accurate enough at t = {self._shown(t):.6g}: the step "
            f"has become {step:.3g}, and its error is {float(sizes[worst]):.3g} times the tolerance at "
            f"{self._field.entry(worst)} = {value:.6g}. The solution or func may have a singularity or a jump there "
            f"(say where in jump_t), or func returned NaN; else use larger rtol and atol, or double precision"
        )

    def _is_shortest(self, step: float, t: float) -> bool:
        """Whether no step at a time may be shorter."""
        return step <= max(_SHORTEST * math.ulp(t), self._control.min_step * (1 + _ROUNDED), self._shortest)

    def _loses(
        self,
        history: History,
        trial: History,
        failure: NotSolvedError | None,
        lengths: tuple[float, ...],
        order: int,
    ) -> bool:
        """Whether the solve goes on without some samples, which are NaN then."""
        if self._lost is None:
            return False
        if failure is not None:
            failed = failure.failed
        else:
            with torch.no_grad():
                failed = self._lost.too_large(self._ratios(order, lengths, trial))
        if failed is None or not self._lost.add(failed):
            return False
        history.x = self._lost.filled(history.x, math.nan)
        return True

    def _ratios(self, order: int, lengths: tuple[float, ...], trial: History) -> Tensor:
        """The errors of a step in terms of the tolerance, entry by entry."""
        estimate = self._family.error(order, lengths)
        assert estimate is not None
        assert trial.previous is not None
        return self._errors.relative(estimate, trial, self._errors.scale(trial.previous, trial.x))

    def _shown(self, t: float) -> float:
        """A time as the user knows it."""
        return self._field.direction * t
