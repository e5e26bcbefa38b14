"""Nonlinear problems with time-varying parameters, grids, and an independent reference: a fine continuous adjoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """x' = f(x, θ(t)) on [0, horizon] in two dimensions, with θ(t) in two dimensions.

    `f`, `theta` and the products with its Jacobians are written once, for numpy arrays; `torch_f` is f for tensors.
    """

    name: str
    horizon: float
    x0: tuple[float, float]
    target: tuple[float, float]
    torch_f: Callable[[Tensor, Tensor], Tensor]
    theta: Callable[[np.ndarray], np.ndarray]
    f: Callable[[np.ndarray, np.ndarray], np.ndarray]
    state_vjp: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    theta_vjp: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


# With few operations, for each takes its time forwards and backwards.


def _pendulum(x: Tensor, theta: Tensor) -> Tensor:
    (angle, speed), (one, two) = x.unbind(), theta.unbind()
    return torch.stack([speed * one, torch.addcmul(-0.3 * speed, angle.sin(), two, value=-1)])


def _lotka_volterra(x: Tensor, theta: Tensor) -> Tensor:
    (prey, hunters), (one, two) = x.unbind(), theta.unbind()
    return torch.stack([prey * (one - hunters), hunters * (prey - two)])


def _van_der_pol(x: Tensor, theta: Tensor) -> Tensor:
    (place, speed), (one, two) = x.unbind(), theta.unbind()
    return torch.stack([speed, one * (1 - place * place) * speed - two * place])


def _epidemic(x: Tensor, theta: Tensor) -> Tensor:
    (healthy, ill), (one, two) = x.unbind(), theta.unbind()
    new = one * healthy * ill
    return torch.stack([-new, torch.addcmul(new, two, ill, value=-1)])


PENDULUM = Problem(
    name="pendulum",
    horizon=2.0,
    x0=(1.0, 0.5),
    target=(0.3, -0.2),
    torch_f=_pendulum,
    theta=lambda t: np.stack([1 + 0.5 * np.sin(3 * t), 1.5 + t]),
    f=lambda x, th: np.stack([x[1] * th[0], -np.sin(x[0]) * th[1] - 0.3 * x[1]]),
    state_vjp=lambda x, th, p: np.stack([-np.cos(x[0]) * th[1] * p[1], th[0] * p[0] - 0.3 * p[1]]),
    theta_vjp=lambda x, th, p: np.stack([x[1] * p[0], -np.sin(x[0]) * p[1]]),
)

LOTKA_VOLTERRA = Problem(
    name="lotka-volterra",
    horizon=3.0,
    x0=(1.2, 0.8),
    target=(0.9, 0.6),
    torch_f=_lotka_volterra,
    theta=lambda t: np.stack([1 + 0.3 * np.cos(2 * t), 0.8 + 0.2 * t]),
    f=lambda x, th: np.stack([th[0] * x[0] - x[0] * x[1], x[0] * x[1] - th[1] * x[1]]),
    state_vjp=lambda x, th, p: np.stack([(th[0] - x[1]) * p[0] + x[1] * p[1], -x[0] * p[0] + (x[0] - th[1]) * p[1]]),
    theta_vjp=lambda x, th, p: np.stack([x[0] * p[0], -x[1] * p[1]]),
)

PROBLEMS = (PENDULUM, LOTKA_VOLTERRA)

VAN_DER_POL = Problem(
    name="van-der-pol",
    horizon=2.0,
    x0=(1.5, 0.0),
    target=(-0.4, -0.9),
    torch_f=_van_der_pol,
    theta=lambda t: np.stack([1 + 0.4 * np.cos(3 * t), 1 + 0.5 * np.sin(2 * t)]),
    f=lambda x, th: np.stack([x[1], th[0] * (1 - x[0] ** 2) * x[1] - th[1] * x[0]]),
    state_vjp=lambda x, th, p: np.stack(
        [-(2 * th[0] * x[0] * x[1] + th[1]) * p[1], p[0] + th[0] * (1 - x[0] ** 2) * p[1]]
    ),
    theta_vjp=lambda x, th, p: np.stack([(1 - x[0] ** 2) * x[1] * p[1], -x[0] * p[1]]),
)

EPIDEMIC = Problem(
    name="epidemic",
    horizon=4.0,
    x0=(0.9, 0.1),
    target=(0.4, 0.1),
    torch_f=_epidemic,
    theta=lambda t: np.stack([1.8 + 0.6 * np.sin(2 * t), 0.6 + 0.1 * t]),
    f=lambda x, th: np.stack([-th[0] * x[0] * x[1], th[0] * x[0] * x[1] - th[1] * x[1]]),
    state_vjp=lambda x, th, p: np.stack([th[0] * x[1] * (p[1] - p[0]), th[0] * x[0] * (p[1] - p[0]) - th[1] * p[1]]),
    theta_vjp=lambda x, th, p: np.stack([x[0] * x[1] * (p[1] - p[0]), -x[1] * p[1]]),
)


BEYOND = 1e-6
"""How far the flow is solved beyond the horizon, for last nodes that rounding has put there."""


@cache
def _flow(problem: Problem) -> Callable[[float | np.ndarray], np.ndarray]:
    """From times to x, and the matrix Y with Y' = -(∂f/∂x)ᵀ Y that is the identity at 0: of shape (6,) or (6, n).

    By SciPy's DOP853 at tight tolerances; once for all observations of a problem, whose costates are Y times vectors.
    """

    def slope(t: float, both: np.ndarray) -> np.ndarray:
        x, theta = both[:2], problem.theta(t)
        adjoint = -problem.state_vjp(x, theta, both[2:].reshape(2, 2))
        return np.concatenate([problem.f(x, theta), adjoint.ravel()])

    begin = np.concatenate([problem.x0, np.eye(2).ravel()])
    span = (0.0, problem.horizon + BEYOND)
    return solve_ivp(slope, span, begin, method="DOP853", rtol=1e-12, atol=1e-13, dense_output=True).sol


class Reference:
    """The flow and its continuous adjoint for E = Σ_j ½ |x(t_j) - target|², by SciPy.

    Args:
        problem: the problem.
        observed: the observation times t_j, increasing, the last one the end of the solve.
        weight: a factor on E.
    """

    def __init__(self, problem: Problem, observed: list[float], weight: float = 1.0) -> None:
        assert observed[-1] <= problem.horizon + BEYOND
        self.problem = problem
        self.observed = observed
        at = np.array(observed)
        jumps = weight * (self.state(at) - np.array(problem.target)[:, None])
        # p is Y times what observations from there on have brought in.
        brought = np.linalg.solve(np.moveaxis(self._adjoint(at), 2, 0), jumps.T[..., None])[..., 0]
        self._sums = brought[::-1].cumsum(0)[::-1]
        self.x0_gradient = self._sums[0]

    def state(self, t: float | np.ndarray) -> np.ndarray:
        """x(t), of shape (2,); or of shape (2, n) for n times."""
        return _flow(self.problem)(t)[:2]

    def _adjoint(self, times: np.ndarray) -> np.ndarray:
        """Y at n times, of shape (2, 2, n)."""
        return _flow(self.problem)(times)[2:].reshape(2, 2, -1)

    def costate(self, t: float, left_weight: float) -> np.ndarray:
        """p(t); at an observation inside the interval the mean of its limits, the one from the left so weighted."""
        return self.costates(np.array([t]), np.array([left_weight]))[:, 0]

    def costates(self, times: np.ndarray, left_weights: np.ndarray) -> np.ndarray:
        """`costate` at n times, of shape (2, n)."""
        last = len(self.observed) - 1
        # An observation at a time is in the limit from the left alone; at the end there is no other.
        left, right = (np.minimum(np.searchsorted(self.observed, times + shift), last) for shift in (-1e-9, 1e-9))
        sums = left_weights[:, None] * self._sums[left] + (1 - left_weights)[:, None] * self._sums[right]
        return np.einsum("ijn,nj->in", self._adjoint(times), sums)

    def density(self, nodes: Tensor, last: bool = False) -> Tensor:
        """The functional gradient (∂f/∂θ)ᵀ p at the nodes, of shape (N, 2), or (N + 1, 2) with the last one.

        At an observed node the limits of p have the weights of the steps that they belong to.
        """
        times, steps = nodes.numpy(), nodes.diff().numpy()
        left_weights = np.concatenate([[0.0], steps[:-1] / (steps[:-1] + steps[1:]), [1.0]])
        if not last:
            times, left_weights = times[:-1], left_weights[:-1]
        states, costates = self.state(times), self.costates(times, left_weights)
        return torch.tensor(self.problem.theta_vjp(states, self.problem.theta(times), costates).T.copy())


def derivative_of_a_shared_parameter(of: Reference) -> float:
    """∂E/∂φ for θ_1(t) = 1 + φ sin 3t, where the end alone is observed: the integral of the density times sin 3t."""
    (end,) = of.observed
    points, weights = np.polynomial.legendre.leggauss(60)
    times = (points + 1) * end / 2
    density = of.density(torch.tensor([*times, end]))[:, 0].numpy()
    return float((weights * density * np.sin(3 * times)).sum() * end / 2)


def _random(steps: int, horizon: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    lengths = 0.8 + 0.4 * torch.rand(20, generator=generator, dtype=torch.float64)
    return _from_steps(lengths.repeat_interleave(steps // 20), horizon)


def _from_steps(lengths: Tensor, horizon: float) -> Tensor:
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])
    nodes = nodes * (horizon / nodes[-1])
    nodes[-1] = horizon
    return nodes


def _ones(steps: int) -> Tensor:
    return torch.ones(steps, dtype=torch.float64)


# From the number of steps, a multiple of 20, and the horizon to nodes. The random one refines 20 random steps: with
# steps drawn anew for every number of steps, leapfrog has order 3/2.
GRIDS: dict[str, Callable[[int, float], Tensor]] = {
    "uniform": lambda n, T: _from_steps(_ones(n), T),
    "truncated": lambda n, T: _from_steps(torch.cat([_ones(n - 1), 0.3 * _ones(1)]), T),
    "growing": lambda n, T: _from_steps(torch.exp(1.5 * torch.arange(n, dtype=torch.float64) / n), T),
    "abrupt": lambda n, T: _from_steps(torch.cat([_ones(n // 2), 0.25 * _ones(n - n // 2)]), T),
    "random": _random,
}


def orders(errors: list[float]) -> list[float]:
    """The measured orders between errors for steps that halve."""
    return [float(np.log2(a / b)) for a, b in pairwise(errors)]
