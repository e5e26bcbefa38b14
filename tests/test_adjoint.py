"""The discrete adjoint against auto-differentiation of the recurrence it is the adjoint of."""

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.adjoint import discrete_adjoint
from torchdiffeq_lmm.stepping import march


@pytest.mark.parametrize(("increments", "slopes"), [(0, 1), (0, 3), (1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_matches_autograd_for_any_recurrence(increments: int, slopes: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5

    rows = [(tuple(draw(increments).tolist()), tuple(draw(slopes).tolist())) for _ in range(steps)]
    matrices = draw(steps, 2, 2)
    node_cotangents = [None, *draw(steps, 2).unbind()]
    slope_cotangents = draw(steps, 2)

    x0 = draw(2).requires_grad_()
    forcing = [draw(2).requires_grad_() for _ in range(steps)]
    loss = torch.zeros((), dtype=torch.float64)
    for n, slope, x in march(x0, rows, lambda n, x: matrices[n] @ x + forcing[n]):
        loss = loss + x @ node_cotangents[n + 1] + slope @ slope_cotangents[n]
    loss.backward()

    arrived = {}

    def pull_back(n: int, mu: Tensor | None) -> Tensor | None:
        if mu is None:
            return None
        arrived[n] = mu + slope_cotangents[n]
        return matrices[n].T @ arrived[n]

    backwards = list(discrete_adjoint(rows, node_cotangents, pull_back, torch.zeros(2, dtype=torch.float64)))
    assert [step.n for step in backwards] == list(reversed(range(steps)))
    torch.testing.assert_close(backwards[-1].window, x0.grad)
    for n in range(steps):
        torch.testing.assert_close(arrived[n], forcing[n].grad)


def test_windows_are_the_running_sum() -> None:
    rows = [((0.0,), (0.1,)), ((-1.0,), (0.2,)), ((-4.0,), (0.6,))]
    ones = torch.ones(1, dtype=torch.float64)
    node_cotangents = [None, ones, None, 3 * ones]
    pulled = {0: 0.5 * ones, 1: None, 2: 0.25 * ones, 3: None}
    steps = list(discrete_adjoint(rows, node_cotangents, lambda n, _: pulled[n], 0 * ones))
    assert [float(step.window) for step in steps] == [3.25, 4.25, 4.75]
    assert [float(step.next_window) for step in steps] == [3.0, 3.25, 4.25]
