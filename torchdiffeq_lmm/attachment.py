"""The one node of autograd that a recorded solve becomes."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .compilation import repeatedly_differentiable
from .linearisation import hooks_suspended


class Solve(Protocol):
    """What the node knows of its solve beside its inputs and outputs."""

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Those of its inputs that are parameters."""

    def backward(self, cotangents: Sequence[Tensor | None], times_need_grad: bool) -> tuple[Tensor | None, ...]:
        """The gradients with respect to all its inputs."""


def attach(solve: Solve, values: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Give values the graph of a solve.

    The node lets go of the solve when autograd lets go of what it has saved.

    Args:
        solve: the solve.
        values: what it has led to.
        inputs: y0, the times, and what else it depends on.
    """
    token, unpacked = torch.empty(0), []

    def unpack(packed: Solve) -> Tensor:
        unpacked.append(packed)
        return token

    with torch.autograd.graph.saved_tensors_hooks(lambda _: solve, unpack):
        return _AttachedSolve.apply(token, unpacked, values, *inputs)  # type: ignore[no-untyped-call, no-any-return]


class _AttachedSolve(torch.autograd.Function):
    """(y0, times, others) -> the states and values of f that are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        unpacked: list[Solve],
        values: list[Tensor],
        y0: Tensor,  # noqa: ARG004
        user_times: Tensor | None,
        *others: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token)
        ctx.unpacked = unpacked
        ctx.times_need_grad = user_times is not None and user_times.requires_grad
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        assert len(ctx.saved_tensors) == 1
        solve: Solve = ctx.unpacked.pop()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grad_filter does not support create_graph=True, for its gradient is no derivative of the loss and has "
                "none to give; nor do implicit methods, and backward='reversible' and 'checkpoint', whose gradients "
                "are worked out once. For second derivatives solve with an explicit method and without both, or, an "
                "ODE, with grad_filter='smooth'"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "grad_filter, backward and implicit methods do not support is_grads_batched=True, nor torch.func "
                "transforms of their gradient; ask for one gradient after the other"
            )
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        with hooks_suspended(solve.sources), repeatedly_differentiable():
            found = solve.backward(cotangents, ctx.times_need_grad)
        return (None, None, None, *found)
