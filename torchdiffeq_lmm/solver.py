"""A multistep method in the form in which torchdiffeq calls its solvers: from options and times to states."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .attachment import stack
from .backward import resolve_backward
from .combination import Weight
from .compilation import eager
from .endless import Endless
from .evaluation import refuse_tangents, savable
from .events import EventSign
from .filter_plan import FilterPlan, plan_filter
from .grad_filter import CostateFilter, SmoothFilter, resolve_grad_filter
from .grid import (
    Grid,
    GridConstructor,
    Placement,
    check_step_size,
    check_times,
    constructed_grid,
    grid_of_times,
    place,
    uniform_grid,
)
from .grid_parameter import parameters_of
from .host import MAX_EVENT_STEPS, find_event, unwrap, warn_of_unused_options
from .implicit import ImplicitSolver
from .interpolation import Interpolation, check_interpolation, cubic_hermite, linear, slide
from .methods import LEAPFROG, MultistepMethod
from .recurrence import Recurrence, unroll
from .reversal import is_reversible
from .runge_kutta import TwoStageMethod
from .smooth import observed
from .stepping import History, march
from .tape import Parameters, Tape, Trajectory
from .tolerances import event_tolerance, resolve_tolerance
from .vector_field import Side, VectorField


class MultistepSolver:
    """A linear multistep method as a fixed-step solver of torchdiffeq.

    torchdiffeq makes one for every call of `odeint`, with the function, the state (flattened, where it is a tuple) and
    the time (increasing) as its wrappers present them.

    Args:
        func: torchdiffeq's wrapper of the user's function.
        y0: the initial state, floating or complex, of any shape.
        step_size: the length of the steps, positive, in the unit of t. By default a step goes from every time of t to
            the next.
        grid_constructor: ``grid_constructor(func, y0, t)`` returns the nodes, as torchdiffeq's option.
        interp: "linear" or "cubic": how outputs between nodes are made.
        perturb: evaluate func a hair beside the nodes, as torchdiffeq's option.
        grad_filter: None, "auto", "leapfrog", "smooth", a `CostateFilter` or a `SmoothFilter`: see there.
        backward: "autograd", "reversible", "checkpoint", a `Reversible` or a `Checkpoint`: see there.
        adjoint_params: for the latter four, the tensors whose gradients are wanted besides those of y0 and t. By
            default the parameters of func, which must be a module then.
        unused: rtol and atol, for implicit steps, the latter for events too; norm, which nothing uses; anything else
            is warned of.

    Raises:
        TypeError: y0, step_size, grad_filter, backward or adjoint_params is of a wrong type; or rtol or atol, where
            steps are implicit.
        ValueError: step_size, interp, grad_filter, backward, or a tolerance that is used, has a wrong value; step_size
            and grid_constructor are both given; grad_filter or backward is given to `torchdiffeq.odeint_adjoint`;
            adjoint_params is given where it is not used, or is not where it is needed.
    """

    method: ClassVar[MultistepMethod | TwoStageMethod]
    order: ClassVar[int]

    def __init__(
        self,
        func: Callable[..., Any],
        y0: Tensor,
        step_size: float | Tensor | None = None,
        grid_constructor: GridConstructor | None = None,
        interp: Interpolation = "linear",
        perturb: bool = False,
        grad_filter: object = None,
        backward: object = "autograd",
        adjoint_params: Iterable[Tensor] | None = None,
        **unused: Any,
    ) -> None:
        self.atol = unused.pop("atol", 1e-9)
        self.rtol = unused.pop("rtol", 1e-7)
        unused.pop("norm", None)
        warn_of_unused_options(self, unused)
        if not (y0.is_floating_point() or y0.is_complex()):
            raise TypeError(f"y0 must be a floating or complex tensor, got dtype {y0.dtype}; use y0.float()")
        if step_size is not None:
            check_step_size(step_size)
            if grid_constructor is not None:
                raise ValueError("step_size and grid_constructor are mutually exclusive options, got both")
        if grid_constructor is not None and not callable(grid_constructor):
            raise TypeError(f"grid_constructor must be a callable (func, y0, t) -> grid, got {grid_constructor!r}")
        check_interpolation(interp)
        if self.method.is_implicit:
            self.atol, self.rtol = (
                resolve_tolerance(name, given, y0) for name, given in (("atol", self.atol), ("rtol", self.rtol))
            )
        self.grad_filter = resolve_grad_filter(grad_filter, self.method.name)
        self.func = func
        self.y0 = savable(y0)
        self.step_size = step_size
        self.grid_constructor = grid_constructor
        self.interp = interp
        self.perturb = perturb
        hosted = unwrap(func)
        reversible = isinstance(self.method, MultistepMethod) and is_reversible(self.method)
        self.backward = resolve_backward(backward, self.method.name, reversible)
        for option, value, plain in (("grad_filter", grad_filter, None), ("backward", backward, "autograd")):
            if value != plain and hosted.in_adjoint:
                raise ValueError(
                    f"{option} must be {plain!r} in odeint_adjoint, got {value!r}: its gradient comes from a solve of "
                    f"its own, which no {option} reaches. Use odeint"
                )
        self._parameters = self._find_parameters(hosted.call, adjoint_params)
        self._reverse = hosted.reversed
        self._callback_step = hosted.callback_step
        self._vector_field = VectorField(hosted, y0, perturb, copies=self.method.remembers_slopes)

    def _find_parameters(self, func: object, adjoint_params: Iterable[Tensor] | None) -> Parameters | None:
        if self.backward is None:
            if adjoint_params is not None:
                raise ValueError(
                    "adjoint_params must not be given where backward is 'autograd', which finds all parameters by "
                    "itself; got some"
                )
            return None
        if adjoint_params is None:
            if not isinstance(func, torch.nn.Module):
                raise ValueError(
                    f"adjoint_params must be given where func is not an nn.Module, got None and {func!r}; list the "
                    f"tensors that func depends on and whose gradients are wanted, or give () if there are none"
                )
            return Parameters(parameters_of(func), are_all=True)
        if isinstance(adjoint_params, Tensor):
            raise TypeError("adjoint_params must be an iterable of tensors, got a tensor; use a tuple of it alone")
        if not isinstance(adjoint_params, Iterable):
            raise TypeError(f"adjoint_params must be an iterable of tensors, got {adjoint_params!r}")
        given = tuple(adjoint_params)
        for i, parameter in enumerate(given):
            if not isinstance(parameter, Tensor):
                raise TypeError(f"adjoint_params must be an iterable of tensors, got {parameter!r} as number {i}")
        # Tied weights may be listed twice.
        return Parameters(tuple({id(p): p for p in given if p.requires_grad}.values()), are_all=False)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called, for torchdiffeq's warning of others."""
        return {"callback_step"}

    @eager
    def integrate(self, t: Tensor) -> Tensor:
        """Solve from t[0] to t[-1].

        Args:
            t: the output times, of shape (n,), strictly increasing.

        Returns:
            The states at `t`, of shape (n, *y0.shape).

        Raises:
            TypeError, ValueError: t, the grid or what func returns is not as it must be.
            RuntimeError: an implicit equation was not solved.
        """
        t = savable(t)
        check_times(t)
        if len(t) == 1:
            return torch.stack([self.y0])
        grid, placements = self._grid(t)
        if self._is_smooth:
            _check_equal(grid.steps)
        lengths: list[float] = grid.steps.tolist()
        steps: Sequence[Weight] = grid.steps.unbind() if grid.requires_grad else lengths
        recurrence = self._unroll(grid.steps)
        at_node = recurrence.nodes
        tape = self._tape(grid.requires_grad, len(steps))
        times = recurrence.times(grid.nodes)
        time, user_time, user_times = self._times(times, recurrence, t)
        # No tensor that grows with the number of steps is held without need.
        del grid, times
        wanted = self._wanted(placements, [recurrence.evaluated[state] for state in at_node])
        seen = sorted(wanted.states)
        if self._is_smooth:
            wanted.smooth([recurrence.evaluated[state] for state in at_node])
        evaluate = self._evaluator(tape, time, user_time, {at_node[n]: n for n in wanted.slopes})

        trajectory = Trajectory({0: self.y0}, evaluate.kept)
        rows = recurrence.rows if tape is not None else recurrence.differentiable_rows()
        node, x = 0, self._start(tape)
        history = History(x)
        for state, made in chain([(0, x)], march(history, rows, evaluate, evaluate.solve_implicit)):
            if state != at_node[node]:
                continue
            if tape is not None and node < len(steps):
                tape.pass_by(state, history, evaluate)
            if node in wanted.states and node > 0:
                trajectory.states[node] = made
            if node in wanted.end_slopes:
                trajectory.end_slopes[node] = evaluate.at_end(node, state, made)
            if self._callback_step is not None and node < len(steps):
                self._callback_step(time(state), made, time(at_node[node + 1]) - time(state))
            node += 1
        if tape is not None:
            plan = self._plan(recurrence, lengths)
            trajectory = tape.attach(trajectory, user_times, recurrence, plan, history, evaluate.again)
        if self._is_smooth:
            trajectory = _smoothed(trajectory, seen, steps)
        return stack([self._output(placement, steps, trajectory) for placement in placements], trajectory.keeper)

    @eager
    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Solve from t0, in steps of `step_size`, until `event_fn` changes its sign.

        Args:
            t0: the initial time, 0-d.
            event_fn: ``event_fn(t, y)``, a 0-d tensor, in the solver's time and state.

        Returns:
            The time of the event, 0-d and without a graph, and the states at t0 and then, of shape (2, *y0.shape).

        Raises:
            TypeError, ValueError: an option, or what func returns, is not as it must be; event_fn is 0 at t0, or NaN
                anywhere.
            RuntimeError: there is no event within torchdiffeq's limit of steps, or an implicit equation was not solved.
        """
        if self.step_size is None:
            raise ValueError("step_size must be given in options where event_fn is, got None")
        tolerance = event_tolerance(self.atol, self.y0)
        event_sign = EventSign(event_fn, self._reverse)
        check_times(t0.reshape(1))
        h = float(self.step_size)
        # A copy, for the backward pass may need it when the caller has changed it.
        t0 = t0.to(self.y0.device, self._vector_field.time_dtype, copy=True)
        tape = self._tape(t0.requires_grad, MAX_EVENT_STEPS)
        beginning = self._unroll(_equal_steps(h, 2 * self.method.steps + 2 * self.method.order + 2))
        endless = Endless(beginning)

        def time(position: float) -> Tensor:
            return t0 + position * h

        def state_at(event_time: Tensor, n: int, trajectory: Trajectory) -> Tensor:
            return self._inside(n, (event_time - time(n)) / h, h, trajectory)

        def user_time(state: int) -> Tensor:
            side = self._side(beginning, endless.counterpart(state))
            return self._vector_field.user_times(time(endless.position(state)), side)

        # Straight lines need no slopes.
        wanted: dict[int, int] | None = None if self.interp == "cubic" else {}
        evaluate = self._evaluator(tape, lambda state: time(endless.position(state)), user_time, wanted)
        x = x_before = x_earlier = self._start(tape)
        sign = event_sign.at_beginning(time(0), x)
        before, n = 0, 0
        if self._callback_step is not None:
            self._callback_step(time(0), x, time(1) - time(0))
        history = History(x)
        if tape is not None:
            tape.pass_by(0, history, evaluate)
        for state, made in march(history, endless.rows(), evaluate, evaluate.solve_implicit):
            if not endless.is_node(state):
                continue
            if event_sign(time(n + 1), made) != sign:
                break
            n, before, x_before, x_earlier = n + 1, state, made, x_before
            if n == MAX_EVENT_STEPS:
                raise RuntimeError(
                    f"event_fn did not change its sign within {MAX_EVENT_STEPS} steps of step_size {h}, the most that "
                    f"are made; if there is an event later, use a larger step_size"
                )
            evaluate.forget(before)
            if tape is not None:
                tape.pass_by(state, history, evaluate)
            if self._callback_step is not None:
                self._callback_step(time(n), made, time(n + 1) - time(n))

        trajectory = Trajectory({max(0, n - 1): x_earlier, n: x_before, n + 1: made, 0: self.y0})
        needs_slopes = self.interp == "cubic" or self._is_smooth
        for node, of_node, reached in ((n, before, x_before), (n + 1, state, made)) if needs_slopes else ():
            is_kept = of_node in evaluate.kept and (tape is None or tape.keeps)
            if is_kept and not (self.perturb and node > n):
                trajectory.slopes[node] = evaluate.kept[of_node]
            else:
                trajectory.end_slopes[node] = evaluate.at_end(node, of_node, reached)
        with torch.no_grad():
            event_time, _ = find_event(
                lambda t: state_at(t, n, trajectory), sign, time(n), time(n + 1), event_sign.as_tensor, tolerance
            )
        if tape is not None:
            recurrence = endless.until(state)
            positions = t0.new_tensor(recurrence.positions)
            user_times = self._user_times(t0 + h * positions, recurrence)
            plan = self._plan(recurrence, [h] * (n + 1))
            trajectory = tape.attach(trajectory, user_times, recurrence, plan, history, evaluate.again)
        if self._is_smooth:
            trajectory = _smoothed(trajectory, [n, n + 1], [h] * (n + 1))
        return event_time, stack([self.y0, state_at(event_time, n, trajectory)], trajectory.keeper)

    def _unroll(self, steps: Tensor) -> Recurrence:
        return self.method.unroll(steps) if isinstance(self.method, TwoStageMethod) else unroll(self.method, steps)

    def _grid(self, t: Tensor) -> tuple[Grid, list[Placement]]:
        if self.step_size is None and self.grid_constructor is None:
            return grid_of_times(t), [Placement(node) for node in range(len(t))]
        if self.grid_constructor is None:
            assert self.step_size is not None
            grid = uniform_grid(t, float(self.step_size))
        else:
            grid = constructed_grid(self.grid_constructor, self.func, self.y0, t, self._reverse)
        return grid, place(t, grid)

    @property
    def _is_smooth(self) -> bool:
        return isinstance(self.grad_filter, SmoothFilter)

    def _times(
        self, times: Tensor, recurrence: Recurrence, t: Tensor
    ) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor], Tensor | None]:
        """From a state to its time in the dtype of t, and to the user's; the latter of all, where they have a graph."""
        if times.requires_grad:
            times = times.to(t)
            user_times = self._user_times(times, recurrence)
            # All at once, for the cost of their gradients would else be quadratic.
            return times.unbind().__getitem__, user_times.unbind().__getitem__, user_times
        refuse_tangents(times)
        numbers = times.tolist()
        time = _Blocks(numbers, lambda block, _: block.to(t, non_blocking=True))
        return time, _Blocks(numbers, lambda _, first: self._user_times(time.block(first), recurrence, first)), None

    def _user_times(self, times: Tensor, recurrence: Recurrence, first: int = 0) -> Tensor:
        """What the user's function is given for the times of the states from the first one on."""
        if not self.perturb:
            return self._vector_field.user_times(times)
        sides = [self._side(recurrence, state) for state in range(first, first + len(times))]
        return torch.stack(
            [self._vector_field.user_times(time, side) for time, side in zip(times.unbind(), sides, strict=True)]
        )

    def _side(self, recurrence: Recurrence, state: int) -> Side:
        """From which side of its time a state sees f, with `perturb`: that of the step in which it is evaluated."""
        row = recurrence.rows[state - 1] if state else None
        if recurrence.positions[state] % 1:
            return "neither"
        return "right" if row is None or (row.is_node and row.implicit is None) else "left"

    def _tape(self, differentiate_times: bool, steps: int) -> Tape | None:
        filters = isinstance(self.grad_filter, CostateFilter)
        is_plain = not filters and self.backward is None and not self.method.is_implicit
        if is_plain or not torch.is_grad_enabled():
            return None
        return Tape(self._vector_field, self.y0, differentiate_times, self.backward, self._parameters, steps)

    def _start(self, tape: Tape | None) -> Tensor:
        return self.y0 if tape is None else self.y0.detach()

    def _plan(self, recurrence: Recurrence, steps: list[float]) -> FilterPlan | None:
        if not isinstance(self.grad_filter, CostateFilter):
            return None
        method = None if isinstance(self.method, TwoStageMethod) else self.method
        return plan_filter(self.grad_filter.weights, recurrence, steps, method)

    def _evaluator(
        self,
        tape: Tape | None,
        time: Callable[[int], Tensor],
        user_time: Callable[[int], Tensor],
        wanted: Mapping[int, int] | None,
    ) -> "_Evaluator":
        # Once more, for the backward pass, steps are made without a graph, but by the same iterations.
        differentiable = torch.is_grad_enabled()

        def implicit() -> ImplicitSolver:
            field = self._vector_field
            return ImplicitSolver(self.rtol, self.atol, field.precision, field.entry, differentiable)

        return _Evaluator(self._vector_field, tape, implicit, self.method.name, time, user_time, wanted)

    def _wanted(self, placements: Sequence[Placement], evaluated: Sequence[bool]) -> "_Wanted":
        """What the outputs are made of; f at a node is taken from the recurrence where that evaluates it."""
        states: set[int] = set()
        slopes: set[int] = set()
        end_slopes: set[int] = set()
        for node, fraction, shift in placements:
            states.add(node)
            if fraction is not None:
                states.add(node + 1)
            if shift is not None or (fraction is not None and self.interp == "cubic"):
                (slopes if evaluated[node] else end_slopes).add(node)
            if fraction is not None and self.interp == "cubic":
                from_left = self.perturb and not self.method.is_implicit
                (end_slopes if from_left or not evaluated[node + 1] else slopes).add(node + 1)
        return _Wanted(states, slopes, end_slopes)

    def _output(self, placement: Placement, steps: Sequence[Weight], trajectory: Trajectory) -> Tensor:
        node, fraction, shift = placement
        if fraction is not None:
            return self._inside(node, fraction, steps[node], trajectory)
        if shift is not None:
            return slide(trajectory.states[node], shift, trajectory.start_slope(node))
        return trajectory.states[node]

    def _inside(self, node: int, fraction: Weight, step: Weight, trajectory: Trajectory) -> Tensor:
        x0, x1 = trajectory.states[node], trajectory.states[node + 1]
        if self.interp == "linear":
            return linear(fraction, x0, x1)
        f0, f1 = trajectory.start_slope(node), trajectory.end_slope(node + 1)
        if not self._is_smooth:
            return cubic_hermite(fraction, step, x0, f0, x1, f1)
        # Slopes would start one parity alone; as far as the states are concerned a straight line is exact enough.
        value = cubic_hermite(fraction, step, x0.detach(), f0.detach(), x1.detach(), f1.detach())
        line = linear(fraction.detach() if isinstance(fraction, Tensor) else fraction, x0, x1)
        return value + (line - line.detach())


