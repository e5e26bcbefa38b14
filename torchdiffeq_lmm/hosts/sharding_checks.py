"""Modules that `torch.distributed.fsdp.fully_shard` has split among processes: where they cannot be parts of func."""

import sys
from collections.abc import Iterable

import torch

from torchdiffeq_lmm.parameters.grid_parameter import GridParameter

_ADVICE = "give fully_shard the whole model, whose forward makes the solve, and no part of that function"


def refuse_sharded(func: object, reasons: Iterable[str], argument: str = "func") -> None:
    """Raise a ValueError where a part of func is sharded by itself and a solve cannot evaluate it.

    A sharded module asks all processes for its parameters whenever it is called, and once more in the backward pass, by
    hooks on its outputs. So all must evaluate func equally often, in one pass of autograd. A model that is sharded as a
    whole has its parameters for as long as the solve lasts.

    Args:
        func: the user's function; only an nn.Module is looked at.
        reasons: what else of the solve does not go with sharded parts; where there is nothing, they are evaluated as
            any other module, but for a `GridParameter`, whose rows would be gone as soon as it has returned them.
        argument: what messages call func.
    """
    # Where it was never imported nothing is sharded.
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None or not isinstance(func, torch.nn.Module):
        return
    found = {name: part for name, part in func.named_modules() if isinstance(part, sharded)}
    for name, part in found.items():
        given = f"part {name!r} of {argument}" if name else argument
        for reason in reasons:
            raise ValueError(f"{given} must not be sharded by itself, by fully_shard, {reason}; {_ADVICE}")
        if isinstance(part, GridParameter):
            raise ValueError(
                f"{given} must not be sharded by itself, by fully_shard: it is a GridParameter, and its rows are freed "
                f"as soon as it has returned them; {_ADVICE}"
            )
