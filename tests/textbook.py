"""Linear multistep methods as the books print them, and as one would program them without this package.

The coefficients are those of Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.1 and III.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor


@dataclass(frozen=True)
class Textbook:
    """Σ_j α_j x_{n+j} = h Σ_j β_j f_{n+j}, of some order, with the error constant C_{p+1} / σ(1)."""

    order: int
    alpha: tuple[Fraction, ...]
    beta: tuple[Fraction, ...]
    error_constant: Fraction


def _fractions(denominator: int, newest_first: Sequence[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(numerator, denominator) for numerator in reversed(newest_first))


def _adams(order: int, denominator: int, newest_first: Sequence[int], constant: Fraction) -> Textbook:
    alpha = _fractions(1, [1, -1] + [0] * (len(newest_first) - 2))
    return Textbook(order, alpha, _fractions(denominator, newest_first), constant)


def _bdf(order: int, denominator: int, newest_first: Sequence[int]) -> Textbook:
    """Of Σ α_j x_{n+j} = h f_{n+k}, as printed: with α_k other than 1."""
    scale = Fraction(denominator, newest_first[0])
    alpha = tuple(scale * a for a in _fractions(denominator, newest_first))
    return Textbook(order, alpha, (Fraction(0),) * order + (scale,), Fraction(-1, order + 1))


_AM = {
    2: _adams(2, 2, [1, 1], Fraction(-1, 12)),
    3: _adams(3, 12, [5, 8, -1], Fraction(-1, 24)),
    4: _adams(4, 24, [9, 19, -5, 1], Fraction(-19, 720)),
    5: _adams(5, 720, [251, 646, -264, 106, -19], Fraction(-3, 160)),
}


def _corrector(k: int) -> Textbook:
    """The Adams–Moulton formula of k - 1 steps, written over the k steps of its predictor."""
    return Textbook(k, (Fraction(0), *_AM[k].alpha), (Fraction(0), *_AM[k].beta), _AM[k].error_constant)


TEXTBOOK = {
    "leapfrog": Textbook(2, _fractions(1, [1, 0, -1]), _fractions(1, [0, 2, 0]), Fraction(1, 6)),
    "ab1": _adams(1, 1, [0, 1], Fraction(1, 2)),
    "ab2": _adams(2, 2, [0, 3, -1], Fraction(5, 12)),
    "ab3": _adams(3, 12, [0, 23, -16, 5], Fraction(3, 8)),
    "ab4": _adams(4, 24, [0, 55, -59, 37, -9], Fraction(251, 720)),
    "ab5": _adams(5, 720, [0, 1901, -2774, 2616, -1274, 251], Fraction(95, 288)),
    "nystrom3": Textbook(3, _fractions(1, [1, 0, -1, 0]), _fractions(3, [0, 7, -2, 1]), Fraction(1, 6)),
    **{f"abm{k}": _corrector(k) for k in range(2, 6)},
    **{f"am{k}": method for k, method in _AM.items()},
    "milne_simpson": Textbook(4, _fractions(1, [1, 0, -1]), _fractions(3, [1, 4, 1]), Fraction(-1, 180)),
    "bdf1": _bdf(1, 1, [1, -1]),
    "bdf2": _bdf(2, 2, [3, -4, 1]),
    "bdf3": _bdf(3, 6, [11, -18, 9, -2]),
    "bdf4": _bdf(4, 12, [25, -48, 36, -16, 3]),
    "bdf5": _bdf(5, 60, [137, -300, 300, -200, 75, -12]),
    "bdf6": _bdf(6, 60, [147, -360, 450, -400, 225, -72, 10]),
}

Function = Callable[[float, np.ndarray], np.ndarray]


def random_steps(seed: int, count: int, mean: float = 0.05, spread: float = 0.5) -> Tensor:
    """Steps whose ratios go up to exp(2 spread)."""
    generator = torch.Generator().manual_seed(seed)
    return mean * torch.exp(spread * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1))


def nodes_of(steps: Tensor) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(steps.detach().numpy())])


def interpolants(t: Sequence[float], values: Sequence[np.ndarray]) -> list[Polynomial]:
    """The polynomials through the values, one for each component."""
    # A single node spans no domain.
    domain = None if len(t) > 1 else [t[0] - 1, t[0] + 1]
    return [Polynomial.fit(t, column, len(t) - 1, domain=domain) for column in np.transpose(values)]


def integral(t: Sequence[float], values: Sequence[np.ndarray], start: float, end: float) -> np.ndarray:
    primitives = [polynomial.integ() for polynomial in interpolants(t, values)]
    return np.array([primitive(end) - primitive(start) for primitive in primitives])


def fixed_point(function: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """x = function(x), where that contracts."""
    x = start
    for _ in range(200):
        following = function(x)
        if np.array_equal(following, x):
            break
        x = following
    return x


def naive_start(t: np.ndarray, f: Function, x0: np.ndarray, sweeps: int, implicit: bool, first: bool) -> np.ndarray:
    """Deferred corrections at the nodes t: from Euler steps, every sweep repeats one with the last one's integral."""

    def euler(x: np.ndarray, n: int, rest: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """x + h (the slope of the Euler step) + rest, which may depend on nothing else."""
        h = t[n + 1] - t[n]
        if not implicit:
            return x + h * f(t[n], x) + rest(x)
        return fixed_point(lambda y: x + h * f(t[n + 1], y) + rest(y), x)

    xs = [x0]
    for n in range(len(t) - 1):
        xs.append(euler(xs[n], n, lambda _: np.zeros_like(x0)))
    for _ in range(sweeps - 1):
        old = [f(time, x) for time, x in zip(t, xs, strict=True)]
        known = slice(None) if first else slice(1, None)
        xs = [x0]
        for n in range(len(t) - 1):
            area = integral(t[known], old[known], t[n], t[n + 1])
            rest = area - (t[n + 1] - t[n]) * old[n + 1 if implicit else n]
            xs.append(euler(xs[n], n, lambda _, rest=rest: rest))
    return np.array(xs)


def _two_step_implicit(h: float, before: float) -> tuple[float, np.ndarray]:
    """e and the slopes' weights at t_{n+1}, t_n, t_{n-1}, from the conditions for t, t², t³, t⁴ about t_n."""
    at = np.array([h, 0.0, -before])
    conditions, moments = np.zeros((4, 4)), np.zeros(4)
    for power in range(1, 5):
        conditions[power - 1] = [-((-before) ** power), *(power * at ** (power - 1))]
        moments[power - 1] = h**power
    e, *weights = np.linalg.solve(conditions, moments)
    return e, np.array(weights)


def naive_step(name: str, t: np.ndarray, x: list[np.ndarray], slopes: list[np.ndarray], f: Function) -> np.ndarray:
    """The state at t[n + 1] by the method's definition, from the whole history at t[0], ..., t[n]."""
    n = len(x) - 1
    kind, k = name.rstrip("0123456789"), int("0" + name[-1]) if name[-1].isdigit() else 2
    now, new = t[n], t[n + 1]
    h = new - now

    def explicit_adams() -> np.ndarray:
        return x[n] + integral(t[n - k + 1 : n + 1], slopes[-k:], now, new)

    def adams_moulton(slope: np.ndarray) -> np.ndarray:
        return x[n] + integral(t[n - k + 2 : n + 2], [*slopes[n - k + 2 :], slope], now, new)

    if kind == "ab":
        return explicit_adams()
    if kind == "abm":
        return adams_moulton(f(new, explicit_adams()))
    if kind == "am":
        return fixed_point(lambda y: adams_moulton(f(new, y)), x[n])
    if kind == "nystrom":
        return x[n - 1] + integral(t[n - k + 1 : n + 1], slopes[-k:], t[n - 1], new)
    if kind == "leapfrog":
        r = h / (now - t[n - 1])
        return x[n] - r**2 * (x[n] - x[n - 1]) + h * (1 + r) * slopes[n]
    if kind == "milne_simpson":
        e, (b_new, b_now, b_before) = _two_step_implicit(h, now - t[n - 1])
        known = x[n] + e * (x[n] - x[n - 1]) + b_now * slopes[n] + b_before * slopes[n - 1]
        return fixed_point(lambda y: known + b_new * f(new, y), x[n])
    assert kind == "bdf"
    times, latest = t[n - k + 1 : n + 2] - new, x[n - k + 1 :]

    def slope_through(y: np.ndarray) -> np.ndarray:
        return np.array([polynomial.deriv()(0.0) for polynomial in interpolants(times, [*latest, y])])

    rest = slope_through(np.zeros_like(x[n]))
    scale = slope_through(np.ones_like(x[n])) - rest
    return fixed_point(lambda y: (f(new, y) - rest) / scale, x[n])


def naive_solution(name: str, t: np.ndarray, f: Function, x0: np.ndarray, start: int, sweeps: int) -> np.ndarray:
    """The states at all nodes, the first `start` steps by deferred corrections."""
    implicit = name.startswith(("am", "bdf", "milne"))
    start = min(start, len(t) - 1)
    x = list(naive_start(t[: start + 1], f, x0, sweeps, implicit, first=not name.startswith("bdf")))
    slopes = [f(time, state) for time, state in zip(t, x, strict=False)]
    for n in range(start, len(t) - 1):
        x.append(naive_step(name, t, x, slopes, f))
        slopes.append(f(t[n + 1], x[-1]))
    return np.array(x)
