"""Whether the rows of grid parameters are those of a filtered solve, which gives every node its own gradient."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.grad_filter import CostateFilter
from torchdiffeq_lmm.parameters.grid_parameter import GridParameter
from torchdiffeq_lmm.parameters.lookups import noted_lookups

Nodes = tuple[Tensor, bool]
"""Those of a piece, in the solver's time, and whether func is evaluated at the last one."""


def asks_for_nodes(grad_filter: object) -> bool:
    """Whether `checked_rows` looks at the nodes of a solve."""
    return isinstance(grad_filter, CostateFilter) and torch.is_grad_enabled()


@contextmanager
def checked_rows(grad_filter: object, method: str, direction: float, pieces: Sequence[Nodes]) -> Iterator[None]:
    """Warn, once the solve within has been made, where a grid parameter has other rows than it needs.

    Args:
        grad_filter: of the solve.
        method: its name.
        direction: of its time, 1 or -1.
        pieces: the nodes of all pieces, which may be added within; of several, between jumps, nothing is said.
    """
    if not asks_for_nodes(grad_filter):
        yield
        return
    with noted_lookups() as noted:
        yield
    if len(pieces) != 1:
        return
    nodes, sees_end = pieces[0]
    for parameter in noted.values():
        assert isinstance(parameter, GridParameter)
        reason = parameter.values.requires_grad and _reason(parameter, direction * nodes.detach(), sees_end)
        if reason:
            advice = "a row for each node, kind='linear'" if sees_end else "a row for each step"
            warnings.warn(
                f"a GridParameter of kind {parameter.kind!r} has other rows than method {method!r} has steps, so the "
                f"gradients that grad_filter gives its rows are not theirs: {reason}. Let its nodes be those of the "
                f"solve, with {advice}; or solve with fixed steps, if they are chosen by a tolerance",
                stacklevel=2,
            )


def _reason(parameter: GridParameter, nodes: Tensor, sees_end: bool) -> str:
    """What is wrong; empty where nothing is."""
    grid = parameter.nodes
    if grid[-1] < grid[0]:
        grid, nodes = -grid, -nodes
    widths = grid.diff()
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * float(grid.abs().max())
    slack = (_SLACK * widths).clamp(min=rounding).minimum(_MOST_SLACK * widths)
    seen = nodes if sees_end else nodes[:-1]
    if parameter.kind == "linear":
        return _unseen(grid, slack.min(), nodes.sort().values, seen.sort().values)
    # As a lookup finds them.
    begins = grid[:-1] - slack
    lookups, steps = (
        torch.bincount((torch.searchsorted(begins, times, right=True) - 1).clamp(0), minlength=len(begins))
        for times in (seen, (nodes[1:] + nodes[:-1]) / 2)
    )
    other = (_MANY * (lookups - steps).abs() > steps).nonzero()
    if not len(other):
        return ""
    row = int(other[0])
    return f"row {row} is looked up at {int(lookups[row])} nodes, and is of {int(steps[row])} steps"


def _unseen(grid: Tensor, slack: Tensor, nodes: Tensor, seen: Tensor) -> str:
    """The first row, where there is one, that is at no node, and between few."""
    after = torch.searchsorted(seen, grid).clamp(1, max(len(seen) - 1, 1))
    around = torch.stack([seen[after - 1], seen[after.clamp(max=len(seen) - 1)]])
    is_far = (around - grid).abs().amin(0) > slack
    has_few = _MANY * (around[1] - around[0]) > grid.diff().min()
    is_inside = (grid >= nodes[0] - slack) & (grid <= nodes[-1] + slack)
    unseen = (is_inside & is_far & has_few).nonzero()
    return f"row {int(unseen[0])} is at no node at which func is evaluated" if len(unseen) else ""


_SLACK, _MOST_SLACK, _ROUNDINGS = 0.01, 0.25, 4
"""A node may be beside that of a row by this part of a step; or by single precision's roundings, to the latter part."""

_MANY = 20
"""With more steps for a row one of them does not matter."""
