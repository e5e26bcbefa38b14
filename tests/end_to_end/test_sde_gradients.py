"""Gradients through torchsde.sdeint: of auto-differentiation, and filtered, on given Brownian paths."""

from functools import cache

import pytest
import torch
import torchsde
from methods import slow_but
from problems import orders
from sde_problems import NOISES, Path, Pendulum, initial
from torch import Tensor

from torchdiffeq_lmm import CostateFilter

EXPLICIT = ("leapfrog", "ab3", "abm2")
HORIZON = 2.0


def solve(sde: object, method: str, bm: Path, y0: Tensor, dt: float, rtol: float = 1e-12, **options: object) -> Tensor:
    times = torch.tensor([0.0, 0.3, bm.horizon], dtype=torch.float64)
    return torchsde.sdeint(sde, y0, times, bm=bm, method=method, dt=dt, rtol=rtol, atol=rtol, options=options)


@pytest.mark.parametrize(
    ("method", "noise"),
    slow_but(
        [("leapfrog", "diagonal")],
        [
            *(("leapfrog", noise) for noise in NOISES),
            # Two noises each, so that the explicit and the implicit methods meet all.
            *((method, noise) for method in ("ab3", "bdf2") for noise in NOISES[:2]),
            *((method, noise) for method in ("abm2", "am2") for noise in NOISES[2:]),
        ],
    ),
)
def test_gradcheck(method: str, noise: str) -> None:
    sde = Pendulum(noise)
    bm = Path(2, sde.channels, 32)

    def run(y0: Tensor, pull: Tensor, scale: Tensor) -> Tensor:
        del sde._parameters["pull"], sde._parameters["scale"]
        sde._parameters["pull"], sde._parameters["scale"] = pull, scale
        return solve(sde, method, bm, y0, 1 / 8)[1:]

    inputs = (initial(2).requires_grad_(), sde.pull, sde.scale)
    # In random directions but for one method and noise, where all entries are checked.
    fast_mode = (method, noise) != ("leapfrog", "general")
    assert torch.autograd.gradcheck(run, inputs, fast_mode=fast_mode)
    if method in EXPLICIT:
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=fast_mode)


@pytest.mark.parametrize("method", slow_but(["leapfrog"], [*EXPLICIT, "bdf2"]))
@pytest.mark.parametrize("noise", NOISES)
def test_a_filter_changes_the_drifts_parameters_alone(method: str, noise: str) -> None:
    sde, y0 = Pendulum(noise), initial().requires_grad_()
    bm = Path(4, sde.channels, 32)
    plain, filtered = (
        torch.autograd.grad(solve(sde, method, bm, y0, 1 / 16, **options).sin().sum(), [y0, sde.scale, sde.pull])
        for options in ({}, {"grad_filter": CostateFilter(weights="trapezoid")})
    )
    assert (plain[0] - filtered[0]).abs().max() < 1e-13
    assert (plain[1] - filtered[1]).abs().max() < 1e-13
    assert 0 < abs(plain[2] - filtered[2]) < 0.2 * abs(plain[2])


@pytest.mark.parametrize("method", slow_but(["leapfrog"], ["leapfrog", "bdf2"]))
def test_parameters_are_found_wherever_they_are(method: str) -> None:
    # In a list, shared between drift and diffusion, behind a network made before the solve.
    net = torch.nn.Linear(2, 2).double()
    outside = torch.ones(2, dtype=torch.float64, requires_grad=True)
    made = net(outside)

    class SDE:
        sde_type, noise_type = "ito", "diagonal"

        def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(y * made)
            return -hidden, 0.3 * hidden

    bm = Path(4, 2, 32)
    wanted = [outside, *net.parameters()]
    gradients = []
    for options in ({}, {"grad_filter": CostateFilter(weights="trapezoid")}):
        loss = solve(SDE(), method, bm, initial(), 1 / 32, **options)[-1].square().sum()
        gradients.append(torch.autograd.grad(loss, wanted, retain_graph=True))
    for plain, filtered in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert (plain - filtered).abs().max() < 0.1 * plain.abs().max() + 1e-3


def test_nothing_to_differentiate() -> None:
    sde, bm = Pendulum("diagonal").requires_grad_(False), Path(4, 2, 32)
    assert not solve(sde, "leapfrog", bm, initial(), 1 / 32, grad_filter="auto").requires_grad
    assert not solve(sde, "bdf2", bm, initial(), 1 / 32).requires_grad


