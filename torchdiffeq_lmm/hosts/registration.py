"""Which solvers torchdiffeq and torchsde learn from this package, the user's own methods among them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from numbers import Rational, Real

from torchdiffeq_lmm.schemes.method_info import MethodInfo, info_of
from torchdiffeq_lmm.schemes.methods import (
    LEAPFROG,
    METHODS,
    MultistepMethod,
    adams_bashforth_formula,
    adams_moulton_formula,
    bdf_formula,
    constant_formula,
)
from torchdiffeq_lmm.schemes.runge_kutta import TWO_STAGE_METHODS
from torchdiffeq_lmm.schemes.stability import order, unstable_root
from torchdiffeq_lmm.schemes.variable_order import FAMILIES

from .adaptive_solver import AdaptiveSolver, adaptive_solver_of
from .sde_solver import MultistepSDESolver, sde_solver_of
from .solver import Leapfrog, MultistepSolver, solver_of
from .torchdiffeq_host import add_solvers, check_free, remove_solvers
from .torchsde_host import add_sde_solvers, check_free_sde, remove_sde_solvers

ODE_SOLVERS: dict[str, type[MultistepSolver] | type[AdaptiveSolver]] = {
    **{method.name: Leapfrog if method is LEAPFROG else solver_of(method) for method in METHODS},
    **{method.name: solver_of(method) for method in TWO_STAGE_METHODS},
    **{family.name: adaptive_solver_of(family) for family in FAMILIES},
}

SDE_SOLVERS: dict[str, type[MultistepSDESolver]] = {method.name: sde_solver_of(method) for method in METHODS}


def register() -> None:
    """Enter this package's methods into the method tables of torchdiffeq and torchsde. Importing the package does it.

    May be called any number of times.

    Raises:
        RuntimeError: either has a method of one of the names that is not ours. Nothing is entered then.
    """
    _enter(ODE_SOLVERS, SDE_SOLVERS)


def unregister() -> None:
    """Take this package's methods out of both method tables again; `register` brings them back.

    May be called any number of times. Methods of the same name that are not ours stay.
    """
    remove_solvers(ODE_SOLVERS)
    remove_sde_solvers(SDE_SOLVERS)


def register_method(name: str, alpha: Sequence[float | Fraction], beta: Sequence[float | Fraction]) -> MethodInfo:
    """Register a linear multistep method of your own, Σ_j α_j x_{n+j} = h Σ_j β_j f_{n+j}.

    It starts by itself, and keeps all promises of this package's own methods, gradient filters included; but constant
    coefficients hold for equal steps, so that on a non-uniform grid it raises a ValueError. The last step may differ:
    it is made by the Adams or BDF formula of the same order.

    Args:
        name: under which torchdiffeq and torchsde shall know it.
        alpha: α_0, ..., α_k, with α_k ≠ 0, by which everything is divided. Fractions are exact; of floats the nearest
            simple fraction is taken where it is as near as rounding.
        beta: β_0, ..., β_k. With β_k = 0 the method is explicit.

    Returns:
        What is known of it: see `MethodInfo`.

    Raises:
        TypeError: `name` is not a string, or a coefficient not a real number.
        ValueError: the coefficients do not make a method: they are too few, of different lengths, not finite, α_k is
            0, the method is not consistent, or violates the root condition. Or `name` is taken by another method of
            this package; by the same one it may be, and nothing changes.
        RuntimeError: torchdiffeq or torchsde has a method of that name that is not ours.

    Source: Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.2 and III.3.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not name:
        raise ValueError("name must not be empty, got ''")
    exact_alpha, exact_beta = _normalised(_fractions("alpha", alpha), _fractions("beta", beta))
    p = _check_method(exact_alpha, exact_beta)
    formula = partial(constant_formula, exact_alpha, exact_beta)
    closing = partial(adams_bashforth_formula, p)
    if exact_beta[-1] != 0:
        closing = partial(adams_moulton_formula if any(exact_beta[:-1]) else bdf_formula, p)
    method = MultistepMethod(name, p, len(exact_alpha) - 1, formula, closing=closing)
    known = ODE_SOLVERS.get(name)
    if known is not None and (
        not isinstance(known.method, MultistepMethod)
        or known.method.predictor is not None
        or known.method.on_equal_steps != method.on_equal_steps
    ):
        raise ValueError(f"name must be new, got {name!r}, which is a method of this package already; choose another")
    solver = known or solver_of(method)
    sde_solver = SDE_SOLVERS.get(name) or sde_solver_of(method)
    _enter({name: solver}, {name: sde_solver})
    ODE_SOLVERS[name], SDE_SOLVERS[name] = solver, sde_solver
    return method_info(name)


