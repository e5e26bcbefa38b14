"""A multistep method in the form in which torchdiffeq calls its solvers: from options and times to states."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.autograd_function import Keeper, stack
from torchdiffeq_lmm.autodiff.backward_modes import resolve_backward
from torchdiffeq_lmm.autodiff.compilation import eager
from torchdiffeq_lmm.autodiff.reversal import is_reversible
from torchdiffeq_lmm.autodiff.solve_recorder import Parameters, Tape, Trajectory
from torchdiffeq_lmm.filters.filter_plan import FilterPlan, plan_filter, step_to_end
from torchdiffeq_lmm.filters.grad_filter import CostateFilter, SmoothFilter, resolve_grad_filter
from torchdiffeq_lmm.filters.smoothed_observation import observed
from torchdiffeq_lmm.forward.autograd_state import savable
from torchdiffeq_lmm.forward.events import EventSign
from torchdiffeq_lmm.forward.grid import (
    Grid,
    GridConstructor,
    Placement,
    check_step_size,
    check_times,
    constructed_grid,
    grid_of_times,
    pieces_of,
    pieces_until,
    place,
    place_in,
    uniform_grid,
    uniform_pieces,
)
from torchdiffeq_lmm.forward.implicit import ImplicitSolver
from torchdiffeq_lmm.forward.interpolation import (
    Interpolation,
    check_interpolation,
    cubic_hermite,
    linear_interpolation,
    slide,
)
from torchdiffeq_lmm.forward.jumps import jumps_of
from torchdiffeq_lmm.forward.step_source import EndlessSteps, FixedSteps, Sides, StepSource
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.forward.tolerances import event_tolerance, resolve_tolerance
from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.parameters.grid_parameter import parameters_of
from torchdiffeq_lmm.schemes.methods import LEAPFROG, MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.runge_kutta import TwoStageMethod
from torchdiffeq_lmm.schemes.unrolling import unroll
from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .torchdiffeq_host import MAX_EVENT_STEPS, find_event, unwrap, warn_of_unused_options


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
        jump_t: times at which func jumps, a tensor of shape (m,) or a sequence of numbers, in any order: see below.
        grad_filter: None, "auto", "leapfrog", "smooth", a `CostateFilter` or a `SmoothFilter`: see there.
        backward: "autograd", "reversible", "checkpoint", a `Reversible` or a `Checkpoint`: see there.
        adjoint_params: for the latter four, the tensors whose gradients are wanted besides those of y0 and t. By
            default the parameters of func, which must be a module then.
        unused: rtol and atol, for implicit steps, the latter for events too; norm, which nothing uses; anything else
            is warned of.

    **Jumps.** A time of `jump_t` between t[0] and t[-1] is a node, up to rounding the one that is there. The solve is a
    chain of solves then, from one jump to the next, each with a start, a filter and checkpoints of its own; its steps
    of `step_size` begin at the jump, and its last one is cut short at the next. func is evaluated at the neighbouring
    numbers of a jump, in the real dtype of the state, from the side of the piece; at a jump at t[0] or t[-1] from
    inside. Times outside are ignored. A gradient with respect to jump_t is that of moving the node; at an output there,
    the gradient with respect to the output's time is that from the left. Where the jumps are as close as the steps, a
    one-step method is the better choice.

    Raises:
        TypeError: y0, step_size, jump_t, grad_filter, backward or adjoint_params is of a wrong type; or rtol or atol,
            where steps are implicit.
        ValueError: step_size, interp, jump_t, grad_filter, backward, or a tolerance that is used, has a wrong value;
            step_size and grid_constructor are both given; grad_filter or backward is given to
            `torchdiffeq.odeint_adjoint`;
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
        jump_t: Any = None,
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
        self._sides = Sides(self._vector_field, perturb)
        # torchdiffeq negates tensors alone.
        is_tensor = isinstance(jump_t, Tensor)
        negate = hosted.options_reversed if is_tensor else hosted.reversed != hosted.options_reversed
        self._jumps = jumps_of(jump_t, is_negated=hosted.reversed and is_tensor, negate=negate)

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
        pieces, placements = self._pieces(t)
        if self._is_smooth:
            for piece in pieces:
                _check_equal(piece.steps)
        sources = [
            FixedSteps(piece, rows, self._sides, t) for piece, rows in zip(pieces, self._rows(pieces), strict=True)
        ]
        # No tensor that grows with the number of steps is held without need.
        del pieces
        x, outputs, keepers = self.y0, [], []
        around = [None, *sources, None]
        for source, placed, before, after in zip(sources, placements, around, around[2:], strict=False):
            made, x, keeper = self._solve(source, placed, x, before, after)
            outputs += made
            keepers.append(keeper)
        return stack(outputs, keepers)

    def _solve(
        self,
        source: FixedSteps,
        placements: Sequence[Placement],
        y0: Tensor,
        before: FixedSteps | None,
        after: FixedSteps | None,
    ) -> tuple[list[Tensor], Tensor, Keeper | None]:
        """The outputs in one piece of a solve, from a jump of f to the next, its last state, and what keeps it."""
        recurrence, at_node, last = source.recurrence, source.recurrence.nodes, len(source.lengths)
        tape = self._tape(y0, source.requires_grad, last)
        wanted = self._wanted([*placements, Placement(last)], [recurrence.evaluated[state] for state in at_node])
        seen = sorted(wanted.states)
        if self._is_smooth:
            wanted.smooth([recurrence.evaluated[state] for state in at_node])
        evaluate = self._evaluator(tape, source, {at_node[n]: n for n in wanted.slopes})

        trajectory = Trajectory({0: y0}, evaluate.kept)
        node, x, time = 0, _start(y0, tape), source.time
        history = History(x)
        rows = source.rows(differentiable=tape is None)
        for state, made in chain([(0, x)], march(history, rows, evaluate, evaluate.solve_implicit)):
            if state != at_node[node]:
                continue
            if tape is not None and node < last:
                tape.pass_by(state, history, evaluate)
            if node in wanted.states and node > 0:
                trajectory.states[node] = made
            if node in wanted.end_slopes:
                trajectory.end_slopes[node] = evaluate.at_end(node, state, made)
            if self._callback_step is not None and node < last:
                self._callback_step(time(state), made, time(at_node[node + 1]) - time(state))
            node += 1
        if tape is not None:
            plan = self._plan(recurrence, source.lengths, before, after)
            trajectory = tape.attach(trajectory, source.user_times, recurrence, plan, history, evaluate.again)
        if self._is_smooth:
            trajectory = _smoothed(trajectory, seen, source.steps)
        outputs = [self._output(placement, source.steps, trajectory) for placement in placements]
        return outputs, trajectory.states[last], trajectory.keeper

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
        x = self.y0
        search = _Search(event_sign, event_sign.at_beginning(t0, x), tolerance)
        made, keepers = 0, []
        before: FixedSteps | None = None
        for source, after in pairwise(chain(self._sources_until_event(t0, h), [None])):
            assert source is not None
            event_time, x, keeper = self._solve_until_event(source, x, search, made, before, after)
            keepers.append(keeper)
            if event_time is not None:
                break
            assert isinstance(source, FixedSteps)
            made += source.count
            before = source
        assert event_time is not None
        return event_time, stack([self.y0, x], keepers)

    def _sources_until_event(self, t0: Tensor, h: float) -> Iterator[FixedSteps | EndlessSteps]:
        """Steps from t0 to the first jump of f, from each jump to the next, and without an end."""
        sides, last = self._sides, t0
        if self._jumps is not None:
            end = float(t0.detach()) + MAX_EVENT_STEPS * h
            pieces, last_jump, is_jump = pieces_until(t0.reshape(1), end, h, self._jumps)
            for piece in pieces:
                yield FixedSteps(piece, self._unroll(piece.steps), sides, t0)
            last, sides = last_jump[0].to(t0), replace(sides, jumps=(is_jump, False))
        beginning = self._unroll(_equal_steps(h, 2 * self.method.steps + 2 * self.method.order + 2))
        yield EndlessSteps(last, h, beginning, sides)

    def _solve_until_event(
        self,
        source: FixedSteps | EndlessSteps,
        y0: Tensor,
        search: "_Search",
        made_before: int,
        before: FixedSteps | None,
        after: FixedSteps | EndlessSteps | None,
    ) -> tuple[Tensor | None, Tensor, Keeper | None]:
        """The time of the event, None if it is not in this piece of a solve, the state then or at the end, its keeper.

        Args:
            source: the steps of the piece.
            y0: the state at its beginning.
            search: for the event.
            made_before: how many steps have been made before this piece.
            before, after: the pieces before and after it.
        """
        time = source.time_of
        tape = self._tape(y0, source.requires_grad, MAX_EVENT_STEPS if source.count is None else source.count)
        # Straight lines need no slopes.
        wanted: dict[int, int] | None = None if self.interp == "cubic" else {}
        evaluate = self._evaluator(tape, source, wanted)
        x = x_before = x_earlier = _start(y0, tape)
        first, n = 0, 0
        if self._callback_step is not None:
            self._callback_step(time(0), x, time(1) - time(0))
        history = History(x)
        if tape is not None:
            tape.pass_by(0, history, evaluate)
        is_event = False
        for state, made in march(history, source.rows(tape is None), evaluate, evaluate.solve_implicit):
            if not source.is_node(state):
                continue
            is_event = search.sign(time(n + 1), made) != search.before
            if is_event or n + 1 == source.count:
                break
            n, first, x_before, x_earlier = n + 1, state, made, x_before
            self._check_event_steps(made_before + n)
            evaluate.forget(first)
            if tape is not None:
                tape.pass_by(state, history, evaluate)
            if self._callback_step is not None:
                self._callback_step(time(n), made, time(n + 1) - time(n))
        if not is_event:
            self._check_event_steps(made_before + n + 1)

        trajectory = Trajectory({max(0, n - 1): x_earlier, n: x_before, n + 1: made, 0: y0})
        needs_slopes = (self.interp == "cubic" and is_event) or self._is_smooth
        for node, of_node, reached in ((n, first, x_before), (n + 1, state, made)) if needs_slopes else ():
            is_kept = of_node in evaluate.kept and (tape is None or tape.keeps)
            if is_kept and not (self.perturb and node > n):
                trajectory.slopes[node] = evaluate.kept[of_node]
            else:
                trajectory.end_slopes[node] = evaluate.at_end(node, of_node, reached)

        def state_at(event_time: Tensor) -> Tensor:
            step = source.step(n)
            return self._inside(n, (event_time - time(n)) / step, step, trajectory)

        event_time: Tensor | None = None
        if is_event:
            with torch.no_grad():
                event_time, _ = find_event(
                    state_at, search.before, time(n), time(n + 1), search.sign.as_tensor, search.tolerance
                )
        steps = source.until(state, n + 1)
        if tape is not None:
            plan = self._plan(steps.recurrence, steps.lengths, before, None if is_event else after)
            trajectory = tape.attach(trajectory, steps.user_times, steps.recurrence, plan, history, evaluate.again)
        if self._is_smooth:
            trajectory = _smoothed(trajectory, [n, n + 1], steps.steps)
        x = trajectory.states[n + 1] if event_time is None else state_at(event_time)
        return event_time, x, trajectory.keeper

    def _check_event_steps(self, made: int) -> None:
        if made >= MAX_EVENT_STEPS:
            raise RuntimeError(
                f"event_fn did not change its sign within {MAX_EVENT_STEPS} steps of step_size "
                f"{float(self.step_size)}, the most that are made; if there is an event later, use a larger step_size"  # type: ignore[arg-type]
            )

    def _unroll(self, steps: Tensor) -> Recurrence:
        return self.method.unroll(steps) if isinstance(self.method, TwoStageMethod) else unroll(self.method, steps)

    def _rows(self, pieces: Sequence[Grid]) -> Iterator[Recurrence]:
        """The rows on each piece; those of equal steps are the same."""
        known: dict[tuple[float, ...], Recurrence] = {}
        for piece in pieces:
            if len(pieces) == 1 or piece.requires_grad:
                yield self._unroll(piece.steps)
                continue
            lengths = tuple(piece.steps.tolist())
            if lengths not in known:
                known[lengths] = self._unroll(piece.steps)
            yield known[lengths]

    def _pieces(self, t: Tensor) -> tuple[list[Grid], list[list[Placement]]]:
        """The grid, cut in pieces where f jumps, and where the outputs lie in each."""
        jumps, step_size = self._jumps, None if self.step_size is None else float(self.step_size)
        if step_size is not None and jumps is not None:
            pieces = uniform_pieces(t, step_size, jumps)
            return pieces, place_in(t, pieces, jumps)
        if step_size is not None:
            grid = uniform_grid(t, step_size)
        elif self.grid_constructor is not None:
            grid = constructed_grid(self.grid_constructor, self.func, self.y0, t, self._reverse)
        else:
            grid = grid_of_times(t)
        is_of_times = step_size is None and self.grid_constructor is None
        if jumps is None:
            return [grid], [[Placement(node) for node in range(len(t))] if is_of_times else place(t, grid)]
        pieces = pieces_of(grid, t, jumps)
        placements = place_in(t, pieces, jumps)
        if is_of_times:
            # Where it is not a jump, node and output time are the same variable.
            placements = [
                [p if p.node == len(piece.steps) else p._replace(shift=None) for p in placed]
                for placed, piece in zip(placements, pieces, strict=True)
            ]
        return pieces, placements

    @property
    def _is_smooth(self) -> bool:
        return isinstance(self.grad_filter, SmoothFilter)

    def _tape(self, y0: Tensor, differentiate_times: bool, steps: int) -> Tape | None:
        filters = isinstance(self.grad_filter, CostateFilter)
        is_plain = not filters and self.backward is None and not self.method.is_implicit
        if is_plain or not torch.is_grad_enabled():
            return None
        return Tape(self._vector_field, y0, differentiate_times, self.backward, self._parameters, steps)

    def _plan(
        self, recurrence: Recurrence, lengths: list[float], before: FixedSteps | None, after: StepSource | None
    ) -> FilterPlan | None:
        if not isinstance(self.grad_filter, CostateFilter):
            return None
        method = None if isinstance(self.method, TwoStageMethod) else self.method
        step_before = None if before is None else step_to_end(before.recurrence, before.lengths, method)
        step_after = None if after is None else after.first_step
        return plan_filter(self.grad_filter.weights, recurrence, lengths, method, step_before, step_after)

    def _evaluator(self, tape: Tape | None, source: StepSource, wanted: Mapping[int, int] | None) -> "_Evaluator":
        # Once more, for the backward pass, steps are made without a graph, but by the same iterations.
        differentiable = torch.is_grad_enabled()

        def implicit() -> ImplicitSolver:
            field = self._vector_field
            return ImplicitSolver(self.rtol, self.atol, field.precision, field.entry, differentiable)

        return _Evaluator(self._vector_field, tape, implicit, self.method.name, source, wanted)

    def _wanted(self, placements: Sequence[Placement], evaluated: Sequence[bool]) -> "_Wanted":
        """What the outputs are made of; f at a node is taken from the recurrence where that evaluates it."""
        states: set[int] = set()
        slopes: set[int] = set()
        end_slopes: set[int] = set()
        for node, fraction, shift in placements:
            states.add(node)
            if fraction is not None:
                states.add(node + 1)
            is_cubic = fraction is not None and self.interp == "cubic"
            ends = [node + 1] if is_cubic else []
            if shift is not None and node == len(evaluated) - 1:
                ends = [node]
            elif shift is not None or is_cubic:
                (slopes if evaluated[node] else end_slopes).add(node)
            for end in ends:
                from_left = self.perturb and not self.method.is_implicit
                (end_slopes if from_left or not evaluated[end] else slopes).add(end)
        return _Wanted(states, slopes, end_slopes)

    def _output(self, placement: Placement, steps: Sequence[Weight], trajectory: Trajectory) -> Tensor:
        node, fraction, shift = placement
        if fraction is not None:
            return self._inside(node, fraction, steps[node], trajectory)
        if shift is not None:
            # At the last node the slope from the left, of which there may be no other.
            slope = trajectory.end_slope if node == len(steps) else trajectory.start_slope
            return slide(trajectory.states[node], shift, slope(node))
        return trajectory.states[node]

    def _inside(self, node: int, fraction: Weight, step: Weight, trajectory: Trajectory) -> Tensor:
        x0, x1 = trajectory.states[node], trajectory.states[node + 1]
        if self.interp == "linear":
            return linear_interpolation(fraction, x0, x1)
        f0, f1 = trajectory.start_slope(node), trajectory.end_slope(node + 1)
        if not self._is_smooth:
            return cubic_hermite(fraction, step, x0, f0, x1, f1)
        # Slopes would start one parity alone; as far as the states are concerned a straight line is exact enough.
        value = cubic_hermite(fraction, step, x0.detach(), f0.detach(), x1.detach(), f1.detach())
        line = linear_interpolation(fraction.detach() if isinstance(fraction, Tensor) else fraction, x0, x1)
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


class _Search(NamedTuple):
    """For an event.

    Attributes:
        sign: of the event function.
        before: what it is at the beginning of the solve.
        tolerance: for the time of the event.
    """

    sign: EventSign
    before: float
    tolerance: float


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
        source: the times of the states.
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
        source: StepSource,
        wanted: Mapping[int, int] | None,
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._vector_field = vector_field
        self._tape = tape
        self._user_time = source.user_time
        self._user_time_at_end = source.user_time_at_end
        self._wanted = wanted
        self._evaluate = _evaluation_of(vector_field, tape, wanted or {})
        self.again = partial(_Steps, vector_field, implicit, name, source.user_time)
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
        user_time = self._user_time_at_end(node, state)
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
            f"grad_filter='smooth' is for equal steps, got steps from {shortest!r} to {longest!r}; use "
            f"grad_filter='leapfrog', which is for any grid, or a step_size of which the interval is a multiple"
        )


def _start(y0: Tensor, tape: Tape | None) -> Tensor:
    return y0 if tape is None else y0.detach()


def _equal_steps(h: float, count: int) -> Tensor:
    return torch.full((count,), h, dtype=torch.float64, device="cpu")
