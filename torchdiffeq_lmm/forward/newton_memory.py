"""What the iterations of implicit steps take from one step to the next, and what is known of an iterate."""

from typing import NamedTuple, Protocol

from torch import Tensor

from .implicit_equation import Equations, Flags, Numbers, Rows, Tolerances
from .samples import Samples


class Outcome(NamedTuple):
    """What has become of the equations.

    Attributes:
        d, f: the solutions, and the slopes by the equation; of failed samples what was reached.
        failed: which samples have failed, of shape (S,).
        ran_out: which of them because there were no more iterations.
        residual, correction, excess: where these have ended, entry by entry; `excess` is the last correction in terms
            of the tolerance. Of solved samples they mean nothing.
    """

    d: Rows
    f: Rows
    failed: Flags
    ran_out: Flags
    residual: Rows
    excess: Rows


class Memory(Protocol):
    """What is remembered of the samples from step to step; see `block_newton.BlockNewton`.

    Attributes:
        tolerances: see there.
        max_iterations: of substitution, and of Newton's method from one starting point.
        uses_newton: whether substitution has failed for a sample, or would take longer.
        slow: for so many steps a Jacobian is to be made at the start, as a sample's steps took many iterations.
        lipschitz: of f, as seen by substitution.
    """

    tolerances: Tolerances
    max_iterations: int
    uses_newton: Flags
    slow: Numbers
    lipschitz: Numbers

    @property
    def is_exact(self) -> bool:
        """Whether Jacobians are made by auto-differentiation."""

    @property
    def is_due(self) -> bool:
        """Whether in this step Jacobians may be made anew before they fail."""

    @property
    def is_rate_due(self) -> bool:
        """Whether in this step the rates of convergence of substitution are to be seen anew."""

    def correct(self, residual: Rows, newton: Flags) -> Rows:
        """Return the Newton correction for a residual, of some samples; of the others the residual itself."""

    def evaluate(self, equations: Equations, y: Rows, samples: Flags) -> Rows | None:
        """Return f at y, the Jacobians of some samples being made anew by the same evaluation; None if it cannot be."""

    def refresh(self, equations: Equations, d: Rows, f: Rows, samples: Flags) -> None:
        """Make the Jacobians of some samples anew, at d."""

    def update(self, residual: Rows, correction: Rows, direction: Tensor, samples: Flags, weight: float) -> None:
        """Add to the Jacobians of some samples what the last step has shown of them."""

    def forget(self, samples: Flags) -> None:
        """Forget the Jacobians of some samples."""

    def has_block(self) -> Flags:
        """Return which samples have a Jacobian."""


class FullNewton(Protocol):
    """Newton's method for all samples at once, with Jacobians of every iterate."""

    def solve(
        self, samples: Samples, tolerances: Tolerances, equations: Equations, start: Rows, skipped: Flags
    ) -> tuple[Rows, Flags]:
        """Return the solutions d, and for which samples they are, those that are skipped aside."""


class Iterate(NamedTuple):
    """An iterate: f, its residual, and its correction, of shape (S, D); and what is measured of it, of shape (S,).

    Attributes:
        f, residual, value: f, the residual and the correction.
        direction: of the last step; see `Memory.update`.
        excess: the correction in terms of the tolerance.
        known: at most 1 where the rate of convergence is known, or nothing is left to correct.
        seen: the least rate of convergence in this step.
        size, residual_size: the largest entries of the correction and of the residual in terms of the tolerance.
        level: the largest entry of the correction in terms of sizes that stay the same in one step.
        small: at most 1 where, by the rate of convergence, nothing is left after the correction.
        is_known: the largest entry of `known`.
    """

    f: Rows
    residual: Rows
    value: Rows
    direction: Tensor
    excess: Tensor
    known: Tensor
    seen: Tensor
    size: Numbers
    residual_size: Numbers
    level: Numbers
    small: Numbers
    is_known: Numbers
