"""Traces an iterate of Newton's method for implicit steps: see `newton_iterate`."""

from typing import Any

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.samples import Samples

from .block_tracing import Fakes, Shapes, TracedBlock, parts_of
from .func_capture import CapturedFunc
from .newton_iterate import Given, Iterates, next_iterate

_GIVEN, _ITERATES = len(Given._fields), len(Iterates._fields)


def trace_newton(
    func: CapturedFunc, samples: Samples, precision: float, of_entries: tuple[bool, bool], like: Shapes
) -> TracedBlock:
    """`next_iterate`, from what is given, the iterates, the time, and what func depends on and looks up.

    Args:
        func: func.
        samples: how a state is made of samples.
        precision: of its values.
        of_entries: whether rtol and atol have a value for every entry of a state.
        like: the shapes.

    Raises:
        RuntimeError: func cannot be traced.
    """
    size = samples.entries

    def split(state: Tensor) -> Tensor:
        # Of a batch of any size the numbers of `samples` are not those.
        return state.reshape(-1, size) if len(samples.shapes) == 1 else samples.split(state)

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        given, iterates, (time,), tensors = parts_of(flat, (_GIVEN, _ITERATES, 1))

        def join(rows: Tensor) -> Tensor:
            return rows.reshape(given[0].shape) if len(samples.shapes) == 1 else samples.join(rows)

        latest, left = next_iterate(
            lambda y: func(time, y, tensors), split, join, precision, Given(*given), Iterates(*iterates)
        )
        return (*latest, left)

    fakes = Fakes(like)
    numbers = fakes.empty(dtype=torch.float64)
    tolerances = [
        fakes.state() if is_of_entries else fakes.empty(dtype=like.x.dtype) for is_of_entries in of_entries
    ]
    with fakes.mode:
        done = torch.empty_like(split(fakes.state())[:, :1], dtype=torch.bool)
    inputs: list[Any] = [
        *(fakes.state(), fakes.state(), numbers, *tolerances, fakes.state()),
        *(fakes.state(), fakes.state(), fakes.state(), done),
        fakes.empty(*like.time.shape, dtype=like.time.dtype),
        *fakes.tensors,
        *(fakes.empty(*rows.shape, dtype=rows.dtype) for rows in like.looked_up),
    ]
    return fakes.traced(run, inputs)
