"""What all solvers of torchdiffeq in this package have in common: func, its implicit equations, and its gradients."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.backward_modes import resolve_backward
from torchdiffeq_lmm.autodiff.compile_settings import Compile
from torchdiffeq_lmm.autodiff.compiled_newton import CompiledNewton
from torchdiffeq_lmm.autodiff.piece import PieceSolver
from torchdiffeq_lmm.filters.grad_filter import CostateFilter, resolve_grad_filter
from torchdiffeq_lmm.forward.autograd_state import savable
from torchdiffeq_lmm.forward.implicit import ImplicitSolver, OnFailure, check_on_failure
from torchdiffeq_lmm.forward.jumps import Jumps, jumps_of
from torchdiffeq_lmm.forward.known_jacobian import known_jacobian
from torchdiffeq_lmm.forward.newton_options import Newton, check_newton
from torchdiffeq_lmm.forward.quadrature import QuadratureSolver
from torchdiffeq_lmm.forward.samples import BatchDims, Systems, samples_of, warn_of_failures
from torchdiffeq_lmm.forward.tolerances import resolve_tolerance
from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.schemes.methods import Method

from .adjoint_params import resolve_adjoint_params
from .compile_checks import check_compile, check_compiled_newton, check_compiled_solve
from .sharding_checks import refuse_sharded
from .torchdiffeq_host import unwrap


class ImplicitOptions(NamedTuple):
    """How implicit equations are solved: see `MultistepSolver`."""

    batch_dims: BatchDims
    on_failure: OnFailure
    newton: Newton
    jac_sparsity: Any
    jac: Callable[[Tensor, Any], Any] | None
    preconditioner: Callable[[Tensor, Any, float], Any] | None


class GradientOptions(NamedTuple):
    """How gradients are found: see `MultistepSolver`."""

    grad_filter: object
    backward: object
    adjoint_params: Iterable[Tensor] | None


class DifferentiableSolver:
    """A solver that torchdiffeq makes for every call of `odeint`; see `MultistepSolver` and `AdaptiveSolver`.

    Args:
        func: torchdiffeq's wrapper of the user's function.
        y0: the initial state.
        tolerances: rtol and atol.
        perturb: torchdiffeq's option.
        jump_t: times at which func jumps.
        equations: how implicit equations are solved.
        gradients: how gradients are found.

    Attributes:
        chooses_steps: whether steps follow the error, and so the tolerances.

    Raises:
        TypeError, ValueError: an option is not as it must be; or func has parts that are sharded by themselves.
    """

    method: ClassVar[Method]
    order: ClassVar[int]
    chooses_steps: ClassVar[bool] = False

    def __init__(
        self,
        func: Callable[..., Any],
        y0: Tensor,
        tolerances: tuple[Any, Any],
        perturb: bool,
        jump_t: Any,
        equations: ImplicitOptions,
        gradients: GradientOptions,
    ) -> None:
        if not (y0.is_floating_point() or y0.is_complex()):
            raise TypeError(f"y0 must be a floating or complex tensor, got dtype {y0.dtype}; use y0.float()")
        self.rtol, self.atol = tolerances
        if self.method.is_implicit or self.chooses_steps:
            self.atol, self.rtol = (
                resolve_tolerance(name, given, y0) for name, given in (("atol", self.atol), ("rtol", self.rtol))
            )
        grad_filter, backward, adjoint_params = gradients
        self.grad_filter = resolve_grad_filter(grad_filter, self.method.name)
        self.func = func
        self.y0 = savable(y0)
        hosted = unwrap(func)
        self.backward = resolve_backward(backward)
        self.backward.check(self.method, backward)
        for option, value, plain in (("grad_filter", grad_filter, None), ("backward", backward, "autograd")):
            if value != plain and hosted.in_adjoint:
                raise ValueError(
                    f"{option} must be {plain!r} in odeint_adjoint, got {value!r}: its gradient comes from a solve of "
                    f"its own, which no {option} reaches. Use odeint"
                )
        refuse_sharded(hosted.call, self._unsharded_reasons())
        check_on_failure(equations.on_failure)
        check_newton(equations.newton)
        self._equations = equations
        self._hosted = hosted
        self._reverse = hosted.reversed
        self._vector_field = VectorField(hosted, y0, perturb, copies=self.method.remembers_slopes)
        known = (equations.jac_sparsity, equations.jac, equations.preconditioner)
        self._known = known_jacobian(*known, self.method, self._vector_field, y0, equations.batch_dims)
        self._samples = samples_of(
            self._vector_field.shapes_of_part, equations.batch_dims if self._known is None else 0
        )
        self._parameters = resolve_adjoint_params(hosted.call, adjoint_params, self.backward)
        self._jumps = self._times_of(jump_t, "jump_t")
        self._compiled_equations: Compile | None = None

    def _compile_equations(self, settings: Compile) -> None:
        """Solve the equations of implicit steps by a compiled function, if that can be."""
        check_compile(self._hosted)
        check_compiled_newton(self.y0, self._samples, self._equations.newton, self._known)
        self._compiled_equations = settings

    def _unsharded_reasons(self) -> list[str]:
        """Why no part of func may be sharded: see `refuse_sharded`."""
        reasons = []
        if self.chooses_steps or self.method.is_implicit:
            reasons.append(f"with method {self.method.name!r}, which evaluates func as often as values ask for")
        if isinstance(self.grad_filter, CostateFilter):
            reasons.append("where grad_filter is given, which needs several passes of autograd")
        if self.backward.evaluates_again:
            reasons.append("where func is evaluated again for the backward pass, as backward says")
        return reasons

    def _times_of(self, given: Any, argument: str) -> Jumps | None:
        """Times that the user gives as an option, in the solver's time."""
        hosted = self._hosted
        # torchdiffeq negates tensors alone.
        is_tensor = isinstance(given, Tensor)
        negate = hosted.options_reversed if is_tensor else hosted.reversed != hosted.options_reversed
        return jumps_of(given, is_negated=hosted.reversed and is_tensor, negate=negate, argument=argument)

    def _pieces(
        self,
        max_steps: int,
        callback_step: Callable[[Tensor, Tensor, Tensor], object] | None,
        tolerance: Callable[[Tensor], Tensor] | None = None,
    ) -> PieceSolver:
        """What solves the pieces of one solve; it does not hold the solver, for the backward pass may hold it.

        Args:
            max_steps, callback_step, tolerance: see `PieceSolver`.
        """
        field, options, settings = self._vector_field, self._equations, self._compiled_equations
        full: CompiledNewton | None = None
        if settings is not None:
            check_compiled_solve(self._hosted, self.y0)
            full = CompiledNewton(settings, self._hosted, field)
        # Once more, for the backward pass, steps are made without a graph, but by the same iterations.
        differentiable = torch.is_grad_enabled()
        part = field.part
        rtol, atol = (_of_part(tolerance, part) for tolerance in (self.rtol, self.atol))
        first = 0 if part is None else part.start
        solver = partial(
            ImplicitSolver,
            rtol,
            atol,
            field.precision,
            lambda entry: field.entry(first + entry),
            differentiable,
            self._samples,
            options.newton,
            options.on_failure,
            self._known,
            self.chooses_steps,
            field.count_jacobian,
            full,
        )
        return PieceSolver(
            vector_field=field,
            method=self.method,
            mode=self.backward,
            parameters=self._parameters,
            costate_filter=self.grad_filter if isinstance(self.grad_filter, CostateFilter) else None,
            implicit=solver if part is None else lambda: QuadratureSolver(solver(), part),
            systems=Systems(self._samples, options.newton, self._known),
            callback_step=callback_step,
            max_steps=max_steps,
            tolerance=tolerance,
        )

    def _warn_of_failures(self, x: Tensor) -> None:
        """Warn of samples that were lost, where they were to become NaN."""
        if self._equations.on_failure == "nan":
            name = repr(self.method.name)
            reason = (
                f"no step of method {name} was short enough"
                if self.chooses_steps
                else f"the implicit equations of method {name} were not solved"
            )
            warn_of_failures(self._samples, x, reason)


def _of_part(tolerance: float | Tensor, part: slice | None) -> float | Tensor:
    is_of_entries = isinstance(tolerance, Tensor) and tolerance.ndim == 1 and len(tolerance) > 1
    return tolerance[part] if part is not None and is_of_entries else tolerance  # type: ignore[index]
