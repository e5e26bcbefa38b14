"""Zero-stability on non-uniform grids: by how much the past of a method can amplify an error.

Where steps grow, the weights of the earlier increments do. A method that uses several of them, as BDF do, then
amplifies errors from step to step, whatever the problem; over many growing steps beyond all bounds.

Source: Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.5.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from .methods import Formula, MultistepMethod
from .stability import coefficients, is_strongly_stable

MAX_AMPLIFICATION = 1e8
"""More than this is taken for a grid on which the method does not work: results there have no correct digit."""


def check_variable_step_stability(
    method: MultistepMethod, lengths: Sequence[float], formulas: Iterable[Formula]
) -> None:
    """Raise a ValueError where the steps grow so that the method is not stable.

    Args:
        method: the method.
        lengths: of all steps.
        formulas: of the steps after the start, in any unit.
    """
    # The other roots of leapfrog and its like are on the unit circle, and their growth is bounded by that of the steps.
    if len(set(lengths[:-1])) <= 1 or len(method.on_equal_steps.increments) == 0 or not _damps(method):
        return
    amplified = amplification(formula.increments for formula in formulas)
    if amplified > MAX_AMPLIFICATION:
        ratio = max(after / before for before, after in pairwise(lengths))
        raise ValueError(
            f"method {method.name!r} is not stable on this grid: its steps, which grow by up to {ratio:.3g} from one "
            f"to the next, amplify errors by {amplified:.1e}. Let them grow by less than "
            f"{largest_stable_ratio(method):.4g} for long, or use a BDF method of lower order"
        )


def amplification(increment_weights: Iterable[Sequence[float]]) -> float:
    """By how much d_{n+1} = Σ_i e[n, i] d_{n-i} amplifies increments over the worst run of steps.

    Up to a small factor: a run is begun anew wherever the amplification has fallen below 1.

    Args:
        increment_weights: e[n] of one step after the other, all of the same length.
    """
    largest = 1.0
    product: np.ndarray | None = None
    for weights in increment_weights:
        companion = np.eye(len(weights), k=-1)
        companion[0] = weights
        product = companion if product is None else companion @ product
        norm = float(np.linalg.norm(product))
        largest = max(largest, norm)
        if norm < 1:
            product = None
        elif norm > MAX_AMPLIFICATION**2:
            break
    return largest


def largest_stable_ratio(method: MultistepMethod) -> float:
    """The ratio of steps that a method may grow by from each to the next, for any number of steps.

    Args:
        method: whose formula, on equal steps, damps all increments but one.
    """

    def is_stable(ratio: float) -> bool:
        lengths = [ratio**-i for i in range(1, method.steps)]
        nodes = [1.0, 0.0, *(-s for s in accumulate(lengths))]
        weights = [float(weight) for weight in method.formula(nodes).increments]
        return bool(np.all(np.abs(np.roots([1.0, *(-weight for weight in weights)])) < 1))

    low, high = 1.0, 10.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low


def _damps(method: MultistepMethod) -> bool:
    return is_strongly_stable(coefficients(method.on_equal_steps, method.steps)[0])
