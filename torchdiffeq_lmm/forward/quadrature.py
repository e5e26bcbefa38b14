"""Implicit steps of a state of which f depends on a part alone: that part has an equation, the rest is a quadrature.

Such is the backward dynamics of torchdiffeq's odeint_adjoint: the gradients of parameters are integrals along the way,
and there may be many more of them than there are unknowns.
"""

from collections.abc import Callable

from torch import Tensor

from .implicit import ImplicitSolver
from .jacobian import Slope


class QuadratureSolver:
    """Solves implicit steps as `ImplicitSolver` does.

    Args:
        solver: of the equations of the part.
        part: the entries of the flattened state that f depends on.
    """

    def __init__(self, solver: ImplicitSolver, part: slice) -> None:
        self._solver = solver
        self._part = part

    def solve(
        self,
        x: Tensor,
        known: Tensor | None,
        weight: float,
        guess: Tensor | None,
        slope: Slope,
        iterate: Slope,
        where: Callable[[], str],
        time: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ImplicitSolver.solve`."""
        part = self._part

        def whole(of_part: Tensor) -> Tensor:
            y = x.clone()
            y[part] = of_part
            return y

        d_part, f_part = self._solver.solve(
            x[part],
            None if known is None else known[part],
            weight,
            None if guess is None else guess[part],
            lambda y: slope(whole(y))[part],
            lambda y: iterate(whole(y))[part],
            where,
            time,
        )
        # At the solution once more, for the last iterate is only near it.
        f = iterate(whole(x[part] + d_part)).clone()
        f[part] = f_part
        d = weight * f if known is None else known + weight * f
        d[part] = d_part
        return d, f
