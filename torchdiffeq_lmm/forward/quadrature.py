"""Implicit steps of a state of which f depends on a part alone: that part has an equation, the rest is a quadrature.

Such is the backward dynamics of torchdiffeq's odeint_adjoint: the gradients of parameters are integrals along the way,
and there may be many more of them than there are unknowns.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .implicit import ImplicitSolver
from .implicit_equation import Equation


class QuadratureSolver:
    """Solves implicit steps as `ImplicitSolver` does.

    Args:
        solver: of the equations of the part.
        part: the entries of the flattened state that f depends on.
    """

    def __init__(self, solver: ImplicitSolver, part: slice) -> None:
        self._solver = solver
        self._part = part

    def solve(self, equation: Equation, guess: Tensor | None, where: Callable[[], str]) -> tuple[Tensor, Tensor]:
        """See `ImplicitSolver.solve`."""
        part, x = self._part, equation.x

        def whole(of_part: Tensor) -> Tensor:
            y = x.clone()
            y[part] = of_part
            return y

        of_part = replace(
            equation,
            x=x[part],
            c=equation.c[part],
            slope=lambda y: equation.slope(whole(y))[part],
            iterate=lambda y: equation.iterate(whole(y))[part],
        )
        d_part, f_part = self._solver.solve(of_part, None if guess is None else guess[part], where)
        # At the solution once more, for the last iterate is only near it.
        f = equation.iterate(whole(x[part] + d_part)).clone()
        f[part] = f_part
        d = equation.c + equation.weight * f
        d[part] = d_part
        return d, f
