"""Many equations d = c + b* f(x + d) at once, one for each sample, by substitution or by Newton's method.

Every sample goes its own way: with a Jacobian of its own, kept from step to step for as long as it serves, with a
damping of its own, accepted by its own residuals and corrections. f is evaluated for all of them at once; a sample that
is done stays where it is. So what becomes of a sample does not depend on the others, as far as f does not.

When an equation is solved is said in `implicit`; what is done with each sample, in `newton_iteration`.

Source: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8, for simplified Newton iterations and their
rates; Deuflhard, *Newton Methods for Nonlinear Problems*, 3.3, for their damping.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .block_jacobian import BlockJacobian, real_rows, rows_like
from .implicit_equation import TRUSTED, Equations, Flags, Numbers, Rows, Tolerances, all_of, any_of
from .newton_iteration import NewtonIteration
from .newton_memory import Outcome

_PERIOD = 4
"""Jacobians are made at once for all samples that want one, in every step of this number."""


class BlockNewton:
    """Solves the equations of all samples, step after step.

    Args:
        count: S, the number of samples.
        tolerances: see there.
        jacobian: makes the Jacobians.
        max_iterations: of substitution, and of Newton's method from one starting point.
        on_jacobian: called at every Jacobian, of all samples or some.
        full: tried first: from the equations, a first iterate and samples that are left as they are to solutions and
            for which samples they are.
    """

    def __init__(
        self,
        count: int,
        tolerances: Tolerances,
        jacobian: BlockJacobian,
        max_iterations: int,
        on_jacobian: Callable[[], object],
        full: Callable[[Equations, Rows, Flags], tuple[Rows, Flags]] | None = None,
    ) -> None:
        self.tolerances = tolerances
        self._jacobian = jacobian
        self.max_iterations = max_iterations
        self._on_jacobian = on_jacobian
        self._full = full
        self.uses_newton: Flags = np.zeros(count, bool)
        self.slow: Numbers = np.zeros(count)
        self.lipschitz: Numbers = np.full(count, np.inf)
        self._has_block: Flags = np.zeros(count, bool)
        self._steps = 0
        self._blocks: Tensor | None = None
        self._inverses: Tensor | None = None
        self._weights: Numbers = np.full(count, np.nan)

    def solve(self, equations: Equations, starts: list[Rows], skipped: Flags, persists: bool) -> Outcome:
        """Solve the equations.

        Args:
            equations: see there.
            starts: one or two first iterates d, in the order in which they are tried.
            skipped: samples that are left as they are.
            persists: whether more is tried than Newton's method from the first of them.

        Raises:
            CoupledError: f does not act on the samples independently.
        """
        with torch.no_grad():
            if self._full is None:
                return self._solve(equations, starts, skipped, persists)
            d, solved = self._full(equations, starts[0], skipped)
            slopes = (d - equations.c).div_(equations.weight)
            if all_of(solved | skipped):
                if equations.records:
                    equations.iterate(equations.x + d)
                nobody = np.zeros_like(skipped)
                return Outcome(d, slopes, nobody, nobody, d, d)
            # So that f is evaluated at their solutions, too.
            mask = self._mask(solved, d)
            starts = [torch.where(mask, d, start) for start in starts]
            found = self._solve(equations, starts, skipped | solved, persists)
            return found._replace(d=torch.where(mask, d, found.d), f=torch.where(mask, slopes, found.f))

    def _solve(self, equations: Equations, starts: list[Rows], skipped: Flags, persists: bool) -> Outcome:
        """The same, by Jacobians that are kept."""
        self._reweigh(equations.weight)
        self._steps += 1
        solving = NewtonIteration(self, equations, starts, skipped)
        solving.run()
        if persists and len(starts) > 1 and any_of(solving.failed):
            solving.begin_again(solving.other, solving.failed)
            solving.run()
        if persists and self._jacobian.is_exact and any_of(solving.failed):
            # What auto-differentiation does not see of func, differences do.
            unsolved = solving.failed
            exact, self._jacobian = self._jacobian, self._jacobian.by_differences()
            for start in (solving.first, solving.other)[: len(starts)]:
                if any_of(solving.failed):
                    solving.begin_again(start, solving.failed)
                    solving.run()
            if (solving.failed == unsolved).all():
                self._jacobian = exact
        return solving.outcome()

    @property
    def is_exact(self) -> bool:
        """Whether Jacobians are made by auto-differentiation."""
        return self._jacobian.is_exact

    @property
    def is_due(self) -> bool:
        """Whether Jacobians may be made anew before they fail."""
        return self._steps % _PERIOD == 0

    @property
    def is_rate_due(self) -> bool:
        """Whether rates of substitution are to be seen anew: of all samples at once, as it takes an evaluation."""
        return self._steps % TRUSTED == 0

    def correct(self, residual: Rows, newton: Flags) -> Rows:
        """The Newton correction for a residual, of some samples; of the others the residual itself."""
        if self._inverses is None or not any_of(newton):
            return residual
        columns = real_rows(residual).to(self._inverses.dtype).unsqueeze(2)
        solved = rows_like(torch.bmm(self._inverses, columns).squeeze(2), residual)
        return solved if all_of(newton) else torch.where(self._mask(newton, residual), solved, residual)

    def evaluate(self, equations: Equations, y: Rows, samples: Flags) -> Rows | None:
        """f at y, and by the same evaluation the Jacobians of some samples anew; None where func has no graph."""
        found = self._jacobian.differentiated(equations.slope, y)
        if found is None:
            return None
        self._keep(found[1], equations.weight, samples)
        return found[0]

    def refresh(self, equations: Equations, d: Rows, f: Rows, samples: Flags) -> None:
        """Make the Jacobians of some samples anew, at d."""
        y = equations.x + d
        if self.evaluate(equations, y, samples) is None:
            blocks = self._jacobian.differences(equations.slope, y, f, equations.sizes(d, f), samples)
            self._keep(blocks, equations.weight, samples)

    def update(self, residual: Rows, correction: Rows, direction: Tensor, samples: Flags, weight: float) -> None:
        """Add to the Jacobians of some samples what the last step has shown of them, by Broyden's rank-one update.

        Args:
            residual: after the step.
            correction: by the updated Jacobians.
            direction: the step s in terms of its own length, s / |s|², which products with it are made of.
            samples: which.
            weight: b*.
        """
        assert self._blocks is not None
        assert self._inverses is not None
        row, to = real_rows(direction).unsqueeze(1), self._inverses.dtype
        change = real_rows(residual / weight).unsqueeze(2)
        blocks = torch.addcmul(self._blocks, change, row.to(self._blocks.dtype))
        change = real_rows(correction).to(to).unsqueeze(2)
        inverses = torch.addcmul(self._inverses, change, torch.bmm(row.to(to), self._inverses))
        if not all_of(samples):
            mask = self._mask(samples, blocks)[..., None]
            blocks, inverses = torch.where(mask, blocks, self._blocks), torch.where(mask, inverses, self._inverses)
        self._blocks, self._inverses = blocks, inverses

    def forget(self, samples: Flags) -> None:
        """Forget the Jacobians of some samples."""
        self._has_block &= ~samples

    def has_block(self) -> Flags:
        """Which samples have a Jacobian."""
        return self._has_block

    def _keep(self, blocks: Tensor, weight: float, samples: Flags) -> None:
        self._on_jacobian()
        if self._blocks is None or self._inverses is None or all_of(samples):
            self._blocks, self._inverses = blocks, inverses_of(blocks, weight)
        else:
            index = torch.from_numpy(np.flatnonzero(samples)).to(blocks.device)
            chosen = blocks[index]
            self._blocks.index_copy_(0, index, chosen)
            self._inverses.index_copy_(0, index, inverses_of(chosen, weight))
        self._has_block |= samples
        self._weights[samples] = weight

    def _reweigh(self, weight: float) -> None:
        stale = self._has_block & (self._weights != weight)
        if self._blocks is not None and any_of(stale):
            self._inverses = inverses_of(self._blocks, weight)
            self._weights[:] = weight

    @staticmethod
    def _mask(flags: Flags, like: Rows) -> Tensor:
        return torch.from_numpy(flags).to(like.device).unsqueeze(1)


def inverses_of(blocks: Tensor, weight: float) -> Tensor:
    """(1 - b* J)⁻¹ of every block, in double precision where the device has it; not finite where it is singular."""
    dtype = blocks.dtype if blocks.device.type == "mps" else torch.float64
    unit = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
    inverses: Tensor
    inverses, info = torch.linalg.inv_ex(unit - weight * blocks.to(dtype))
    return inverses.masked_fill_((info != 0)[:, None, None], torch.nan)
