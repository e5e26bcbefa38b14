"""What compiled solves are not for: refused in words, before any work is done."""

from collections.abc import Iterable

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.backward_modes import resolve_backward
from torchdiffeq_lmm.autodiff.compiled_piece import CompiledBackward
from torchdiffeq_lmm.autodiff.newton_iterate import MOST_ENTRIES
from torchdiffeq_lmm.autodiff.reversal import Reversible
from torchdiffeq_lmm.forward.autograd_state import refuse_tangents
from torchdiffeq_lmm.forward.known_jacobian import Known
from torchdiffeq_lmm.forward.newton_options import Newton
from torchdiffeq_lmm.forward.samples import Samples
from torchdiffeq_lmm.forward.vector_field import HostedFunction
from torchdiffeq_lmm.schemes.methods import Method

from .sharding_checks import refuse_sharded

_OLDEST = (2, 11)
"""The version of PyTorch that compiled solves have been tested with; they lean on parts that change."""


def refuse_compile(given: object, what: str) -> None:
    """Raise a ValueError if a solve that cannot be compiled is to be."""
    if given is not None and given is not False:
        raise ValueError(f"compile is for ODEs by the methods of this package but adams, not for {what}, got {given!r}")


def check_compile(hosted: HostedFunction) -> None:
    """Raise an error where nothing of a solve can be compiled.

    Raises:
        RuntimeError: PyTorch is too old, or a transform of torch.func is on.
        ValueError: it is that of odeint_adjoint, or func has sharded parts.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST:
        raise RuntimeError(
            f"compile needs PyTorch {'.'.join(map(str, _OLDEST))} or newer, got {torch.__version__}; install that, or "
            f"solve without compile"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("compile does not support torch.func transforms of a solve; solve without compile")
    refuse_sharded(hosted.call, ["where compile is given, for PyTorch cannot trace what gathers it"])
    if hosted.in_adjoint:
        raise ValueError("compile must not be given to odeint_adjoint; use odeint, which needs as little memory then")


def check_compiled_newton(y0: Tensor, samples: Samples, newton: Newton, known: Known | None) -> None:
    """Raise an error where the equations of implicit steps cannot be solved by a compiled function.

    Raises:
        TypeError: the dtype of the state has no such functions.
        ValueError: samples have too many entries, or another option does not go with it.
    """
    if y0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"y0 must be float32 or float64 where compile is given and steps are implicit, got {y0.dtype}; solve "
            f"without compile"
        )
    if known is not None:
        raise ValueError(
            "jac_sparsity, jac and preconditioner must not be given where compile is: a compiled function makes "
            "Jacobians by itself; leave one of both out"
        )
    if samples.entries > MOST_ENTRIES or not newton.allows_blocks(samples.count, samples.entries):
        raise ValueError(
            f"compile is for samples of at most {MOST_ENTRIES} entries where steps are implicit, and for those that "
            f"matrix_limit of Newton allows for, got {samples.entries}, where {samples.dims} dimensions of y0 count "
            f"samples; say by batch_dims if more do, or solve without compile"
        )


def resolve_compiled_blocks(
    method: Method, hosted: HostedFunction, jump_t: object, backward: object
) -> CompiledBackward:
    """The backward pass that the user asks for, where a solve runs in compiled blocks.

    Raises:
        TypeError: `backward` is no backward mode.
        ValueError: it is none of those that go with compiled blocks, or another option is not.
        RuntimeError: see `check_compile`.
    """
    check_compile(hosted)
    if jump_t is not None:
        raise ValueError("jump_t must not be given where compile is; solve from jump to jump, or without compile")
    if hosted.callback_step is not None:
        raise ValueError(
            "func must have no callback_step where compile is given: steps have no beginning in Python that could call "
            "it; leave one of both out"
        )
    mode = resolve_backward(backward)
    mode.check(method, backward)
    if isinstance(mode, Reversible):
        return mode
    if backward == "autograd":
        return "autograd"
    if backward == "checkpoint":
        return "checkpoint"
    raise ValueError(
        f"backward must be 'autograd', 'checkpoint' or 'reversible' where compile is given, got {backward!r}: there "
        f"is a checkpoint at the beginning of every block, whose length is that of Compile(block=...)"
    )


def check_compiled_solve(hosted: HostedFunction, y0: Tensor) -> None:
    """Raise an error where what is around a solve does not go with compiled blocks.

    Raises:
        RuntimeError: autocast or forward mode is on.
        ValueError: func is distributed.
    """
    if torch.is_autocast_enabled(y0.device.type):
        raise RuntimeError(
            "compile does not support autocast around a solve; put autocast inside func, or solve without compile"
        )
    refuse_tangents(y0)
    if isinstance(hosted.call, torch.nn.Module) and any(
        isinstance(part, torch.nn.parallel.DistributedDataParallel) for part in hosted.call.modules()
    ):
        raise ValueError(
            "func must not be a DistributedDataParallel module where compile is given, for it would be bypassed; wrap "
            "the model around the solve instead"
        )


def resolve_compiled_params(adjoint_params: Iterable[Tensor] | None) -> tuple[Tensor, ...] | None:
    """The tensors whose gradients are wanted; None for all.

    Raises:
        TypeError: they are no tensors.
    """
    if adjoint_params is None:
        return None
    if isinstance(adjoint_params, Tensor) or not isinstance(adjoint_params, Iterable):
        raise TypeError(f"adjoint_params must be an iterable of tensors, got {adjoint_params!r}")
    given = tuple(adjoint_params)
    for i, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"adjoint_params must be an iterable of tensors, got {parameter!r} as number {i}")
    return given
