"""A multistep method in the form in which torchdiffeq calls its solvers: from options and times to states."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.autograd_function import stack
from torchdiffeq_lmm.autodiff.compilation import eager
from torchdiffeq_lmm.autodiff.compile_settings import resolve_compile
from torchdiffeq_lmm.autodiff.compiled_piece import CompiledPieceSolver
from torchdiffeq_lmm.autodiff.goals import Outputs, Search, UntilEvent, smoothed
from torchdiffeq_lmm.autodiff.piece import Piece, PieceSolver
from torchdiffeq_lmm.filters.grad_filter import CostateFilter, SmoothFilter
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
from torchdiffeq_lmm.forward.implicit import OnFailure
from torchdiffeq_lmm.forward.interpolation import Interpolation, check_interpolation
from torchdiffeq_lmm.forward.newton_options import DEFAULT_NEWTON, Newton
from torchdiffeq_lmm.forward.outputs import OutputRule
from torchdiffeq_lmm.forward.samples import BatchDims
from torchdiffeq_lmm.forward.step_source import FixedSteps, GridSteps, Sides, UnboundedSteps
from torchdiffeq_lmm.forward.tolerances import (
    check_equal,
    check_max_num_steps,
    check_steps,
    event_tolerance,
)
from torchdiffeq_lmm.schemes.methods import LEAPFROG, MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.runge_kutta import TwoStageMethod
from torchdiffeq_lmm.schemes.unrolling import unroll

from .compile_checks import check_compiled_solve, resolve_compiled_blocks, resolve_compiled_params
from .compiled_grids import PLANNED_GRIDS, PlannedGrid, grid_key
from .grid_checks import asks_for_nodes, checked_rows
from .solver_base import DifferentiableSolver, GradientOptions, ImplicitOptions
from .torchdiffeq_host import MAX_EVENT_STEPS, find_event, warn_of_unused_options


class MultistepSolver(DifferentiableSolver):
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
        batch_dims: for implicit steps, how many leading dimensions of the state, or of all components of a tuple, count
            samples that func treats independently. "auto" takes all but the last, and looks whether that is so; samples
            that are coupled are solved as one system.
        on_failure: "raise" an error where the equation of an implicit step is not solved; or "nan", to go on with NaN
            for that sample, with one warning in the end; a state of a single sample raises in any case.
        newton: for implicit steps, a `Newton`: how exactly, with how much work and in how much memory they are solved.
        jac_sparsity, jac, preconditioner: for implicit steps of large systems, what is known of the Jacobian of func:
            see `known_jacobian`.
        max_num_steps: the most steps that are made, as the option of torchdiffeq's adaptive solvers. By default 20,000
            in the search for an event, as in torchdiffeq, and else 10 million, more of which are taken for a mistake.
        jump_t: times at which func jumps, a tensor of shape (m,) or a sequence of numbers, in any order: see below.
        grad_filter: None, "auto", "leapfrog", "smooth", a `CostateFilter` or a `SmoothFilter`: see there.
        backward: "autograd", "reversible", "checkpoint", a `Reversible` or a `Checkpoint`: see there.
        adjoint_params: for the latter four, the tensors whose gradients are wanted besides those of y0 and t. By
            default the parameters of func, which must be a module then.
        compile: None or False, True, or a `Compile`: see there.
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
        TypeError: y0, step_size, jump_t, max_num_steps, grad_filter, backward or adjoint_params is of a wrong type; or
            rtol or atol, where steps are implicit.
        ValueError: step_size, interp, jump_t, max_num_steps, grad_filter, backward, or a tolerance that is used, has a
            wrong value; step_size and grid_constructor are both given; grad_filter or backward is given to
            `torchdiffeq.odeint_adjoint`; adjoint_params is given where it is not used, or is not where it is needed.
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
        max_num_steps: int | None = None,
        batch_dims: BatchDims = "auto",
        on_failure: OnFailure = "raise",
        newton: Newton = DEFAULT_NEWTON,
        jac_sparsity: Any = None,
        jac: Callable[[Tensor, Any], Any] | None = None,
        preconditioner: Callable[[Tensor, Any, float], Any] | None = None,
        grad_filter: object = None,
        backward: object = "autograd",
        adjoint_params: Iterable[Tensor] | None = None,
        compile: object = None,  # noqa: A002
        **unused: Any,
    ) -> None:
        unused.pop("norm", None)
        tolerances = unused.pop("rtol", 1e-7), unused.pop("atol", 1e-9)
        warn_of_unused_options(self, unused)
        if step_size is not None:
            check_step_size(step_size)
            if grid_constructor is not None:
                raise ValueError("step_size and grid_constructor are mutually exclusive options, got both")
        if grid_constructor is not None and not callable(grid_constructor):
            raise TypeError(f"grid_constructor must be a callable (func, y0, t) -> grid, got {grid_constructor!r}")
        check_interpolation(interp)
        check_max_num_steps(max_num_steps)
        equations = ImplicitOptions(batch_dims, on_failure, newton, jac_sparsity, jac, preconditioner)
        settings = resolve_compile(compile)
        # The steps of implicit methods are made one by one, their equations are solved by a compiled function.
        in_blocks = settings is not None and not self.method.is_implicit
        # Blocks find out by themselves what func depends on, and have backward passes of their own.
        own = ("autograd", None) if in_blocks else (backward, adjoint_params)
        gradients = GradientOptions(grad_filter, *own)
        super().__init__(func, y0, tolerances, perturb, jump_t, equations, gradients)
        self.step_size = step_size
        self.grid_constructor = grid_constructor
        self.interp = interp
        self.perturb = perturb
        self.max_num_steps = max_num_steps
        self._max_event_steps = MAX_EVENT_STEPS if max_num_steps is None else max_num_steps
        self._sides = Sides(self._vector_field, perturb)
        self._compile = settings if in_blocks else None
        self._adjoint_params = resolve_compiled_params(adjoint_params) if in_blocks else None
        if in_blocks:
            self._backward = resolve_compiled_blocks(self.method, self._hosted, jump_t, backward)
        elif settings is not None:
            self._compile_equations(settings)
        self._is_smooth = isinstance(self.grad_filter, SmoothFilter)
        left_slopes = perturb and not self.method.is_implicit
        self._rule = OutputRule(interp, left_slopes, has_straight_gradient=self._is_smooth)

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
        solver = self._solver_of_grid(t)
        key = self._grid_key(t, solver) if isinstance(solver, CompiledPieceSolver) else None
        known = None if key is None else PLANNED_GRIDS.find(key)
        if known is not None:
            assert isinstance(solver, CompiledPieceSolver)
            return known.outputs(solver, self.y0, self._rule)
        pieces, placements = self._grids(t)
        check_steps(sum(len(piece.steps) for piece in pieces), self.max_num_steps)
        if self._is_smooth:
            for piece in pieces:
                check_equal(piece.steps)
        sources = [
            FixedSteps(piece, rows, self._sides, t) for piece, rows in zip(pieces, self._rows(pieces), strict=True)
        ]
        # No tensor that grows with the number of steps is held without need.
        nodes = []
        if len(pieces) == 1 and asks_for_nodes(self.grad_filter) and sources[0].recurrence.is_at_nodes:
            nodes.append((pieces[0].nodes, sources[0].recurrence.sees_end))
        del pieces
        around, x, outputs, keepers = [None, *sources, None], self.y0, [], []
        with checked_rows(self.grad_filter, self.method.name, self._vector_field.direction, nodes):
            for source, placed, before, after in zip(sources, placements, around, around[2:], strict=False):
                goal = Outputs(source, placed, self._rule, self._is_smooth)
                if key is not None and isinstance(solver, CompiledPieceSolver) and not goal.slope_nodes:
                    planned = solver.planned(source, goal)
                    if planned is not None:
                        PLANNED_GRIDS.keep(key, PlannedGrid(planned, placed, source.lengths))
                trajectory, made, keeper = solver.solve(source, x, goal, before, after)
                if self._is_smooth:
                    trajectory = smoothed(trajectory, goal.nodes, made.steps)
                x = trajectory.states[source.count]
                outputs += [self._rule.output(placement, made.steps, trajectory) for placement in placed]
                keepers.append(keeper)
        self._warn_of_failures(x)
        return stack(outputs, keepers)

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
        if self._compile is not None:
            raise ValueError("compile must not be given where event_fn is: how many steps there are depends on values")
        if self.step_size is None:
            raise ValueError("step_size must be given in options where event_fn is, got None")
        tolerance = event_tolerance(self.atol, self.y0)
        event_sign = EventSign(event_fn, self._reverse)
        check_times(t0.reshape(1))
        h = float(self.step_size)
        # A copy, for the backward pass may need it when the caller has changed it.
        t0 = t0.to(self.y0.device, self._vector_field.time_dtype, copy=True)
        x, made, keepers, solver = self.y0, 0, [], self._solver()
        search = Search(event_sign, event_sign.at_beginning(t0, x), tolerance, self._max_event_steps, h)
        before: FixedSteps | None = None
        event_time: Tensor | None = None
        for source, after in pairwise(chain(self._sources_until_event(t0, h), [None])):
            assert source is not None
            goal = UntilEvent(source, search, made, self.interp == "cubic", self._is_smooth, self._rule.left_slopes)
            piece = solver.solve(source, x, goal, before, after)
            event_time, x = self._end_of(piece, goal, source, search)
            keepers.append(piece.keeper)
            if event_time is not None:
                break
            assert isinstance(source, FixedSteps)
            made, before = made + source.count, source
        assert event_time is not None
        self._warn_of_failures(x)
        return event_time, stack([self.y0, x], keepers)

    def _end_of(
        self, piece: Piece, goal: UntilEvent, source: GridSteps, search: Search
    ) -> tuple[Tensor | None, Tensor]:
        """The time of the event, None if it is not in this piece, and the state then, or at the end."""
        node, time, trajectory = goal.node, source.time_of, piece.trajectory

        def state_at(event_time: Tensor) -> Tensor:
            step = source.step(node)
            return self._rule.inside(node, (event_time - time(node)) / step, step, trajectory)

        event_time: Tensor | None = None
        if goal.is_event:
            with torch.no_grad():
                event_time, _ = find_event(
                    state_at, search.before, time(node), time(node + 1), search.sign.as_tensor, search.tolerance
                )
        if self._is_smooth:
            trajectory = smoothed(trajectory, [node, node + 1], piece.steps.steps)
        return event_time, trajectory.states[node + 1] if event_time is None else state_at(event_time)

    def _sources_until_event(self, t0: Tensor, h: float) -> Iterator[GridSteps]:
        """Steps from t0 to the first jump of f, from each jump to the next, and without an end."""
        sides, last = self._sides, t0
        if self._jumps is not None:
            end = float(t0.detach()) + self._max_event_steps * h
            pieces, last_jump, is_jump = pieces_until(t0.reshape(1), end, h, self._jumps)
            for piece in pieces:
                yield FixedSteps(piece, self._unroll(piece.steps), sides, t0)
            last, sides = last_jump[0].to(t0), replace(sides, jumps=(is_jump, False))
        beginning = self._unroll(_equal_steps(h, 2 * self.method.steps + 2 * self.method.order + 2))
        yield UnboundedSteps(last, h, beginning, sides)

    def _solver(self) -> PieceSolver:
        return self._pieces(self._max_event_steps, self._hosted.callback_step)

    def _grid_key(self, t: Tensor, solver: CompiledPieceSolver) -> Hashable | None:
        """What a compiled solve knows a grid by; None where it does not."""
        if self.grid_constructor is not None or self._is_smooth:
            return None
        of_state = self.y0.device, self._vector_field.time_dtype, self._reverse, self.perturb, self.interp
        filtered = self.grad_filter if torch.is_grad_enabled() else None
        return grid_key(t, self.step_size, self.method, solver.block, self.max_num_steps, filtered, *of_state)

    def _solver_of_grid(self, t: Tensor) -> PieceSolver | CompiledPieceSolver:
        if self._compile is None:
            return self._solver()
        costate_filter = self.grad_filter if isinstance(self.grad_filter, CostateFilter) else None
        check_compiled_solve(self._hosted, self.y0)
        return CompiledPieceSolver(
            settings=self._compile,
            hosted=self._hosted,
            vector_field=self._vector_field,
            method=self.method,
            costate_filter=costate_filter,
            adjoint_params=self._adjoint_params,
            backward=self._backward,
            eager=self._solver(),
            time=t[0].detach().to(self.y0.device, self._vector_field.time_dtype),
            y0=self.y0,
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

    def _grids(self, t: Tensor) -> tuple[list[Grid], list[list[Placement]]]:
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


def solver_of(method: MultistepMethod | TwoStageMethod) -> type[MultistepSolver]:
    """The solver class of a method."""
    summary = f"The method {method.name!r} as a solver of torchdiffeq: see `MultistepSolver`."
    members = {"method": method, "order": method.order, "__doc__": summary, "__module__": __name__}
    return type(method.name, (MultistepSolver,), members)


def _equal_steps(h: float, count: int) -> Tensor:
    return torch.full((count,), h, dtype=torch.float64, device="cpu")
