"""Some steps on end as one graph, against plain auto-differentiation through all of them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.autodiff.checkpoint_segment import SegmentGraph, segment_graph, segment_vjp
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.methods import METHODS
from torchdiffeq_lmm.schemes.unrolling import unroll

METHOD = {method.name: method for method in METHODS}
EQUAL = torch.full((12,), 0.1, dtype=torch.float64)
GRIDS = {
    "equal": EQUAL,
    "changing": torch.cat([EQUAL[:5], EQUAL[:4] / 3, EQUAL[:3]]),
    "unequal": 0.1 * (1 + 0.3 * torch.sin(torch.arange(12, dtype=torch.float64))),
}


def no_implicit(*args: object) -> tuple[Tensor, Tensor]:
    raise AssertionError


class Problem:
    """A solve with two parameters, of which the loss sees four nodes."""

    def __init__(self, method: str, grid: str) -> None:
        self.recurrence = unroll(METHOD[method], GRIDS[grid])
        self.x0 = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
        self.theta = torch.tensor([1.3, 0.4], dtype=torch.float64, requires_grad=True)
        self.unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        nodes = self.recurrence.nodes
        self.seen = {nodes[n]: torch.tensor([1.0 + n, -2.0], dtype=torch.float64) for n in (0, 3, 4, 8, 12)}

    def slope(self, state: int, x: Tensor) -> Tensor:
        return torch.stack([x[1] * self.theta[0], -torch.sin(x[0] + 0.1 * state) * self.theta[1]])

    def wanted(self) -> tuple[Tensor, Tensor]:
        loss = (self.seen[0] * self.x0).sum()
        for state, x in march(History(self.x0), self.recurrence.rows, self.slope, no_implicit):
            if state in self.seen:
                loss = loss + (self.seen[state] * x).sum()
        return torch.autograd.grad(loss, (self.x0, self.theta))

    def stretches(self, borders: list[int]) -> list[SegmentGraph]:
        """From node to node, each going on from what the steps before it have left without a graph."""
        states = [self.recurrence.nodes[node] for node in borders]
        found, history = [], History(self.x0.detach())
        for first, end in pairwise(states):
            rows = self.recurrence.rows[first:end]
            found.append(segment_graph(history, rows, self.slope, no_implicit, first))
            with torch.no_grad():
                for _ in march(history, rows, self.slope, no_implicit, first):
                    pass
        return found


@pytest.mark.parametrize("borders", [[0, 12], [0, 1, 12], [0, 4, 5, 6, 12], [0, 3, 7, 11, 12]])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ["leapfrog", "nystrom3", "ab1", "ab3", "ab5", "abm3"])
@pytest.mark.one_in(5)
def test_stretch_after_stretch_gives_the_gradient_of_all_steps(method: str, grid: str, borders: list[int]) -> None:
    problem = Problem(method, grid)
    stretches = problem.stretches(borders)
    carried: list[Tensor | None] = [None] * len(stretches[-1].end)
    theta = torch.zeros_like(problem.theta)
    for stretch in reversed(stretches):
        carried, (grad, unused) = segment_vjp(stretch, carried, problem.seen, (problem.theta, problem.unused))
        theta += grad
        assert unused is None
    wanted = problem.wanted()
    torch.testing.assert_close(carried[0] + problem.seen[0], wanted[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(theta, wanted[1], rtol=1e-13, atol=1e-13)


def test_what_nobody_sees_has_no_gradient() -> None:
    problem = Problem("ab2", "equal")
    (stretch,) = problem.stretches([0, 12])
    carried, grads = segment_vjp(stretch, [None] * len(stretch.end), {}, (problem.theta,))
    assert carried == [None]
    assert grads == [None]


def test_a_stretch_is_cut_off_from_what_came_before() -> None:
    problem = Problem("leapfrog", "equal")
    stretch = segment_graph(History(problem.x0), problem.recurrence.rows[:3], problem.slope, no_implicit, 0)
    assert stretch.begin[0].is_leaf
    assert stretch.begin[0] is not problem.x0
    assert list(stretch.states) == [1, 2, 3]
