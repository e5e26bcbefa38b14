"""A multistep method in the form in which torchsde calls its solvers: from an SDE and times to states."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.autograd_function import Keeper, stack
from torchdiffeq_lmm.autodiff.backward_modes import AUTOGRAD
from torchdiffeq_lmm.autodiff.compilation import eager
from torchdiffeq_lmm.autodiff.noise_adjoint import refuse_gradients
from torchdiffeq_lmm.autodiff.solve_recorder import RecordedField, SolveRecorder
from torchdiffeq_lmm.filters.filter_plan import FilterPlan, plan_filter, step_to_end
from torchdiffeq_lmm.filters.grad_filter import SmoothFilter, resolve_grad_filter
from torchdiffeq_lmm.forward.autograd_state import savable
from torchdiffeq_lmm.forward.grid import (
    Grid,
    Placement,
    check_step_size,
    check_times,
    place,
    place_in,
    uniform_grid,
    uniform_pieces,
)
from torchdiffeq_lmm.forward.implicit import ImplicitSolver
from torchdiffeq_lmm.forward.interpolation import linear_interpolation
from torchdiffeq_lmm.forward.jumps import jumps_of
from torchdiffeq_lmm.forward.multistep_state import Past, past_of, resume
from torchdiffeq_lmm.forward.newton_options import DEFAULT_NEWTON, check_newton
from torchdiffeq_lmm.forward.outputs import Trajectory
from torchdiffeq_lmm.forward.samples import Systems, samples_of
from torchdiffeq_lmm.forward.sde_stepping import DriftAndNoise, NoiseTerm, noise_of_rows
from torchdiffeq_lmm.forward.step_evaluator import StepEvaluator
from torchdiffeq_lmm.forward.stepping import march
from torchdiffeq_lmm.forward.tolerances import resolve_tolerance
from torchdiffeq_lmm.forward.vector_field import entry_name, precision_of
from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence
from torchdiffeq_lmm.schemes.unrolling import start_length

from .compile_checks import refuse_compile
from .grid_checks import asks_for_nodes, checked_rows
from .sharding_checks import refuse_sharded
from .torchsde_host import HostedSDE, unwrap_sde, warn_of_unused_sde_options

if TYPE_CHECKING:
    from torchsde import BaseBrownian, BaseSDE


class MultistepSDESolver:
    """A stochastic linear multistep (Maruyama) method as a fixed-step solver of torchsde.

    torchsde makes one for every call of `sdeint`. Steps of `dt` go from ts[0] on, the last one cut short at ts[-1];
    outputs in between are linear interpolations, all as for torchsde's own methods. The times of the nodes are
    ts[0] + n dt in float64.

    Of strong (mean-square) order 1 for additive noise and 1/2 else, of weak order 1. Where the noise is small, of size
    ε, the mean-square error is O(h^p + ε h + ε² √h), with p the order of the ODE method: that is what the methods are
    for.

    Args:
        sde: the SDE, in torchsde's wrapper: Itô, or Stratonovich with additive noise, where both are the same.
        bm: the Brownian motion, of which increments are asked for.
        dt: the length of the steps, positive.
        adaptive: must be False.
        rtol, atol: for implicit steps, whose equations are solved to 1e-4 (atol + rtol |y|).
        dt_min: unused.
        options: ``grad_filter``: None, "auto", "leapfrog" or a `CostateFilter`. ``jump_t``: times at which drift or
            diffusion jumps, a tensor of shape (m,) or a sequence of numbers, as torchdiffeq's option: see below.
            ``newton``: a `Newton`, for implicit steps: see there.
            Anything else is warned of.

    Each time of `jump_t` between ts[0] and ts[-1] is a node; drift and diffusion are evaluated a hair to its left and
    to its right, and the method starts anew there, with steps of `dt`. That restores the order in h of the drift's
    part of the error, which is what the methods are for: O(h^p + ε h + ε² √h) again, instead of O(h). Where noise
    dominates it changes little. A solve that begins at a jump makes no use of the past that it is given.

    Raises:
        TypeError: dt, grad_filter, jump_t or y0 is of a wrong type.
        ValueError: dt, grad_filter or jump_t has a wrong value, jump_t requires a gradient, `adaptive` is set, or the
            noise is none that the methods are for.

    Source: Buckwar, Winkler, *Multistep methods for SDEs and their application to problems with small noise* (SIAM
    Journal on Numerical Analysis, 2006).
    """

    method: ClassVar[MultistepMethod]
    weak_order = 1.0

    def __init__(
        self,
        sde: "BaseSDE",
        bm: "BaseBrownian",
        dt: float | Tensor,
        adaptive: bool,
        rtol: float | Tensor,
        atol: float | Tensor,
        dt_min: float | Tensor,  # noqa: ARG002
        options: dict[str, Any],
    ) -> None:
        name = self.method.name
        if sde.sde_type == "stratonovich" and sde.noise_type != "additive":
            raise ValueError(
                f"method {name!r} is for Ito SDEs, and for Stratonovich SDEs with additive noise, where both are the "
                f"same; got a Stratonovich SDE with {sde.noise_type} noise. Use 'midpoint', 'heun' or "
                f"'reversible_heun', or write the SDE in the Ito sense"
            )
        if adaptive:
            raise ValueError(
                f"adaptive must be False for method {name!r}, which makes steps of dt, got {adaptive}; for adaptive "
                f"steps use a method of torchsde's own"
            )
        check_step_size(dt, "dt")
        # Traced by torch 2.5, `dict(options)` would still have what is taken out.
        options = {**options}
        # A smoothed observation would average the noise too.
        grad_filter = resolve_grad_filter(options.pop("grad_filter", None), name, smooth=False)
        assert not isinstance(grad_filter, SmoothFilter)
        self._jumps = jumps_of(options.pop("jump_t", None), is_negated=False, negate=False)
        if self._jumps is not None and self._jumps.times.requires_grad:
            raise ValueError(
                "jump_t must not require a gradient, got a tensor that does: times of an SDE have none; detach it"
            )
        self._newton = options.pop("newton", DEFAULT_NEWTON)
        check_newton(self._newton)
        refuse_compile(options.pop("compile", None), "SDEs, which draw random numbers")
        reasons = [f"with the implicit method {name!r}"] if self.method.is_implicit else []
        reasons += ["where grad_filter is given"] if grad_filter is not None else []
        refuse_sharded(sde, reasons, "sde")
        if options:
            warn_of_unused_sde_options(name, options)
        self.grad_filter = grad_filter
        self.strong_order = 1.0 if sde.noise_type == "additive" else 0.5
        self._sde = sde
        self._bm = bm
        self._dt = float(dt)
        self._rtol = rtol
        self._atol = atol

    def __repr__(self) -> str:
        return f"{type(self).__name__} of strong order: {self.strong_order}, and weak order: {self.weak_order}"

    def init_extra_solver_state(self, t0: Tensor, y0: Tensor) -> Past:  # noqa: ARG002
        """The past at the beginning: none. The first steps are then made together, as for ODEs."""
        return ()

    @eager
    def integrate(self, y0: Tensor, ts: Tensor, extra0: Past) -> tuple[Tensor, Past]:
        """Solve from ts[0] to ts[-1].

        Args:
            y0: the initial state, of shape (batch, d).
            ts: the output times, of shape (T,), strictly increasing.
            extra0: empty, or what a solve up to ts[0] has returned: its latest steps, its increments by the drift and
                its slopes, so that this one goes on as if both were one solve. The steps may have another length.

        Returns:
            The states at `ts`, of shape (T, batch, d), and the same for a solve that goes on from ts[-1]; empty where
            the method reaches over more steps than have been made.

        Raises:
            TypeError, ValueError: y0, ts, dt, extra0, or a tolerance of implicit steps is not as it must be.
            RuntimeError: an implicit equation was not solved.
        """
        if not y0.is_floating_point():
            raise TypeError(f"y0 must be a floating tensor, got dtype {y0.dtype}; use y0.float()")
        check_times(ts, "ts")
        if not ts.is_floating_point():
            ts = ts.to(y0.dtype)
        if len(ts) == 1:
            return torch.stack([y0]), extra0
        if self._jumps is None:
            grid = uniform_grid(ts, self._dt, "dt")
            pieces, placements = [grid], [place(ts, grid)]
        else:
            pieces = uniform_pieces(ts, self._dt, self._jumps, "dt")
            placements = place_in(ts, pieces, self._jumps)
        if self.method.is_implicit:
            self._rtol, self._atol = (
                resolve_tolerance(name, given, y0) for name, given in (("rtol", self._rtol), ("atol", self._atol))
            )
        x, outputs, keepers = y0, [], []
        # What was before a jump is of no use after it.
        past: Past = () if pieces[0].jumps[0] else extra0
        step_before: float | None = None
        for n, (piece, placed) in enumerate(zip(pieces, placements, strict=True)):
            step_after = float(pieces[n + 1].steps[0]) if n + 1 < len(pieces) else None
            solved = self._solve(piece, placed, x, ts, past if n == 0 else (), step_before, step_after)
            x, past, step_before = solved.x, solved.past, solved.step_to_end
            outputs += solved.outputs
            keepers.append(solved.keeper)
        return stack(outputs, keepers), past

    def _solve(
        self,
        grid: Grid,
        placements: Sequence[Placement],
        y0: Tensor,
        ts: Tensor,
        extra0: Past,
        step_before: float | None,
        step_after: float | None,
    ) -> "_Solved":
        """Solve from one jump to the next; for the steps before and after see `plan_filter`."""
        method = self.method
        is_recorded = self._is_recorded(extra0)
        start = y0.detach() if is_recorded else y0
        recurrence, history, offset = resume(method, extra0, grid.steps, start)
        first, of_rows = recurrence.nodes[offset], noise_of_rows(recurrence)
        source = _Field(self._sde, self._bm, grid, ts, recurrence.positions, offset, method)
        precision = precision_of(y0.dtype, y0.device)
        samples = samples_of((y0.shape,), "auto")
        field: DriftAndNoise = source
        recorder: SolveRecorder | None = None
        if is_recorded:
            recorder = SolveRecorder(
                source.drift_at, precision, Systems(samples, self._newton), y0, False, AUTOGRAD, None, len(grid.steps)
            )
            field = RecordedField(source, source.time, recorder)
        entry = partial(entry_name, "y", shape=y0.shape)
        implicit = partial(
            ImplicitSolver,
            self._rtol,
            self._atol,
            precision,
            entry,
            torch.is_grad_enabled(),
            samples,
            self._newton,
        )
        steps_of = partial(StepEvaluator, source.drift_at, implicit, method.name, source.time)
        steps = steps_of(lambda state, _, x: field.drift(state, x))
        noise = NoiseTerm(of_rows, field)

        wanted = {len(grid.steps), *(near for placement in placements for near in _neighbours(placement))}
        trajectory = Trajectory({offset: y0})
        node = offset
        rows = recurrence.rows[first:]
        is_alone = step_before is None and step_after is None
        nodes = [(grid.nodes, recurrence.sees_end)] if is_alone and asks_for_nodes(self.grad_filter) else []
        with checked_rows(self.grad_filter, method.name, 1, nodes):
            for state, made in march(history, rows, noise.evaluate, steps.solve_implicit, first, noise):
                if not recurrence.rows[state - 1].is_node:
                    continue
                node += 1
                if node - offset in wanted:
                    trajectory.states[node] = made
        past = past_of(method, recurrence, _behind(extra0, grid.steps), history)
        end, keeper = None, None
        if recorder is not None:
            lengths: list[float] = grid.steps.tolist()
            plan = self._plan(recurrence, lengths, step_before, step_after)
            trajectory, keeper = recorder.attach(trajectory, None, recurrence, plan, history, steps_of, offset, of_rows)
            past = refuse_gradients(trajectory.states[node], past)
            end = None if self.grad_filter is None else step_to_end(recurrence, lengths, method)
        states = {of - offset: x for of, x in trajectory.states.items()}
        outputs = [_output(placement, states) for placement in placements]
        return _Solved(outputs, states[node - offset], past, end, keeper)

    def _plan(
        self, recurrence: Recurrence, lengths: list[float], step_before: float | None, step_after: float | None
    ) -> FilterPlan | None:
        if self.grad_filter is None:
            return None
        plan = plan_filter(self.grad_filter.weights, recurrence, lengths, self.method, step_before, step_after)
        # The noise is like observations at every node, in whose layers μ_m / h is not the costate.
        return replace(plan, raw=[False] * len(plan.raw))

    def _is_recorded(self, extra0: Past) -> bool:
        if not torch.is_grad_enabled() or (self.grad_filter is None and not self.method.is_implicit):
            return False
        if extra0 and self.grad_filter is not None:
            raise ValueError(
                "extra_solver_state must not be given with grad_filter, which looks at the whole solve at once; solve "
                "in one piece, or without grad_filter"
            )
        if any(tensor.requires_grad for tensor in extra0):
            raise ValueError(
                f"extra_solver_state must not require a gradient for method {self.method.name!r}, whose steps are "
                f"implicit; detach its tensors, use an explicit method, or solve in one piece"
            )
        return True


class _Solved(NamedTuple):
    """One piece of a solve.

    Attributes:
        outputs: the states asked for.
        x: the last one.
        past: what a solve that goes on needs.
        step_to_end: with a filter, see `filter_plan.step_to_end`.
        keeper: keeps the solve: see `autograd_function.stack`.
    """

    outputs: list[Tensor]
    x: Tensor
    past: Past
    step_to_end: float | None
    keeper: Keeper | None


class _Field:
    """f and K at the states of one solve.

    Args:
        sde, bm: see `MultistepSDESolver`.
        grid: the nodes.
        ts: for the dtype and the device of times.
        positions: of the states, see `Recurrence`.
        offset: the position of the first node.
        method: the method.
    """

    def __init__(
        self,
        sde: "BaseSDE",
        bm: "BaseBrownian",
        grid: Grid,
        ts: Tensor,
        positions: list[float],
        offset: int,
        method: MultistepMethod,
    ) -> None:
        times = grid.nodes.to(ts, copy=True)
        for node, direction in ((0, 1), (-1, -1)):
            if grid.jumps[node]:
                # f and g are seen from inside; no noise increment begins at the last node.
                time = times[node]
                times[node] = torch.nextafter(time, time + direction * (1 + time.abs()))
        self._times = times.unbind()
        self._positions = positions
        self._offset = offset
        numbers: list[float] = grid.nodes.tolist()

        @lru_cache(max(1, start_length(method)))
        def increment(n: int) -> Tensor:
            return savable(bm(numbers[n], numbers[n + 1]))

        self._increment: Callable[[int], Tensor] = increment
        self._sde: HostedSDE = unwrap_sde(sde, increment(0))
        # A single step of any method uses both of its slopes.
        self._copies = method.remembers_slopes or len(grid.nodes) == 2

    def time(self, state: int) -> Tensor:
        """What the SDE is given for the time of a state."""
        return self._times[self._node(state)]

    def drift_at(self, time: Tensor, x: Tensor) -> Tensor:
        """The drift at a time, as the SDE is given it."""
        return self._kept(self._sde.drift(time, x))

    def drift(self, state: int, x: Tensor) -> Tensor:
        """See `DriftAndNoise`."""
        return self.drift_at(self.time(state), x)

    def noise(self, state: int, x: Tensor) -> Tensor:
        """See `DriftAndNoise`."""
        return self._kept(self._sde.noise(self.time(state), x, self._increment(self._node(state))))

    def drift_and_noise(self, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `DriftAndNoise`."""
        slope, noise = self._sde.drift_and_noise(self.time(state), x, self._increment(self._node(state)))
        return self._kept(slope), self._kept(noise)

    def _kept(self, value: Tensor) -> Tensor:
        # The SDE may return the same memory again and again.
        return value.clone() if self._copies else value

    def _node(self, state: int) -> int:
        return int(self._positions[state]) - self._offset


def _neighbours(placement: Placement) -> tuple[int, ...]:
    node = placement.node
    return (node,) if placement.fraction is None else (node, node + 1)


def _output(placement: Placement, states: dict[int, Tensor]) -> Tensor:
    node, fraction, _ = placement
    return states[node] if fraction is None else linear_interpolation(fraction, states[node], states[node + 1])


def _behind(past: Past, steps: Tensor) -> Tensor:
    return torch.cat([past[0].to(steps).flip(0), steps]) if past else steps


def sde_solver_of(method: MultistepMethod) -> type[MultistepSDESolver]:
    """The solver class of a method."""
    summary = f"The method {method.name!r} as a solver of torchsde: see `MultistepSDESolver`."
    return type(method.name, (MultistepSDESolver,), {"method": method, "__doc__": summary, "__module__": __name__})
