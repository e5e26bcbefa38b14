"""Training in two processes, in the quick mode of its example, which starts them."""

import json
from pathlib import Path

import pytest
import torch
from compiled_solves import NEEDS_TORCH
from programs import EXAMPLES, run_alone

pytestmark = [
    pytest.mark.slow,
    NEEDS_TORCH,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this PyTorch has no gloo, by which the processes meet",
    ),
]

REFUSED = {
    "plain": {},
    'grad_filter="auto"': {"fully_shard(func)": "where grad_filter is given"},
    'backward="checkpoint"': {"fully_shard(func)": "evaluated again for the backward pass"},
    "compile=True": {"DDP(func)": "DistributedDataParallel", "fully_shard(func)": "where compile is given"},
    'compile=True, grad_filter="auto"': {
        "DDP(func)": "DistributedDataParallel",
        "fully_shard(func)": "where grad_filter is given",
    },
}
"""For every way what is not to be distributed by itself, and a part of the reason."""


def test_two_processes_have_the_losses_of_one_and_say_what_is_refused(tmp_path: Path) -> None:
    printed = run_alone(EXAMPLES / "processes.py", "--quick", "--output", tmp_path)
    found = json.loads((tmp_path / "processes.json").read_text(encoding="utf-8"))
    assert found.keys() == REFUSED.keys()
    seen: set[str] = set()
    for way, refused in REFUSED.items():
        assert f"| `{way}` |" in printed
        of_way = found[way]
        assert of_way["losses"] == sorted(of_way["losses"], reverse=True), way
        assert max(of_way["model"].values()) < 1e-12, way
        seen.update(of_way["model"])
        for column, got in of_way["func"].items():
            if column in refused:
                assert refused[column] in got, (way, column)
                assert got in printed, (way, column)
            else:
                assert got < 1e-12, (way, column)
        # What is compiled has been compared with the solve that is not.
        assert of_way["model"], way
    assert seen == {"DDP", "fully_shard"}
    # The first step is the same one; then the filter has changed the parameters.
    plain, filtered = found["plain"]["losses"], found['grad_filter="auto"']["losses"]
    assert filtered[0] == pytest.approx(plain[0], rel=1e-12)
    assert abs(filtered[-1] - plain[-1]) > 1e-9 * plain[-1]
    assert found['backward="checkpoint"']["losses"] == pytest.approx(plain, rel=1e-12)
