"""Solves and torch.compile; by the backend that traces and differentiates all, and leaves out the machine code."""

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torchsde
from torch import Tensor, nn

import torchdiffeq_lmm

# The compiler alone takes seconds to import.
pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "filtered": {"grad_filter": "leapfrog"},
    "smooth": {"grad_filter": "smooth"},
    "reversible": {"backward": "reversible"},
    "checkpoint, filtered": {"backward": "checkpoint", "grad_filter": "auto"},
}


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * t.cos()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # What the compiler itself warns of is none of ours.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def loss_of(func: Callable, method: str, keywords: dict[str, str]) -> Callable[[], Tensor]:
    y0, t = torch.ones(2, 3), torch.tensor([0.0, 0.5, 1.0])

    def loss() -> Tensor:
        return torchdiffeq_lmm.odeint(func, y0, t, method=method, options={"step_size": 0.1}, **keywords).square().sum()

    return loss


def gradients(field: Field, loss: Callable[[], Tensor]) -> list[Tensor]:
    field.zero_grad()
    loss().backward()
    return [parameter.grad.clone() for parameter in field.parameters()]


@pytest.mark.parametrize(
    ("what", "way"),
    [
        *itertools.product(["func"], ["plain", "checkpoint, filtered"]),
        *itertools.product(["the training step"], ["plain", "filtered", "smooth", "reversible"]),
    ],
)
def test_compiled_or_not_the_gradient_is_the_same(what: str, way: str) -> None:
    field = Field()
    expected = gradients(field, loss_of(field, "leapfrog", WAYS[way]))
    if what == "func":
        loss = loss_of(torch.compile(field, backend="aot_eager"), "leapfrog", WAYS[way])
    else:
        loss = torch.compile(loss_of(field, "leapfrog", WAYS[way]), backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(field, loss), expected)


@pytest.mark.parametrize("method", ["ab3", "bdf2"])
def test_other_methods_too(method: str) -> None:
    field = Field()
    expected = gradients(field, loss_of(field, method, {"grad_filter": "auto"}))
    compiled = torch.compile(field, backend="aot_eager")
    torch.testing.assert_close(gradients(field, loss_of(compiled, method, {"grad_filter": "auto"})), expected)


class Stochastic(Field):
    sde_type, noise_type = "ito", "diagonal"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y


def test_an_sde_too_and_its_options_are_known() -> None:
    field, y0, ts = Stochastic(), torch.ones(2, 3), torch.tensor([0.0, 0.5, 1.0])
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(2, 3), entropy=1)

    def loss() -> Tensor:
        options = {"grad_filter": "auto", "jump_t": [0.3]}
        return torchsde.sdeint(field, y0, ts, bm=bm, dt=0.1, method="ab3", options=options).square().sum()

    expected = gradients(field, loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(gradients(field, torch.compile(loss, backend="aot_eager")), expected)
    assert not [warning for warning in caught if "Unexpected arguments" in str(warning.message)]


def test_a_compiled_step_takes_as_few_graphs_as_the_solve_has_sides() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(loss_of(Field(), "leapfrog", {}), backend=backend)
    step()
    count = len(graphs)
    step()
    assert len(graphs) == count
    # torchdiffeq's checks make some; the steps none.
    assert not any("tanh" in str(node.target) for graph in graphs for node in graph.graph.nodes)
