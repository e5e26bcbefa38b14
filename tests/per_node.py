"""The gradient of every node's own parameters by every method, against the density by a fine continuous adjoint."""

from collections.abc import Callable
from functools import cache

import torch
from problems import GRIDS, Problem, Reference
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import method_info


def evaluated(name: str, steps: int) -> slice:
    """The nodes whose slopes are in the formula: f_0 in no BDF, the last one only where there is an f_{n+1}."""
    info = method_info(name)
    return slice(1 if name.startswith("bdf") else 0, steps if info.beta[-1] == 0 else steps + 1)


class PerNode:
    """f with its own parameter at every node, and the loss of `Reference` at some of them."""

    def __init__(self, problem: Problem, nodes: Tensor) -> None:
        self.problem = problem
        self.nodes = nodes
        # Evaluated between the nodes f raises a KeyError.
        self.index = {t: n for n, t in enumerate(nodes.tolist())}
        self.theta = torch.tensor(problem.theta(nodes.numpy()).T.copy()).requires_grad_()
        self.rows = self.theta.unbind()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.problem.torch_f(x, self.rows[self.index[float(t)]])

    def gradients(
        self, name: str, observed: list[int], grad_filter: object, weight: float = 1.0, rtol: float = 1e-9
    ) -> Tensor:
        """The gradient of every node's parameter, divided by the step after it, and by the last one at the last."""
        x0 = torch.tensor(self.problem.x0, dtype=torch.float64)
        options = {"grid_constructor": lambda func, y0, t: self.nodes}
        states = torchdiffeq_lmm.odeint(
            self,
            x0,
            self.nodes[[0, *observed]],
            method=name,
            options=options,
            grad_filter=grad_filter,
            rtol=rtol,
            atol=0.1 * rtol,
        )
        (0.5 * weight * (states[1:] - torch.tensor(self.problem.target, dtype=torch.float64)).square().sum()).backward()
        steps = self.nodes.diff()
        return self.theta.grad / torch.cat([steps, steps[-1:]])[:, None]


@cache
def reference(problem: Problem, observed: tuple[float, ...], weight: float = 1.0) -> Reference:
    return Reference(problem, list(observed), weight)


@cache
def density(problem: Problem, grid: str, steps: int, observed: tuple[int, ...], weight: float) -> tuple[Tensor, Tensor]:
    nodes = GRIDS[grid](steps, problem.horizon)
    of = reference(problem, tuple(nodes[list(observed)].tolist()), weight)
    return nodes, of.density(nodes, last=True)


OBSERVATIONS: dict[str, Callable[[int], list[int]]] = {
    "at the end": lambda n: [n],
    "four": lambda n: [n // 4, n // 2, 3 * n // 4, n],
    "at every node": lambda n: list(range(1, n + 1)),
    "at every fourth node": lambda n: list(range(4, n + 1, 4)),
    "in the start": lambda n: [1, 2, 3, n],
    "at neighbours": lambda n: [n // 2, n // 2 + 1, n - 1, n],
}


@cache
def density_errors(
    name: str, grad_filter: object, grid: str, observations: str, problem: Problem, steps: int, rtol: float = 1e-6
) -> tuple[Tensor, slice]:
    observed = OBSERVATIONS[observations](steps)
    weight = 1 / len(observed)
    nodes, exact = density(problem, grid, steps, tuple(observed), weight)
    gradients = PerNode(problem, nodes).gradients(name, observed, grad_filter, weight, rtol)
    return (gradients - exact).abs().amax(1), evaluated(name, steps)
