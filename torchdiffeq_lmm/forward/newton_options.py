"""What users can ask of the equations of implicit steps."""

from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class Newton:
    """How the equations of implicit steps are solved: how exactly, with how much work, in how much memory.

    Substitution solves an equation that is not stiff, Newton's method any other. A Newton correction is found with a
    matrix for the Jacobian, n² numbers for n unknowns, or by GMRES: with products with the Jacobian alone, and a basis
    of a Krylov space of up to `krylov_dimension` vectors. Unknowns are real: a complex entry of the state counts twice.

    Args:
        tolerance: every entry y of the state is solved for to this fraction of atol + rtol |y|, but no further than to
            the rounding of func.
        max_iterations: of substitution, and of Newton's method from one starting point. Where they do not suffice, the
            step raises a RuntimeError.
        matrix_limit: up to so many unknowns a matrix is kept, from step to step, for as long as it serves; of every
            sample, where func acts on samples independently.
        fallback_limit: larger samples have matrices as well, while these all together hold no more numbers than one for
            so many unknowns. For a single system between `matrix_limit` and so many, GMRES is tried first, and a matrix
            made where that does not suffice; where the Jacobian that auto-differentiation gives leads nowhere,
            differences of func are tried. The gradient's linear equations, too, are solved with a matrix for no more
            unknowns. With both limits 0 there is never a matrix.
        krylov_dimension: the largest dimension of a Krylov space.
        max_restarts: how often GMRES goes on with another Krylov space where one is full.

    Raises:
        TypeError: `tolerance` is not a real number, or one of the others is not an int.
        ValueError: `tolerance` is not positive or more than 1; `max_iterations` or `krylov_dimension` is not positive;
            or one of the others is negative.
    """

    tolerance: float = 1e-4
    max_iterations: int = 50
    matrix_limit: int = 256
    fallback_limit: int = 4096
    krylov_dimension: int = 100
    max_restarts: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.tolerance, Real) or isinstance(self.tolerance, bool):
            raise TypeError(f"tolerance must be a real number, got {self.tolerance!r}")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"tolerance must be positive and at most 1, got {self.tolerance}")
        _check_int("max_iterations", self.max_iterations, 1)
        _check_int("matrix_limit", self.matrix_limit, 0)
        _check_int("fallback_limit", self.fallback_limit, 0)
        _check_int("krylov_dimension", self.krylov_dimension, 1)
        _check_int("max_restarts", self.max_restarts, 0)

    def allows_blocks(self, count: int, size: int) -> bool:
        """Whether there is a matrix for each of so many systems of a size, without GMRES being tried first."""
        return size <= self.matrix_limit or (count > 1 and count * size**2 <= self.fallback_limit**2)

    @property
    def largest_matrix(self) -> int:
        """The most unknowns for which a matrix is made at all."""
        return max(self.matrix_limit, self.fallback_limit)


def _check_int(argument: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")


DEFAULT_NEWTON = Newton()


def check_newton(newton: object) -> None:
    """Raise a TypeError unless `newton` is a `Newton`."""
    if not isinstance(newton, Newton):
        raise TypeError(f"newton must be a Newton, as torchdiffeq_lmm.Newton(tolerance=1e-5), got {newton!r}")
