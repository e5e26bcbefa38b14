"""What is known of a method: its theory, and what auto-differentiation makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .methods import MultistepMethod
from .stability import coefficients, effective_weights, error_constant, is_strongly_stable, order, parasitic_rate, roots

OscillationExtent = Literal["everywhere", "near observations", "nowhere"]


@dataclass(frozen=True)
class MethodInfo:
    """A linear multistep method Σ_j α_j x_{n+j} = h Σ_j β_j f_{n+j}; `print` it to read it.

    Attributes:
        name: its name.
        order: p, of convergence.
        steps: k.
        kind: "explicit", "predictor-corrector" or "implicit".
        evaluations: of func per step; None where an equation is solved.
        error_constant: C = C_{p+1} / σ(1), by which methods are compared: a step misses x by σ(1) C h^{p+1} x^{(p+1)}
            to leading order.
        alpha: α_0, ..., α_k, exact, with α_k = 1. Of the corrector, where there is a predictor.
        beta: β_0, ..., β_k, exact.
        roots: those of ρ(z) = Σ α_j zʲ, the largest first.
        weights: w_0, w_1, ..., by which f counts i nodes before an observation, in steps: the series of σ/ρ. They are
            also, for constant f, what auto-differentiation hands to the parameters there.
        oscillation: where the gradient of auto-differentiation oscillates around the functional gradient: everywhere,
            if ρ has another root on the unit circle; in a layer before every observation, and where the method starts;
            nowhere.
        parasitic_rate: r, if the method has a parasitic solution that does not die out: in y' = -y it goes as exp(r t),
            whatever the step, and takes over in the long run. None if it has none, and decays where y does, with steps
            that are short enough.
        any_grid: whether it keeps its order when the steps differ; else only the last step may.
    """

    name: str
    order: int
    steps: int
    kind: Literal["explicit", "predictor-corrector", "implicit"]
    evaluations: int | None
    error_constant: Fraction
    alpha: tuple[Fraction, ...]
    beta: tuple[Fraction, ...]
    roots: tuple[complex, ...]
    weights: tuple[Fraction, ...]
    oscillation: OscillationExtent
    parasitic_rate: float | None
    any_grid: bool

    def __str__(self) -> str:
        evaluations = "as many as its equation takes" if self.evaluations is None else str(self.evaluations)
        gradient = {
            "everywhere": "oscillates everywhere",
            "near observations": "oscillates in a layer before every observation",
            "nowhere": "does not oscillate",
        }[self.oscillation]
        lines = {
            "order": str(self.order),
            "error constant": str(self.error_constant),
            "formula": _equation(self.alpha, self.beta),
            "kind": f"{self.kind}, {self.steps} {'step' if self.steps == 1 else 'steps'}",
            "evaluations per step": evaluations,
            "roots of rho": ", ".join(_root(root) for root in self.roots),
            "effective weights": ", ".join(map(str, self.weights)) + ", ...",
            "gradient by AD": gradient,
            "decaying solutions": _decay(self.parasitic_rate),
            "grids": "any" if self.any_grid else "equal steps; the last one may differ",
        }
        return "\n".join([self.name, *(f"  {label + ':':<22}{value}" for label, value in lines.items())])


def info_of(method: MultistepMethod, count: int = 8) -> MethodInfo:
    """Work out what is known of a method.

    Args:
        method: the method.
        count: how many effective weights to give.
    """
    alpha, beta = coefficients(method.on_equal_steps, method.steps)
    weights = effective_weights(alpha, beta, max(count, 2 * method.steps + 2))
    oscillation: OscillationExtent = "everywhere"
    if is_strongly_stable(alpha):
        # The node of the observation itself may be left out, as by explicit methods, or counted in full.
        settled = all(weight == 1 for weight in weights[1:]) and weights[0] in (0, 1)
        oscillation = "nowhere" if settled else "near observations"
    return MethodInfo(
        name=method.name,
        order=order(alpha, beta),
        steps=method.steps,
        kind="implicit" if method.is_implicit else "explicit" if method.predictor is None else "predictor-corrector",
        evaluations=method.evaluations,
        error_constant=error_constant(alpha, beta),
        alpha=alpha,
        beta=beta,
        roots=tuple(roots(alpha)),
        weights=tuple(weights[:count]),
        oscillation=oscillation,
        parasitic_rate=parasitic_rate(alpha, beta),
        any_grid=method.closing is None,
    )


def _decay(rate: float | None) -> str:
    if rate is None:
        return "decay, with steps that are short enough"
    return f"not for these: where y goes as exp(-t), a parasitic solution goes as exp({rate:.3g} t)"


def _equation(alpha: Sequence[Fraction], beta: Sequence[Fraction]) -> str:
    states = _weighted_terms(alpha, "x")
    slopes = _weighted_terms(beta, "f")
    return f"{states} = h ({slopes})"


def _weighted_terms(weights: Sequence[Fraction], name: str) -> str:
    text = ""
    for j in range(len(weights) - 1, -1, -1):
        weight = weights[j]
        if weight == 0:
            continue
        sign = "-" if weight < 0 else "+"
        size = "" if abs(weight) == 1 else f"{abs(weight)} "
        index = "n" if j == 0 else f"n+{j}"
        text += f" {sign} {size}{name}[{index}]" if text else f"{'-' if weight < 0 else ''}{size}{name}[{index}]"
    return text


def _root(root: complex) -> str:
    # Rounding to the digits shown leaves a zero of either sign.
    real, imaginary = round(root.real, 4) + 0.0, round(root.imag, 4) + 0.0
    return f"{real:g}" if imaginary == 0 else f"{real:g}{imaginary:+g}i"
