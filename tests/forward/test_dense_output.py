"""The polynomial through the latest states: exact for polynomials, of the order of its degree, differentiable."""

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from problems import orders
from torch import Tensor

from torchdiffeq_lmm.forward.dense_output import Span, interpolated

TIMES = [0.5, 0.75, 0.8, 1.3, 1.4, 2.0, 2.1]


def states_of(x: Polynomial) -> dict[int, Tensor]:
    return {node: torch.tensor([x(t), -2 * x(t)], dtype=torch.float64) for node, t in enumerate(TIMES)}


def test_the_nodes_of_a_span() -> None:
    assert list(Span(5, 3).nodes) == [5, 4, 3, 2]
    assert list(Span(2, 2).nodes) == [2, 1, 0]
    assert list(Span(0, 0).nodes) == [0]


@pytest.mark.parametrize("reach", range(1, 7))
def test_it_is_exact_for_polynomials_of_its_degree(reach: int) -> None:
    x = Polynomial(np.random.default_rng(reach).uniform(-1, 1, reach + 1))
    for fraction in (-1.0, -0.7, -0.25, 0.0):
        t = TIMES[6] + fraction * (TIMES[6] - TIMES[5])
        found = interpolated(Span(6, reach), TIMES, states_of(x), fraction)
        assert found.tolist() == pytest.approx([x(t), -2 * x(t)], abs=1e-12)


@pytest.mark.parametrize("node", [3, 6])
def test_at_the_nodes_it_is_the_states(node: int) -> None:
    states = states_of(Polynomial([1.0, -1.0, 0.3, 2.0, 1.0, 1.0, 1.0]))
    assert torch.equal(interpolated(Span(node, 3), TIMES, states, 0.0), states[node])
    torch.testing.assert_close(interpolated(Span(node, 3), TIMES, states, -1.0), states[node - 1], rtol=0, atol=1e-13)


def test_it_asks_for_the_states_of_its_span_alone() -> None:
    states = {node: state for node, state in states_of(Polynomial([0.0, 1.0])).items() if node in (3, 4, 5)}
    assert float(interpolated(Span(5, 2), TIMES, states, -0.5)[0]) == pytest.approx(1.7, rel=1e-14)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_its_error_is_of_one_order_more_than_its_degree(reach: int) -> None:
    errors = []
    for h in (0.2, 0.1, 0.05):
        times = [1 + h * (n - reach) for n in range(reach + 1)]
        states = {n: torch.sin(torch.tensor([t], dtype=torch.float64)) for n, t in enumerate(times)}
        found = interpolated(Span(reach, reach), times, states, -0.4)
        errors.append(abs(float(found) - float(np.sin(times[-1] - 0.4 * h))))
    assert all(abs(measured - (reach + 1)) < 0.35 for measured in orders(errors))


def test_gradients_of_the_states_and_of_the_fraction() -> None:
    states = [torch.tensor([0.3 * n, n**2 - 1.0], dtype=torch.float64, requires_grad=True) for n in range(4)]
    fraction = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)

    def at(fraction: Tensor, *states: Tensor) -> Tensor:
        return interpolated(Span(3, 3), TIMES, dict(enumerate(states)), fraction)

    assert torch.autograd.gradcheck(at, (fraction, *states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_the_dtype_is_that_of_the_states(dtype: torch.dtype) -> None:
    states = {node: state.to(dtype) for node, state in states_of(Polynomial([0.0, 1.0, 1.0])).items()}
    for fraction in (-0.5, torch.tensor(-0.5, dtype=torch.float64)):
        found = interpolated(Span(4, 2), TIMES, states, fraction)
        assert found.dtype is dtype
        assert complex(found[0]).real == pytest.approx(1.35 + 1.35**2, rel=1e-6)
