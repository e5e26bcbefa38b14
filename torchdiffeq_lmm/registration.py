"""Which solvers torchdiffeq learns from this package."""

from .host import add_solvers, remove_solvers
from .solver import Leapfrog, MultistepSolver

SOLVERS: dict[str, type[MultistepSolver]] = {solver.method.name: solver for solver in (Leapfrog,)}


def register() -> None:
    """Enter this package's methods into torchdiffeq's method table. Importing the package does it.

    May be called any number of times.

    Raises:
        RuntimeError: torchdiffeq has a method of one of the names that is not ours. Nothing is entered then.
    """
    add_solvers(SOLVERS)


def unregister() -> None:
    """Take this package's methods out of torchdiffeq's method table again; `register` brings them back.

    May be called any number of times. Methods of the same name that are not ours stay.
    """
    remove_solvers(SOLVERS)
