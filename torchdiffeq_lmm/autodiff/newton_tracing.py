"""Traces an iterate of Newton's method for implicit steps: see `newton_iterate`."""

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.samples import Samples

from .func_capture import CapturedFunc
from .newton_iterate import Given, Iterates, next_iterate
from .state_layout import laid_out
from .tracing import Fakes, Shapes, TracedBlock, parts_of

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
    is_tuple = len(samples.shapes) > 1

    def split(state: Tensor) -> list[Tensor]:
        # Of a batch of any size the numbers of `samples` are not those; and a matrix stays one, for components apart.
        rows = samples.split(state) if is_tuple else state
        return list((rows if samples.is_matrix else rows.reshape(-1, samples.entries)).unbind(1))

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        given, iterates, (time,), tensors = parts_of(flat, (_GIVEN, _ITERATES, 1))

        def join(entries: list[Tensor]) -> Tensor:
            rows = laid_out(torch.stack(entries, 1), 2, like.axis)
            if is_tuple:
                return samples.join(rows)
            return rows if samples.is_matrix else rows.reshape(given[0].shape)

        latest, left = next_iterate(
            lambda y: func(time, y, tensors), split, join, precision, Given(*given), Iterates(*iterates)
        )
        return (*latest, left)

    fakes = Fakes(like)
    weight = fakes.empty(dtype=torch.float64)
    rtol, atol = (fakes.states() if of_each else fakes.empty(dtype=like.x.dtype) for of_each in of_entries)
    with fakes.mode:
        done, lost = (torch.empty_like(split(fakes.states())[0], dtype=torch.bool) for _ in range(2))
    given = Given(fakes.states(), fakes.states(), weight, rtol, atol, fakes.states())
    iterates = Iterates(fakes.states(), fakes.states(), fakes.states(), fakes.states(), done, lost)
    return fakes.traced(run, [*given, *iterates, fakes.times(), *fakes.tensors, *fakes.looked_up()])
