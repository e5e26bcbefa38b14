"""One iterate of Newton's method for all samples at once, with the Jacobian at that very iterate: to be traced.

Nothing in it depends on values: corrections come from Gaussian elimination with its exchanges of rows, written out
entry by entry, so that a compiler makes loops over the samples of it. Each sample knows nothing of the others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.implicit_equation import CAUTION, NEAR, SLOW, excess_of, size_of, tolerance_of


MOST_ENTRIES = 8
"""Of samples with more entries, what is written out entry by entry takes long to compile."""


class Iterates(NamedTuple):
    """Where the samples are on their way, in the shape of a state but for `done`.

    Attributes:
        d: the iterates.
        correction: the last correction; 0 where there was none.
        rate: the least rate of convergence seen of each entry; infinite where there was none.
        done: which samples are solved, of shape (S, 1).
    """

    d: Tensor
    correction: Tensor
    rate: Tensor
    done: Tensor


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


def next_iterate(
    slope: Callable[[Tensor], Tensor],
    split: Callable[[Tensor], Tensor],
    join: Callable[[Tensor], Tensor],
    precision: float,
    given: Given,
    iterates: Iterates,
) -> tuple[Iterates, Tensor]:
    """The next iterates; and how many samples are not done, and how many have others in their f, of shape (2,).

    Args:
        slope: f, differentiable.
        split: from a state to its samples, of shape (S, D).
        join: the inverse.
        precision: of func's values, relative.
        given: the equations.
        iterates: the last ones.
    """
    x, c, d, correction, rate, noise = map(split, (given.x, given.c, *iterates[:3], given.noise))
    rtol, atol = (of if of.ndim == 0 else split(of) for of in (given.rtol, given.atol))
    y = x + d
    f, rows, product = _differentiated(slope, join(y), noise, split, join)
    residual = c + given.weight * f - d
    # The blocks 1 - b* J, by columns of entries, in the precision in which they are solved.
    size, weight = x.shape[1], given.weight
    blocks = [[float(i == j) - weight * entry.double() for j, entry in enumerate(row.unbind(1))] for i, row in enumerate(rows)]
    found = _solved(blocks, [entry.double() for entry in residual.unbind(1)])
    value = torch.stack(found, 1).to(residual.dtype)

    level = torch.maximum(size_of(x), size_of(y))
    tolerance = tolerance_of(rtol, atol, precision, level, (d - c).abs(), residual.dtype)
    excess = excess_of(value.abs(), tolerance)
    now = value.abs() / correction.abs()
    least = torch.fmin(now, rate)
    small = excess * torch.fmin(CAUTION * now, torch.ones_like(now))
    known = torch.fmin(least / SLOW, excess_of(residual.abs(), tolerance))
    # As in `newton_iteration`; what is not a number is not solved.
    solved = (excess <= NEAR).all(1) & (small <= 1).all(1) & (known <= 1).all(1)

    terms = torch.stack([(noise[:, i, None] * row).abs() for i, row in enumerate(rows)]).sum(0).amax(1)
    missed = (product - torch.stack([noise[:, i, None] * row for i, row in enumerate(rows)]).sum(0)).abs().amax(1)
    coupled = ~(missed <= size * precision**0.5 * terms) & torch.isfinite(terms) & torch.isfinite(missed)

    done = iterates.done | solved[:, None]
    left = torch.stack([(~done).sum(), coupled.sum()])
    latest = Iterates(
        join(torch.where(iterates.done, d, d + value)),
        join(torch.where(iterates.done, correction, value)),
        join(torch.where(iterates.done, rate, least)),
        done,
    )
    return latest, left


def _differentiated(
    slope: Callable[[Tensor], Tensor],
    y: Tensor,
    noise: Tensor,
    split: Callable[[Tensor], Tensor],
    join: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """F; the rows of the Jacobians, each of shape (S, D); and the products of some numbers with the whole Jacobian."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        f = slope(leaf)

    def pulled(cotangent: Tensor) -> Tensor:
        if not f.requires_grad:
            return torch.zeros_like(noise)
        (found,) = torch.autograd.grad(f, leaf, join(cotangent), retain_graph=True, allow_unused=True)
        return torch.zeros_like(noise) if found is None else split(found)

    units = torch.eye(noise.shape[1], dtype=f.dtype, device=f.device)
    rows = [pulled(unit.expand_as(noise)) for unit in units]
    return split(f.detach()), [row.detach() for row in rows], pulled(noise).detach()


def _solved(blocks: Sequence[Sequence[Tensor]], rhs: Sequence[Tensor]) -> list[Tensor]:
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
    found: list[Tensor] = []
    for k in reversed(range(count)):
        known = sum((a * z for a, z in zip(rows[k][k + 1 : count], found, strict=True)), torch.zeros_like(rhs[0]))
        found.insert(0, (rows[k][count] - known) / rows[k][k])
    return found
