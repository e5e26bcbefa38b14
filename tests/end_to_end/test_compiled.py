"""Solves compiled by Inductor: slow, for each takes the compiler seconds."""

from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, UNEQUAL, Field, assert_same, compiling, solved, start
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Compile, CostateFilter

pytestmark = [NEEDS_TORCH, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHORT = Compile(block=5)


@pytest.mark.parametrize(
    ("method", "grad_filter", "t", "options"),
    [
        ("leapfrog", "leapfrog", INSIDE, REGULAR),
        ("ab3", CostateFilter(order=3), UNEQUAL, None),
        ("abm2", None, UNEQUAL, None),
    ],
)
def test_values_and_gradients_are_those_of_an_eager_solve(
    method: str, grad_filter: Any, t: Tensor, options: dict[str, Any] | None
) -> None:
    func, keywords = Field(), {"options": options, "grad_filter": grad_filter}
    compiled = solved(func, start(), t, method, compile=SHORT, **keywords)
    assert_same(compiled, solved(func, start(), t, method, **keywords))


class Wide(nn.Module):
    """Its products are too large to be sums."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 65), nn.Tanh(), nn.Linear(65, 2)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * t.cos()


def test_one_compilation_serves_all_batch_sizes_from_the_second_on() -> None:
    func = Wide()
    for batch, compilations in ((3, 2), (40, 2), (64, 0), (2, 0)):
        with compiling(compilations):
            compiled = solved(func, start(batch), INSIDE, "leapfrog", options=REGULAR, compile=SHORT)
        assert_same(compiled, solved(func, start(batch), INSIDE, "leapfrog", options=REGULAR))


def test_a_missing_compiler_is_an_error_that_says_so() -> None:
    import torch._inductor.config as config

    patched = config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with patched, pytest.raises(RuntimeError, match=r"compile failed in Inductor(?s:.*)C\+\+ compiler"):
        torchdiffeq_lmm.odeint(lambda t, y: y.sin() * t, start(), INSIDE, method="ab1", options=REGULAR, compile=SHORT)


def test_single_precision() -> None:
    func = Field().float()
    y0 = start().float().requires_grad_()
    states = torchdiffeq_lmm.odeint(func, y0, INSIDE.float(), method="ab2", options=REGULAR, compile=SHORT)
    found = [states, *torch.autograd.grad(states.sum(), (y0, *func.parameters()))]
    expected = solved(func.double(), start(), INSIDE, "ab2", options=REGULAR)
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