class Leapfrog(MultistepSolver):
    """Leapfrog, also called the explicit midpoint rule or two-step Nyström method: ``x_{n+1} = x_{n-1} + 2 h f_n``.

    Started by an Euler step; one evaluation of func per step. Not the Runge–Kutta midpoint method, nor the staggered
    leapfrog (Verlet) scheme of mechanics.

    By its variable-step form it is second order on every grid whose neighbouring steps become equal under refinement,
    but for finitely many: uniform, cut short, growing, changed abruptly. Else its parasitic mode, which alternates from
    step to step, adds up: order 3/2 where every step has a random length of its own, order 1 where long and short steps
    alternate. On dissipative problems that mode grows along the solve.

    Source: Shampine, *Stability of the leapfrog/midpoint method* (2009); for variable steps `leapfrog_recurrence`.
    """

    method = LEAPFROG
    order = LEAPFROG.order


class _Wanted(NamedTuple):
    """The nodes whose states and slopes the outputs are made of: see `Trajectory`."""

    states: set[int]
    slopes: set[int]
    end_slopes: set[int]

    def smooth(self, evaluated: Sequence[bool]) -> None:
        """Add what smoothed values of the states need."""
        for node in sorted(self.states - {0}):
            self.states.add(node - 1)
            (self.slopes if evaluated[node] else self.end_slopes).add(node)


