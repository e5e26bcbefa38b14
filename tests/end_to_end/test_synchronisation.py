"""What a GPU would wait for: values read from tensors. Their number must not grow with the number of steps."""

from collections import Counter
from typing import Any

import pytest
import torch
from methods import slow_but
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchdiffeq_lmm
from torchdiffeq_lmm.forward import step_source

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::item"}

WAYS: dict[str, dict[str, Any]] = {
    "leapfrog": {"method": "leapfrog"},
    "leapfrog, filtered": {"method": "leapfrog", "grad_filter": "leapfrog"},
    "leapfrog, smooth": {"method": "leapfrog", "grad_filter": "smooth"},
    "leapfrog, reversible": {"method": "leapfrog", "backward": "reversible", "grad_filter": "auto"},
    "leapfrog, three checkpoints": {"method": "leapfrog", "backward": torchdiffeq_lmm.Checkpoint(3)},
    "ab4": {"method": "ab4"},
    "ab4, filtered": {"method": "ab4", "grad_filter": "auto"},
    "abm3, three checkpoints": {
        "method": "abm3",
        "grad_filter": "auto",
        "backward": torchdiffeq_lmm.Checkpoint(3),
    },
}


class Reads(TorchDispatchMode):
    """Counts the operations that read a value from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * t.cos()


def reads(steps: int, keywords: dict[str, Any]) -> Counter[str]:
    torch.manual_seed(0)
    func, y0, t = Field(), torch.ones(3, 2), torch.tensor([0.0, 0.5, 1.0])
    with Reads() as mode:
        states = torchdiffeq_lmm.odeint(func, y0, t, options={"step_size": 1 / steps}, **keywords)
        states.square().sum().backward()
    return mode.counts


@pytest.mark.parametrize("way", slow_but(["leapfrog, filtered"], WAYS))
def test_no_step_reads_a_value(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # More steps than times are made at once, which are 256 otherwise.
    monkeypatch.setattr(step_source._Blocks, "_SIZE", 64)
    assert reads(75, WAYS[way]) == reads(150, WAYS[way])


def test_a_checkpoint_reads_a_value_and_a_step_between_two_reads_none() -> None:
    def counted(steps: int) -> int:
        return sum(reads(steps, {"method": "leapfrog", "backward": "checkpoint"}).values())

    # Of N steps √N are kept, and each is compared when it is reached again.
    fewer, more = counted(100), counted(400)
    assert 0 < more - fewer <= 3 * (20 - 10)


def test_reads_are_counted() -> None:
    with Reads() as mode:
        float(torch.ones(()))
    assert sum(mode.counts.values()) == 1
