"""Cost of a step against the number of steps, forward and backward apart: it should not depend on it."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from networks import Network
from report import absences, markdown
from speed import plain_loop
from timing import Spread, failure, seconds
from torch import Tensor

import torchdiffeq_lmm

WIDTH, BATCH = 2, 64

# The keywords of odeint; none for the loop as one writes it down.
MODES: dict[str, dict[str, Any] | None] = {
    "a plain loop": None,
    "autograd": {},
    'grad_filter="leapfrog"': {"grad_filter": "leapfrog"},
    'grad_filter="smooth"': {"grad_filter": "smooth"},
    'backward="reversible"': {"backward": "reversible"},
    'backward="checkpoint"': {"backward": "checkpoint"},
    'backward="reversible", grad_filter="leapfrog"': {"backward": "reversible", "grad_filter": "leapfrog"},
    'backward="checkpoint", grad_filter="leapfrog"': {"backward": "checkpoint", "grad_filter": "leapfrog"},
}


def both_ways(steps: int, keywords: dict[str, Any] | None) -> tuple[float, float]:
    """The seconds that one solve from 0 to 1 takes forward and backward."""
    torch.manual_seed(0)
    func, y0 = Network(WIDTH), torch.randn(BATCH, WIDTH)
    t, options = torch.tensor([0.0, 1.0]), {"step_size": 1 / steps}
    made: list[Tensor] = []

    def forward() -> None:
        if keywords is None:
            end = plain_loop(func, y0, steps)
        else:
            end = torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, **keywords)[-1]
        made.append(end.square().mean())

    first = seconds(forward)
    backward: Callable[[], None] = made[0].backward
    return first, seconds(backward)


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every mode at every number of steps, in turn."""
    numbers = (50, 200) if quick else (100, 1_000, 10_000, *((100_000,) if long else ()))
    results: dict[str, Any] = {"steps": list(numbers), "microseconds": {}, "absent": {}}
    modes = dict(MODES)
    for steps in numbers:
        rounds = 7 if steps <= 1_000 else 3 if steps <= 10_000 else 1
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in modes}
        # The first round, where it is short, is the warm-up.
        for round_ in range(rounds + (steps <= 1_000)):
            gc.collect()
            for name in list(modes):
                made: list[tuple[float, float]] = []
                why = failure(lambda: made.append(both_ways(steps, modes[name])))
                if why is not None:
                    results["absent"][f"{name} at N = {steps}"] = why
                    del modes[name]
                elif round_ or steps > 1_000:
                    times[name] += made
        for name in modes:
            for way, values in zip(("forward", "backward"), zip(*times[name], strict=True), strict=True):
                spread = Spread.of([1e6 * value / steps for value in values])
                results["microseconds"].setdefault(name, {}).setdefault(way, []).append(vars(spread))
    return results


def table(results: dict[str, Any]) -> str:
    """Microseconds per step: rows are modes and ways, columns numbers of steps."""
    rows = [
        (name, way, *(f"{cell['median']:.0f} [{cell['low']:.0f}, {cell['high']:.0f}]" for cell in cells))
        for name, ways in results["microseconds"].items()
        for way, cells in ways.items()
    ]
    width = max((len(row) for row in rows), default=2)
    rows = [row + ("",) * (width - len(row)) for row in rows]
    header = ("leapfrog with", "µs per step", *(f"N = {steps:,}" for steps in results["steps"][: width - 2]))
    return markdown(header, rows) + absences(results["absent"])
