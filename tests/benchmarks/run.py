"""Run the benchmarks: print their tables, write their figures as JSON, draw the pictures. They gate nothing.

    python tests/benchmarks/run.py [--quick] [--long] [--only speed,memory] [--output output/benchmarks]

The peers take part where they are installed: ``pip install torchdyn TorchDiffEqPack diffrax``. Nothing else should run
on the machine meanwhile. The cost of a step at 100,000 steps is measured with ``--long`` alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import adaptive
import batches
import compilation
import compiled
import gpu
import implicit
import length
import memory
import precision
import speed
import summary
from machine import machine
from pictures import draw_adaptive, draw_memory, draw_precision, draw_summary
from report import markdown, write_json

PARTS: dict[str, ModuleType] = {
    "speed": speed,
    "implicit": implicit,
    "batches": batches,
    "length": length,
    "compile": compilation,
    "compiled": compiled,
    "memory": memory,
    "precision": precision,
    "adaptive": adaptive,
    "gpu": gpu,
}
PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "memory": draw_memory,
    "precision": draw_precision,
    "adaptive": draw_adaptive,
}


def names(given: str) -> list[str]:
    """The parts named in a list with commas."""
    chosen = given.split(",")
    for name in chosen:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return chosen


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmarks of torchdiffeq_lmm beside its peers.")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, compile not at all")
    parser.add_argument("--long", action="store_true", help="the cost of a step with 100,000 steps as well")
    parser.add_argument("--only", type=names, help=f"of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="a folder for JSON and pictures")
    return parser.parse_args()


def main() -> None:
    """Run the parts that are asked for."""
    given = arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    here, results = machine(), {}
    # Compiling one function takes longer than all the rest in haste.
    chosen = given.only or [name for name in PARTS if not (given.quick and name in ("compile", "compiled"))]
    texts = [markdown(("machine", ""), list(here.items()))]
    print(texts[0], flush=True)
    for name in chosen:
        part, start = PARTS[name], time.perf_counter()
        results[name] = part.measure(quick=given.quick, long=given.long)
        title = (part.__doc__ or name).splitlines()[0]
        texts.append(f"## {title}\n\n{part.table(results[name])}")
        print(f"\n{texts[-1]}\n\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        write_json(given.output / f"{name}.json", {"machine": here, "quick": given.quick, name: results[name]})
        if name in PICTURES:
            PICTURES[name](results[name], given.output / f"{name}.png")
    if {"memory", "precision"} <= results.keys():
        draw_summary(results["memory"], results["precision"], given.output / "summary.png")
    texts.insert(1, f"## Summary\n\n{summary.table(results)}")
    print(f"\n{texts[1]}")
    (given.output / "benchmarks.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"\nTables, figures and pictures are in {given.output}/.")


if __name__ == "__main__":
    main()
