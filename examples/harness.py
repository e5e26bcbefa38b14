"""What the examples share: their command line, tables, and where their results go."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Not every example draws, and the import takes a second.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable to the colour-blind.
COLORS = {
    "auto-differentiation": "#D55E00",
    "filtered": "#0072B2",
    "smooth": "#009E73",
    "midpoint": "#CC79A7",
    "odeint_adjoint": "#E69F00",
    "truth": "#000000",
}


def arguments(doc: str, quick: str, seed: int | None = None) -> argparse.Namespace:
    """The command line of an example.

    Args:
        doc: its docstring, whose first line describes it.
        quick: what ``--quick`` leaves out.
        seed: the default of ``--seed``; None for an example without random numbers.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), metavar="DIR", help="where to write, default: %(default)s"
    )
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed, help="of the random numbers, default: %(default)s")
    return parser.parse_args()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; numbers are to be formatted before."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(output: Path, name: str, results: object, figures: "Mapping[str, Figure]") -> None:
    """Write the results as ``name.json`` and each figure as a PNG of its own name, and say where."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{name}.json"]
    paths[0].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for title, figure in figures.items():
        figure.savefig(output / f"{title}.png", dpi=110, pil_kwargs={"optimize": True})
        paths.append(output / f"{title}.png")
    print("\nWrote " + ", ".join(map(str, paths)))
