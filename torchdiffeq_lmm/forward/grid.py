"""Where the steps are and where the outputs sit among them.

From `t`, `step_size` and `grid_constructor` to nodes, steps and placements. All of it is worked out once, before the
first step, in float64 on the CPU, in the solver's increasing time.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd_state import savable
from .jumps import Jumps

MAX_STEPS = 10_000_000
"""More steps than this are taken for a mistake in `step_size`."""

_TIME_ULPS = 4
"""Times that agree to so many units in the last place are the same time."""

GridConstructor = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """The nodes t_0 < ... < t_N of a solve.

    Attributes:
        nodes: of shape (N + 1,), float64, CPU; carries the gradient to `t` where `t` requires one.
        steps: h, of shape (N,), float64, CPU: the differences of the nodes, made equal where they are equal up to
            the rounding of the nodes.
        eps: of the dtype in which the nodes were given.
        jumps: whether f jumps at the first node, and at the last one.
    """

    nodes: Tensor
    steps: Tensor
    eps: float = torch.finfo(torch.float64).eps
    jumps: tuple[bool, bool] = (False, False)

    @property
    def requires_grad(self) -> bool:
        """Whether the nodes carry a gradient to `t`."""
        return self.nodes.requires_grad


class Placement(NamedTuple):
    """Where one output lies.

    Attributes:
        node: the last node at or before it.
        fraction: how far it lies on the way to the next node, in (0, 1); None where it lies at the node. A 0-d
            tensor where the grid or the output time carries a gradient.
        shift: the output time minus that of its node, 0 in value; None where no gradient with respect to it is
            needed.
    """

    node: int
    fraction: float | Tensor | None = None
    shift: Tensor | None = None


def check_step_size(step_size: object, argument: str = "step_size") -> None:
    """Raise unless `step_size`, which the user knows as `argument`, is a positive, finite number.

    Raises:
        TypeError: it is not a real number nor a tensor that holds one.
        ValueError: it is not positive or not finite, or requires a gradient.
    """
    is_number = isinstance(step_size, Real) and not isinstance(step_size, bool)
    is_scalar_tensor = (
        isinstance(step_size, Tensor)
        and step_size.numel() == 1
        and not step_size.is_complex()
        and step_size.dtype is not torch.bool
    )
    if not (is_number or is_scalar_tensor):
        raise TypeError(f"{argument} must be a positive real number, got {step_size!r}")
    if isinstance(step_size, Tensor) and step_size.requires_grad:
        raise ValueError(f"{argument} must not require a gradient, got a tensor that does; use {argument}.detach()")
    try:
        value = float(step_size)  # type: ignore[arg-type]
    except OverflowError:
        value = math.inf
    if not (math.isfinite(value) and value > 0):
        hint = "; it is a length and positive also where t is decreasing" if value < 0 else ""
        raise ValueError(f"{argument} must be positive and finite, got {value}{hint}")


def check_times(t: Tensor, argument: str = "t") -> None:
    """Raise a ValueError unless `t`, which the user knows as `argument`, holds at least one time, and finite ones."""
    if len(t) == 0:
        raise ValueError(f"{argument} must hold at least one time, got an empty tensor")
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{argument} must be finite, got {t}")


def uniform_grid(t: Tensor, step_size: float, argument: str = "step_size") -> Grid:
    """Steps of `step_size` from t[0] on, the last one cut short at t[-1] where they do not fit.

    Args:
        t: increasing, of shape (n,), n ≥ 2.
        step_size: in the unit of `t`.
        argument: as which the user knows it.

    Raises:
        ValueError: that makes more than `MAX_STEPS` steps.
    """
    times = _in_float64(t)
    _check_count(times, step_size, argument)
    return _divided(times[:1], times[-1:], step_size, _rounding(t))


def _check_count(times: Tensor, step_size: float, argument: str) -> None:
    length = float((times[-1] - times[0]).detach())
    count = length / step_size
    if count > MAX_STEPS:
        raise ValueError(
            f"{argument} {step_size} makes {count:.3g} steps from t[0] to t[-1], over a length of {length}; at "
            f"most {MAX_STEPS} are made. Use a larger {argument}"
        )


def _divided(begin: Tensor, end: Tensor, step_size: float, rounding: float) -> Grid:
    """Steps from one time to another, both of shape (1,), the last one cut short where they do not fit."""
    # A remainder of no more than rounding is no step of its own.
    count = float((end - begin).detach()) / step_size
    steps = max(1, math.ceil(count - min(rounding / step_size, 0.01)))
    nodes = torch.arange(steps + 1, dtype=torch.float64, device="cpu").mul_(step_size)
    if begin.requires_grad or end.requires_grad:
        nodes = torch.cat([begin + nodes[:-1], end])
    else:
        # In place, as the memory of many steps should be that of little else.
        nodes.add_(begin)
        nodes[-1:] = end
    return _grid(nodes, torch.finfo(torch.float64).eps)


def uniform_pieces(t: Tensor, step_size: float, jumps: Jumps, argument: str = "step_size") -> list[Grid]:
    """As `uniform_grid`, with steps of `step_size` from every jump on, the last one cut short at the next.

    Args:
        t, step_size, argument: see there.
        jumps: the times at which f jumps; those outside the interval of `t` are ignored.

    Returns:
        A grid from each jump to the next.
    """
    times = _in_float64(t)
    _check_count(times, step_size, argument)
    inside, at_ends = jumps_inside(jumps, t)
    bounds = [times[:1], *_each(inside), times[-1:]]
    rounding = jump_rounding(jumps, t)
    return _marked([_divided(begin, end, step_size, rounding) for begin, end in pairwise(bounds)], at_ends)


def pieces_until(t0: Tensor, end: float, step_size: float, jumps: Jumps) -> tuple[Iterator[Grid], Tensor, bool]:
    """As `uniform_pieces`, from t0, of shape (1,), to the last jump before `end`.

    Returns:
        The grids, as they are asked for; where they end, of shape (1,); and whether f jumps there, which it need not
        at t0.
    """
    bounds = torch.cat([t0.detach(), t0.detach().new_tensor([end])])
    inside, (at_start, _) = jumps_inside(jumps, bounds)
    times = [_in_float64(t0), *_each(inside)]
    rounding = jump_rounding(jumps, bounds)
    grids = (
        replace(_divided(begin, end, step_size, rounding), jumps=(at_start or n > 0, True))
        for n, (begin, end) in enumerate(pairwise(times))
    )
    return grids, times[-1], at_start or len(times) > 1


def pieces_of(grid: Grid, t: Tensor, jumps: Jumps) -> list[Grid]:
    """A grid with the jumps among its nodes, cut in pieces there.

    Args:
        grid: from t[0] to t[-1]. A node that is a jump but for rounding is replaced by it.
        t: the output times.
        jumps: the times at which f jumps; those outside the interval of `t` are ignored.

    Returns:
        A grid from each jump to the next.
    """
    inside, at_ends = jumps_inside(jumps, t)
    if not len(inside):
        return _marked([grid], at_ends)
    nodes, times = grid.nodes.detach(), inside.detach()
    before = (torch.searchsorted(nodes, times) - 1).clamp(min=0)
    tolerance = (0.01 * grid.steps.detach()[before]).clamp(max=jump_rounding(jumps, t))
    is_other = torch.ones(len(nodes), dtype=torch.bool, device="cpu")
    for nearest in (before, before + 1):
        is_other[nearest[(nodes[nearest] - times).abs() <= tolerance]] = False
    is_other[[0, -1]] = True
    others = grid.nodes[is_other]
    merged, order = torch.cat([others, inside]).sort()
    bounds = [0, *(order >= len(others)).nonzero()[:, 0].tolist(), len(merged) - 1]
    eps = max(grid.eps, jumps.eps)
    return _marked([_grid(merged[begin : end + 1], eps) for begin, end in pairwise(bounds)], at_ends)


def jump_rounding(jumps: Jumps, t: Tensor) -> float:
    """By how much a time of `t` may differ from a jump and be the same."""
    return max(_rounding(t), _TIME_ULPS * jumps.eps * float(t.detach().abs().max()))


def jumps_inside(jumps: Jumps, t: Tensor) -> tuple[Tensor, tuple[bool, bool]]:
    """The jumps between t[0] and t[-1], and whether there are some at these."""
    begin, end = float(t[0].detach()), float(t[-1].detach())
    tolerance = min(jump_rounding(jumps, t), 0.01 * (end - begin))
    exact = jumps.times.detach()
    at_ends = (bool(((exact - begin).abs() <= tolerance).any()), bool(((exact - end).abs() <= tolerance).any()))
    return jumps.times[(exact > begin + tolerance) & (exact < end - tolerance)], at_ends


def _each(times: Tensor) -> list[Tensor]:
    # Of no times split() makes one tensor without entries.
    return list(times.split(1)) if len(times) else []


def _marked(pieces: list[Grid], at_ends: tuple[bool, bool]) -> list[Grid]:
    """The pieces with what is known of jumps at their ends."""
    last = len(pieces) - 1
    return [
        replace(piece, jumps=(at_ends[0] if n == 0 else True, at_ends[1] if n == last else True))
        for n, piece in enumerate(pieces)
    ]


def grid_of_times(t: Tensor) -> Grid:
    """A step from every time of `t` to the next."""
    return _grid(_in_float64(t), torch.finfo(t.dtype).eps)


def constructed_grid(
    grid_constructor: GridConstructor, func: Any, y0: Tensor, t: Tensor, reverse: bool = False
) -> Grid:
    """The grid that the user's `grid_constructor(func, y0, t)` returns.

    Args:
        grid_constructor, func, y0, t: as torchdiffeq hands them to a solver.
        reverse: whether the user's time is the negative of the solver's, for messages.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: it is not one-dimensional, finite and strictly monotonic, or does not begin and end with `t`.
    """
    try:
        made = grid_constructor(func, y0, t)
    except TypeError as error:
        if not reverse:
            raise
        # torchdiffeq has negated what the constructor returned, whatever it was.
        raise TypeError(f"grid_constructor must return a floating-point tensor of times: {error}") from error
    if not isinstance(made, Tensor) or not made.is_floating_point():
        got = f"a tensor of dtype {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
        raise TypeError(f"grid_constructor must return a floating-point tensor of times, it returned {got}")
    made = savable(made)
    if made.ndim != 1 or len(made) < 2:
        raise ValueError(
            f"grid_constructor must return a one-dimensional tensor of at least 2 times, it returned one of shape "
            f"{tuple(made.shape)}"
        )
    sign = -1 if reverse else 1
    _check_monotonic(made.detach(), sign)
    inner, times = _in_float64(made)[1:-1], _in_float64(t)
    tolerance = max(_rounding(made), _rounding(t))
    for index in (0, -1):
        end, wanted = float(made[index].detach()), float(times[index].detach())
        if abs(end - wanted) > tolerance:
            raise ValueError(
                f"grid_constructor must return a grid that begins with t[0] and ends with t[-1]; its entry {index} is "
                f"{sign * end}, t[{index}] is {sign * wanted}"
            )
    # The ends are those of t, also for the gradient. A node that lies between both roundings of an end is refused.
    nodes = torch.cat([times[:1], inner, times[-1:]])
    _check_monotonic(nodes.detach(), sign)
    return _grid(nodes, torch.finfo(made.dtype).eps)


def place_in(t: Tensor, pieces: Sequence[Grid], jumps: Jumps) -> list[list[Placement]]:
    """Find every output time among the nodes of the pieces of a grid.

    Args:
        t: see `place`.
        pieces: one after the other. An output at a jump is at the last node of the piece that ends there, and
            so is its gradient with respect to the time, as with torchdiffeq's adaptive methods.
        jumps: the times at which f jumps, for their rounding.

    Returns:
        The placements in each piece.
    """
    nodes = torch.cat([pieces[0].nodes, *(piece.nodes[1:] for piece in pieces[1:])])
    starts = list(accumulate((len(piece.steps) for piece in pieces), initial=0))[:-1]
    roundings = torch.full((len(nodes),), _rounding(t), dtype=torch.float64, device="cpu")
    roundings[starts[1:]] = jump_rounding(jumps, t)
    placed: list[list[Placement]] = [[] for _ in pieces]
    for placement in place(t, Grid(nodes, torch.cat([piece.steps for piece in pieces])), roundings):
        is_at_node = placement.fraction is None
        piece = max(0, (bisect_left if is_at_node else bisect_right)(starts, placement.node) - 1)
        placed[piece].append(placement._replace(node=placement.node - starts[piece]))
    return placed


def place(t: Tensor, grid: Grid, roundings: Tensor | None = None) -> list[Placement]:
    """Find every output time among the nodes.

    Args:
        t: increasing, of shape (n,), within the grid; t[0] and t[-1] are its ends.
        roundings: by how much an output at each node may differ from it, of shape (N + 1,). By default that of t.

    Returns:
        One placement per output.
    """
    times = _in_float64(t)
    nodes = grid.nodes.detach()
    after = torch.searchsorted(nodes, times.detach().contiguous()).clamp(1, len(nodes) - 1)
    before = after - 1
    nearest = torch.where(nodes[after] - times.detach() < times.detach() - nodes[before], after, before)
    # Never so much that an output inside a step is moved to its end.
    rounding = (
        torch.tensor(_rounding(t), dtype=torch.float64, device="cpu") if roundings is None else roundings[nearest]
    )
    tolerance = torch.minimum(0.01 * grid.steps.detach()[before], rounding)
    at_node = (nodes[nearest] - times.detach()).abs() <= tolerance

    if not (times.requires_grad or grid.requires_grad):
        fractions = ((times - nodes[before]) / (nodes[after] - nodes[before])).tolist()
        return [
            Placement(near) if exact else Placement(left, fraction)
            for near, left, exact, fraction in zip(
                nearest.tolist(), before.tolist(), at_node.tolist(), fractions, strict=True
            )
        ]

    starts, ends = grid.nodes[before], grid.nodes[after]
    fractions_with_grad = ((times - starts) / (ends - starts)).unbind()
    # At the ends of the grid, node and output time are the same variable.
    shifts = (times - grid.nodes[nearest]).unbind()
    last = len(nodes) - 1
    return [
        Placement(near, shift=shifts[i] if 0 < near < last else None)
        if exact
        else Placement(left, fractions_with_grad[i])
        for i, (near, left, exact) in enumerate(zip(nearest.tolist(), before.tolist(), at_node.tolist(), strict=True))
    ]


def _in_float64(t: Tensor) -> Tensor:
    return t.to("cpu", torch.float64)


def _rounding(t: Tensor) -> float:
    return _TIME_ULPS * torch.finfo(t.dtype).eps * float(t.detach().abs().max())


def _check_monotonic(nodes: Tensor, sign: int) -> None:
    good = torch.isfinite(nodes)
    good[1:] &= nodes[1:] > nodes[:-1]
    if not bool(good.all()):
        index = int((~good).nonzero()[0])
        raise ValueError(
            f"grid_constructor must return a grid of finite, strictly monotonic times that run from t[0] to t[-1]; its "
            f"entry {index} is {sign * float(nodes[index])}"
            + (f", after {sign * float(nodes[index - 1])}" if index else "")
        )


def _grid(nodes: Tensor, eps: float) -> Grid:
    exact = nodes.detach()
    lengths = exact.diff()
    # Equal steps, or equal ones and a last one, whose nodes have been rounded, are equal steps all the same.
    rounding = _TIME_ULPS * eps * float(exact.abs().max())
    for count in (len(lengths), len(lengths) - 1):
        if count > 1:
            equal = float(exact[count] - exact[0]) / count
            deviation = torch.arange(count + 1, dtype=torch.float64, device="cpu")
            deviation.mul_(-equal).add_(exact[: count + 1])
            if float(deviation.sub_(exact[0]).abs_().max()) <= min(rounding, 0.01 * equal):
                lengths[:count] = equal
                break
    if nodes.requires_grad:
        # The value is exact, the gradient that of the differences.
        differences = nodes.diff()
        lengths = lengths + (differences - differences.detach())
    return Grid(nodes, lengths, eps)
