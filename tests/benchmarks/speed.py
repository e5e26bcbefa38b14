"""Time of a training step, forward and backward, through Linear–Tanh–Linear in single precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from networks import Network, StepwiseNetwork
from peers import diffrax_training_step, mali_solve, torchdyn_solve
from report import absences, markdown, verdict
from timing import Contest, round_robin
from torch import Tensor, nn

import torchdiffeq_lmm

# Width D, batch B, steps N.
SIZES = ((2, 64, 100), (64, 256, 100), (256, 512, 50))

# torchdiffeq's explicit_adams of max_order 5 is the one of order 4: it keeps max_order - 1 slopes.
SAME_ORDER = "torchdiffeq explicit_adams (order 4)"


@dataclass(frozen=True)
class Comparison:
    """One row: a contestant, what it is measured against, and the ratio it should stay below at every size."""

    name: str
    against: str
    targets: tuple[float | None, float | None, float | None] = (None, None, None)


COMPARISONS = (
    Comparison("leapfrog", "plain loop", (1.15, 1.0, 1.0)),
    Comparison("leapfrog", "torchdiffeq midpoint", (0.5, 0.5, 0.5)),
    Comparison('leapfrog, grad_filter="leapfrog"', "leapfrog", (1.8, None, 1.35)),
    Comparison('leapfrog, grad_filter="smooth"', "leapfrog", (1.05, 1.05, 1.05)),
    Comparison("per-step stack, register_grad_filter", "per-step stack", (1.02, 1.02, 1.02)),
    Comparison("ab4", "torchdiffeq explicit_adams (default)", (0.5, None, 0.9)),
    Comparison("ab4", SAME_ORDER),
    Comparison('leapfrog, backward="reversible"', "leapfrog", (1.6, 1.6, 1.6)),
    Comparison('leapfrog, backward="checkpoint"', "leapfrog"),
    Comparison('leapfrog, backward="reversible"', "TorchDiffEqPack MALI"),
    Comparison("leapfrog", "diffrax LeapfrogMidpoint, jitted"),
    *(
        Comparison(name, "plain loop")
        for name in (
            "plain loop, torch.add(alpha=)",
            "ab4",
            "torchdiffeq euler",
            "torchdiffeq midpoint",
            "torchdiffeq heun2",
            "torchdiffeq rk4",
            SAME_ORDER,
            "torchdiffeq explicit_adams (default)",
            "torchdyn midpoint",
            "TorchDiffEqPack MALI",
            "diffrax LeapfrogMidpoint, jitted",
        )
    ),
)

# Of these the error at the end is measured, against rk4 with four times as many steps, all in double precision.
ERRORS = {
    "leapfrog": "leapfrog",
    "torchdiffeq midpoint": "midpoint",
    "ab4": "ab4",
    SAME_ORDER: "explicit_adams",
    "torchdiffeq explicit_adams (default)": "explicit_adams",
}


def plain_loop(func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, steps: int) -> Tensor:
    """Leapfrog from 0 to 1 as one writes it down."""
    t, h = torch.zeros((), dtype=y0.dtype), 1 / steps
    x0, x1 = y0, y0 + h * func(t, y0)
    for _ in range(steps - 1):
        x0, x1 = x1, x0 + 2 * h * func(t, x1)
    return x1


def lean_loop(func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, steps: int) -> Tensor:
    """The same with one kernel for product and sum."""
    t, h = torch.zeros((), dtype=y0.dtype), 1 / steps
    x0, x1 = y0, torch.add(y0, func(t, y0), alpha=h)
    for _ in range(steps - 1):
        x0, x1 = x1, torch.add(x0, func(t, x1), alpha=2 * h)
    return x1


def host(func: Any, y0: Tensor, steps: int, method: str, **options: Any) -> Tensor:
    """The final state through `torchdiffeq.odeint`."""
    options = {"step_size": 1 / steps, **options}
    return torchdiffeq.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=y0.dtype), method=method, options=options)[-1]


def ours(func: Any, y0: Tensor, steps: int, **keywords: Any) -> Tensor:
    """The final state through `torchdiffeq_lmm.odeint`, by leapfrog."""
    t = torch.tensor([0.0, 1.0], dtype=y0.dtype)
    return torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options={"step_size": 1 / steps}, **keywords)[-1]


def training_step(module: nn.Module, solve: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward, the gradients made anew."""

    def step() -> None:
        module.zero_grad()
        solve().square().mean().backward()

    return step


