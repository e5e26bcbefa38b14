"""`odeint` with torchdiffeq's keywords, `grad_filter` and `backward`."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torchdiffeq
from torch import Tensor

from torchdiffeq_lmm.autodiff.backward_modes import resolve_backward
from torchdiffeq_lmm.autodiff.checkpoints import Checkpoint
from torchdiffeq_lmm.autodiff.compilation import eager
from torchdiffeq_lmm.autodiff.compile_settings import Compile, resolve_compile
from torchdiffeq_lmm.autodiff.reversal import Reversible
from torchdiffeq_lmm.filters.grad_filter import CostateFilter, SmoothFilter, resolve_grad_filter
from torchdiffeq_lmm.forward.events import checked_event
from torchdiffeq_lmm.schemes.runge_kutta import TWO_STAGE_METHODS

from .registration import ODE_SOLVERS

SUBSTITUTES = {two_stage.substitutes: two_stage.name for two_stage in TWO_STAGE_METHODS}
"""torchdiffeq's methods that this package steps itself where their gradients are to be filtered."""

State = Tensor | tuple[Tensor, ...]
GradFilterLike = Literal["auto", "leapfrog", "smooth"] | CostateFilter | SmoothFilter | None
CompileLike = bool | Compile | None
BackwardLike = Literal["autograd", "reversible", "checkpoint"] | Reversible | Checkpoint


@overload
def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Tensor,
    t: Tensor,
    *,
    rtol: Any = ...,
    atol: Any = ...,
    method: str | None = ...,
    options: dict[str, Any] | None = ...,
    event_fn: None = ...,
    grad_filter: GradFilterLike = ...,
    backward: BackwardLike = ...,
    adjoint_params: Iterable[Tensor] | None = ...,
    compile: CompileLike = ...,
) -> Tensor: ...


@overload
def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = ...,
    atol: Any = ...,
    method: str | None = ...,
    options: dict[str, Any] | None = ...,
    event_fn: None = ...,
    grad_filter: GradFilterLike = ...,
    backward: BackwardLike = ...,
    adjoint_params: Iterable[Tensor] | None = ...,
    compile: CompileLike = ...,
) -> tuple[Tensor, ...]: ...


@overload
def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = ...,
    atol: Any = ...,
    method: str | None = ...,
    options: dict[str, Any] | None = ...,
    event_fn: Callable[[Tensor, Any], Tensor],
    grad_filter: GradFilterLike = ...,
    backward: BackwardLike = ...,
    adjoint_params: Iterable[Tensor] | None = ...,
    compile: CompileLike = ...,
) -> tuple[Tensor, State]: ...


