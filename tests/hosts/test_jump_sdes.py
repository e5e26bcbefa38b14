"""jump_t in stochastic differential equations."""

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from jumping import SOME, f64
from methods import FAST_EXPLICIT, ORDER, in_turn, slow_but
from problems import orders
from torch import Tensor, nn

from torchdiffeq_lmm import CostateFilter


class JumpingDrift(nn.Module):
    noise_type = "diagonal"

    def __init__(self, noise: float, sde_type: str = "ito") -> None:
        super().__init__()
        self.noise = noise
        self.sde_type = sde_type
        self.k = nn.Parameter(f64(1.0))
        self.seen: list[float] = []

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(float(t))
        return -self.k * y if t < 0.5 else 2 - self.k * y * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.noise * torch.ones_like(y) * (1.0 if t < 0.5 else 3.0)


@pytest.mark.parametrize(
    ("name", "grad_filter"), in_turn([None, CostateFilter("trapezoid"), "auto"], few=1, fast=FAST_EXPLICIT)
)
def test_an_sde_without_noise_is_the_ode(name: str, grad_filter: object) -> None:
    ts, jumps = f64(0.0, 0.3, 0.5, 1.0), [0.5, 0.72]
    results, gradients = [], []
    for is_sde in (True, False):
        sde, y0 = JumpingDrift(0.0), f64(1.0, 0.7).reshape(1, 2).requires_grad_()
        options = {"jump_t": jumps} if grad_filter is None else {"jump_t": jumps, "grad_filter": grad_filter}
        if is_sde:
            y = torchsde.sdeint(sde, y0, ts, method=name, dt=0.05, rtol=1e-9, atol=1e-11, options=options)
        else:
            y = torchdiffeq.odeint(
                sde.f, y0, ts, method=name, options={**options, "step_size": 0.05}, rtol=1e-9, atol=1e-11
            )
        y.square().sum().backward()
        results.append((y.detach(), y0.grad))
        gradients.append(sde.k.grad)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    # On a path the filter uses one formula at all nodes, for an ODE the better of two.
    tolerance = 1e-9 if grad_filter is None else 0.1 if ORDER[name] == 1 else 2e-2
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=1e-9)


@pytest.mark.slow
def test_small_noise_and_a_jump_of_the_drift() -> None:
    """Additive noise on given paths: beside a fine solve the error is second order in h again, with jump_t."""
    y0, ts = torch.ones(16, 1, dtype=torch.float64), f64(0.0, 1.0)
    errors: dict[bool, list[float]] = {True: [], False: []}
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(16, 1), dtype=torch.float64, entropy=5)
    with torch.no_grad():
        fine = torchsde.sdeint(
            JumpingDrift(1e-6), y0, ts, bm=bm, method="ab2", dt=1 / 512, options={"jump_t": f64(0.5)}
        )[-1]
        for dt in (1 / 16, 1 / 32, 1 / 64):
            for with_jumps in (True, False):
                options = {"jump_t": [0.5]} if with_jumps else {}
                y = torchsde.sdeint(JumpingDrift(1e-6), y0, ts, bm=bm, method="ab2", dt=dt, options=options)[-1]
                errors[with_jumps].append(float((y - fine).square().mean().sqrt()))
    assert np.mean(orders(errors[True])) > 1.7, errors
    assert np.mean(orders(errors[False])) < 1.4, errors


class Recorded:
    """A Brownian motion that notes what it is asked for."""

    def __init__(self, bm: torchsde.BaseBrownian) -> None:
        self.bm = bm
        self.asked: list[tuple[float, float]] = []

    def __call__(self, a: float, b: float) -> Tensor:
        self.asked.append((float(a), float(b)))
        return self.bm(a, b)

    def __getattr__(self, name: str) -> object:
        return getattr(self.bm, name)


def test_an_sde_at_a_jump() -> None:
    """Drift and diffusion see its two sides, increments are over the true intervals, and steps go on from it."""
    bm = Recorded(torchsde.BrownianInterval(0.0, 1.0, size=(1, 1), dtype=torch.float64, entropy=5))
    sde = JumpingDrift(0.1)
    torchsde.sdeint(
        sde,
        torch.ones(1, 1, dtype=torch.float64),
        f64(0.0, 1.0),
        bm=bm,
        method="abm2",
        dt=0.2,
        options={"jump_t": [0.5]},
    )
    intervals = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)]
    np.testing.assert_allclose(sorted(set(bm.asked)), intervals, rtol=0, atol=1e-12)
    assert (0.4, 0.5) in bm.asked
    assert bm.asked[-1][1] == 1.0
    around = {t for t in sde.seen if abs(t - 0.5) < 1e-9}
    assert around == {np.nextafter(0.5, 0), np.nextafter(0.5, 1)}


@pytest.mark.parametrize("name", slow_but(set(SOME) - {"bdf2"}, SOME))
def test_an_sde_goes_on_where_it_ended(name: str) -> None:
    """The first piece takes the past up, the last one hands it on; at a jump there is none to take up."""
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(2, 1), dtype=torch.float64, entropy=5)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    arguments = {"bm": bm, "method": name, "dt": 1 / 32, "options": {"jump_t": [0.5, 0.5 + 1 / 8]}}
    # What implicit steps have learned is not handed on: each is solved to its tolerance.
    arguments |= {"rtol": 1e-8, "atol": 1e-8}
    with torch.no_grad():
        whole = torchsde.sdeint(JumpingDrift(0.1), y0, f64(0.0, 0.25, 0.5, 0.75, 1.0), **arguments)
        y, extra = y0, None
        for begin, end, expected in zip((0.0, 0.25, 0.5, 0.75), (0.25, 0.5, 0.75, 1.0), whole[1:], strict=True):
            states, extra = torchsde.sdeint(
                JumpingDrift(0.1), y, f64(begin, end), extra=True, extra_solver_state=extra, **arguments
            )
            y = states[-1]
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_jumps_of_an_sde_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="jump_t must not require a gradient"):
        torchsde.sdeint(
            JumpingDrift(0.1),
            torch.ones(1, 1, dtype=torch.float64),
            f64(0.0, 1.0),
            method="ab2",
            dt=0.1,
            options={"jump_t": f64(0.5, requires_grad=True)},
        )