def method_info(name: str) -> MethodInfo:
    """What is known of a method of this package: order, error constant, roots, weights, and what AD makes of it.

    Args:
        name: of a multistep method, of this package or your own.

    Raises:
        ValueError: there is none of that name.
    """
    solver = ODE_SOLVERS.get(name)
    if solver is None or not isinstance(solver.method, MultistepMethod):
        names = [known for known, solver in ODE_SOLVERS.items() if isinstance(solver.method, MultistepMethod)]
        raise ValueError(f"name must be one of {', '.join(map(repr, names))}, got {name!r}")
    return info_of(solver.method)


def _enter(solvers: Mapping[str, type], sde_solvers: Mapping[str, type]) -> None:
    """Enter them into both tables, all or none."""
    check_free(solvers)
    check_free_sde(sde_solvers)
    add_solvers(solvers)
    add_sde_solvers(sde_solvers)


def _fractions(argument: str, coefficients: Sequence[float | Fraction]) -> list[Fraction]:
    exact = []
    if not isinstance(coefficients, Iterable):
        raise TypeError(f"{argument} must be a sequence of real numbers, got {coefficients!r}")
    for j, coefficient in enumerate(coefficients):
        if not isinstance(coefficient, Real) or isinstance(coefficient, bool):
            raise TypeError(f"{argument}[{j}] must be a real number, got {coefficient!r}")
        if isinstance(coefficient, Rational):
            exact.append(Fraction(int(coefficient.numerator), int(coefficient.denominator)))
            continue
        value = float(coefficient)
        if not math.isfinite(value):
            raise ValueError(f"{argument}[{j}] must be finite, got {value}")
        simple = Fraction(value).limit_denominator(100_000)
        exact.append(simple if math.isclose(simple, value, rel_tol=4e-16) else Fraction(value))
    return exact


def _normalised(
    alpha: Sequence[Fraction], beta: Sequence[Fraction]
) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    if len(alpha) != len(beta) or len(alpha) < 2:
        raise ValueError(
            f"alpha and beta must have the same length k + 1, at least 2, got {len(alpha)} and {len(beta)}; fill up "
            f"with zeros"
        )
    if alpha[-1] == 0:
        raise ValueError("alpha[-1] must not be 0: x_{n+k} is what a step makes. Leave out the last of both")
    if alpha[0] == 0 and beta[0] == 0:
        raise ValueError(
            "alpha[0] and beta[0] must not both be 0: the method has fewer steps. Leave out the first of both"
        )
    return tuple(a / alpha[-1] for a in alpha), tuple(b / alpha[-1] for b in beta)


def _check_method(alpha: tuple[Fraction, ...], beta: tuple[Fraction, ...]) -> int:
    """Return the order of a method, at least 1."""
    p = order(alpha, beta)
    if p < 0:
        raise ValueError(
            f"alpha violates consistency, rho(1) = 0: with alpha[-1] = 1 its sum must be 0, got {float(sum(alpha)):.6g}"
        )
    if p < 1:
        derivative = sum(j * a for j, a in enumerate(alpha))
        raise ValueError(
            f"alpha and beta violate consistency, rho'(1) = sigma(1): with alpha[-1] = 1, the sum of j alpha[j] is "
            f"{float(derivative):.6g}, that of beta {float(sum(beta)):.6g}"
        )
    unstable = unstable_root(alpha)
    if unstable is not None:
        root, multiplicity = unstable
        shown = f"{root.real:.6g}" if abs(root.imag) < 1e-6 else f"{root:.6g}"
        what = "lies outside the unit circle" if abs(root) > 1 + 1e-4 else "lies on the unit circle"
        raise ValueError(
            f"alpha violates the root condition (zero-stability): the root {shown} of rho, of multiplicity "
            f"{multiplicity} and modulus {abs(root):.6g}, {what}; every root must be inside, or on it and simple"
        )
    return p
