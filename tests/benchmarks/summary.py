"""The one small table of speed, memory and precision."""

from typing import Any

from precision import contest
from report import markdown

SPEED = (
    ("leapfrog", "plain loop"),
    ("leapfrog", "torchdiffeq midpoint"),
    ('leapfrog, grad_filter="leapfrog"', "leapfrog"),
    ('leapfrog, grad_filter="smooth"', "leapfrog"),
    ('leapfrog, backward="reversible"', "leapfrog"),
    ("ab4", "torchdiffeq explicit_adams (default)"),
    ("leapfrog", "diffrax LeapfrogMidpoint, jitted"),
)


def table(parts: dict[str, dict[str, Any]]) -> str:
    """What has been measured of speed, memory and precision, in a few rows."""
    blocks = []
    if "speed" in parts:
        sizes = parts["speed"]["sizes"]
        found = {(row["what"], row["against"], row["size"]): row["median"] for row in parts["speed"]["ratios"]}
        found |= {(against, what, size): 1 / ratio for (what, against, size), ratio in found.items()}
        rows = [
            (what, against, *(f"{found[key]:.2f}" if (key := (what, against, size)) in found else "" for size in sizes))
            for what, against in SPEED
        ]
        blocks.append(markdown(("time of a training step of", "against that of", *sizes), rows))
    if "memory" in parts:
        rows = [
            (
                name,
                *(f"{row['bytes'] / 1024:,.0f} KiB" for row in measured),
                f"{measured[-1]['error of the discrete gradient']:.0e}",
                f"{measured[-1]['error of the gradient of the flow']:.0e}",
            )
            for name, measured in parts["memory"]["modes"].items()
            if len(measured) == len(parts["memory"]["steps"])
        ]
        peaks = (f"peak memory, N = {steps:,}" for steps in parts["memory"]["steps"])
        blocks.append(markdown(("mode", *peaks, "gradient error, discrete", "flow"), rows))
    if "precision" in parts:
        blocks.append(contest(parts["precision"], (1e-4,)))
    return "\n\n".join(blocks)
