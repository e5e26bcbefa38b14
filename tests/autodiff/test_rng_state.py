"""The circumstances of an evaluation, restored for as long as they are needed and not longer."""

from contextlib import nullcontext

import pytest
import torch

from torchdiffeq_lmm.autodiff.rng_state import ForwardContext, RngState

CPU = torch.device("cpu")


def autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def test_a_random_state_tells_whether_numbers_were_drawn() -> None:
    before = RngState.now(CPU)
    assert before.device is None
    assert before.equals(RngState.now(CPU))
    torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert before.equals(RngState.now(CPU))
    torch.rand(1)
    assert not before.equals(RngState.now(CPU))
    torch.set_rng_state(before.cpu)
    assert before.equals(RngState.now(CPU))


def test_a_random_state_tells_whether_numbers_were_drawn_on_the_device() -> None:
    cpu = torch.get_rng_state()
    one, other = (torch.tensor([value], dtype=torch.uint8) for value in (1, 2))
    assert RngState(cpu, one).equals(RngState(cpu, one.clone()))
    assert not RngState(cpu, one).equals(RngState(cpu, other))


def test_random_numbers_are_drawn_again_and_others_are_not_disturbed() -> None:
    circumstances, random = ForwardContext(CPU), RngState.now(CPU)
    first = torch.rand(4)
    torch.rand(11)
    before = torch.get_rng_state()
    for _ in range(2):
        with circumstances.restored(random):
            assert torch.equal(torch.rand(4), first)
        assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), circumstances.restored(random):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_snapshot_is_not_used_up() -> None:
    random = RngState.now(CPU)
    kept = random.cpu.clone()
    with ForwardContext(CPU).restored(random):
        torch.rand(1000)
    assert torch.equal(random.cpu, kept)


@pytest.mark.parametrize("inside", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outside", [None, torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_forward_pass(inside: torch.dtype | None, outside: torch.dtype | None) -> None:
    def entered(dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    with entered(inside):
        circumstances, wanted = ForwardContext(CPU), autocast()
    with entered(outside):
        around = autocast()
        with circumstances.restored():
            assert torch.is_autocast_enabled("cpu") == (inside is not None)
            if inside is not None:
                assert autocast() == wanted
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype is (inside or torch.float32)
        assert autocast() == around


def test_nothing_is_entered_where_nothing_differs() -> None:
    assert isinstance(ForwardContext(CPU).restored(), nullcontext)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        circumstances = ForwardContext(CPU)
        assert isinstance(circumstances.restored(), nullcontext)
    assert not isinstance(circumstances.restored(), nullcontext)


@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_of_autocast_is_restored(cached: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        circumstances = ForwardContext(CPU)
    with circumstances.restored():
        assert torch.is_autocast_cache_enabled() == cached


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_are_drawn_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    circumstances, random = ForwardContext(device), RngState.now(device)
    first = torch.rand(4, device=device)
    assert not random.equals(RngState.now(device))
    before = torch.cuda.get_rng_state(device)
    with circumstances.restored(random):
        assert torch.equal(torch.rand(4, device=device), first)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
