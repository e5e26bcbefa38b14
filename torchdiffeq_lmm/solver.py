"""A multistep method in the form in which torchdiffeq calls its solvers: from options and times to states."""

from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .combination import Weight
from .grad_filter import resolve_grad_filter
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
from .host import MAX_EVENT_STEPS, find_event, unwrap, warn_of_unused_options
from .interpolation import Interpolation, check_interpolation, cubic_hermite, linear, slide
from .methods import LEAPFROG, MultistepMethod
from .stepping import march
from .tape import Tape, Trajectory
from .vector_field import VectorField


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
        grad_filter: None, "leapfrog" or a `LeapfrogFilter`: see there.
        unused: rtol, atol and norm, of which only atol is used, for events; anything else is warned of.

    Raises:
        TypeError: y0, step_size or grad_filter is of a wrong type.
        ValueError: step_size, interp or grad_filter has a wrong value; step_size and grid_constructor are both given;
            grad_filter is given to `torchdiffeq.odeint_adjoint`.
    """

    method: ClassVar[MultistepMethod]
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
        **unused: Any,
    ) -> None:
        self.atol = unused.pop("atol", 1e-9)
        unused.pop("rtol", None)
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
        self.grad_filter = resolve_grad_filter(grad_filter, self.method.name)
        self.func = func
        self.y0 = y0
        self.step_size = step_size
        self.grid_constructor = grid_constructor
        self.interp = interp
        self.perturb = perturb
        hosted = unwrap(func)
        if self.grad_filter is not None and hosted.in_adjoint:
            raise ValueError(
                f"grad_filter must be None in odeint_adjoint, got {grad_filter!r}: its gradient comes from a solve of "
                f"its own, which no filter reaches. Use odeint"
            )
        self._reverse = hosted.reversed
        self._callback_step = hosted.callback_step
        self._vector_field = VectorField(hosted, y0, perturb)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called, for torchdiffeq's warning of others."""
        return {"callback_step"}

    def integrate(self, t: Tensor) -> Tensor:
        """Solve from t[0] to t[-1].

        Args:
            t: the output times, of shape (n,), strictly increasing.

        Returns:
            The states at `t`, of shape (n, *y0.shape).

        Raises:
            TypeError, ValueError: t, the grid or what func returns is not as it must be.
        """
        check_times(t)
        if len(t) == 1:
            return torch.stack([self.y0])
        grid, placements = self._grid(t)
        steps = _entries(grid.steps) if grid.requires_grad else grid.steps.tolist()
        recurrence = self.method.recurrence(grid.steps)
        tape = self._tape(grid.requires_grad)
        times = grid.nodes.to(t)
        user_times = self._vector_field.user_times(times)
        evaluate = _Evaluator(
            self._vector_field, self._callback_step, tape, _entries(times).__getitem__, _entries(user_times).__getitem__
        )

        wanted = self._wanted(placements, len(steps))
        trajectory = Trajectory({0: self.y0})
        rows = recurrence.differentiable_rows() if tape is None and recurrence.requires_grad else recurrence.rows()
        for n, slope, x in march(self._start(tape), rows, evaluate):
            if n in wanted.slopes:
                trajectory.slopes[n] = slope.clone()
            if n + 1 in wanted.states:
                trajectory.states[n + 1] = x
            if n + 1 in wanted.end_slopes:
                trajectory.end_slopes[n + 1] = evaluate.at_end(n + 1, x)
        if tape is not None:
            trajectory = tape.attach(trajectory, user_times, recurrence, self._window_weights(grid.steps))
        return torch.stack([self._output(placement, steps, trajectory) for placement in placements])

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Solve from t0, in steps of `step_size`, until `event_fn` changes its sign.

        Args:
            t0: the initial time, 0-d.
            event_fn: ``event_fn(t, y)``, a 0-d tensor, in the solver's time and state.

        Returns:
            The time of the event, 0-d and without a graph, and the states at t0 and then, of shape (2, *y0.shape).

        Raises:
            TypeError, ValueError: an option, or what func returns, is not as it must be.
            RuntimeError: there is no event within torchdiffeq's limit of steps.
        """
        if self.step_size is None:
            raise ValueError("step_size must be given in options where event_fn is, got None")
        tolerance = float(torch.as_tensor(self.atol).min())
        if not tolerance > 0:
            raise ValueError(f"atol must be positive where event_fn is given, got {tolerance}")
        check_times(t0.reshape(1))
        h = float(self.step_size)
        t0 = t0.to(self.y0.device, self._vector_field.time_dtype)
        tape = self._tape(t0.requires_grad)

        def time(node: int) -> Tensor:
            return t0 + node * h

        def event_sign(node: int, x: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.sign(event_fn(time(node), x))

        def state_at(event_time: Tensor, n: int, trajectory: Trajectory) -> Tensor:
            return self._inside(n, (event_time - time(n)) / h, h, trajectory)

        evaluate = _Evaluator(
            self._vector_field, self._callback_step, tape, time, lambda n: self._vector_field.user_times(time(n))
        )
        start_rows = self.method.recurrence(torch.full((self.method.steps,), h, dtype=torch.float64)).rows()
        rows = chain(start_rows, repeat(start_rows[-1]))
        start = x_before = self._start(tape)
        sign = event_sign(0, start)
        for n, slope, x in islice(march(start, rows, evaluate), MAX_EVENT_STEPS):
            if event_sign(n + 1, x) != sign:
                trajectory = Trajectory({n: x_before, n + 1: x, 0: self.y0}, {n: slope})
                break
            x_before = x
        else:
            raise RuntimeError(
                f"event_fn did not change its sign within {MAX_EVENT_STEPS} steps of step_size {h}, the most that are "
                f"made; if there is an event later, use a larger step_size"
            )

        if self.interp == "cubic":
            trajectory.end_slopes[n + 1] = evaluate.at_end(n + 1, x)
        with torch.no_grad():
            event_time, _ = find_event(
                lambda t: state_at(t, n, trajectory), sign, time(n), time(n + 1), event_fn, tolerance
            )
        if tape is not None:
            steps = torch.full((n + 1,), h, dtype=torch.float64)
            user_times = self._vector_field.user_times(t0 + h * torch.arange(n + 2).to(t0))
            trajectory = tape.attach(trajectory, user_times, self.method.recurrence(steps), self._window_weights(steps))
        return event_time, torch.stack([self.y0, state_at(event_time, n, trajectory)])

    def _grid(self, t: Tensor) -> tuple[Grid, list[Placement]]:
        if self.step_size is None and self.grid_constructor is None:
            return grid_of_times(t), [Placement(node) for node in range(len(t))]
        if self.grid_constructor is None:
            assert self.step_size is not None
            grid = uniform_grid(t, float(self.step_size))
        else:
            grid = constructed_grid(self.grid_constructor, self.func, self.y0, t, self._reverse)
        return grid, place(t, grid)

    def _tape(self, differentiate_times: bool) -> Tape | None:
        if self.grad_filter is None or not torch.is_grad_enabled():
            return None
        return Tape(self._vector_field, differentiate_times)

    def _start(self, tape: Tape | None) -> Tensor:
        return self.y0 if tape is None else self.y0.detach()

    def _window_weights(self, steps: Tensor) -> Tensor:
        assert self.grad_filter is not None
        return self.grad_filter.window_weights(steps)

    def _wanted(self, placements: Sequence[Placement], last: int) -> "_Wanted":
        """What the outputs are made of; the end of a step takes the slope of the next one, if there is one to take."""
        wanted = _Wanted(set(), set(), set())
        for node, fraction, shift in placements:
            wanted.states.add(node)
            if fraction is not None:
                wanted.states.add(node + 1)
            if shift is not None or (fraction is not None and self.interp == "cubic"):
                wanted.slopes.add(node)
            if fraction is not None and self.interp == "cubic":
                (wanted.end_slopes if self.perturb or node + 1 == last else wanted.slopes).add(node + 1)
        return wanted

    def _output(self, placement: Placement, steps: Sequence[Weight], trajectory: Trajectory) -> Tensor:
        node, fraction, shift = placement
        if fraction is not None:
            return self._inside(node, fraction, steps[node], trajectory)
        if shift is not None:
            return slide(trajectory.states[node], shift, trajectory.slopes[node])
        return trajectory.states[node]

    def _inside(self, node: int, fraction: Weight, step: Weight, trajectory: Trajectory) -> Tensor:
        x0, x1 = trajectory.states[node], trajectory.states[node + 1]
        if self.interp == "linear":
            return linear(fraction, x0, x1)
        return cubic_hermite(fraction, step, x0, trajectory.slopes[node], x1, trajectory.end_slope(node + 1))


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


class _Evaluator:
    """f at the nodes of one solve, with the user's callback before every step.

    Args:
        vector_field: f.
        callback_step: the user's callback, or None.
        tape: what records the evaluations, or None.
        time: from a node to its time.
        user_time: from a node to what func is given for it.
    """

    def __init__(
        self,
        vector_field: VectorField,
        callback_step: Callable[[Tensor, Tensor, Tensor], object] | None,
        tape: Tape | None,
        time: Callable[[int], Tensor],
        user_time: Callable[[int], Tensor],
    ) -> None:
        self._vector_field = vector_field
        self._callback_step = callback_step
        self._tape = tape
        self._time = time
        self._user_time = user_time

    def __call__(self, node: int, x: Tensor) -> Tensor:
        if self._callback_step is not None:
            time = self._time(node)
            self._callback_step(time, x, self._time(node + 1) - time)
        user_time = self._user_time(node)
        if self._tape is not None:
            return self._tape.evaluate(node, user_time, x)
        return self._vector_field(user_time, x)

    def at_end(self, node: int, x: Tensor) -> Tensor:
        """f at the end of a step, outside the recurrence."""
        user_time = self._vector_field.user_times(self._time(node), side="left")
        if self._tape is not None:
            return self._tape.evaluate(node, user_time, x, end=True)
        return self._vector_field(user_time, x)


def _entries(values: Tensor) -> Sequence[Tensor]:
    """The entries of a vector; all at once where they have a gradient, whose cost would else be quadratic."""
    return values.unbind() if values.requires_grad else values  # type: ignore[return-value]
