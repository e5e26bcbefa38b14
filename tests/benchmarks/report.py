"""Tables in Markdown, and figures as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned for those who read it as text."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def absences(absent: dict[str, str]) -> str:
    """One line for everything that was left out, with the reason."""
    return "".join(f"\nNot measured: {name} ({why})." for name, why in absent.items())


def failures(results: dict[str, Any], problem: str) -> dict[tuple[str, str], list[float]]:
    """Of one problem, for each solver and reason: the tolerances at which it has no result."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in results["absent"]:
        if each["problem"] == problem:
            found.setdefault((each["solver"], each["why"]), []).append(each["rtol"])
    return found


def verdict(value: float, target: float | None) -> str:
    """Whether a ratio meets its target."""
    if target is None:
        return ""
    return f"≤ {target:g} {'met' if value <= target else 'MISSED'}"


def write_json(path: Path, figures: object) -> None:
    """Write the figures, readable and in a fixed layout."""
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
