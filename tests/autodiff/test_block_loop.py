"""Loops over blocks that are alike: what they carry on, take and keep; by Python and by kernels alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compiled_solves import NEEDS_TORCH
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchdiffeq_lmm import Compile
from torchdiffeq_lmm.autodiff.block_loop import BlockFunction, Given, carried, fixed, shifted, stacks
from torchdiffeq_lmm.autodiff.inductor import compiled
from torchdiffeq_lmm.autodiff.kernel_loop import KernelFunction

COUNT = 7
Run = Callable[..., Sequence[Tensor]]


def step(x: Tensor, total: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next state and total, and what is made on the way."""
    made = torch.stack([x * rows[0], x.sin() + rows[1]])
    following = (made.sum(0) * weight).cos()
    return following.t().contiguous().t(), total + (x * weight).sum(), made


def states(count: int) -> Tensor:
    # Components are next to each other for all samples, as states lie in memory.
    return torch.linspace(0, 1, count * 12, dtype=torch.float64).reshape(count, 3, 4).transpose(1, 2)


def inputs(count: int = COUNT, starts: tuple[int, ...] | None = None) -> list[Given]:
    rows = torch.linspace(-1, 2, count * 2 * 3, dtype=torch.float64).reshape(count, 2, 3)
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = states(1)[0] if starts is None else states(len(starts))
    total = torch.zeros((), dtype=torch.float64)
    return [*carried([x], 0, starts), *carried([total], 1), *stacks([rows]), *fixed([weight])]


def by_hand(
    count: int, starts: tuple[int, ...] | None, *, backwards: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    begins, total, rows, weight = (given.value for given in inputs(count, starts))
    x = begins
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for block in reversed(range(count)) if backwards else range(count):
        if starts is not None and block in starts:
            x = begins[starts.index(block)]
        x, total, between = step(x, total, rows[block], weight)
        for made, of_blocks in zip((x, total, between), found, strict=True):
            of_blocks.append(made)
    return found


def traced(run: Run, inputs: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    mode = FakeTensorMode()
    values: list[Tensor] = [mode.from_tensor(given) for given in inputs]
    with mode:
        return make_fx(run)(*values), values


def compiled_function(run: Run, given: Sequence[Given]) -> KernelFunction:
    function, code, _ = compiled(*traced(run, [one.one for one in given]), None, {}, in_loops=True)
    assert code is not None
    return KernelFunction(function, code)


def check(
    function: BlockFunction,
    count: int,
    kept: Sequence[int],
    *,
    backwards: bool,
    starts: tuple[int, ...] | None = None,
) -> None:
    found = function.looped(count, inputs(count, starts), kept, backwards=backwards)
    expected = by_hand(count, starts, backwards=backwards)
    for number, of_blocks in enumerate(expected):
        torch.testing.assert_close(found.last[number], of_blocks[-1])
        if number in kept:
            stack = torch.stack(of_blocks[::-1] if backwards else of_blocks)
            torch.testing.assert_close(found.kept[number], stack)
    assert list(found.kept) == list(kept)


CASES = [(count, kept, backwards) for count in (1, 2, COUNT) for kept in ((), (0, 2)) for backwards in (False, True)]


@pytest.mark.parametrize(("count", "kept", "backwards"), CASES)
def test_every_block_takes_what_the_one_before_returns(count: int, kept: Sequence[int], backwards: bool) -> None:
    check(BlockFunction(step), count, kept, backwards=backwards)


STARTS = [((0, 2, 3), False), ((6, 1, 0), True), ((6,), True)]


@pytest.mark.parametrize(("starts", "backwards"), STARTS)
def test_certain_blocks_begin_with_what_is_given(starts: tuple[int, ...], backwards: bool) -> None:
    check(BlockFunction(step), COUNT, (0,), backwards=backwards, starts=starts)


def test_the_layout_of_what_is_kept_is_that_of_each_block() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        return (x.t().contiguous().t() + 1,)

    x = torch.zeros(3, 2)
    for count in (1, 3):
        stack = BlockFunction(run).looped(count, carried([x]), [0]).kept[0]
        assert stack.shape == (count, 3, 2)
        assert stack.stride()[1:] == (1, 3)
        assert shifted(stack[0], stack).stride()[1:] == (1, 3)


def test_a_stack_is_shifted_by_one() -> None:
    stack = torch.arange(4.0).reshape(4, 1)
    assert shifted(torch.tensor([9.0]), stack).tolist() == [[9.0], [0.0], [1.0], [2.0]]


@NEEDS_TORCH
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestKernels:
    def test_they_make_the_same_without_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        function, by_python = compiled_function(step, inputs()), BlockFunction.looped
        with monkeypatch.context() as context:
            context.setattr(BlockFunction, "looped", _never)
            for count, kept, backwards in CASES:
                check(function, count, kept, backwards=backwards)
            for starts, backwards in STARTS:
                check(function, COUNT, (0,), backwards=backwards, starts=starts)
            # What is the same for all blocks may be of each in another loop.
            x, total, rows, weight = inputs()
            for given in (rows, *fixed([rows.one]), rows):
                taken = [x, total, given, weight]
                expected = by_python(BlockFunction(step), COUNT, taken, []).last
                torch.testing.assert_close(tuple(function.looped(COUNT, taken, []).last), expected)
            # Each call has memory of its own.
            with ThreadPoolExecutor(4) as pool:
                done = [pool.submit(check, function, COUNT, (0, 2), backwards=i % 2 == 0) for i in range(200)]
                assert [one.result() for one in done] == [None] * 200

    def test_a_function_that_calls_pytorch_is_called_itself(self) -> None:
        def run(x: Tensor, weight: Tensor) -> tuple[Tensor]:
            return ((x * weight).sort(0).values,)

        weight = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(8, 5)
        given = [*carried([weight.cos()]), *fixed([weight])]
        found = compiled_function(run, given).looped(3, given, [0])
        torch.testing.assert_close(found.kept[0], BlockFunction(run).looped(3, given, [0]).kept[0])

    def test_a_mode_for_gpus_does_no_harm_on_a_cpu(self) -> None:
        def run(x: Tensor, weight: Tensor) -> tuple[Tensor]:
            return (x @ weight,)

        weight = torch.linspace(-1, 1, 1600, dtype=torch.float64).reshape(40, 40)
        given = weight, weight.cos()
        function = Compile(mode="reduce-overhead").compiled(*traced(run, given), in_loops=True)
        torch.testing.assert_close(tuple(function(*given)), run(*given))

    def test_an_error_of_a_kernel_is_an_error(self) -> None:
        def run(x: Tensor, rows: Tensor) -> tuple[Tensor]:
            return (x.index_select(0, rows) + 1,)

        x, rows = torch.zeros(4), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 4]])
        function = compiled_function(run, [*carried([x]), *stacks([rows])])
        assert function.looped(2, [*carried([x]), *stacks([rows[:2]])], []).last[0].tolist() == [2.0] * 4
        with pytest.raises(RuntimeError, match="index"):
            function.looped(3, [*carried([x]), *stacks([rows])], [])


def _never(*_: object, **__: object) -> None:
    raise AssertionError
