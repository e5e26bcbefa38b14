"""The response to a shift of the past along the flow, against the flow itself, and the weights of higher order."""

from math import factorial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from torchdiffeq_lmm.filters.cell_weights import interpolatory_shares
from torchdiffeq_lmm.filters.shifted_past import PastTerm, moments, shifted_past

F64 = torch.float64
LAGS = (0.0, -0.7, -1.0, -2.3, -3.1)


def jacobian(t: float) -> np.ndarray:
    return np.array([[-0.3 + np.sin(t), 1.2], [-2 * np.cos(2 * t), 0.4 * t - 0.5]])


def propagator(s: float) -> np.ndarray:
    """From the state at 0 to that at s."""
    columns = [
        solve_ivp(lambda t, x: jacobian(t) @ x, (0, s), unit, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
        for unit in np.eye(2)
    ]
    return np.stack(columns, axis=1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def error(order: int, h: float, damping: float = 0.0) -> float:
    """Of Σ c_lᵀ x(t_l) + h Σ S_lᵀ x'(t_l) for given c and S, at the nodes h × LAGS."""
    c, slopes = draw(len(LAGS), 2, seed=1), h * draw(len(LAGS), 2, seed=2)
    exact = np.zeros(2)
    for lag, of_x, of_slope in zip(LAGS, c.numpy(), slopes.numpy(), strict=True):
        flow = propagator(h * lag)
        exact += flow.T @ of_x + flow.T @ jacobian(h * lag).T @ of_slope
    # x(t_l) as the state at 0 with the increments up to it.
    past = [PastTerm(h * lag, None, [(1.0, slope)]) for lag, slope in zip(LAGS, slopes, strict=True)]
    past += [PastTerm(h * lag, 0.0, [(0.5, of_x), (0.5, of_x)]) for lag, of_x in zip(LAGS[1:], c[1:], strict=True)]

    def product(place: int, vector: Tensor) -> Tensor:
        return torch.from_numpy(jacobian(h * LAGS[place])).T @ vector

    def damp(place: int, vector: Tensor) -> Tensor:
        matrix = torch.eye(2, dtype=F64) - damping * torch.from_numpy(jacobian(h * LAGS[place])).T
        return torch.linalg.solve(matrix, vector)

    found = shifted_past(
        moments(c.sum(0), past, order), [h * lag for lag in LAGS], product, damp if damping else None, damping
    )
    assert found is not None
    return float((found - torch.from_numpy(exact)).abs().max())


@pytest.mark.parametrize("is_damped", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_its_error_is_of_the_order(order: int, is_damped: bool) -> None:
    lengths = (0.08, 0.04, 0.02, 0.01) if order == 5 else (0.02, 0.01, 0.005, 0.0025)
    errors = [error(order, h, h / 4 if is_damped else 0.0) for h in lengths]
    assert np.log2(errors[-2] / errors[-1]) > order - 0.35, errors


def test_the_number_of_products() -> None:
    for order, count in ((2, 1), (3, 2), (4, 4), (5, 7)):
        calls = []

        def product(place: int, vector: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(place)
            return vector

        shifted_past([draw(2, seed=k) for k in range(order)], LAGS, product, None, 0.0)
        assert len(calls) == count


def test_what_is_zero_stays_away() -> None:
    def product(place: int, vector: Tensor) -> Tensor:
        raise AssertionError

    first = draw(2, seed=1)
    assert moments(first, [], 4) == [first, None, None, None]
    assert torch.equal(shifted_past([first, None, None], LAGS, product, None, 0.0), first)
    assert shifted_past([None, None, None], LAGS, product, None, 0.0) is None


def test_a_jacobian_as_large_as_can_be_leaves_it_bounded() -> None:
    given = [draw(1, seed=k) for k in range(5)]
    values = []
    for rate in (1e3, 1e6, 1e9):
        found = shifted_past(
            given, LAGS, lambda _, v, rate=rate: -rate * v, lambda _, v, rate=rate: v / (1 + rate), 1.0
        )
        values.append(float(found))
    assert max(map(abs, values)) < 1e4
    assert values[-1] == pytest.approx(values[-2], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("breaks", [[], [0.4], [0.4, 0.9]])
@pytest.mark.parametrize("order", [3, 4, 5])
def test_polynomials_between_breaks_are_integrated_exactly(order: int, breaks: list[float]) -> None:
    """On unequal times that hold the breaks, but not always both ends."""
    generator = np.random.default_rng(3)
    times = np.unique(np.concatenate([generator.uniform(0, 1.3, 24), breaks, [0.0]]))
    shares = interpolatory_shares(times.tolist(), breaks, 1.3, order)
    total = expected = 0.0
    for number, (low, high) in enumerate(zip([0.0, *breaks], [*breaks, 1.3], strict=True)):
        coefficients = generator.normal(size=order)
        polynomial = np.polynomial.Polynomial(coefficients)
        expected += polynomial.integ()(high) - polynomial.integ()(low)
        for time, share in zip(times, shares, strict=True):
            if low < time < high:
                total += sum(share) * polynomial(time)
            elif time == low:
                total += share.after * polynomial(time)
            elif time == high and number < len(breaks):
                total += share.before * polynomial(time)
    assert total == pytest.approx(expected, rel=1e-11)


def test_far_from_the_ends_of_equal_steps_the_weights_are_the_step() -> None:
    shares = interpolatory_shares([0.1 * n for n in range(21)], [], 2.0, 4)
    assert [sum(share) for share in shares[4:-4]] == pytest.approx([0.1] * 13, rel=1e-10)
    assert sum(map(sum, shares)) == pytest.approx(2.0)


def test_the_order_of_a_piece_with_few_evaluations_is_their_number() -> None:
    """Two at its ends: the trapezoid rule."""
    shares = interpolatory_shares([0.0, 1.0, 3.0], [1.0], 3.0, 5)
    assert [tuple(share) for share in shares] == [(0.0, 0.5), (0.5, 1.0), (1.0, 0.0)]


def test_moments_are_those_of_the_definition() -> None:
    vector = draw(2, seed=5)
    found = moments(None, [PastTerm(-0.5, None, [(2.0, vector)]), PastTerm(-0.25, -0.75, [(3.0, vector)])], 4)
    for k in range(1, 4):
        factor = 2 * (-0.5) ** (k - 1) / factorial(k - 1) + 3 * ((-0.25) ** k - (-0.75) ** k) / factorial(k)
        torch.testing.assert_close(found[k], factor * vector)
