"""What torch.compile makes of func and of the whole forward pass, with the time that compiling takes.

Every case runs in a process of its own, without inductor's caches and under a time limit, as the compilation of an
unrolled solve may take longer than anybody would wait.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from networks import Network
from report import absences, markdown
from speed import SIZES, host, plain_loop, training_step
from timing import round_robin
from torch import Tensor

import torchdiffeq_lmm

# The whole solve at the size with the fewest steps alone: the more of them are unrolled, the longer it takes.
CASES = (
    ("leapfrog, func compiled", "func", SIZES[0]),
    ("leapfrog, func compiled", "func", SIZES[-1]),
    ("leapfrog, solve and loss compiled", "solve", SIZES[-1]),
    ("plain loop, solve and loss compiled", "loop", SIZES[-1]),
)
LIMIT_S = 60


def run_case(what: str, width: int, batch: int, steps: int) -> dict[str, Any]:
    """Time one case against its eager form.

    Args:
        what: "func", "solve" or "loop".
        width, batch, steps: the size.
    """
    torchdiffeq_lmm.register()
    torch.manual_seed(0)
    func, y0 = Network(width), torch.randn(batch, width)

    def solve(inner: Any) -> Tensor:
        return plain_loop(inner, y0, steps) if what == "loop" else host(inner, y0, steps, "leapfrog")

    eager = training_step(func, lambda: solve(func))
    if what == "func":
        compiled_func = torch.compile(func)
        compiled = training_step(func, lambda: solve(compiled_func))
    else:
        compiled_solve = torch.compile(lambda: solve(func))
        compiled = training_step(func, compiled_solve)
    start = time.perf_counter()
    compiled()
    first = time.perf_counter() - start
    contest = round_robin({"eager": eager, "compiled": compiled}, rounds=7, at_least=2)
    if contest.absent:
        raise RuntimeError(f"a second run failed: {contest.absent}")
    return {
        "first call, s": first,
        "ratio": vars(contest.ratio("compiled", "eager")),
        "milliseconds": {name: contest.milliseconds(name).median for name in contest.times},
    }


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every case; in haste the first alone."""
    results: dict[str, Any] = {"rows": [], "absent": {}}
    for name, what, size in CASES[: 1 if quick else None]:
        label = f"{name}, at D, B, N = {', '.join(map(str, size))}"
        command = [sys.executable, str(Path(__file__)), what, *map(str, size)]
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            results["absent"][label] = f"not compiled within {LIMIT_S} s"
            continue
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            results["absent"][label] = lines[-1][:160]
            continue
        results["rows"].append({"what": name, "size": size, **json.loads(done.stdout.splitlines()[-1])})
    return results


def table(results: dict[str, Any]) -> str:
    """One row per case and size."""
    rows = [
        (
            row["what"],
            ", ".join(map(str, row["size"])),
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}",
            f"{row['milliseconds']['compiled']:.2f}",
            f"{row['first call, s']:.1f}",
        )
        for row in results["rows"]
    ]
    header = ("what", "D, B, N", "ratio to eager", "quartiles", "ms", "first call, s")
    return markdown(header, rows) + absences(results["absent"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time one case and print it as JSON.")
    parser.add_argument("what", choices=sorted({case[1] for case in CASES}))
    parser.add_argument("size", type=int, nargs=3)
    given = parser.parse_args()
    print(json.dumps(run_case(given.what, *given.size)))
