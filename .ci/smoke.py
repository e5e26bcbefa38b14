"""A solve and a gradient of every room of the installed package, each against its closed form.

Needs nothing but the package. Prints every error, and raises where one is too large.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torchdiffeq
import torchsde
from torch import Tensor, nn

import torchdiffeq_lmm as lmm

STEPS = 200
OPTIONS = {"step_size": 1 / STEPS}
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def check(what: str, got: Tensor | float | None, exact: Tensor | float, tolerance: float) -> None:
    """Raise a RuntimeError where an entry is further from the exact value than `tolerance`, or not there at all."""
    if got is None:
        raise RuntimeError(f"{what}: there is none")
    error = float((torch.as_tensor(got) - torch.as_tensor(exact)).detach().abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"{what}: off by {error:.2g}, more than {tolerance:.2g}")
    print(f"{what}: off by {error:.1e}")


def check_decay(what: str, method: str, tolerance: float, fixed: bool = True) -> None:
    """x' = -k x, x(0) = 1, through torchdiffeq: x(1) = exp(-k), whose derivative is -exp(-k)."""
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    end = torchdiffeq.odeint(lambda t, x: -k * x, ONE, T, method=method, options=OPTIONS if fixed else None)[-1]
    end.sum().backward()
    check(f"{what}, solution", end, math.exp(-2), tolerance)
    check(f"{what}, gradient", k.grad, -math.exp(-2), tolerance)


def growth(grad_filter: Literal["auto"] | None) -> lmm.GridParameter:
    """x' = θ(t) x, x(0) = 1, with a θ for every step, all of them 1, and the gradient of x(1) = e.

    In function space that gradient is x(t) p(t), p being the costate: e at all times.
    """
    nodes = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    theta = lmm.GridParameter(torch.ones(STEPS, 1, dtype=torch.float64), nodes)
    end = lmm.odeint(lambda t, x: theta(t) * x, ONE, T, method="leapfrog", options=OPTIONS, grad_filter=grad_filter)[-1]
    end.sum().backward()
    check(f"filters: grad_filter={grad_filter!r}, solution", end, math.e, 1e-4)
    return theta


class Oscillator(nn.Module):
    """x'' = -ω² x, at rest at 1: x(1) = cos ω, whose derivative is -sin ω."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(x', x'')."""
        return torch.stack([x[1], -self.omega.square() * x[0]])


class Drift(nn.Module):
    """dX = a dt + s dW, X(0) = 0: X(1) = a + s W(1), whose derivatives are 1 and W(1)."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.s = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        """The drift."""
        return self.a.expand_as(x)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        """The diffusion."""
        return self.s.expand_as(x)


def check_schemes() -> None:
    """What is known of a method, and a method of one's own."""
    known = lmm.method_info("ab2")
    if (known.order, known.error_constant, known.beta) != (2, Fraction(5, 12), (Fraction(-1, 2), Fraction(3, 2), 0)):
        raise RuntimeError(f"schemes: method_info says of Adams–Bashforth 2\n{known}")
    own = lmm.register_method("smoke", alpha=[0, -1, 1], beta=[-0.5, 1.5, 0])
    if (own.order, own.beta) != (known.order, known.beta):
        raise RuntimeError(f"schemes: register_method makes of Adams–Bashforth 2\n{own}")
    check_decay("schemes: a registered method", "smoke", 1e-4)


def check_filters_and_parameters() -> None:
    """Leapfrog's gradient per step, filtered and not, and what `oscillation` says of both."""
    filtered, raw = growth("auto"), growth(None)
    check("filters: grad_filter='auto', gradient", filtered.values.grad, math.e / STEPS, 1e-3 / STEPS)
    check("filters: filter_gradient", lmm.filter_gradient(raw.values.grad), math.e / STEPS, 1e-3 / STEPS)
    check("parameters: GridParameter, refined", filtered.refine()(0.3), 1.0, 1e-12)
    for name, parameter, oscillates in (("filtered", filtered, False), ("not filtered", raw, True)):
        verdict = lmm.oscillation(parameter)
        if verdict.oscillates is not oscillates:
            raise RuntimeError(f"parameters: oscillation says of a gradient that is {name}\n{verdict}")


def check_autodiff(backward: Literal["checkpoint", "reversible"]) -> None:
    """A solve that keeps little for its backward pass."""
    oscillator = Oscillator()
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end = lmm.odeint(oscillator, y0, T, method="leapfrog", options=OPTIONS, backward=backward)[-1, 0]
    end.backward()
    check(f"autodiff: backward={backward!r}, solution", end, math.cos(3), 1e-3)
    check(f"autodiff: backward={backward!r}, gradient", oscillator.omega.grad, -math.sin(3), 1e-3)


def check_torchsde() -> None:
    """A solve by torchsde, on a given path."""
    sde, y0 = Drift(), torch.zeros(4, 1, dtype=torch.float64)
    path = torchsde.BrownianInterval(0.0, 1.0, size=(4, 1), dtype=torch.float64, entropy=0)
    end = torchsde.sdeint(sde, y0, T, bm=path, method="leapfrog", dt=1 / STEPS)[-1]
    end.sum().backward()
    w = path(0.0, 1.0)
    check("hosts: torchsde, solution", end, 0.5 + 0.2 * w, 1e-9)
    check("hosts: torchsde, gradient of the drift", sde.a.grad, 4.0, 1e-9)
    check("hosts: torchsde, gradient of the diffusion", sde.s.grad, w.sum(), 1e-9)


if not Path(lmm.__file__).is_relative_to(sys.prefix):
    raise RuntimeError(f"the package is to be installed in {sys.prefix}, got {lmm.__file__}")
check_schemes()
check_decay("forward: bdf2", "bdf2", 1e-4)
check_filters_and_parameters()
check_autodiff("checkpoint")
check_autodiff("reversible")
check_decay("hosts: torchdiffeq, ab3", "ab3", 1e-5)
check_decay("hosts: torchdiffeq, adams", "adams", 1e-6, fixed=False)
check_decay("hosts: torchdiffeq, bdf", "bdf", 1e-5, fixed=False)
check_torchsde()