def test_second_derivatives_of_a_filtered_gradient_are_refused() -> None:
    sde, bm = Pendulum("diagonal"), Path(4, 2, 32)
    loss = solve(sde, "leapfrog", bm, initial(), 1 / 32, grad_filter="leapfrog").sum()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, sde.pull, create_graph=True)


@pytest.mark.parametrize("method", slow_but(["leapfrog"], ["leapfrog", "ab2", "ab3"]))
def test_without_noise_shared_parameters_agree_with_the_exact_gradient_at_second_order(method: str) -> None:
    sde, y0 = Pendulum("diagonal", epsilon=0.0), initial()
    differences = []
    for steps in (32, 64, 128):
        bm = Path(4, 2, steps)
        plain, filtered = (
            torch.autograd.grad(solve(sde, method, bm, y0, 1 / steps, **options)[-1].sin().sum(), sde.pull)[0]
            for options in ({}, {"grad_filter": CostateFilter(weights="trapezoid")})
        )
        differences.append(abs(float(plain - filtered)))
    assert min(orders(differences)) > 1.7


def theta(t: Tensor) -> Tensor:
    return torch.stack([1 + 0.5 * torch.sin(3 * t), 1.5 + t])


def drift(y: Tensor, values: Tensor) -> Tensor:
    (angle, speed), (one, two) = y.unbind(1), values.unbind(-1)
    return torch.stack([speed * one, torch.addcmul(-0.3 * speed, angle.sin(), two, value=-1)], 1)


class PerStep:
    """A drift and a diffusion with parameters of their own per step and path."""

    sde_type = "ito"

    def __init__(
        self, epsilon: float, multiplicative: bool, steps: int, batch: int, noise_type: str = "diagonal"
    ) -> None:
        self.epsilon, self.multiplicative, self.steps, self.noise_type = epsilon, multiplicative, steps, noise_type
        times = torch.arange(steps + 1, dtype=torch.float64) * (HORIZON / steps)
        self.theta = theta(times).T.unsqueeze(1).repeat(1, batch, 1).requires_grad_()
        self.scale = torch.ones_like(self.theta, requires_grad=True)
        self.thetas, self.scales = self.theta.unbind(), self.scale.unbind()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return drift(y, self.thetas[self._step(t)])

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self.epsilon * self.scales[self._step(t)] * (torch.cos(y) if self.multiplicative else 1)
        return {"diagonal": g, "scalar": g.unsqueeze(2), "general": g.diag_embed()}[self.noise_type]

    def _step(self, t: Tensor) -> int:
        return round(float(t) / HORIZON * self.steps)


FINE, BATCH, STEPS = 480, 32, (20, 40, 80)


def loss_of(x: Tensor) -> Tensor:
    return 0.5 * (x - torch.tensor([0.3, -0.2], dtype=torch.float64)).square().sum()


@cache
def reference(epsilon: float, multiplicative: bool, channels: int = 2) -> tuple[Path, Tensor, Tensor]:
    """A path, at its nodes (∂f/∂θ)ᵀ p, and in its steps the gradient of a scale of g.

    By Milstein's method with Heun's for the drift, and its exact adjoint.
    """
    path = Path(BATCH, channels, FINE, HORIZON)
    h = HORIZON / FINE
    values = theta(torch.arange(FINE + 1, dtype=torch.float64) * h).T
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(BATCH, 1).requires_grad_()
    states = [x]
    scales = torch.ones(FINE, BATCH, 2, dtype=torch.float64, requires_grad=True).unbind()
    for n, (dw, scale) in enumerate(zip(path.increments, scales, strict=True)):
        g = epsilon * scale * (torch.cos(x) if multiplicative else 1)
        slope = drift(x, values[n])
        corrected = drift(x + h * slope + g * dw, values[n + 1])
        levy = 0.5 * g * -epsilon * scale * torch.sin(x) * (dw**2 - h) if multiplicative else 0
        x = x + 0.5 * h * (slope + corrected) + g * dw + levy
        states.append(x)
    grads = torch.autograd.grad(loss_of(x), [*states, *scales])
    costates, of_scales = grads[: len(states)], grads[len(states) :]
    density = [
        torch.stack([y[:, 1] * p[:, 0], -torch.sin(y[:, 0]) * p[:, 1]], 1)
        for y, p in zip(states, costates, strict=True)
    ]
    return path, torch.stack(density).detach(), torch.stack(of_scales)


