"""The equation of an implicit step, d = c + b* f(x + d).

Where the step is not stiff, substitution solves it. Where substitution is slow or diverges, Newton's method does. Where
f acts on samples independently, or the state is small, a matrix for the Jacobian of each sample is kept from step to
step for as long as it serves: see `block_newton`. For large coupled states there are products with the Jacobian, along
the directions of a Krylov space: see `krylov_newton`.

**When an equation is solved.** Every entry has a tolerance of its own: a fraction of atol + rtol |y|, but no less than
its own rounding. A correction below it is no proof: a Jacobian that is no longer right makes small corrections of large
residuals, and so does an iteration that has stopped moving. So a correction counts where the one before it shows that
the iteration contracts, or where the residual itself is as small. Where rounding in func lets neither happen, the
residual counts as 0 if it is no larger than the differences that the last place of the state makes in func, entry by
entry. All else is an error.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .block_jacobian import BlockJacobian, CoupledError
from .block_newton import BlockNewton
from .correctors import corrector_of
from .implicit_equation import Equation, Equations, Flags, Tolerances, all_of, any_of
from .jacobian import Jacobian
from .known_jacobian import Known, KnownPreconditioner
from .krylov_newton import Failure, KrylovNewton
from .linear import to_real
from .newton_memory import FullNewton, Outcome
from .newton_options import DEFAULT_NEWTON, Newton
from .samples import Samples

OnFailure = Literal["raise", "nan"]


def check_on_failure(on_failure: object) -> None:
    """Raise a ValueError unless `on_failure` says what to do."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")


class NotSolvedError(RuntimeError):
    """The equation of an implicit step was not solved.

    Attributes:
        failed: for which samples; None where there is one, or f couples them.
    """

    def __init__(self, message: str, failed: Flags | None = None) -> None:
        super().__init__(message)
        self.failed = failed


