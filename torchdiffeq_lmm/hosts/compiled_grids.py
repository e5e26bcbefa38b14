"""Grids that compiled solves have had of late: planning one again would take longer than to solve on it."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.block_schedule import Schedule
from torchdiffeq_lmm.autodiff.compiled_piece import CompiledPieceSolver
from torchdiffeq_lmm.forward.grid import Placement
from torchdiffeq_lmm.forward.outputs import OutputRule, Trajectory

_KEPT = 16
"""So many grids are remembered."""

_MOST_STEPS = 100_000
"""No grid of more steps is."""


class PlannedGrid(NamedTuple):
    """A grid without jumps or gradients, with outputs that are made of states alone.

    Attributes:
        schedule: of the solve.
        placements: where the outputs are.
        lengths: of the steps.
    """

    schedule: Schedule
    placements: Sequence[Placement]
    lengths: list[float]

    def outputs(self, solver: CompiledPieceSolver, y0: Tensor, rule: OutputRule) -> Tensor:
        """The outputs of a solve on it."""
        states = solver.states(self.schedule, y0, None, None)
        trajectory = Trajectory(states)
        return torch.stack([rule.output(placement, self.lengths, trajectory) for placement in self.placements])


class PlannedGrids:
    """The latest ones, by all that they depend on."""

    def __init__(self) -> None:
        self._grids: OrderedDict[Hashable, PlannedGrid] = OrderedDict()

    def find(self, key: Hashable) -> PlannedGrid | None:
        """The grid, if it is remembered."""
        found = self._grids.get(key)
        if found is not None:
            self._grids.move_to_end(key)
        return found

    def keep(self, key: Hashable, grid: PlannedGrid) -> None:
        """Remember a grid."""
        if len(grid.lengths) <= _MOST_STEPS:
            self._grids[key] = grid
            while len(self._grids) > _KEPT:
                self._grids.popitem(last=False)


PLANNED_GRIDS = PlannedGrids()


def grid_key(t: Tensor, step_size: float | Tensor | None, *others: Hashable) -> Hashable | None:
    """What a grid depends on; None where it has a gradient.

    Args:
        t: the output times.
        step_size: of the steps.
        others: besides.
    """
    if t.requires_grad or (isinstance(step_size, Tensor) and step_size.requires_grad):
        return None
    length = None if step_size is None else float(step_size)
    return (t.detach().cpu().numpy().tobytes(), t.dtype, length, *others)
