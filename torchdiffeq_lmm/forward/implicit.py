"""The equation of an implicit step, d = c + b* f(x + d), solved: by substitution, or by Newton's method.

Where the step is not stiff, substitution solves it. Where substitution is slow or diverges, Newton's method does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .implicit_equation import CAUTION, NEAR, SLOW, Acceptance, ImplicitEquation, Solution
from .jacobian import Slope
from .linear import to_real
from .newton_method import Failure, NewtonMethod
from .newton_options import DEFAULT_NEWTON, Newton


class ImplicitSolver:
    """Solves the implicit steps of one solve, one after the other.

    Args:
        rtol, atol: torchdiffeq's tolerances, numbers or tensors that broadcast with the state.
        precision: the relative precision of func's values, the unit in the last place of their dtype.
        entry: from the index of an entry of the flattened state to what it is called in messages.
        differentiable: whether func may be given states that require a gradient, for its Jacobian.
        newton: how exactly, with how much work and in how much memory.
    """

    def __init__(
        self,
        rtol: float | Tensor,
        atol: float | Tensor,
        precision: float,
        entry: Callable[[int], str],
        differentiable: bool = True,
        newton: Newton = DEFAULT_NEWTON,
    ) -> None:
        self._acceptance = Acceptance(rtol, atol, newton.tolerance, precision)
        self._entry = entry
        self._options = newton
        self._method = NewtonMethod(self._acceptance, newton, differentiable)
        self._uses_newton = False
        self._lipschitz = torch.inf

    def solve(
        self,
        x: Tensor,
        known: Tensor | None,
        weight: float,
        guess: Tensor | None,
        slope: Slope,
        iterate: Slope,
        where: Callable[[], str],
    ) -> tuple[Tensor, Tensor]:
        """Solve d = c + b* f(x + d).

        Args:
            x: the state that d is added to.
            known: c; None for 0.
            weight: b*.
            guess: for f(x + d); None for 0.
            slope: f.
            iterate: f again, called once at every iterate; the last one is the solution, up to the tolerance.
            where: returns the step in words, for messages.

        Returns:
            d and f(x + d), with d = c + b* f to rounding, and f to the tolerance.

        Raises:
            RuntimeError: no iteration converges, or func gives what is not finite.
        """
        with torch.no_grad():
            equation = ImplicitEquation(x, torch.zeros_like(x) if known is None else known, weight, slope, iterate)
            start = equation.c if guess is None else equation.c + weight * guess
            found: Solution | Failure | None = None
            # A guess from a past of much smaller steps may be far off; then better none.
            starts = [start] if guess is None else [start, equation.c]
            if not self._uses_newton:
                found = self._substitute(equation, start)
                if found is None:
                    # One by the slope before a stiff step is, as a rule.
                    starts.sort(key=equation.level)
            while not isinstance(found, Solution):
                self._uses_newton = True
                for beginning in starts:
                    if not isinstance(found, Solution):
                        found = self._method.solve(equation, beginning)
                if isinstance(found, Failure) and (
                    found.entry is None or not self._method.changes_way(to_real(x).numel())
                ):
                    break
        if isinstance(found, Solution):
            return found
        raise RuntimeError(self._complaint(found, where()))

    def _complaint(self, failure: Failure, where: str) -> str:
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

    def _substitute(self, equation: ImplicitEquation, d: Tensor) -> Solution | None:
        weight, acceptance = equation.weight, self._acceptance
        previous = torch.inf
        for _ in range(self._options.max_iterations):
            f = equation.iterate(equation.x + d)
            following = equation.c + weight * f
            size = acceptance.size(equation, d, following - d)
            # Small corrections may be rounding, which tells nothing of the rate.
            if NEAR < previous < torch.inf:
                self._lipschitz = size / (previous * abs(weight))
            # What is left of the error is this correction times the rate, seen before if not now.
            rate = CAUTION * self._lipschitz * abs(weight)
            is_solved = size == 0 or (size <= 1 and (rate < 1 or previous <= 1))
            if is_solved or (size <= NEAR and rate * size <= 1):
                return Solution(following, f)
            if not size <= max(SLOW * previous, 1):
                is_near = previous <= NEAR and size <= NEAR and rate <= CAUTION * SLOW
                if is_near and acceptance.is_rounding(equation, d, f, following - d):
                    return Solution(following, f)
                return None
            d, previous = following, size
        return None