class ImplicitSolver:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        precision: the relative precision of func's values, the unit in the last place of their dtype.
        entry: from the index of an entry of the flattened state to what it is called in messages.
        differentiable: whether func may be given states that require a gradient, for its Jacobian.
        samples: how the state is made of samples; None for one sample. Where f turns out to couple them, fewer of its
            dimensions count as samples from then on, and at last none.
        newton: how exactly, with how much work and in how much memory.
        on_failure: what to do where a sample cannot be solved: raise an error, or go on with NaN for that sample.
        known: what the user knows of the Jacobian of the whole state, which is one sample then.
        is_retried: whether a step that is not solved is tried anew, so that only samples that are NaN stay so.
        on_jacobian: called whenever a matrix is made for the Jacobian, of all samples or some.
        full: Newton's method for all samples at once, tried first; None for none.
    """

    def __init__(
        self,
        rtol: float | Tensor,
        atol: float | Tensor,
        precision: float,
        entry: Callable[[int], str],
        differentiable: bool = True,
        samples: Samples | None = None,
        newton: Newton = DEFAULT_NEWTON,
        on_failure: OnFailure = "raise",
        known: Known | None = None,
        is_retried: bool = False,
        on_jacobian: Callable[[], object] = lambda: None,
        full: FullNewton | None = None,
    ) -> None:
        self._rtol = rtol
        self._atol = atol
        self._precision = precision
        self._entry = entry
        self._samples = samples
        self._differentiable = differentiable
        self._options = newton
        self._on_failure = on_failure
        self._known = known
        self._is_retried = is_retried
        self._on_jacobian = on_jacobian
        self._full = full
        self._blocks: BlockNewton | None = None
        self._krylov: KrylovNewton | None = None
        self._uses_matrix = False
        self._has_failed = False

    def solve(self, equation: Equation, guess: Tensor | None, where: Callable[[], str]) -> tuple[Tensor, Tensor]:
        """Solve d = c + b* f(x + d).

        Args:
            equation: see there.
            guess: for f(x + d); None for 0.
            where: returns the step in words, for messages.

        Returns:
            d and f(x + d), with d = c + b* f to rounding, and f to the tolerance.

        Raises:
            NotSolvedError: no iteration converges, or func gives what is not finite.
        """
        # A step that can be made anew, shorter, is soon given up; where two in a row fail, everything is tried.
        persists = self._has_failed or not self._is_retried
        self._has_failed = True
        solution = self._solution(equation, guess, where, persists)
        self._has_failed = False
        return solution

    def _solution(
        self, equation: Equation, guess: Tensor | None, where: Callable[[], str], persists: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x, c = equation.x, equation.c
            # A guess from a past of much smaller steps may be far off; then better none.
            starts = [c] if guess is None else [c + equation.weight * guess, c]
            if x.numel() == 0:
                f = equation.iterate(x + starts[0])
                return c + equation.weight * f, f
            samples: Samples | None = Samples((x.shape,), 0) if self._samples is None else self._samples
            if self._known is not None and not self._uses_matrix:
                samples = None
            while samples is not None:
                self._samples = samples
                size = to_real(x).numel() // max(samples.count, 1)
                if self._options.allows_blocks(samples.count, size) or (samples.dims == 0 and self._uses_matrix):
                    try:
                        return self._solve_blocks(samples, equation, starts, where, persists)
                    except CoupledError:
                        self._blocks = None
                samples = samples.fewer() if samples.dims else None
            return self._solve_krylov(equation, starts, where, persists)

    def _solve_blocks(
        self, samples: Samples, equation: Equation, starts: list[Tensor], where: Callable[[], str], persists: bool
    ) -> tuple[Tensor, Tensor]:
        x = equation.x
        rows = [samples.split(of) for of in (x, equation.c, *starts)]
        if self._blocks is None:
            rtol, atol = (
                samples.split(of.expand_as(x)) if isinstance(of, Tensor) else of for of in (self._rtol, self._atol)
            )
            tolerances = Tolerances(rtol, atol, self._options.tolerance, self._precision)
            jacobian = BlockJacobian(self._differentiable, self._precision)
            full = None if self._full is None else partial(self._full.solve, samples, tolerances)
            self._blocks = BlockNewton(
                samples.count, tolerances, jacobian, self._options.max_iterations, self._on_jacobian, full
            )
        lost = np.zeros(samples.count, bool)
        if self._on_failure == "nan" and samples.count > 1:
            # Those that have failed before; f is evaluated where another sample is, so that no gradient is NaN.
            finite = torch.isfinite(rows[0]).all(1)
            lost = (~finite).cpu().numpy()
            if any_of(lost) and not all_of(lost):
                gone, other = ~finite[:, None], rows[0][finite][:1]
                rows = [torch.where(gone, other, rows[0]), *(of.masked_fill(gone, 0.0) for of in rows[1:])]
        equations = Equations(
            rows[0],
            rows[1],
            equation.weight,
            lambda of: samples.split(equation.slope(samples.join(of))),
            lambda of: samples.split(equation.iterate(samples.join(of))),
            equation.time,
            equation.records,
        )
        found = self._blocks.solve(equations, rows[2:], lost, persists)
        if any_of(found.failed) and (self._on_failure == "raise" or self._is_retried or samples.count == 1):
            failed = found.failed if samples.count > 1 else None
            raise NotSolvedError(self._complaint_of(samples, x, found, where()), failed)
        lost |= found.failed
        if not any_of(lost):
            return samples.join(found.d), samples.join(found.f)
        gone = torch.from_numpy(lost).to(x.device)[:, None]
        return samples.join(found.d.masked_fill(gone, torch.nan)), samples.join(found.f.masked_fill(gone, torch.nan))

    def _solve_krylov(
        self, equation: Equation, starts: list[Tensor], where: Callable[[], str], persists: bool
    ) -> tuple[Tensor, Tensor]:
        if self._krylov is None:
            jacobian = Jacobian(self._differentiable)
            corrector = corrector_of(jacobian, self._options, self._known, self._precision, self._on_jacobian)
            self._krylov = KrylovNewton(self._rtol, self._atol, self._precision, self._options, corrector)
        found = self._krylov.solve(equation, starts, persists)
        size = to_real(equation.x).numel()
        self._uses_matrix |= size <= self._options.largest_matrix and self._krylov.is_dear
        if not isinstance(found, Failure):
            return found
        has_factors = not (self._known is None or isinstance(self._known, KnownPreconditioner))
        if has_factors:
            found = found._replace(entries=0)
        elif found.entry is not None and size <= self._options.largest_matrix:
            self._uses_matrix = True
            return self._solve_blocks(Samples((equation.x.shape,), 0), equation, starts, where, persists)
        raise NotSolvedError(self._complaint(found, where()))

    def _complaint_of(self, samples: Samples, x: Tensor, found: Outcome, where: str) -> str:
        worst_row = int(np.flatnonzero(found.failed)[0])
        excess = torch.where(torch.from_numpy(found.failed).to(x.device)[:, None], found.excess, -1.0)
        entry = int(samples.join(excess.to(x.dtype.to_real())).argmax()) if x.numel() else 0
        worst_row = worst_row if samples.count == 1 else int(excess.amax(1).argmax())
        residual = samples.join(found.residual).reshape(-1)
        if not bool(torch.isfinite(found.residual[worst_row]).all()):
            failure = Failure(None, torch.nan, torch.nan, torch.inf)
        else:
            value = (x + samples.join(found.d)).reshape(-1)[entry].item()
            size = float(excess.max())
            entries = to_real(x).numel() // samples.count
            run_out = bool(found.ran_out[worst_row])
            failure = Failure(entry, value, float(residual[entry].abs()), size, entries, run_out)
        text = self._complaint(failure, where)
        if samples.count == 1:
            return text
        count = int(found.failed.sum())
        return (
            f"{text} It is one of {count} samples, of {samples.count}, that were not solved: "
            f"{samples.names(found.failed)}. options={{'on_failure': 'nan'}} goes on without them"
        )

    def _complaint(self, failure: "Failure", where: str) -> str:
        if failure.entry is None or failure.size == torch.inf:
            return (
                f"the implicit equation {where} was not solved, because func (an SDE's drift) returned NaN or "
                f"infinity there, or the equation is singular. Check func; or use smaller steps, by step_size or "
                f"grid_constructor (dt for an SDE)"
            )
        options = self._options
        run_out = (
            f" Newton's method ended after {options.max_iterations} iterations, its max_iterations."
            if failure.has_run_out
            else ""
        )
        too_many = (
            f" The state has {failure.entries} entries; more than {options.largest_matrix} are too many for a matrix "
            f"of the Jacobian, so that stiff terms which couple many of them are hard; a larger fallback_limit of "
            f"Newton allows for more."
            if failure.entries > options.largest_matrix
            else ""
        )
        return (
            f"the implicit equation {where} was not solved: the worst entry of the state is "
            f"{self._entry(failure.entry)} = {failure.value:.6g}; its residual is {failure.residual:.3g}, and the last "
            f"Newton correction {failure.size:.3g} times the tolerance, {options.tolerance:g} (atol + rtol |y|). Use "
            f"smaller steps there, by step_size or grid_constructor (dt for an SDE); a BDF method of lower order, if "
            f"the problem is stiff or the steps grow fast; double precision; or larger rtol and atol, if func is exact "
            f"to no more digits.{run_out}{too_many}"
        )
