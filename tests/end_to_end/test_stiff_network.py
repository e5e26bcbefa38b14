"""A stiff neural ODE: a network that has learned the rates of Robertson's reaction, in logarithms, for 256 samples."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torchdiffeq_lmm import odeint

F64 = torch.float64
STOICHIOMETRY = torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, -1.0], [0.0, 0.0, 1.0]], dtype=F64)
LOG_CONSTANTS = torch.tensor([0.04, 1e4, 3e7], dtype=F64).log()
END, SAMPLES, WATCHED = 100.0, 256, 100


def logarithms(y: Tensor) -> Tensor:
    return y.clamp_min(1e-12).log()


def log_rates(y: Tensor) -> Tensor:
    a, b, c = logarithms(y).unbind(-1)
    return LOG_CONSTANTS + torch.stack([a, b + c, 2 * b], -1)


class Network(nn.Module):
    """Robertson's reaction with a perceptron for the logarithms of its rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.Linear(3, 32, dtype=F64), nn.Linear(32, 3, dtype=F64)

    def features(self, y: Tensor) -> Tensor:
        return torch.tanh(self.hidden(logarithms(y) / 10))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.exp(self.last(self.features(y))) @ STOICHIOMETRY.T


@cache
def learned() -> Network:
    """A network whose last layer is fitted to the rates near one trajectory, off by at most 0.13 %."""
    network = Network()
    truth = solve_ivp(
        lambda t, y: (STOICHIOMETRY @ torch.exp(log_rates(torch.from_numpy(y)))).numpy(),
        (0, 1e4),
        [1.0, 0.0, 0.0],
        "Radau",
        rtol=1e-8,
        atol=1e-12,
        t_eval=np.logspace(-5, 4, 300),
    )
    y = torch.tensor(truth.y.T).repeat(8, 1)
    y = y * torch.exp(0.3 * torch.randn(y.shape, dtype=F64))
    with torch.no_grad():
        inputs = torch.cat([network.features(y), torch.ones(len(y), 1, dtype=F64)], 1)
        weights = torch.linalg.lstsq(inputs, log_rates(y)).solution
        assert (inputs @ weights - log_rates(y)).abs().max() < 0.01
        network.last.weight.copy_(weights[:-1].T)
        network.last.bias.copy_(weights[-1])
    return network


def initial() -> Tensor:
    share = torch.linspace(0.5, 0.999, SAMPLES, dtype=F64)
    return torch.stack([share, torch.full((SAMPLES,), 1e-6, dtype=F64), 1 - share], 1)


@cache
def by_scipy(start: tuple[float, ...], shift: tuple[float, ...] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """The end from one state, with something added to the last biases."""
    network, added = learned(), torch.tensor(shift, dtype=F64)

    def f(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y)
        rates = network.last(network.features(state)) + added
        return (torch.exp(rates) @ STOICHIOMETRY.T).numpy()

    with torch.no_grad():
        return solve_ivp(f, (0, END), start, "Radau", rtol=1e-8, atol=1e-13).y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "t", "accuracy"),
    [
        ("bdf", torch.tensor([0.0, END], dtype=F64), 1e-5),
        # On a grid of 200 steps.
        ("bdf2", torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-6, 2, 200, dtype=F64)]), 3e-3),
    ],
)
def test_solution_and_gradients(method: str, t: Tensor, accuracy: float) -> None:
    network, y0 = learned(), initial().requires_grad_()
    y = odeint(network, y0, t, method=method, rtol=1e-6, atol=1e-10)[-1]
    for sample in (WATCHED, SAMPLES - 1):
        error = np.abs(y[sample].detach().numpy() / by_scipy(tuple(y0[sample].tolist())) - 1).max()
        assert error < accuracy

    by_start, by_bias = torch.autograd.grad(y[WATCHED, 2], [y0, network.last.bias])
    others = by_start[torch.arange(SAMPLES) != WATCHED]
    assert not others.any()
    start, direction = y0[WATCHED].detach(), torch.tensor([0.3, -1e-7, 0.2], dtype=F64)
    wanted = [by_scipy(tuple((start + sign * 1e-3 * direction).tolist()))[2] for sign in (1, -1)]
    assert float(by_start[WATCHED] @ direction) == pytest.approx((wanted[0] - wanted[1]) / 2e-3, rel=10 * accuracy)
    direction = torch.tensor([1.0, -0.5, 0.7], dtype=F64)
    wanted = [by_scipy(tuple(start.tolist()), tuple((sign * 1e-3 * direction).tolist()))[2] for sign in (1, -1)]
    assert float(by_bias @ direction) == pytest.approx((wanted[0] - wanted[1]) / 2e-3, rel=10 * accuracy)
