"""Solves compiled by Inductor: slow, for each takes the compiler seconds."""

import pytest
import torch
from compiled_solves import (
    INSIDE,
    NEEDS_TORCH,
    REGULAR,
    TRACED,
    UNEQUAL,
    Field,
    Light,
    assert_same,
    compiling,
    solved,
    start,
)
from torch import Tensor

from torchdiffeq_lmm import Compile, CostateFilter, odeint
from torchdiffeq_lmm.autodiff.block_loop import BlockFunction

pytestmark = [NEEDS_TORCH, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHORT = Compile(block=5)


def test_one_compilation_serves_all_batch_sizes_from_the_second_on() -> None:
    """Of a filtered solve with outputs inside steps, a layer for every step, and matrix products that are kept."""
    width = 10
    # Of a batch of 3 the products are small enough to be sums; of one whose size is not known they are kept. What the
    # first size takes is compiled in other tests.
    func, keywords = Field(width), {"options": REGULAR, "grad_filter": "leapfrog"}
    with compiling(1), torch.no_grad():
        of_one_size = odeint(func, start(3, width), INSIDE, method="leapfrog", compile=TRACED, **keywords)
        assert_same([of_one_size], [odeint(func, start(3, width), INSIDE, method="leapfrog", **keywords)])
    for batch, compilations in ((40, 2), (64, 0), (3, 0)):
        with compiling(compilations):
            compiled = solved(func, start(batch, width), INSIDE, "leapfrog", compile=SHORT, **keywords)
        assert_same(compiled, solved(func, start(batch, width), INSIDE, "leapfrog", **keywords))


def test_a_filter_of_higher_order_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels alone: a call of every block from Python would take longer than the kernels."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(BlockFunction, "looped", never)
    # Of a method with a short start: one of a longer start takes the compiler twice the time.
    func, t, keywords = Light().float(), UNEQUAL.float(), {"grad_filter": CostateFilter(order=3)}
    compiled = solved(func, start().float(), t, "ab2", compile=SHORT, **keywords)
    assert all(found.dtype is torch.float32 for found in compiled)
    expected = solved(func.double(), start(), UNEQUAL, "ab2", **keywords)
    assert_same([found.double() for found in compiled], expected, 1e-5)


def test_equations_of_implicit_steps() -> None:
    """Stiff ones, in single precision, of a second size of the batch."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return rate * (t.cos() - y) ** 3 - 1000 * (y - t.cos())

    rate, t = torch.tensor(10.0, requires_grad=True), torch.linspace(0, 1, 30)
    for batch, compilations in ((4, 1), (9, 1), (5, 0)):
        y0, found = torch.linspace(0.5, 1.5, batch)[:, None], []
        with compiling(compilations):
            y = odeint(func, y0, t, method="bdf2", rtol=1e-5, atol=1e-6, compile=True)
            found.append((y, *torch.autograd.grad(y[-1].sum(), (rate,))))
        y = odeint(func, y0, t, method="bdf2", rtol=1e-5, atol=1e-6)
        found.append((y, *torch.autograd.grad(y[-1].sum(), (rate,))))
        assert_same(*([part.detach() for part in one] for one in found), 1e-5)


def test_a_missing_compiler_is_an_error_that_says_so() -> None:
    import torch._inductor.config as config

    patched = config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with patched, pytest.raises(RuntimeError, match=r"compile failed in Inductor(?s:.*)C\+\+ compiler"):
        odeint(lambda t, y: y.sin() * t, start(), INSIDE, method="ab1", options=REGULAR, compile=SHORT)