def _smoothed(trajectory: Trajectory, nodes: Iterable[int], steps: Sequence[Weight]) -> Trajectory:
    states = dict(trajectory.states)
    for node in nodes:
        if node > 0:
            of_node = trajectory.states[node], trajectory.states[node - 1], trajectory.start_slope(node)
            states[node] = observed(*of_node, steps[node - 1])
    return replace(trajectory, states=states)


class _Evaluator:
    """f at the states of one solve.

    Args:
        vector_field: f.
        tape: what records the evaluations, or None.
        implicit: makes what solves implicit rows.
        name: the method's, for messages.
        time: from a state to its time.
        user_time: from a state to what func is given for its time.
        wanted: the states whose slopes are kept, with their nodes; None for all, by state.

    Attributes:
        kept: the slopes that are kept.
        again: makes the same steps for another time, from what evaluates f: see `_Steps`.
    """

    def __init__(
        self,
        vector_field: VectorField,
        tape: Tape | None,
        implicit: Callable[[], ImplicitSolver],
        name: str,
        time: Callable[[int], Tensor],
        user_time: Callable[[int], Tensor],
        wanted: Mapping[int, int] | None,
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._vector_field = vector_field
        self._tape = tape
        self._time = time
        self._user_time = user_time
        self._wanted = wanted
        self._evaluate = _evaluation_of(vector_field, tape, wanted or {})
        self.again = partial(_Steps, vector_field, implicit, name, user_time)
        self._steps = self.again(self._evaluate)

    def __call__(self, state: int, x: Tensor) -> Tensor:
        slope = self._evaluate(state, self._user_time(state), x)
        if self._wanted is None or state in self._wanted:
            self._keep(state, slope)
        return slope

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The increment and the slope of an implicit row."""
        increment, slope = self._steps.solve_implicit(state, x, known, weight, guess)
        self._keep(state, slope)
        return increment, slope

    def restart(self) -> None:
        """See `Steps`."""
        self._steps.restart()

    def at_end(self, node: int, state: int, x: Tensor) -> Tensor:
        """f at a node, outside the recurrence."""
        user_time = self._vector_field.user_times(self._time(state), side="left" if node else "right")
        if self._tape is not None:
            return self._tape.evaluate_end(node, user_time, x).clone()
        return self._vector_field(user_time, x).clone()

    def forget(self, state: int) -> None:
        """Drop the slopes before a state."""
        for earlier in [kept for kept in self.kept if kept < state]:
            del self.kept[earlier]

    def _keep(self, state: int, slope: Tensor) -> None:
        key = state if self._wanted is None else self._wanted.get(state)
        if key is not None:
            # func may return the same memory again and again.
            self.kept[key] = slope.clone()


def _evaluation_of(
    vector_field: VectorField, tape: Tape | None, wanted: Container[int]
) -> Callable[[int, Tensor, Tensor], Tensor]:
    if tape is None:
        return lambda _, user_time, x: vector_field(user_time, x)
    return lambda state, user_time, x: tape.evaluate(state, user_time, x, keep=state in wanted)


class _Steps:
    """What `march` needs to know of f: see `Steps`.

    Args:
        vector_field: f.
        implicit: makes what solves implicit rows.
        name: the method's, for messages.
        user_time: from a state to what func is given for its time.
        evaluate: f at a state, from its number, its time and itself.
    """

    def __init__(
        self,
        vector_field: VectorField,
        implicit: Callable[[], ImplicitSolver],
        name: str,
        user_time: Callable[[int], Tensor],
        evaluate: Callable[[int, Tensor, Tensor], Tensor],
    ) -> None:
        self._vector_field = vector_field
        self._make_implicit = implicit
        self._implicit = implicit()
        self._name = name
        self._user_time = user_time
        self._evaluate = evaluate

    def __call__(self, state: int, x: Tensor) -> Tensor:
        return self._evaluate(state, self._user_time(state), x)

    def restart(self) -> None:
        """See `Steps`."""
        self._implicit = self._make_implicit()

    def solve_implicit(
        self, state: int, x: Tensor, known: Tensor | None, weight: Weight, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Steps`."""
        user_time = self._user_time(state)
        return self._implicit.solve(
            x,
            known,
            float(weight),
            guess,
            slope=lambda y: self._vector_field(user_time, y),
            iterate=lambda y: self._evaluate(state, user_time, y),
            where=lambda: f"of method {self._name!r} at t = {float(user_time):.6g}",
        )


def solver_of(method: MultistepMethod | TwoStageMethod) -> type[MultistepSolver]:
    """The solver class of a method."""
    summary = f"The method {method.name!r} as a solver of torchdiffeq: see `MultistepSolver`."
    members = {"method": method, "order": method.order, "__doc__": summary, "__module__": __name__}
    return type(method.name, (MultistepSolver,), members)


def _check_equal(steps: Tensor) -> None:
    shortest, longest = float(steps.detach().min()), float(steps.detach().max())
    if shortest != longest:
        raise ValueError(
            f"grad_filter='smooth' is for equal steps, got steps from {shortest:.6g} to {longest:.6g}; use "
            f"grad_filter='leapfrog', which is for any grid, or a step_size of which the interval is a multiple"
        )


def _equal_steps(h: float, count: int) -> Tensor:
    return torch.full((count,), h, dtype=torch.float64, device="cpu")


class _Blocks:
    """The entries of a sequence of numbers as tensors: a block of them at a time, as the memory of all is not needed.

    Args:
        numbers: the sequence.
        tensor: from a block of it, and the number of its first entry, to a tensor.
    """

    _SIZE = 256

    def __init__(self, numbers: Sequence[float], tensor: Callable[[Tensor, int], Tensor]) -> None:
        self._numbers = numbers
        self._tensor = tensor
        self._first = -1
        self._block: Tensor
        self._entries: tuple[Tensor, ...]

    def block(self, first: int) -> Tensor:
        """The block from `first` on, a multiple of its size."""
        if first != self._first:
            numbers = torch.tensor(self._numbers[first : first + self._SIZE], dtype=torch.float64, device="cpu")
            self._first, self._block = first, self._tensor(numbers, first)
            # Cut once, for indexing a tensor costs as much as a small layer.
            self._entries = self._block.unbind()
        return self._block

    def __call__(self, index: int) -> Tensor:
        rest = index % self._SIZE
        if index - rest != self._first:
            self.block(index - rest)
        return self._entries[rest]
