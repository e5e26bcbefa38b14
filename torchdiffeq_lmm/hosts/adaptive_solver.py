"""A family of multistep methods as an adaptive solver of torchdiffeq: from options and times to states."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.autograd_function import stack
from torchdiffeq_lmm.autodiff.compilation import eager
from torchdiffeq_lmm.autodiff.compile_settings import resolve_compile
from torchdiffeq_lmm.autodiff.dense_goals import DenseOutputs, DenseUntilEvent, state_at
from torchdiffeq_lmm.autodiff.piece import PieceSolver
from torchdiffeq_lmm.filters.grad_filter import SmoothFilter
from torchdiffeq_lmm.forward.adaptive_steps import AdaptiveSteps, Callbacks
from torchdiffeq_lmm.forward.autograd_state import refuse_tangents, savable
from torchdiffeq_lmm.forward.dense_output import Span
from torchdiffeq_lmm.forward.error_norm import ErrorNorm, Norm
from torchdiffeq_lmm.forward.events import EventSign
from torchdiffeq_lmm.forward.grid import check_times, jump_rounding, jumps_inside
from torchdiffeq_lmm.forward.implicit import OnFailure
from torchdiffeq_lmm.forward.lost_samples import LostSamples
from torchdiffeq_lmm.forward.newton_options import Newton
from torchdiffeq_lmm.forward.outputs import Trajectory
from torchdiffeq_lmm.forward.samples import BatchDims
from torchdiffeq_lmm.forward.solve_report import SolveReport
from torchdiffeq_lmm.forward.step_controller import StepControl
from torchdiffeq_lmm.forward.tolerances import check_max_num_steps, event_tolerance
from torchdiffeq_lmm.schemes.variable_order import VariableOrderFamily

from .compile_checks import refuse_compile
from .grid_checks import Nodes, asks_for_nodes, checked_rows
from .solver_base import DifferentiableSolver, GradientOptions, ImplicitOptions
from .torchdiffeq_host import find_event, warn_of_unused_options

ADAPTIVE_NEWTON = Newton(tolerance=0.03, max_iterations=8)
"""Equations are solved a little more exactly than the step is accurate; where they are hard, a shorter one helps."""

_MOST_STEPS = 2**31 - 1
"""torchdiffeq's default of max_num_steps."""

_SEGMENT = 1024
"""Checkpoints are as far apart as in a solve of so many steps, whose number is not known beforehand."""


def _root_mean_square(y: Tensor) -> Tensor:
    return y.abs().square().mean().sqrt()


