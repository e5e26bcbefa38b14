"""Matrix products of a compiled block are made once; with checkpoints they are made again, and little is kept."""

from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, assert_same, solved
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter
from torchdiffeq_lmm.autodiff.kept_products import halves

pytestmark = NEEDS_TORCH

WIDTH = 40


class Network(nn.Module):
    """Wide enough for its products not to be written out as sums."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.net(y)
        return slope * t.cos()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(2, 2, 3, padding=1).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = torch.tanh(self.net(y.reshape(-1, 2, 4, WIDTH // 8)))
        return slope.reshape(y.shape)


class InPlace(Network):
    """What is changed in place is kept as it was before."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.net(y) + y
        return slope.mul_(t.cos())


def start(batch: int = 3) -> Tensor:
    return torch.linspace(-1, 1, batch * WIDTH, dtype=torch.float64).reshape(batch, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("func", "keywords"),
    [
        (Network(), {"method": "leapfrog", "grad_filter": "auto"}),
        (Network(), {"method": "leapfrog", "grad_filter": "auto", "backward": "checkpoint"}),
        (Network(), {"method": "leapfrog", "backward": "reversible"}),
        (Network(), {"method": "ab3", "grad_filter": CostateFilter("trapezoid", order="method")}),
        (Convolution(), {"method": "ab2"}),
        (InPlace(), {"method": "ab2"}),
    ],
    ids=["filtered", "checkpoint", "reversible", "order", "convolution", "in place"],
)
def test_values_and_gradients_are_those_of_an_eager_solve(func: nn.Module, keywords: dict[str, Any]) -> None:
    compiled = solved(func, start(), INSIDE, options=REGULAR, compile=TRACED, **keywords)
    # Eager checkpoints are asked for whose gradients are wanted.
    expected = solved(func, start(), INSIDE, options=REGULAR, **{**keywords, "backward": "autograd"})
    assert_same(compiled, expected)


@pytest.mark.slow
def test_gradients_of_times_and_a_second_batch_size() -> None:
    func = Network()
    for batch in (3, 5):
        t = INSIDE.clone().requires_grad_()
        compiled = solved(func, start(batch), t, "ab1", options=REGULAR, compile=TRACED)
        assert_same(compiled, solved(func, start(batch), t, "ab1", options=REGULAR))


@pytest.mark.slow
def test_with_checkpoints_less_is_kept() -> None:
    kept = {}
    for backward in ("autograd", "checkpoint"):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        func = Network()
        # What is traced is saved, too.
        solved(func, start(), INSIDE, "ab1", options=REGULAR, backward=backward, compile=TRACED)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torchdiffeq_lmm.odeint(
                func, start(), INSIDE, method="ab1", options=REGULAR, backward=backward, compile=TRACED
            )
        kept[backward] = sum(sizes) - sum(parameter.numel() for parameter in func.parameters())
    # tanh of 23 steps or more against the states before 5 blocks.
    assert kept["autograd"] - kept["checkpoint"] >= 23 * start().numel()
    assert kept["checkpoint"] <= 8 * start().numel()


def test_a_product_is_made_once() -> None:
    def joint(x: Tensor, w: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            y = torch.tanh(x @ w) @ w
        return y.detach(), *torch.autograd.grad(y, (x, w), cotangent)

    x, w, cotangent = torch.randn(3, 4), torch.randn(4, 4), torch.randn(3, 4)
    parts = halves(make_fx(joint)(x, w, cotangent), 2, 1, keeps=True)
    y, *kept = parts.forward(x, w)
    found = (y, *parts.adjoint(x, w, cotangent, *kept))
    for one, other in zip(found, joint(x, w, cotangent), strict=True):
        torch.testing.assert_close(one, other)
    products = [
        sum(node.target is torch.ops.aten.mm.default for node in part.graph.nodes)
        for part in (parts.forward, parts.adjoint)
    ]
    assert products == [2, 4]


def test_without_products_nothing_is_kept() -> None:
    def joint(x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(x), cotangent * (1 - torch.tanh(x) ** 2)

    parts = halves(make_fx(joint)(torch.ones(2), torch.ones(2)), 1, 1, keeps=True)
    assert not parts.kept
    torch.testing.assert_close(parts.forward(torch.ones(2)), (torch.ones(2).tanh(),))
