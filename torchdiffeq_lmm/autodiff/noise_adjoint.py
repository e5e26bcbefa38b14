"""The adjoint of the noise of a stochastic differential equation, and the costate of a path.

A noise increment K_n = g(t_n, x_n) ΔW_n that leads to a state receives the cotangent of that state with the past held
fixed,

    κ_n = ∂E/∂K_n = P_{n+1},      P_n = P_{n+1} + g_n + J_nᵀ μ_n + (∂K_n/∂x)ᵀ κ_n;

all else is as in schemes/discrete_adjoint.py, and g_n with an index is what E sees of node n.

**The costate of a path.** On a given Brownian path a shift of X(t) goes on as dδ = J δ dt + (∂g/∂x δ) dW, and
p(t) = dE/dX(t) is its adjoint: a random function, known when the path is. A change of the drift during dt changes E by
pᵀ (∂f/∂θ) δθ dt, as for an ODE, and one of the diffusion by pᵀ (∂g/∂θ) δθ dW.

**The parameters of the drift.** Shift the discrete past at node m along that flow: x_m by δ, a slope f_l before by
J_l δ_l, an increment by the drift D_l (which has no noise in it) by h J_l δ_l. It is the past of a shifted solution, so
E responds by pᵀ δ up to the error of the method on the equation and its linearisation. As δ_l - δ and J_l - J_m are
O(√h), being changes over the few steps that a method reaches back, and H_m is O(h),

    p_m = P_m + J_mᵀ H_m + O(h^{3/2}) + the error of the solve,

the identity of filters/costate.py, term by term. The error of the solve leads: its order is 1 for additive noise,
1/2 else, and for noise of size ε the error is O(h² + ε h + ε² √h). The noise gives P a jump at every node, as
observations do, so that nowhere is μ_m / h the costate beyond a layer; the identity is used at all nodes.

**The parameters of the diffusion.** κ_n = P_{n+1} is p_{n+1} but for Jᵀ H = O(h): what oscillates in it is no larger
than the error of the solve. They need no filter, and keep the exact gradient of the discrete loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.samples import Systems
from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, combine

from .evaluation import Evaluation
from .recorded_jacobians import RecordedJacobians
from .stored_evaluations import Kept
from .vjp import ParameterGradients


class NoiseRecord(NamedTuple):
    """What the forward pass leaves of the noise.

    Attributes:
        of_rows: the states whose noise increments each row uses: see `noise_of_rows`.
        evaluations: of K, by state.
    """

    of_rows: Sequence[tuple[int, ...]]
    evaluations: Mapping[int, Evaluation | None]


class NoiseAdjoint:
    """The cotangents κ of the noise increments.

    Args:
        record: of the noise.
        parameters: where the gradients of parameters are added up.
        precision, systems: see `RecordedJacobians`.
    """

    def __init__(
        self,
        record: NoiseRecord,
        parameters: ParameterGradients,
        precision: float,
        systems: Systems,
    ) -> None:
        self._of_rows = record.of_rows
        self._cotangents: dict[int, Contributions] = {}
        self._jacobians = RecordedJacobians(
            Kept(record.evaluations, {}, {}, ()), parameters, True, None, precision, systems
        )

    def pass_by(self, point: AdjointState) -> None:
        """Give a state's cotangent to the noise increments that lead to it."""
        for state in self._of_rows[point.state - 1] if point.state else ():
            self._cotangents.setdefault(state, []).append((1.0, point.window))

    def vjp(self, state: int) -> Tensor | None:
        """(∂K/∂x)ᵀ κ at a state; the parameters of K receive theirs."""
        pulled = self._jacobians.vjp(state, self._cotangents.pop(state, []))
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