# Traced by torch 2.5, a copied dict is without what has been added to it: here, and in torchdiffeq.
@eager
def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    grad_filter: GradFilterLike = None,
    backward: BackwardLike = "autograd",
    adjoint_params: Iterable[Tensor] | None = None,
    compile: CompileLike = None,  # noqa: A002
) -> State | tuple[Tensor, State]:
    """`torchdiffeq.odeint` with a gradient filter, and with a choice between memory and time.

    Args:
        func: ``func(t, y)`` returns dy/dt. Any callable; its parameters need not be listed.
        y0: the state at t[0], a tensor of any shape, floating or complex, or a tuple of such.
        t: the output times, of shape (n,), strictly increasing or decreasing; with `event_fn` two of them, of which the
            second only gives the direction.
        rtol, atol, method, options, event_fn: as in `torchdiffeq.odeint`. Of this package's methods implicit and
            adaptive ones use rtol and atol, and the search for an event uses atol; there they must be finite and
            not negative. An event_fn must not be 0 at t[0], as after an event that has just been: begin beside it.
        grad_filter: None for plain auto-differentiation; ``"auto"`` or a `CostateFilter`, with a method of this package
            or torchdiffeq's ``"midpoint"`` or ``"heun2"``, for gradients of time-varying parameters that converge to
            those of the flow; ``"leapfrog"`` or a `LeapfrogFilter`, with ``method="leapfrog"`` alone. Gradients with
            respect to y0 and t stay those of auto-differentiation. ``"smooth"`` or a `SmoothFilter`, with
            ``method="leapfrog"`` on equal steps, costs less and has none of the limits that follow: see there. Where
            all steps share their parameters no filter is needed, and the default weights would do harm: see
            `CostateFilter`. A UserWarning says where the rows of a `GridParameter` are not those of the steps.

            With the other filters, the arguments of func are cut off from what came before: func may use them only for
            what it returns. What it stores on the side for the loss, a running cost say, would lose its gradient with
            respect to earlier steps; make it part of the state. Of `y0` or `t` captured from outside it makes
            parameters. `callback_step` and `event_fn` are given states without a graph. Hooks on tensors inside func
            run two or three times in the backward pass, for the states, the costate and the parameters; those of leaf
            parameters once, for the whole gradient. A backward pass with ``create_graph=True`` or
            ``is_grads_batched=True`` raises a RuntimeError. All this holds for implicit methods without a filter, too.
        backward: how the backward pass finds the evaluations of func again, with a method of this package and any
            `grad_filter`. ``"autograd"``: they are kept, with their graphs, as auto-differentiation does.
            ``"checkpoint"`` or a `Checkpoint`: a few states are kept, by default √N, and the steps between them are run
            again. ``"reversible"`` or a `Reversible`, for leapfrog: the solution is run backwards, and memory does not
            grow with the number of steps. Both give the gradient that ``"autograd"`` gives, up to rounding; they ask
            for what a filter asks for, and that func is the same when it is evaluated again: what it and
            `adjoint_params` depend on must not change before the backward pass, and buffers that it updates are
            updated twice.
        adjoint_params: with the latter four, the tensors, leaves or not, that get a gradient besides `y0` and `t`, as
            in `torchdiffeq.odeint_adjoint`; others get none. By default the parameters of func, which must be an
            nn.Module then, and which must not depend on others.
        compile: True or a `Compile`, with an explicit method of this package and fixed steps: the solve runs in blocks
            of steps, each compiled by Inductor with its adjoint, many times as fast where func is small. The values are
            the same, to rounding, filtered or not. The first solve takes seconds; later ones of the same func, method,
            dtype and shapes, whatever the steps, the times and the values, take what was compiled. The state at the
            beginning of every block is kept and the others are made again, as by ``backward="checkpoint"``. All tensors
            that func depends on get their gradients; `adjoint_params` may name some of them instead. func must be
            traceable by `torch.compile` without a break, draw no random numbers and change no buffers: otherwise an
            error says so, before the first step. Events, `jump_t`, other backward modes, callbacks, autocast around the
            solve, second derivatives and transforms of torch.func are refused. With an implicit method, "bdf" among
            them, the steps are made one by one and have all their options; the iterates of Newton's method for the
            equations of all samples are compiled. That is for samples of at most 8 entries, in float32 or float64, that
            func treats independently; the values are the same to the tolerance of the equations.

    Returns:
        As `torchdiffeq.odeint`: the states at `t`, of shape (n, *y0.shape), or a tuple of such; with `event_fn` the
        time of the event and the states at t[0] and then.

    Raises:
        ValueError: `grad_filter` or `backward` is unknown, is for another method, or is given here and in `options`;
            or `adjoint_params` is not given where it is needed, given where it is not, or was made in inference mode.
        TypeError: `grad_filter` is neither None, a name nor a filter; or `backward` neither a name nor a way.
        RuntimeError: func or the solve cannot be compiled; the equation of an implicit step was not solved; func draws
            random numbers, and `backward` is "reversible"; or, in the backward pass, func is not what it was, or the
            drift is too large.
        Others where `torchdiffeq.odeint` raises them; and, for a method of this package, TypeErrors and ValueErrors
        that name a wrong option, a wrong grid, or what func returned, before the first step.

    Source: Xu, Chen, Li, Wright, *Correcting auto-differentiation in neural-ODE training* (arXiv 2306.02192), for
    leapfrog, midpoint and heun2 on equal steps.
    """
    options = dict(options or {})
    if grad_filter is not None and options.get("grad_filter") is not None:
        raise ValueError(
            f"grad_filter is given twice, as {grad_filter!r} and in options as {options['grad_filter']!r}; give it once"
        )
    chosen = options.pop("grad_filter", None) if grad_filter is None else grad_filter
    if chosen is not None:
        name = method or "dopri5"
        resolve_grad_filter(chosen, name)
        if name not in SUBSTITUTES and name not in ODE_SOLVERS:
            raise ValueError(
                f"grad_filter {chosen!r} is for the methods of torchdiffeq_lmm and for {' and '.join(SUBSTITUTES)}, "
                f"got method {name!r}"
            )
        options["grad_filter"] = chosen
        method = SUBSTITUTES.get(name, name)
    for option, value in (
        ("backward", backward if backward != "autograd" else None),
        ("adjoint_params", adjoint_params),
        ("compile", compile if compile is not False else None),
    ):
        if value is None:
            continue
        if options.get(option) is not None:
            raise ValueError(f"{option} is given twice, here and in options as {options[option]!r}; give it once")
        name = method or "dopri5"
        if method not in ODE_SOLVERS:
            resolve_backward(backward)
            resolve_compile(compile)
            raise ValueError(f"{option} is for the methods of torchdiffeq_lmm, got method {name!r}")
        options[option] = value
    return torchdiffeq.odeint(  # type: ignore[no-any-return]
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options or None,
        event_fn=None if event_fn is None else checked_event(event_fn),
    )
