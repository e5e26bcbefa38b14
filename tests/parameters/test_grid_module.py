"""A layer with weights of its own for every step: the same as a list of layers."""

import copy
from typing import Any

import pytest
import torch
from compiled_solves import NEEDS_TORCH, TRACED
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import GridModule

STEPS = 10
NODES = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)


def layers(count: int = STEPS) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double() for _ in range(count))


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.layers[min(round(float(t) * STEPS), STEPS - 1)](y)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = GridModule(layers(), NODES)

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.layers(t, y)


def gradients(func: nn.Module, **keywords: Any) -> list[Tensor]:
    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    states = torchdiffeq_lmm.odeint(func, y0, NODES, method="leapfrog", grad_filter="auto", **keywords)
    return list(torch.autograd.grad(states[-1].sum(), list(func.parameters())))


@pytest.mark.parametrize("keywords", [{}, pytest.param({"compile": TRACED}, marks=(NEEDS_TORCH, pytest.mark.slow))])
def test_gradients_are_those_of_a_list_of_layers(keywords: dict[str, Any]) -> None:
    func = Stacked()
    expected = gradients(Indexed())
    count = len(func.layers.names)
    for i, found in enumerate(gradients(func, **keywords)):
        torch.testing.assert_close(found, torch.stack(expected[i::count]), rtol=1e-12, atol=1e-14)


def test_weights_are_linear_between_nodes_if_that_is_asked_for() -> None:
    module = GridModule(layers(3), [0.0, 1.0, 2.0], kind="linear")
    x = torch.ones(2, dtype=torch.float64)
    first, second, _ = layers(3)
    between = copy.deepcopy(first)
    with torch.no_grad():
        for own, one, other in zip(between.parameters(), first.parameters(), second.parameters(), strict=True):
            own.copy_(one + 0.25 * (other - one))
    torch.testing.assert_close(module(0.25, x), between(x))


def test_its_state_is_stored_and_copied_and_its_mode_set() -> None:
    x = torch.ones(2, dtype=torch.float64)
    module, other = GridModule(layers(), NODES), GridModule(reversed(layers()), NODES)
    assert not torch.equal(module(0.05, x), other(0.05, x))
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(copy.deepcopy(other)(0.05, x), module(0.05, x), rtol=0, atol=0)
    dropout = GridModule([nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0)) for _ in range(STEPS)], NODES)
    assert not dropout(0.0, torch.ones(2)).any()
    assert dropout.eval()(0.0, torch.ones(2)).any()


def test_frozen_weights_stay_frozen() -> None:
    frozen = layers()
    for layer in frozen:
        layer[0].requires_grad_(False)
    module = GridModule(frozen, NODES)
    assert [weight.values.requires_grad for weight in module.weights] == [False, False, True, True]


@pytest.mark.parametrize(
    ("modules", "error", "match"),
    [
        ([], ValueError, "modules must be one or more"),
        ([nn.Linear(1, 1), 3], TypeError, "modules must be modules, got int as number 1"),
        ([nn.BatchNorm1d(1)], ValueError, r"modules must have no buffers, got \['running_mean', "),
        ([nn.Linear(1, 1), nn.Linear(1, 2)], ValueError, "same names, shapes and dtypes, got {'weight': "),
        ([nn.Tanh()], ValueError, "modules must have weights"),
        ([nn.Linear(1, 1)], ValueError, "values must have 10 rows for 11 nodes"),
    ],
    ids=["none", "type", "buffers", "shapes", "weights", "count"],
)
def test_modules_that_do_not_fit_are_errors(modules: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GridModule(modules, NODES)
