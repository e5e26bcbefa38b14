"""Inference mode: a solve in it, a backward pass in it, and tensors that were made in it and are used outside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchsde
from methods import slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import GridParameter, Reversible

# Rows that are not those of steps do no harm to what is compared here.
pytestmark = pytest.mark.filterwarnings("ignore:a GridParameter of kind")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"method": "ab3"},
    "filter": {"method": "leapfrog", "grad_filter": "auto"},
    "smooth": {"method": "leapfrog", "grad_filter": "smooth"},
    "checkpoint": {"method": "abm3", "backward": "checkpoint"},
    "checkpoint, filter": {"method": "ab2", "backward": "checkpoint", "grad_filter": "auto"},
    "reversible": {"method": "leapfrog", "backward": "reversible"},
    "drifted": {"method": "leapfrog", "backward": Reversible(tolerance=0.0, on_drift="checkpoint")},
    "implicit": {"method": "bdf2"},
    "implicit, checkpoint": {"method": "am3", "backward": "checkpoint"},
    "implicit, filter": {"method": "bdf3", "grad_filter": "auto"},
}
GRIDS: dict[str, dict[str, Any]] = {
    "step_size": {"step_size": 0.125, "interp": "cubic"},
    "grid_constructor": {"grid_constructor": lambda func, y0, t: torch.linspace(0, 1, 9, dtype=torch.float64)},
}
ways = pytest.mark.parametrize(
    "way", slow_but([way for name, way in WAYS.items() if "implicit, " not in name], WAYS.values()), ids=WAYS
)
sdes = pytest.mark.parametrize(
    ("method", "options"), [("ab2", {}), ("leapfrog", {"grad_filter": "auto"}), ("bdf2", {})]
)


class Field(nn.Module):
    """A network with weights in time, and the drift and the diffusion of an SDE."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        nodes = torch.linspace(0, 1, 9, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        self.theta = GridParameter(torch.cos(torch.arange(18.0)).double().reshape(9, 2), nodes, "linear")

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + self.theta(t)) * y

    f = forward

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y * self.theta(t)


def start() -> Tensor:
    return torch.tensor([1.0, -0.5], dtype=torch.float64)


def times() -> Tensor:
    return torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def solve(func: nn.Module, y0: Tensor, t: Tensor, way: dict[str, Any], grid: str = "step_size") -> Tensor:
    return torchdiffeq_lmm.odeint(func, y0, t, options=dict(GRIDS[grid]), **way)


def gradients(func: nn.Module, states: Tensor, *others: Tensor) -> list[Tensor]:
    return [states.detach(), *torch.autograd.grad((states**3).sum(), [*func.parameters(), *others])]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def brownian() -> torchsde.BrownianInterval:
    return torchsde.BrownianInterval(0.0, 1.0, size=(1, 2), dtype=torch.float64, entropy=1)


@ways
def test_a_solve_in_inference_mode(way: dict[str, Any]) -> None:
    func = Field()
    with torch.no_grad():
        # With a graph an implicit step would have another Jacobian.
        wanted = solve(func, start(), times(), way)
    with torch.inference_mode():
        got = solve(func, start().requires_grad_(), times().requires_grad_(), way)
        assert not got.requires_grad
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        of_module_made_there = solve(Field(), start(), times(), way)
    torch.testing.assert_close(of_module_made_there.clone(), wanted, rtol=1e-12, atol=1e-12)


@sdes
def test_a_stochastic_solve_in_inference_mode(method: str, options: dict[str, Any]) -> None:
    wanted, found = None, None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = torchsde.sdeint(
                Field(), start()[None], times(), bm=brownian(), dt=0.125, method=method, options=options
            )
        wanted = found if wanted is None else wanted
    assert torch.equal(found.clone(), wanted)


@ways
@pytest.mark.one_in(3)
def test_an_event_in_inference_mode(way: dict[str, Any]) -> None:
    def find(y0: Tensor) -> tuple[Tensor, Tensor]:
        return torchdiffeq_lmm.odeint(
            Field(), y0, times()[[0, 2]], options={"step_size": 0.125}, event_fn=lambda t, y: t - 0.6, **way
        )

    with torch.inference_mode():
        made_there = start()
        in_mode = find(start())
    for at, state in (find(made_there), in_mode):
        assert float(at) == pytest.approx(0.6)
        torch.testing.assert_close(state.detach().clone(), find(start())[1].detach())


@ways
@pytest.mark.parametrize("grid", slow_but(list(GRIDS)[:1], GRIDS))
@pytest.mark.one_in(3)
def test_a_state_and_times_that_were_made_in_inference_mode(way: dict[str, Any], grid: str) -> None:
    func = Field()
    wanted = gradients(func, solve(func, start(), times(), way, grid))
    with torch.inference_mode():
        y0, t = start(), times()
    assert_same(gradients(func, solve(func, y0, times(), way, grid)), wanted)
    assert_same(gradients(func, solve(func, start(), t, way, grid)), wanted)


