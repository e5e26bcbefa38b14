"""One iterate of Newton's method for all samples at once, with the Jacobian at that very iterate: to be traced.

Nothing in it depends on values: corrections come from Gaussian elimination with its exchanges of rows, written out
entry by entry, so that a compiler makes loops over the samples of it. Each sample knows nothing of the others.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.implicit_equation import (
    CAUTION,
    NEAR,
    SLOW,
    excess_of,
    own_rounding,
    places_of,
    rounding_of,
    tolerance_of,
)

MOST_ENTRIES = 8
"""Of samples with more entries, what is written out entry by entry takes long to compile."""


class Iterates(NamedTuple):
    """Where the samples are on their way, in the shape of a state but for the last two, of shape (S,).

    Attributes:
        d: the iterates.
        correction: the last correction; 0 where there was none.
        f: f before it; not a number where there was none.
        rate: the least rate of convergence seen of each entry; infinite where there was none.
        done: which samples are solved.
        lost: which are not on their way to a solution.
    """

    d: Tensor
    correction: Tensor
    f: Tensor
    rate: Tensor
    done: Tensor
    lost: Tensor


class Given(NamedTuple):
    """What is given of the equations d = c + b* f(x + d).

    Attributes:
        x, c: of the shape of a state.
        weight: b*, 0-d, in double precision.
        rtol, atol: parts of the tolerances, 0-d or of the shape of a state.
        noise: numbers that samples are told apart by, of the shape of a state.
    """

    x: Tensor
    c: Tensor
    weight: Tensor
    rtol: Tensor
    atol: Tensor
    noise: Tensor


Entries = list[Tensor]
"""Of shape (S,) for each entry of a sample."""


def next_iterate(
    slope: Callable[[Tensor], Tensor],
    split: Callable[[Tensor], Entries],
    join: Callable[[Entries], Tensor],
    precision: float,
    given: Given,
    iterates: Iterates,
) -> tuple[Iterates, Tensor]:
    """The next iterates; and how many samples go on, and how many have others in their f, of shape (2,).

    Args:
        slope: f, differentiable.
        split: from a state to the entries of its samples.
        join: the inverse.
        precision: of func's values, relative.
        given: the equations.
        iterates: the last ones.
    """
    x, c, d, correction, before, rate, noise = map(split, (given.x, given.c, *iterates[:4], given.noise))
    f, rows, products = _differentiated(slope, given.x + iterates.d, noise, split, join)
    weight, dtype = given.weight, given.x.dtype
    residual = [c_i + weight * f_i - d_i for c_i, f_i, d_i in zip(c, f, d, strict=True)]
    # In the precision in which the blocks 1 - b* J are solved.
    blocks = [[float(i == j) - weight * entry.double() for j, entry in enumerate(row)] for i, row in enumerate(rows)]
    value = [entry.to(dtype) for entry in _solved(blocks, [entry.double() for entry in residual])]

    # As in `newton_iteration`, whose names these are; what is not a number is not solved.
    rtol, atol = ([of] * len(x) if of.ndim == 0 else split(of) for of in (given.rtol, given.atol))
    y = [x_i + d_i for x_i, d_i in zip(x, d, strict=True)]
    level = [torch.maximum(x_i.abs(), y_i.abs()) for x_i, y_i in zip(x, y, strict=True)]
    places = _largest(places_of(of_d, precision * size) for of_d, size in zip(correction, level, strict=True))
    places = places.clamp(min=1.0)
    floor = torch.finfo(dtype).eps * _largest(level)
    near, solved, sizes, least = [], [], [], []
    for i, (size, level_i) in enumerate(zip(map(torch.abs, value), level, strict=True)):
        tolerance = tolerance_of(rtol[i], atol[i], precision, level_i, (d[i] - c[i]).abs(), dtype)
        excess, now = excess_of(size, tolerance), size / correction[i].abs()
        least.append(_less(now, rate[i]))
        small = excess * _less(CAUTION * now, torch.ones_like(now))
        known = _less(excess_of(residual[i].abs(), tolerance), least[i] / SLOW)
        rounding = own_rounding(level_i, d[i], c[i], (weight * f[i]).abs(), precision)
        rounding = rounding + weight.abs() * rounding_of(before[i] - f[i], places)
        near.append(excess <= NEAR)
        solved.append((small <= 1) & ((known <= 1) | (residual[i].abs() <= rounding)))
        scale = torch.maximum(tolerance, floor)
        sizes.append((size / scale, correction[i].abs() / scale, (d[i] - c[i]).abs() / scale))
    is_near = _all(near)
    done = iterates.done | is_near & _all(solved)
    # Within its domain of convergence Newton's method halves corrections at least: Deuflhard, 2.1. A first one of more
    # than the step itself, as by the slope before a stiff step, may lead to another solution.
    largest, before_it, step = map(_largest, zip(*sizes, strict=True))
    converges = largest <= torch.where(before_it == 0, SLOW * step, before_it / 2)
    lost = iterates.lost | ~(done | is_near | converges)

    left = torch.stack([(~(done | lost)).sum(), _are_coupled(rows, noise, products, precision).sum()])

    def latest(old: Entries, new: Entries) -> Tensor:
        return join([torch.where(iterates.done, *of_entry) for of_entry in zip(old, new, strict=True)])

    moved = [d_i + value_i for d_i, value_i in zip(d, value, strict=True)]
    found = latest(d, moved), latest(correction, value), latest(before, f), latest(rate, least)
    return Iterates(*found, done, lost), left


def _less(a: Tensor, b: Tensor) -> Tensor:
    # Where a is not a number, b. Of that, Inductor makes no loops over several samples at once by torch.fmin.
    return torch.where(a < b, a, b)


def _largest(entries: Iterable[Tensor]) -> Tensor:
    return reduce(torch.maximum, entries)


def _all(entries: Iterable[Tensor]) -> Tensor:
    return reduce(torch.logical_and, entries)


def _are_coupled(rows: Sequence[Entries], noise: Entries, products: Entries, precision: float) -> Tensor:
    """In which samples others have a part: as in `block_jacobian`."""
    missed, terms = [], []
    for column, product in zip(zip(*rows, strict=True), products, strict=True):
        parts = [number * entry for number, entry in zip(noise, column, strict=True)]
        missed.append((product - reduce(torch.add, parts)).abs())
        terms.append(reduce(torch.add, map(torch.abs, parts)))
    tolerance: Tensor = precision**0.5 * _largest(terms)
    return (_largest(missed) > tolerance) & (tolerance < torch.inf)


def _differentiated(
    slope: Callable[[Tensor], Tensor],
    y: Tensor,
    noise: Entries,
    split: Callable[[Tensor], Entries],
    join: Callable[[Entries], Tensor],
) -> tuple[Entries, list[Entries], Entries]:
    """F; the rows of the Jacobians; and the products of some numbers with the whole Jacobian."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        f = slope(leaf)

    def pulled(cotangent: Entries) -> Entries:
        if f.requires_grad:
            (found,) = torch.autograd.grad(f, leaf, join(cotangent), retain_graph=True, allow_unused=True)
            if found is not None:
                return split(found.detach())
        return [torch.zeros_like(entry) for entry in cotangent]

    ones, zeros = torch.ones_like(noise[0]), torch.zeros_like(noise[0])
    rows = [pulled([ones if i == j else zeros for j in range(len(noise))]) for i in range(len(noise))]
    return split(f.detach()), rows, pulled(noise)


def _solved(blocks: Sequence[Sequence[Tensor]], rhs: Sequence[Tensor]) -> Entries:
    """The solutions of A z = r, given entry by entry, each of shape (S,): by elimination with exchanges of rows."""
    rows = [[*row, r] for row, r in zip(blocks, rhs, strict=True)]
    count = len(rows)
    for k in range(count):
        for i in range(k + 1, count):
            swaps = rows[i][k].abs() > rows[k][k].abs()
            upper, lower = rows[k][k:], rows[i][k:]
            rows[k][k:] = [torch.where(swaps, b, a) for a, b in zip(upper, lower, strict=True)]
            rows[i][k:] = [torch.where(swaps, a, b) for a, b in zip(upper, lower, strict=True)]
        for i in range(k + 1, count):
            factor = rows[i][k] / rows[k][k]
            rows[i][k + 1 :] = [a - factor * b for a, b in zip(rows[i][k + 1 :], rows[k][k + 1 :], strict=True)]
    found: Entries = []
    for k in reversed(range(count)):
        left = rows[k][count]
        for entry, z in zip(rows[k][k + 1 : count], found, strict=True):
            left = left - entry * z
        found.insert(0, left / rows[k][k])
    return found