class AdaptiveSolver(DifferentiableSolver):
    """Multistep methods of variable step and order as an adaptive solver of torchdiffeq.

    torchdiffeq makes one for every call of `odeint`, with the function, the state (flattened, where it is a tuple) and
    the time (increasing) as its wrappers present them.

    Every step is attempted with an order and a length, and kept where its local error, in torchdiffeq's norm, is no
    more than atol + rtol |y|: see `schemes.variable_order` for the formulas and errors, `forward.step_controller` for
    the choice of orders and lengths. Tolerances below 16 units in the last place of y count as so much. Outputs between
    nodes are made by the polynomial through the latest states, as many as the order asks for; the last step ends at
    t[-1]. Gradients are those of the steps that were kept, with lengths and orders held fixed.

    Args:
        func: torchdiffeq's wrapper of the user's function.
        y0: the initial state, floating or complex, of any shape.
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        norm: a function from the state to the size of an error that is given in terms of the tolerance, as
            torchdiffeq's option. By default the root mean square; of a tuple state the largest of its components.
        first_step: the length of the first step. By default chosen by the sizes of y0, func and its change.
        min_step: steps as short as this are kept whatever their error.
        max_step: the longest step.
        safety: steps are shorter by this factor than errors would just allow.
        ifactor, dfactor: the largest and smallest factor from one step to the next.
        max_num_steps: the most attempts from one output to the next.
        max_order: the highest order that is used.
        step_t: times that are to be nodes, as `jump_t`.
        jump_t: times at which func jumps, where steps and order begin anew: see `MultistepSolver`.
        dtype: of times, a real floating dtype, at least that of the state.
        report: a `SolveReport`, which is told what happened.
        batch_dims, on_failure, newton, jac_sparsity, jac, preconditioner, grad_filter, backward, adjoint_params: see
            `MultistepSolver`; the first six are for ``"bdf"``. Samples share their steps.
        unused: what is not known is warned of.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option has a wrong value, or is one for fixed steps.
    """

    method: ClassVar[VariableOrderFamily]
    chooses_steps = True

    def __init__(
        self,
        func: Callable[..., Any],
        y0: Tensor,
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
        norm: Norm = _root_mean_square,
        first_step: Any = None,
        min_step: Any = 0.0,
        max_step: Any = math.inf,
        safety: Any = 0.75,
        ifactor: Any = 10.0,
        dfactor: Any = 0.2,
        max_num_steps: int | None = None,
        max_order: int | None = None,
        step_t: Any = None,
        jump_t: Any = None,
        dtype: torch.dtype = torch.float64,
        report: SolveReport | None = None,
        batch_dims: BatchDims = "auto",
        on_failure: OnFailure = "raise",
        newton: Newton = ADAPTIVE_NEWTON,
        jac_sparsity: Any = None,
        jac: Callable[[Tensor, Any], Any] | None = None,
        preconditioner: Callable[[Tensor, Any, float], Any] | None = None,
        grad_filter: object = None,
        backward: object = "autograd",
        adjoint_params: Iterable[Tensor] | None = None,
        compile: object = None,  # noqa: A002
        **unused: Any,
    ) -> None:
        self._refuse_fixed(unused)
        if not self.method.is_implicit:
            refuse_compile(compile, f"method {self.method.name!r}, whose steps depend on values")
        warn_of_unused_options(self, unused)
        if not callable(norm):
            raise TypeError(f"norm must be a callable that takes a state, got {norm!r}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating dtype, got {dtype!r}")
        if report is not None and not isinstance(report, SolveReport):
            raise TypeError(f"report must be a SolveReport or None, got {report!r}")
        if on_failure == "nan" and not (self.method.is_implicit and backward == "autograd"):
            raise ValueError(
                f"on_failure must be 'raise' for method {self.method.name!r} with backward {backward!r}, got 'nan', "
                f"which is for 'bdf' and 'autograd'"
            )
        check_max_num_steps(max_num_steps)
        equations = ImplicitOptions(batch_dims, on_failure, newton, jac_sparsity, jac, preconditioner)
        gradients = GradientOptions(grad_filter, backward, adjoint_params)
        super().__init__(func, y0, (rtol, atol), False, jump_t, equations, gradients)
        settings = resolve_compile(compile)
        if settings is not None:
            self._compile_equations(settings)
        if isinstance(self.grad_filter, SmoothFilter):
            raise ValueError("grad_filter 'smooth' is for leapfrog")
        self._control = StepControl(
            first_step=None if first_step is None else _number("first_step", first_step, positive=True),
            min_step=_number("min_step", min_step),
            max_step=_number("max_step", max_step, positive=True, finite=False),
            safety=_number("safety", safety, positive=True),
            ifactor=_number("ifactor", ifactor, least=1.0),
            dfactor=_number("dfactor", dfactor, positive=True, most=1.0),
            max_num_steps=_MOST_STEPS if max_num_steps is None else max_num_steps,
            max_order=self._order(max_order),
        )
        if self._control.min_step > self._control.max_step:
            raise ValueError(
                f"min_step must be at most max_step, got {self._control.min_step} and {self._control.max_step}"
            )
        self._lost = LostSamples(self._samples) if on_failure == "nan" else None
        if self._lost is not None and self._vector_field.part is not None:
            raise ValueError("on_failure must be 'raise' in odeint_adjoint, got 'nan'; use odeint")
        self._errors = ErrorNorm(self.rtol, self.atol, norm, self._lost)
        self._stops = self._times_of(step_t, "step_t")
        self._check_apart()
        self._time_dtype = torch.promote_types(dtype, y0.dtype.to_real())
        self._report = SolveReport() if report is None else report

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called, for torchdiffeq's warning of others."""
        return {"callback_step", "callback_accept_step", "callback_reject_step"}

    @eager
    def integrate(self, t: Tensor) -> Tensor:
        """Solve from t[0] to t[-1].

        Args:
            t: the output times, of shape (n,), strictly increasing.

        Returns:
            The states at `t`, of shape (n, *y0.shape).

        Raises:
            TypeError, ValueError: t, or what func returns, is not as it must be.
            RuntimeError: no step is accurate enough, or there are too many.
        """
        t = savable(t)
        check_times(t)
        if len(t) == 1:
            return torch.stack([self.y0])
        self._refuse_tangents(t)
        times, each = t.double().tolist(), t.to(self.y0.device, self._time_dtype).unbind()
        ends, at_ends, rounding = [], (False, False), 0.0
        if self._jumps is not None:
            inside, at_ends = jumps_inside(self._jumps, t)
            ends, rounding = list(inside.to(each[0]).unbind()), jump_rounding(self._jumps, t)
        bounds = [each[0], *ends, each[-1]]
        outputs: list[Tensor] = []
        x, keepers, nodes = self.y0, [], list[Nodes]()
        checked = checked_rows(self.grad_filter, self.method.name, self._vector_field.direction, nodes)
        with self._reported() as solver, checked:
            for piece, (begin, end) in enumerate(pairwise(bounds)):
                is_last = piece == len(ends)
                jumps = (at_ends[0] if piece == 0 else True, at_ends[1] if is_last else True)
                source = self._steps(begin, times[-1] if is_last else float(end.detach()), jumps)
                first = len(outputs) + 1
                last = len(times) if is_last else sum(time <= source.end + rounding for time in times)
                goal = DenseOutputs(source, [min(time, source.end) for time in times[first:last]])
                found, _, keeper = solver.solve(source, x, goal, None, None)
                outputs += [goal.output(i, each[first + i], found) for i in range(last - first)]
                x = self._end_of(source, goal.span, end, found)
                keepers.append(keeper)
                if asks_for_nodes(self.grad_filter):
                    nodes.append((torch.tensor(source.times, dtype=torch.float64, device="cpu"), True))
        self._warn_of_failures(x)
        return stack([self.y0, *outputs], keepers)

    @eager
    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Solve from t0 until `event_fn` changes its sign.

        Args:
            t0: the initial time, 0-d.
            event_fn: ``event_fn(t, y)``, a 0-d tensor, in the solver's time and state.

        Returns:
            The time of the event, 0-d and without a graph, and the states at t0 and then, of shape (2, *y0.shape).

        Raises:
            TypeError, ValueError: what func returns is not as it must be; event_fn is 0 at t0, or NaN anywhere.
            RuntimeError: no step is accurate enough, or there are too many.
        """
        tolerance = event_tolerance(self.atol, self.y0)
        sign = EventSign(event_fn, self._reverse)
        check_times(t0.reshape(1))
        self._refuse_tangents(t0)
        begin = t0.to(self.y0.device, self._time_dtype, copy=True)
        before = sign.at_beginning(begin, self.y0)
        x, keepers = self.y0, []
        with self._reported() as solver:
            for source, end in self._steps_until_event(begin):
                goal = DenseUntilEvent(source, sign, before)
                found, _, keeper = solver.solve(source, x, goal, None, None)
                keepers.append(keeper)
                if goal.is_event:
                    break
                x = self._end_of(source, goal.span, end, found)
        node = goal.span.node
        with torch.no_grad():
            event_time, _ = find_event(
                lambda time: state_at(source, goal.span, time, found),
                before,
                source.time_of(node - 1),
                source.time_of(node),
                sign.as_tensor,
                tolerance,
            )
        return event_time, stack([self.y0, state_at(source, goal.span, event_time, found)], keepers)

    @staticmethod
    def _end_of(source: AdaptiveSteps, span: Span, end: Tensor, found: Trajectory) -> Tensor:
        """The state at the end of a piece; it moves with its time, where that has a graph."""
        return state_at(source, span, end, found) if end.requires_grad else found.states[span.node]

    @contextmanager
    def _reported(self) -> Iterator[PieceSolver]:
        """What solves the pieces of one solve, of which the report is told, also where it raises an error."""
        self._report.begin()
        field = self._vector_field
        field.evaluations = field.jacobians = 0
        try:
            yield self._pieces(_SEGMENT, None, self._errors.scale)
        finally:
            self._report.evaluations, self._report.jacobians = field.evaluations, field.jacobians

    def _steps_until_event(self, begin: Tensor) -> Iterator[tuple[AdaptiveSteps, Tensor]]:
        """Steps from one jump to the next, the last of them without an end."""
        start, is_jump = float(begin.detach()), False
        for end in self._jumps.times.to(begin).unbind() if self._jumps is not None else ():
            if float(end) > start:
                yield self._steps(begin, float(end.detach()), (is_jump, True)), end
                begin, is_jump = end, True
            elif float(end) == start:
                is_jump = True
        yield self._steps(begin, math.inf, (is_jump, False)), begin

    def _steps(self, begin: Tensor, end: float, jumps: tuple[bool, bool]) -> AdaptiveSteps:
        hosted = self._hosted
        return AdaptiveSteps(
            self.method,
            self._control,
            self._errors,
            begin,
            end,
            [] if self._stops is None else self._stops.times.tolist(),
            jumps,
            self._vector_field,
            Callbacks(hosted.callback_step, hosted.callback_accept_step, hosted.callback_reject_step),
            self._report,
            self._lost,
        )

    def _refuse_tangents(self, times: Tensor) -> None:
        """Of times there are none in forward mode: the steps are made of numbers."""
        refuse_tangents(times, *(given.times for given in (self._jumps, self._stops) if given is not None))

    def _refuse_fixed(self, options: dict[str, Any]) -> None:
        for name in ("step_size", "grid_constructor"):
            if options.get(name) is not None:
                fixed = "'bdf1' to 'bdf6'" if self.method.is_implicit else "'abm2' to 'abm5'"
                raise ValueError(
                    f"{name} is for fixed steps, and method {self.method.name!r} chooses its steps; use one of "
                    f"{fixed}, or first_step, max_step, rtol and atol"
                )

    def _order(self, max_order: Any) -> int:
        highest = self.method.max_order
        if max_order is None:
            return highest
        if not isinstance(max_order, int) or isinstance(max_order, bool):
            raise TypeError(f"max_order must be an int or None, got {max_order!r}")
        if not 1 <= max_order <= highest:
            raise ValueError(f"max_order must be from 1 to {highest} for method {self.method.name!r}, got {max_order}")
        return max_order

    def _check_apart(self) -> None:
        if self._stops is None or self._jumps is None:
            return
        both = set(self._stops.times.tolist()) & set(self._jumps.times.tolist())
        if both:
            raise ValueError(
                f"step_t and jump_t must not have any repeated elements between them, got "
                f"{self._vector_field.direction * min(both)} in both; a jump is a node anyway"
            )


def adaptive_solver_of(family: VariableOrderFamily) -> type[AdaptiveSolver]:
    """The solver class of a family."""
    summary = f"The method {family.name!r} as a solver of torchdiffeq: see `AdaptiveSolver`."
    members = {"method": family, "order": family.order, "__doc__": summary, "__module__": __name__}
    return type(family.name, (AdaptiveSolver,), members)


def _number(
    argument: str,
    given: Any,
    least: float = 0.0,
    most: float = math.inf,
    positive: bool = False,
    finite: bool = True,
) -> float:
    """An option as a number; a tensor with one entry counts as such.

    Raises:
        TypeError: it is none.
        ValueError: it is not in its range.
    """
    is_scalar = isinstance(given, Tensor) and given.numel() == 1 and given.is_floating_point()
    if not is_scalar and (not isinstance(given, Real) or isinstance(given, bool)):
        raise TypeError(f"{argument} must be a real number, got {given!r}")
    value = float(given)
    if not least <= value <= most or (positive and value == 0) or (finite and math.isinf(value)):
        kind = "positive" if positive else f"at least {least:g}"
        limit = f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{argument} must be {kind}{limit}{' and finite' if finite else ''}, got {value}")
    return value