@ways
@pytest.mark.one_in(3)
def test_a_state_and_times_that_require_a_gradient_and_were_made_in_inference_mode(way: dict[str, Any]) -> None:
    func, y0, t = Field(), start().requires_grad_(), times().requires_grad_()
    wanted = gradients(func, solve(func, y0, t, way), y0, t)
    with torch.inference_mode():
        y0, t = start().requires_grad_(), times().requires_grad_()
    assert_same(gradients(func, solve(func, y0, t, way), y0, t), wanted)


@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
def test_a_grid_that_was_made_in_inference_mode(backward: str) -> None:
    def gradient(nodes: Tensor) -> list[Tensor]:
        func = Field()
        options = {"grid_constructor": lambda func, y0, t: nodes}
        states = torchdiffeq_lmm.odeint(func, start(), times(), method="ab2", options=options, backward=backward)
        return gradients(func, states, *([nodes] if nodes.requires_grad else []))

    nodes = torch.tensor([0.0, 0.2, 0.3, 0.5, 0.6, 0.9, 1.0], dtype=torch.float64)
    with torch.inference_mode():
        made_there, leaf = nodes.clone(), nodes.clone().requires_grad_()
    wanted = gradient(nodes.clone().requires_grad_())
    assert wanted[-1].any()
    assert_same(gradient(made_there), wanted[:-1])
    assert_same(gradient(leaf), wanted)


class Forced(Field):
    """Its functions save no state, as torchsde asks for them at the initial state itself."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.theta(t) - y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * self.theta(t).expand_as(y)


@sdes
def test_what_was_made_in_inference_mode_for_a_stochastic_solve(method: str, options: dict[str, Any]) -> None:
    def gradient(func: nn.Module, y0: Tensor, ts: Tensor, bm: torchsde.BrownianInterval) -> list[Tensor]:
        y = torchsde.sdeint(func, y0, ts, bm=bm, dt=0.125, method=method, options=options)
        return [y.detach(), *torch.autograd.grad((y**3).sum(), func.theta.values)]

    with torch.inference_mode():
        y0, ts, bm = start()[None], times(), brownian()
        # The increments are kept.
        torchsde.sdeint(Field(), y0, ts, bm=bm, dt=0.125, method=method)
    wanted = gradient(Field(), start()[None], times(), brownian())
    assert_same(gradient(Field(), start()[None], ts, brownian()), wanted)
    assert_same(gradient(Field(), start()[None], times(), bm), wanted)
    wanted = gradient(Forced(), start()[None], times(), brownian())
    assert_same(gradient(Forced(), y0, ts, bm), wanted)


@ways
@pytest.mark.one_in(3)
def test_a_backward_pass_in_inference_mode(way: dict[str, Any]) -> None:
    found = []
    for mode in (lambda: torch.enable_grad(), lambda: torch.inference_mode()):
        func, y0, t = Field(), start().requires_grad_(), times().requires_grad_()
        total = (solve(func, y0, t, way) ** 3).sum()
        with mode():
            found.append([grad.clone() for grad in torch.autograd.grad(total, [*func.parameters(), y0, t])])
            assert torch.is_inference_mode_enabled() == (len(found) == 2)
    assert_same(found[1], found[0])


AGAIN = [way for way in WAYS.values() if "backward" in way]


@pytest.mark.parametrize("way", AGAIN, ids=lambda way: way["method"])
def test_parameters_that_were_made_in_inference_mode_are_named(way: dict[str, Any]) -> None:
    with torch.inference_mode():
        func = Field()
        weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    func.theta = GridParameter(torch.ones(9, 2), torch.linspace(0, 1, 9), "linear")
    with pytest.raises(ValueError, match=r"adjoint_params.* must not have been made in inference mode.* \(2, 2\)"):
        solve(func, start(), times(), way)
    with pytest.raises(ValueError, match=r"adjoint_params.* must not have been made in inference mode.* \(2,\)"):
        solve(lambda t, y: y + weight, start(), times(), {**way, "adjoint_params": [weight]})
    with torch.no_grad():
        assert solve(func, start(), times(), way).isfinite().all()


@pytest.mark.parametrize("use", [lambda theta: theta(0.2), lambda theta: theta.rows], ids=["called", "rows"])
def test_a_grid_parameter_that_was_made_in_inference_mode_is_named(use: Callable[[GridParameter], object]) -> None:
    with torch.inference_mode():
        theta = GridParameter(torch.ones(4, 2), torch.linspace(0, 1, 5))
        use(theta)
    with pytest.raises(ValueError, match="values must not have been made in inference mode"):
        use(theta)
    with torch.no_grad():
        use(theta)
    theta.requires_grad_(False)
    use(theta)
