"""A solve of a stochastic differential equation as one node of autograd: the adjoint with kicks, filtered or not.

A kick K_n = g(t_n, x_n) ΔW_n that leads to a state receives the cotangent of that state with the past held fixed,

    κ_n = ∂E/∂K_n = P_{n+1},      P_n = P_{n+1} + g_n + J_nᵀ μ_n + (∂K_n/∂x)ᵀ κ_n;

all else is as in schemes/discrete_adjoint.py, and g_n with an index is what E sees of node n.

**The costate of a path.** On a given Brownian path a shift of X(t) goes on as dδ = J δ dt + (∂g/∂x δ) dW, and
p(t) = dE/dX(t) is its adjoint: a random function, known when the path is. A change of the drift during dt changes E by
pᵀ (∂f/∂θ) δθ dt, as for an ODE, and one of the diffusion by pᵀ (∂g/∂θ) δθ dW.

**The parameters of the drift.** Shift the discrete past at node m along that flow: x_m by δ, a slope f_l before by
J_l δ_l, an increment by the drift D_l (which has no kick in it) by h J_l δ_l. It is the past of a shifted solution, so
E responds by pᵀ δ up to the error of the method on the equation and its linearisation. As δ_l - δ and J_l - J_m are
O(√h), being changes over the few steps that a method reaches back, and H_m is O(h),

    p_m = P_m + J_mᵀ H_m + O(h^{3/2}) + the error of the solve,

the identity of filters/costate.py, term by term. The error of the solve leads: its order is 1 for additive noise,
1/2 else, and for noise of size ε the error is O(h² + ε h + ε² √h). Kicks give P a jump of their own at every node, like
observations, so that nowhere is μ_m / h the costate beyond a layer; the identity is used at all nodes.

**The parameters of the diffusion.** κ_n = P_{n+1} is p_{n+1} but for Jᵀ H = O(h): what oscillates in it is no larger
than the error of the solve. They need no filter, and keep the exact gradient of the discrete loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.costate import filtered_cotangents
from torchdiffeq_lmm.filters.filter_plan import FilterPlan, plan_filter
from torchdiffeq_lmm.filters.grad_filter import CostateFilter
from torchdiffeq_lmm.forward.autograd_state import refuse_tangents
from torchdiffeq_lmm.forward.sde_stepping import Kicked
from torchdiffeq_lmm.forward.vector_field import precision_of
from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, combine, discrete_adjoint
from torchdiffeq_lmm.schemes.methods import MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Recurrence

from .autograd_function import Keeper, attach
from .evaluation import Evaluation, Recorder
from .stored_evaluations import Kept
from .vjp import Linearisation, ParameterGradients


class Timed(Kicked, Protocol):
    """f and K at the states of one solve, which have times."""

    def time(self, state: int) -> Tensor:
        """The time of a state."""

    def drift_at(self, time: Tensor, x: Tensor) -> Tensor:
        """Return f."""


class KickTape:
    """Records f and the kicks of one solve.

    Args:
        y0: the initial state.
    """

    def __init__(self, y0: Tensor) -> None:
        refuse_tangents(y0)
        self._y0 = y0
        self._precision = precision_of(y0.dtype, y0.device)
        self._slopes: dict[int, Evaluation | None] = {}
        self._kicks: dict[int, Evaluation | None] = {}

    def recording(self, field: Timed) -> Kicked:
        """The same f and K, recorded, with values that have no graph."""
        return _Recording(field, Recorder(field.drift_at, self._y0, False), self._slopes, self._kicks)

    def attach(
        self,
        states: dict[int, Tensor],
        recurrence: Recurrence,
        offset: int,
        kicks: Sequence[tuple[int, ...]],
        grad_filter: CostateFilter | None,
        steps: list[float],
        method: MultistepMethod,
        before: float | None = None,
        after: float | None = None,
    ) -> tuple[dict[int, Tensor], Keeper | None]:
        """Attach the recorded states to autograd.

        Args:
            states: by node; x_0 with the graph of y0.
            recurrence: the rows.
            offset: the node of the recurrence at which the solve begins.
            kicks: the states whose kicks each row uses.
            grad_filter: None for the gradient of auto-differentiation.
            steps: h, of the solve.
            method: the method.
            before, after: see `plan_filter`.

        Returns:
            The states, with the graph that plain stepping would have given them but for the filter, and what keeps
            the solve: see `attachment.stack`; None where there is no graph.
        """
        evaluations = [e for e in (*self._slopes.values(), *self._kicks.values()) if e is not None]
        sources = tuple({id(s): s for e in evaluations if e.handle is None for s in e.sources}.values())
        handles = tuple(e.handle for e in evaluations if e.handle is not None)
        if not (self._y0.requires_grad or sources or handles):
            return states, None
        plan = None
        if grad_filter is not None:
            plan = plan_filter(grad_filter.weights, recurrence, steps, method, before, after)
            # Kicks are like observations at every node, in whose layers μ_m / h is not the costate.
            plan = replace(plan, raw=[False] * len(plan.raw))
        outputs = [node for node in states if node > 0]
        solve = _KickedSolve(
            recurrence,
            offset,
            kicks,
            plan,
            self._slopes,
            self._kicks,
            outputs,
            sources,
            handles,
            self._precision,
        )
        attached = attach(solve, [states[node] for node in outputs], self._y0, None, *sources, *handles)
        return {0: states[0], **dict(zip(outputs, attached.values, strict=True))}, attached.keeper


class _Recording:
    """See `KickTape.recording`."""

    def __init__(
        self,
        field: Timed,
        recorder: Recorder,
        slopes: dict[int, Evaluation | None],
        kicks: dict[int, Evaluation | None],
    ) -> None:
        self._field = field
        self._recorder = recorder
        self._slopes = slopes
        self._kicks = kicks

    def drift(self, state: int, x: Tensor) -> Tensor:
        slope, self._slopes[state] = self._recorder.record(self._field.time(state), x)
        return slope.detach()

    def kick(self, state: int, x: Tensor) -> Tensor:
        ((kick, self._kicks[state]),) = self._recorder.record_parts(lambda x: (self._field.kick(state, x),), x)
        return kick.detach()

    def drift_and_kick(self, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
        (slope, self._slopes[state]), (kick, self._kicks[state]) = self._recorder.record_parts(
            lambda x: self._field.drift_and_kick(state, x), x
        )
        return slope.detach(), kick.detach()


@dataclass(frozen=True)
class _KickedSolve:
    """What the node knows of its solve beside its inputs and outputs: see `KickTape.attach`."""

    recurrence: Recurrence
    offset: int
    kicks: Sequence[tuple[int, ...]]
    plan: FilterPlan | None
    slope_evaluations: dict[int, Evaluation | None]
    kick_evaluations: dict[int, Evaluation | None]
    outputs: list[int]
    sources: tuple[Tensor, ...]
    handles: tuple[Tensor, ...]
    precision: float

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        times_need_grad: bool,  # noqa: ARG002
    ) -> tuple[Tensor | None, ...]:
        """The gradients with respect to y0, the times (none), the sources and the handles."""
        zero = torch.zeros_like(next(cotangent for cotangent in cotangents if cotangent is not None))
        parameters = ParameterGradients()
        recollection = Kept(self.slope_evaluations, {}, {}, self.recurrence.nodes)
        linearisation = Linearisation(recollection, parameters, self.plan is None, None, self.precision)
        kicks = _KickCotangents(self.kicks, self.kick_evaluations, parameters, self.precision)
        seen: list[Tensor | None] = [None] * len(self.recurrence.nodes)
        for node, cotangent in zip(self.outputs, cotangents, strict=True):
            seen[self.offset + node] = cotangent
        window = zero

        def followed() -> Iterator[AdjointState]:
            nonlocal window
            for point in discrete_adjoint(self.recurrence.rows, seen, linearisation, zero, kicks.pull_back):
                window = point.window
                kicks.pass_by(point)
                yield point

        if self.plan is None:
            for _ in followed():
                pass
        else:
            for state, width, costate in filtered_cotangents(
                self.plan, followed(), seen, seen, linearisation.expand, zero
            ):
                evaluation = recollection.evaluation(state)
                if evaluation is not None:
                    parameters.give(evaluation, costate, width)
        parameters.settle()
        return (window, None, *map(parameters.of, self.sources), *map(parameters.of_handle, self.handles))


class _KickCotangents:
    """The cotangents κ of the kicks."""

    def __init__(
        self,
        kicks: Sequence[tuple[int, ...]],
        evaluations: dict[int, Evaluation | None],
        parameters: ParameterGradients,
        precision: float,
    ) -> None:
        self._kicks = kicks
        self._cotangents: dict[int, Contributions] = {}
        self._linearisation = Linearisation(Kept(evaluations, {}, {}, ()), parameters, True, None, precision)

    def pass_by(self, point: AdjointState) -> None:
        """Give a state's cotangent to the kicks that lead to it."""
        for state in self._kicks[point.state - 1] if point.state else ():
            self._cotangents.setdefault(state, []).append((1.0, point.window))

    def pull_back(self, state: int) -> Tensor | None:
        """(∂K/∂x)ᵀ κ at a state; the parameters of K receive theirs."""
        pulled = self._linearisation.pull_back(state, self._cotangents.pop(state, []))
        return combine(pulled) if pulled else None


def refuse_gradients(like: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let an attempt to differentiate tensors of a recorded solve raise an error; `like` is one of its states."""
    if not (like.requires_grad and tensors):
        return tensors
    return _Refused.apply(like, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # noqa: ARG004
        raise RuntimeError(
            "extra_solver_state of a solve with grad_filter, or by an implicit method, has no gradient; detach its "
            "tensors, or use an explicit method without grad_filter"
        )