@cache
def density_errors(
    method: str, epsilon: float, multiplicative: bool, noise_type: str = "diagonal", **options: object
) -> list[float]:
    """Of the gradients per step, divided by the step: the root of their mean square."""
    path, exact, _ = reference(epsilon, multiplicative, 1 if noise_type == "scalar" else 2)
    errors = []
    for steps in STEPS:
        sde = PerStep(epsilon, multiplicative, steps, BATCH, noise_type)
        x0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(BATCH, 1)
        x = solve(sde, method, path, x0, HORIZON / steps, 1e-8, **options)[-1]
        (gradient,) = torch.autograd.grad(loss_of(x), sde.theta)
        difference = gradient[:steps] * steps / HORIZON - exact[:: FINE // steps][:steps]
        errors.append(float(difference.square().mean().sqrt()))
    return errors


@pytest.mark.parametrize(("epsilon", "multiplicative"), slow_but([], [(0.3, False), (0.3, True), (0.01, False)]))
def test_leapfrogs_gradient_by_auto_differentiation_does_not_converge(epsilon: float, multiplicative: bool) -> None:
    errors = density_errors("leapfrog", epsilon, multiplicative)
    assert min(errors) > 1
    assert errors[-1] > 0.9 * errors[0]


NOISY = [(0.0, False, 1.85, 2.5e-3), (0.01, False, 1.5, 2.5e-3), (0.3, False, 0.85, 0.02), (0.3, True, 0.5, 0.04)]
"""Size of the noise, whether it is multiplicative, the least order, and the largest error."""


@pytest.mark.parametrize(
    ("method", "epsilon", "multiplicative", "order", "largest"),
    slow_but(
        [("leapfrog", *NOISY[2])],
        [(method, *noise) for method in ("leapfrog", "ab2") for noise in NOISY]
        # Its steps take many times as long, and without noise it is that for an ODE.
        + [("bdf2", *NOISY[3])],
    ),
)
def test_filtered_it_converges(method: str, epsilon: float, multiplicative: bool, order: float, largest: float) -> None:
    plain = density_errors(method, epsilon, multiplicative)
    filtered = density_errors(method, epsilon, multiplicative, grad_filter="auto")
    # Over all halvings, for single ones depend on the paths.
    assert sum(orders(filtered)) / 2 > order
    assert filtered[-1] < largest
    assert all(after < before / 2 for before, after in zip(plain, filtered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "noise_type"),
    [("leapfrog", "scalar"), ("leapfrog", "general"), ("ab2", "scalar"), ("ab2", "general")],
)
def test_filtered_it_converges_with_other_noises(method: str, noise_type: str) -> None:
    plain = density_errors(method, 0.3, True, noise_type)
    filtered = density_errors(method, 0.3, True, noise_type, grad_filter="auto")
    assert sum(orders(filtered)) / 2 > 0.5
    assert filtered[-1] < 0.05
    assert all(after < before / 2 for before, after in zip(plain, filtered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "multiplicative", "order", "largest"),
    [
        *((method, *of) for method in ("leapfrog", "ab2") for of in ((False, 0.85, 0.035), (True, 0.45, 0.1))),
        ("bdf2", True, 0.45, 0.1),
    ],
)
def test_the_diffusions_parameters_need_no_filter(
    method: str, multiplicative: bool, order: float, largest: float
) -> None:
    path, _, exact = reference(0.3, multiplicative)
    errors = []
    for steps in STEPS:
        sde = PerStep(0.3, multiplicative, steps, BATCH)
        x0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(BATCH, 1)
        (gradient,) = torch.autograd.grad(loss_of(solve(sde, method, path, x0, HORIZON / steps, 1e-8)[-1]), sde.scale)
        of_steps = exact.unflatten(0, (steps, -1)).sum(1)
        errors.append(float((gradient[:steps] - of_steps).norm() / of_steps.norm()))
    assert sum(orders(errors)) / 2 > order
    assert errors[-1] < largest
