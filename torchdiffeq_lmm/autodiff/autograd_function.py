"""The two nodes of autograd that a recorded solve becomes: one for its states, one for the outputs made of them."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .compilation import repeatedly_differentiable
from .vjp import hooks_suspended


class Solve(Protocol):
    """What the node knows of its solve beside its inputs and outputs."""

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Those of its inputs that are parameters."""

    def backward(self, cotangents: Sequence[Tensor | None], times_need_grad: bool) -> tuple[Tensor | None, ...]:
        """The gradients with respect to all its inputs."""


class Keeper:
    """Keeps a solve until autograd lets go of what it has saved.

    Attributes:
        solve: None from then on.
    """

    def __init__(self, solve: Solve) -> None:
        self.solve: Solve | None = solve


class Attached(NamedTuple):
    """Values with the graph of a solve.

    Attributes:
        values: the values.
        keeper: keeps the solve; the node of the values does not, see `stack`.
    """

    values: tuple[Tensor, ...]
    keeper: Keeper


def attach(solve: Solve, values: list[Tensor], *inputs: Tensor | None) -> Attached:
    """Give values the graph of a solve.

    Args:
        solve: the solve.
        values: what it has led to.
        inputs: y0, the times, and what else it depends on.
    """
    keeper = Keeper(solve)
    # Nothing that autograd holds may hold the keeper.
    token, saved = torch.empty(0, device="cpu"), _Saved(keeper)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: saved, lambda _: token):
        attached = _AttachedSolve.apply(token, weakref.ref(keeper), values, *inputs)  # type: ignore[no-untyped-call]
    return Attached(attached, keeper)


def stack(outputs: list[Tensor], keepers: Sequence[Keeper | None]) -> Tensor:
    """`torch.stack`, with a node that holds on to the keepers of the solves that led there; None where there is none.

    A solve may hold a module that holds the outputs. Python's collector sees that circle through an attribute of the
    outputs' own node alone: nodes behind it, and what autograd has saved, are hidden from it.
    """
    if all(keeper is None for keeper in keepers):
        return torch.stack(outputs)
    stacked: Tensor = _Stack.apply(keepers, *outputs)  # type: ignore[no-untyped-call]
    return stacked


class _Saved:
    """Stands for a solve in what autograd has saved, and ends with it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = weakref.ref(keeper)

    def __del__(self) -> None:
        keeper = self._keeper()
        if keeper is not None:
            keeper.solve = None


class _AttachedSolve(torch.autograd.Function):
    """(y0, times, others) -> the states and values of f that are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        keeper: weakref.ref[Keeper],
        values: list[Tensor],
        y0: Tensor,  # noqa: ARG004
        user_times: Tensor | None,
        *others: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token)
        ctx.keeper = keeper
        ctx.times_need_grad = user_times is not None and user_times.requires_grad
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # Raises autograd's own error where all has been freed.
        _ = ctx.saved_tensors
        solve: Solve = ctx.keeper().solve
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grad_filter does not support create_graph=True, for its gradient is no derivative of the loss and has "
                "none to give; nor do implicit methods, and backward='reversible' and 'checkpoint', whose gradients "
                "are worked out once. For second derivatives solve with an explicit method and without both, or, an "
                "ODE, with grad_filter='smooth'"
            )
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        # Evaluations of func are differentiated, which nothing can be in inference mode.
        with torch.inference_mode(False), torch.no_grad(), hooks_suspended(solve.sources), repeatedly_differentiable():
            found = solve.backward(cotangents, ctx.times_need_grad)
        return (None, None, None, *found)


class _Stack(torch.autograd.Function):
    """See `stack`."""

    @staticmethod
    def forward(ctx: Any, keepers: Sequence[Keeper | None], *outputs: Tensor) -> Tensor:
        ctx.keepers = keepers
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        functorch = torch._C._functorch
        if functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(cotangent):
            raise RuntimeError(
                "grad_filter, backward and implicit methods do not support is_grads_batched=True, nor vectorize=True "
                "of torch.autograd.functional, nor torch.func transforms of their gradient; ask for one gradient after "
                "the other"
            )
        return (None, *cotangent.unbind())