def contestants(width: int, batch: int, steps: int) -> dict[str, Callable[[], object]]:
    """Everybody's training step from the same weights and states."""
    torch.manual_seed(0)
    func, y0 = Network(width), torch.randn(batch, width)
    solves: dict[str, Callable[[], Tensor]] = {
        "plain loop": lambda: plain_loop(func, y0, steps),
        "plain loop, torch.add(alpha=)": lambda: lean_loop(func, y0, steps),
        "leapfrog": lambda: host(func, y0, steps, "leapfrog"),
        'leapfrog, grad_filter="leapfrog"': lambda: ours(func, y0, steps, grad_filter="leapfrog"),
        'leapfrog, grad_filter="smooth"': lambda: ours(func, y0, steps, grad_filter="smooth"),
        'leapfrog, backward="reversible"': lambda: ours(func, y0, steps, backward="reversible"),
        'leapfrog, backward="checkpoint"': lambda: ours(func, y0, steps, backward="checkpoint"),
        "ab4": lambda: host(func, y0, steps, "ab4"),
        SAME_ORDER: lambda: host(func, y0, steps, "explicit_adams", max_order=5),
        "torchdiffeq explicit_adams (default)": lambda: host(func, y0, steps, "explicit_adams"),
        "torchdiffeq euler": lambda: host(func, y0, steps, "euler"),
        "torchdiffeq midpoint": lambda: host(func, y0, steps, "midpoint"),
        "torchdiffeq heun2": lambda: host(func, y0, steps, "heun2"),
        "torchdiffeq rk4": lambda: host(func, y0, steps, "rk4"),
        "torchdyn midpoint": lambda: torchdyn_solve(func, y0, 1.0, steps, "midpoint"),
        "TorchDiffEqPack MALI": lambda: mali_solve(func, y0, 1.0, steps),
    }
    runs: dict[str, Callable[[], object]] = {name: training_step(func, solve) for name, solve in solves.items()}

    plain, filtered = StepwiseNetwork(width, steps), StepwiseNetwork(width, steps)
    torchdiffeq_lmm.register_grad_filter(filtered.stack)

    def stepwise(network: StepwiseNetwork) -> Callable[[], Tensor]:
        def solve() -> Tensor:
            network.take_rows()
            return host(network, y0, steps, "leapfrog")

        return solve

    runs["per-step stack"] = training_step(plain, stepwise(plain))
    runs["per-step stack, register_grad_filter"] = training_step(filtered, stepwise(filtered))
    runs["diffrax LeapfrogMidpoint, jitted"] = diffrax_training_step(func.layers, y0, steps)
    return runs


def errors(width: int, batch: int, steps: int) -> dict[str, float]:
    """The relative errors of the final states, in double precision."""
    torch.manual_seed(0)
    func, y0 = Network(width), torch.randn(batch, width)
    func, y0 = func.double(), y0.double()
    made: dict[str, float] = {}
    with torch.no_grad():
        fine = host(func, y0, 4 * steps, "rk4")
        for name, method in ERRORS.items():
            options = {"max_order": 5} if name == SAME_ORDER else {}
            made[name] = float((host(func, y0, steps, method, **options) - fine).norm() / fine.norm())
    return made


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """All ratios at all sizes."""
    results: dict[str, Any] = {"sizes": [], "ratios": [], "milliseconds": {}, "errors": {}, "absent": {}}
    for column, size in enumerate(SIZES[: 1 if quick else None]):
        label = "D, B, N = {}, {}, {}".format(*size)
        results["sizes"].append(label)
        contest: Contest = round_robin(contestants(*size), rounds=7, at_least=1 if quick else 20)
        results["absent"].update(contest.absent)
        results["milliseconds"][label] = {name: vars(contest.milliseconds(name)) for name in contest.times}
        results["errors"][label] = errors(*size)
        for row in COMPARISONS:
            if row.name in contest.times and row.against in contest.times:
                ratio = contest.ratio(row.name, row.against)
                results["ratios"].append(
                    {
                        "what": row.name,
                        "against": row.against,
                        "size": label,
                        "target": row.targets[column],
                        "rounds": len(contest.times[row.name]),
                        **vars(ratio),
                    }
                )
    return results


def table(results: dict[str, Any]) -> str:
    """One table of ratios per size, and one of times and errors."""
    parts = []
    for size in results["sizes"]:
        times, wrong = results["milliseconds"][size], results["errors"][size]
        rows = [
            (
                row["what"],
                row["against"],
                f"{row['median']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                verdict(row["median"], row["target"]),
                f"{times[row['what']]['median']:.2f}",
                f"{wrong[row['what']]:.1e}" if row["what"] in wrong else "",
            )
            for row in results["ratios"]
            if row["size"] == size
        ]
        rounds = max((row["rounds"] for row in results["ratios"] if row["size"] == size), default=0)
        header = ("what", "against", "ratio", "quartiles", "target", "ms", "error at the end")
        parts.append(f"{size} (medians of {rounds} rounds)\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) + absences(results["absent"])
