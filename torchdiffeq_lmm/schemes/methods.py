"""What a linear multistep method is: a formula generated from its definition, on any nodes. No states, no functions.

Every consistent method can be written in increments ``d_{n+1} := x_{n+1} - x_n``, because ρ(1) = 0:

    d_{n+1} = Σ_i e_i d_{n-i} + Σ_i b_i f_{n-i} + b* f_{n+1},      x_{n+1} = x_n + d_{n+1},      i = 0, 1, ...

This form is used throughout. It keeps its accuracy where a tiny step precedes a large one, and its adjoint carries the
running sum P that the gradient filters need (see `filters.costate`) as the cotangent of x_n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Protocol

from .polynomials import (
    Number,
    differentiation_weights,
    integral,
    integration_weights,
    lagrange_basis,
    nodal_polynomial,
)


@dataclass(frozen=True)
class Formula:
    """The weights of one step, in units of that step.

    Attributes:
        increments: e_0, e_1, ..., of the increments d_n, d_{n-1}, ...; dimensionless.
        slopes: b_0, b_1, ..., of f_n, f_{n-1}, ..., divided by the step.
        implicit: b*, of f_{n+1}, divided by the step; 0 for an explicit formula.
    """

    increments: tuple[Number, ...]
    slopes: tuple[Number, ...]
    implicit: Number = 0


Nodes = Sequence[Number]
"""t_{n+1}, t_n, t_{n-1}, ... in the scale in which t_n = 0 and t_{n+1} = 1."""


class Method(Protocol):
    """What a solver needs to know of any method; see `MultistepMethod`."""

    @property
    def name(self) -> str:
        """The name under which torchdiffeq knows it."""

    @property
    def order(self) -> int:
        """Its order of convergence, or the highest one."""

    @property
    def is_implicit(self) -> bool:
        """Whether every step has an equation to solve."""

    @property
    def remembers_slopes(self) -> bool:
        """Whether it uses other slopes than the latest, for steps or for its start."""


@dataclass(frozen=True)
class MultistepMethod:
    """A linear multistep method, or a predictor and a corrector made of two.

    Attributes:
        name: the name under which torchdiffeq knows it.
        order: its order of convergence.
        steps: k, how many of the latest nodes before the new one the formula reaches.
        formula: from the k + 1 nodes t_{n+1}, t_n, ..., t_{n+1-k} to the weights.
        predictor: where it is given, the method is explicit: f_{n+1} is evaluated at what the predictor gives (PECE).
        closing: None where `formula` holds for any nodes. Else it holds for equal steps only, and this is the formula,
            of the same order, for a last step of another length.
    """

    name: str
    order: int
    steps: int
    formula: Callable[[Nodes], Formula]
    predictor: Callable[[Nodes], Formula] | None = None
    closing: Callable[[Nodes], Formula] | None = None

    @cached_property
    def on_equal_steps(self) -> Formula:
        """The weights on a uniform grid, exact."""
        return self.formula([Fraction(1 - i) for i in range(self.steps + 1)])

    @property
    def is_implicit(self) -> bool:
        """Whether every step has an equation to solve."""
        return self.predictor is None and self.on_equal_steps.implicit != 0

    @property
    def uses_first_slope(self) -> bool:
        """Whether f at t_0 takes part; in a formula with no slope but the new one it does not."""
        return not self.is_implicit or any(self.on_equal_steps.slopes)

    @property
    def remembers_slopes(self) -> bool:
        """Whether it uses other slopes than the latest, for steps or for its start."""
        uses_one = self.predictor is None and not self.is_implicit and len(self.on_equal_steps.slopes) == 1
        return not uses_one or self.order > 2

    @property
    def starts_above_its_order(self) -> bool:
        """Whether, explicit, it is started by one sweep more than its order needs.

        An error that its own order allows the start would be most of what PECE methods have, and for ever on the other
        roots of methods of Nyström's kind. That of Adams–Bashforth methods is so large that it hardly counts. Leapfrog
        remembers no slopes, and its filters and its way back rest on an Euler step.
        """
        has_other_roots = len(self.on_equal_steps.increments) > 0
        return self.predictor is not None or (has_other_roots and self.remembers_slopes)

    @property
    def evaluations(self) -> int | None:
        """How many times a step evaluates func; None where that depends on the equation to solve."""
        return None if self.is_implicit else 1 if self.predictor is None else 2


def adams_bashforth_formula(k: int, nodes: Nodes) -> Formula:
    """The integral over the step of the polynomial through the k latest slopes."""
    return Formula((), tuple(integration_weights(nodes[1 : k + 1], nodes[1], nodes[0])))


def adams_moulton_formula(k: int, nodes: Nodes) -> Formula:
    """The integral over the step of the polynomial through the new slope and the k - 1 latest ones."""
    implicit, *slopes = integration_weights(nodes[:k], nodes[1], nodes[0])
    return Formula((), tuple(slopes), implicit)


def nystrom_formula(k: int, nodes: Nodes) -> Formula:
    """The integral over two steps of the polynomial through the k latest slopes."""
    return Formula((-1,), tuple(integration_weights(nodes[1 : k + 1], nodes[2], nodes[0])))


def bdf_formula(k: int, nodes: Nodes) -> Formula:
    """The polynomial through the new state and the k latest ones has the new slope."""
    scale, *sums = _partial_sums(differentiation_weights(nodes[: k + 1], nodes[0]))
    return Formula(tuple(-s / scale for s in sums), (), 1 / scale)


def two_step_formula(explicit: bool, nodes: Nodes) -> Formula:
    """The formula of highest order for d_{n+1} by d_n and the slopes at t_n or, implicit, at t_{n+1}, t_n, t_{n-1}.

    Leapfrog and Milne–Simpson, for steps of any lengths. With q' the nodal polynomial of the slopes, all of which it
    makes vanish, the formula says d_{n+1} = e_0 d_n: that is e_0. The slopes' weights then integrate the rest.
    """
    at = nodes[1:2] if explicit else nodes[:3]
    new, latest, earlier = nodes[:3]
    omega = nodal_polynomial(at)
    e = integral(omega, latest, new) / integral(omega, earlier, latest)
    weights = tuple(integral(basis, latest, new) - e * integral(basis, earlier, latest) for basis in lagrange_basis(at))
    return Formula((e,), weights) if explicit else Formula((e,), weights[1:], weights[0])


def constant_formula(alpha: Sequence[Fraction], beta: Sequence[Fraction], nodes: Nodes) -> Formula:  # noqa: ARG001
    """Σ_j α_j x_{n+j} = h Σ_j β_j f_{n+j} in increments, α_k = 1; for equal steps."""
    _, *sums = _partial_sums(alpha[::-1])
    implicit, *slopes = beta[::-1]
    return Formula(_trimmed([-s for s in sums]), _trimmed(slopes), implicit)


def _partial_sums(weights: Sequence[Number]) -> list[Number]:
    """The weights of the increments in Σ w_i x_{n+1-i}, Σ w_i = 0: w_0, w_0 + w_1, ...; not the last, which is 0."""
    sums = [weights[0]]
    for weight in weights[1:-1]:
        sums.append(sums[-1] + weight)
    return sums


def _trimmed(weights: list[Fraction]) -> tuple[Fraction, ...]:
    while weights and weights[-1] == 0:
        weights = weights[:-1]
    return tuple(weights)


LEAPFROG = MultistepMethod("leapfrog", 2, 2, partial(two_step_formula, True))

METHODS = (
    LEAPFROG,
    *(MultistepMethod(f"ab{k}", k, k, partial(adams_bashforth_formula, k)) for k in range(1, 6)),
    MultistepMethod("nystrom3", 3, 3, partial(nystrom_formula, 3)),
    *(
        MultistepMethod(
            f"abm{k}", k, k, partial(adams_moulton_formula, k), predictor=partial(adams_bashforth_formula, k)
        )
        for k in range(2, 6)
    ),
    *(MultistepMethod(f"am{k}", k, k - 1, partial(adams_moulton_formula, k)) for k in range(2, 6)),
    MultistepMethod("milne_simpson", 4, 2, partial(two_step_formula, False)),
    *(MultistepMethod(f"bdf{k}", k, k, partial(bdf_formula, k)) for k in range(1, 7)),
)
