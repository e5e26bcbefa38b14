"""What alternates in a gradient over the steps: its sums in one pass over the numbers, and what they tell.

With G_n the n-th row of the gradient divided by its width, s_n = ¼ (G_{n-1} + 2 G_n + G_{n+1}) varies slowly and
d_n = ¼ (-G_{n-1} + 2 G_n - G_{n+1}) alternates: see `oscillation.Oscillation`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_STANDS_OUT = 10
"""A few rows stand out where they alternate by so much more than the median row, or by twice that in a single entry."""

_SURELY_A_BOUNDARY_LAYER = 0.65
"""A local index that a random walk of a single entry hardly ever reaches."""

_SURELY_STANDS_OUT = 10
"""Nor do its rows stand out by so many times more than it takes."""

_SINGLE = 0.9
"""Above this concentration, Σ e² / (Σ e)² for the sum e of |d_n|² in each entry, a single entry is what alternates."""

_LEAST_ROWS = 6
"""Of fewer rows none can stand out."""

_NEGLIGIBLE = 0.05
"""Rows count as at least this part of the mean row, for the rounding errors of vanishing rows not to stand out."""

_OWNED = (0.5, 1.0, 2.0)
"""The first and the last row may own half a step or a whole one, whatever the widths say: by these they may be off."""

_CHUNK = 3 * 2**16
"""So many numbers at a time are worked on, for them to stay in the cache; elsewhere than on the CPU more."""


class Sums(NamedTuple):
    """Sums over all entries, float64, on the CPU, with 2 d_n and 2 s_n in place of d_n and s_n, in a common unit.

    Attributes:
        alternating, slow: Σ |d_n|² and Σ |s_n|², of shape (N - 2,).
        neighbours: Σ d_n d_{n+1}, of shape (N - 3,).
        ends: Σ G_0 G_n for n = 0, ..., 3, and the same counted from the last row backwards.
        concentration: see `_SINGLE`.
    """

    alternating: Tensor
    slow: Tensor
    neighbours: Tensor
    ends: tuple[Tensor, Tensor]
    concentration: float


def sums_and_entry(rows: Tensor, widths: Tensor) -> tuple[Sums, int]:
    """The sums, and the entry that alternates most."""
    is_complex, count = rows.is_complex(), len(rows)
    if is_complex:
        rows = torch.view_as_real(rows.resolve_conj()).reshape(count, -1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # Squares of what is far from 1 would overflow, or vanish.
    largest = max(float(torch.stack(torch.aminmax(rows)).abs().max()), torch.finfo(dtype).tiny)
    scale = widths.min() / widths / (largest if math.isfinite(largest) else 1.0)
    factors = scale.to(rows.device, dtype)[:, None]
    by_entry: list[Tensor] = []
    by_row: list[Tensor] = []
    limit = _CHUNK if rows.device.type == "cpu" else 64 * _CHUNK
    chunks = rows.split(2 * max(limit // (2 * count), 128), dim=1)
    # Memory that is new for every product would take more time than the products.
    memory = [torch.empty(chunks[0].numel(), dtype=dtype, device=rows.device) for _ in range(3)]
    for chunk in chunks:
        scaled, product, d = (of[: chunk.numel()].view(chunk.shape) for of in memory)
        product, d = product[2:], d[2:]
        torch.mul(chunk, factors, out=scaled)
        torch.add(scaled[:-2], scaled[2:], out=product)
        torch.sub(scaled[1:-1], product, alpha=0.5, out=d)
        # |s|² - |d|², for s and d are the sum and the difference of the inner row and half of the outer ones.
        excess = torch.mul(scaled[1:-1], product, out=product).sum(1).mul_(2)
        squares = torch.mul(d, d, out=product)
        by_entry.append(squares.sum(0))
        alternating = squares.sum(1)
        neighbours = torch.mul(d[:-1], d[1:], out=product[1:]).sum(1)
        sums = [scaled[:4] @ scaled[0], scaled[-4:] @ scaled[-1], excess, alternating, neighbours]
        by_row.append(torch.cat(sums))
    of_entries = torch.cat(by_entry)
    concentration = (of_entries / of_entries.sum()).square().sum()
    if is_complex:
        of_entries = of_entries.unflatten(0, (-1, 2)).sum(1)
    of_rows = torch.stack(by_row).sum(0, dtype=torch.float64)
    found = torch.cat([of_rows, torch.stack([concentration.double(), of_entries.argmax().double()])]).cpu()
    first, last, excess, alternating, neighbours, rest = found.split([*map(len, sums), 2])
    slow = (alternating + excess).clamp(min=0)
    return Sums(alternating, slow, neighbours, (first, last.flip(0)), float(rest[0])), int(rest[1])


def without_empty_ends(sums: Sums) -> tuple[int, Sums]:
    """The sums without a first or a last row that is 0, and the number of the first row that is left."""
    count = len(sums.slow)
    begin, cut = (int(end[0] == 0) for end in sums.ends)
    if count - begin - cut < 1:
        return 0, sums
    alternating, slow, neighbours = (of[begin : len(of) - cut] for of in (sums.alternating, sums.slow, sums.neighbours))
    return begin, sums._replace(alternating=alternating, slow=slow, neighbours=neighbours)


def _is_single(sums: Sums) -> bool:
    return sums.concentration > _SINGLE


def coherence(sums: Sums, density: Tensor) -> float:
    """See `oscillation.Oscillation`. Where there are too few rows to tell, what alternates is taken for a zigzag."""
    sizes = sums.alternating.sqrt()
    correlation, of_noise = -sums.neighbours.sum(), 2 / 3
    largest = sizes[:-1] @ sizes[1:]
    if _is_single(sums):
        d = density.diff(n=2)
        d = d / d.abs().max()
        correlation, of_noise = (d[:-2].conj() * d[2:]).real.sum(), 1 / 6
        largest = (d[:-2].abs() * d[2:].abs()).sum()
    return (float(correlation / largest) - of_noise) / (1 - of_noise) if largest != 0 else 1.0


def largest_local(sums: Sums) -> tuple[float, int | None, bool] | None:
    """The largest local index, its row if it stands out, and if certainly; None for too few rows."""
    if len(sums.slow) < _LEAST_ROWS - 2:
        return None
    alternating, slow, neighbours = sums.alternating.clone(), sums.slow.clone(), sums.neighbours.clone()
    for n, end in zip((0, -1), sums.ends, strict=True):
        own, first, second, third = end.tolist()
        beside, after, slowly = first - (own + second) / 2, second - (first + third) / 2, first + (own + second) / 2
        # With d + c G and s - c G for d and s at the row beside it, the row G is multiplied by 1 - 2 c.
        c = min(((1 - owned) / 2 for owned in _OWNED), key=lambda c: 2 * c * beside + c * c * own)
        alternating[n] += 2 * c * beside + c * c * own
        slow[n] += c * c * own - 2 * c * slowly
        neighbours[n] += c * after
    sizes = (alternating + slow).clamp(min=0)
    sizes = sizes + _NEGLIGIBLE * sizes.mean()
    if not bool((sizes > 0).all()):
        return 0.0, None, False
    against = neighbours.neg().clamp(min=0)
    of_two = 2 * against / (sizes[:-1] + sizes[1:])
    of_three = 3 * torch.minimum(against[:-1], against[1:]) / (sizes[:-2] + sizes[1:-1] + sizes[2:])
    found = torch.cat([of_two[:1], of_three, of_two[-1:]])
    place = int(found.argmax())
    local = float(found[place])
    least = _STANDS_OUT * (2 if _is_single(sums) else 1) * float((alternating / sizes).median())
    certain = local > _SURELY_A_BOUNDARY_LAYER or local > _SURELY_STANDS_OUT * least
    return local, place + 1 if local > least else None, certain
