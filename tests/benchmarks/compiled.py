"""Compiled solves: a training step against the eager one and diffrax, jitted; the first call; equal errors.

Every case runs in a process of its own, without Inductor's caches, and once more with them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import Network
from peers import diffrax_gradient
from report import absences, markdown, verdict
from scipy.integrate import solve_ivp
from timing import round_robin
from torch import Tensor, nn

import torchdiffeq_lmm

LIMIT_S = 900
DIFFRAX = "diffrax LeapfrogMidpoint, jitted"


def lotka_volterra(xp: Any, y: Any, p: Any) -> Any:
    """Prey and predator."""
    u, v = y[..., 0], y[..., 1]
    return xp.stack([p[0] * u - p[1] * u * v, p[2] * u * v - p[3] * v], -1)


def kepler(xp: Any, y: Any, p: Any) -> Any:
    """A body around a fixed one, in the plane."""
    pull = -p[0] / (y[..., 0] * y[..., 0] + y[..., 1] * y[..., 1]) ** 1.5
    return xp.stack([y[..., 2], y[..., 3], pull * y[..., 0], pull * y[..., 1]], -1)


@dataclass(frozen=True)
class Case:
    """What is solved.

    Args:
        problem: "network", or the name of a field.
        batch: samples.
        steps: N.
        width: of a network.
        target: the ratio of compiled leapfrog to eager leapfrog.
    """

    problem: str
    batch: int
    steps: int
    width: int = 0
    target: float | None = None

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width else ""
        return f"{self.problem}{width}, {self.batch} samples, N = {self.steps:,}"


CASES = (
    Case("network", 64, 100, 2, 0.25),
    Case("Lotka–Volterra", 1, 1000, target=0.1),
    Case("Lotka–Volterra", 64, 1000, target=0.1),
    Case("Kepler", 1, 1000, target=0.1),
    Case("Kepler", 64, 1000, target=0.1),
    Case("network", 256, 100, 64, 0.95),
    Case("network", 512, 50, 256, 0.95),
)
FIELDS: dict[str, tuple[Callable[..., Any], tuple[float, ...], tuple[float, ...], float]] = {
    "Lotka–Volterra": (lotka_volterra, (1.0, 1.0, 1.0, 1.0), (1.5, 0.7), 16.0),
    "Kepler": (kepler, (1.0,), (0.5, 0.0, 0.0, 3**0.5), 8.0),
}


class FieldModule(nn.Module):
    """A field with its parameters."""

    def __init__(self, field: Callable[..., Any], parameters: tuple[float, ...]) -> None:
        super().__init__()
        self.field = field
        self.p = nn.Parameter(torch.tensor(parameters, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(torch, y, self.p)


def network_field(weights: Sequence[np.ndarray]) -> tuple[Callable[..., Any], np.ndarray]:
    """A `Network` as a field, and its parameters on end."""
    shapes = [weight.shape for weight in weights]

    def field(xp: Any, y: Any, p: Any) -> Any:
        parts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        w1, b1, w2, b2 = (p[a:b].reshape(s) for a, b, s in zip(parts, parts[1:], shapes, strict=False))
        return xp.tanh(y @ w1.T + b1) @ w2.T + b2

    return field, np.concatenate([weight.ravel() for weight in weights])


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """The first call, and all ratios; of no rounds the former alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers: dict[str, Callable[[], object]] = {}
    if case.problem == "network":
        func: nn.Module = Network(case.width)
        y0, horizon = torch.randn(case.batch, case.width), 1.0
        field, flat = network_field([weight.detach().numpy() for weight in func.parameters()])
    else:
        field, parameters, start, horizon = FIELDS[case.problem]
        func = FieldModule(field, parameters)
        factors = 1 + 0.01 * np.arange(case.batch)[:, None] / case.batch
        y0, flat = torch.tensor(np.array(start) * factors), np.array(parameters)
    peers[DIFFRAX] = diffrax_gradient(field, flat, y0.numpy(), horizon, "LeapfrogMidpoint", case.steps)
    peers[f"{DIFFRAX}, forward"] = diffrax_gradient(
        field, flat, y0.numpy(), horizon, "LeapfrogMidpoint", case.steps, forward=True
    )
    t = torch.tensor([0.0, horizon], dtype=y0.dtype)

    def solve(**keywords: Any) -> Tensor:
        options = {"step_size": horizon / case.steps}
        keywords = {"method": "leapfrog", "options": options, **keywords}
        return torchdiffeq_lmm.odeint(func, y0, t, **keywords)[-1]

    def training_step(**keywords: Any) -> Callable[[], object]:
        def step() -> None:
            func.zero_grad()
            solve(**keywords).square().mean().backward()

        return step

    def forward() -> object:
        with torch.no_grad():
            return solve(compile=True)

    begin = time.perf_counter()
    training_step(compile=True)()
    first = time.perf_counter() - begin
    if not rounds:
        return {"first call, s": first}
    contestants: dict[str, Callable[[], object]] = {
        "eager": training_step(),
        "eager, filtered": training_step(grad_filter="auto"),
        "compiled": training_step(compile=True),
        "compiled, filtered": training_step(compile=True, grad_filter="auto"),
        "compiled, reversible": training_step(compile=True, backward="reversible"),
        "compiled, forward": forward,
        "compiled ab4": training_step(compile=True, method="ab4"),
        **peers,
    }
    errors: dict[str, float] = {}
    if case.problem != "network":
        exact = np.stack(
            [
                solve_ivp(lambda t, y: field(np, y, flat), (0, horizon), begin, "DOP853", rtol=1e-13, atol=1e-14).y[
                    :, -1
                ]
                for begin in y0.numpy()
            ]
        )
        with torch.no_grad():
            errors["compiled ab4"] = _error(solve(method="ab4").numpy(), exact)
        for solver in ("Tsit5", "Dopri5"):
            found = _equally_accurate(field, flat, y0.numpy(), horizon, solver, errors["compiled ab4"], exact)
            if found is not None:
                name = f"diffrax {solver}, jitted"
                contestants[name], errors[name] = found
    contest = round_robin(contestants, rounds=rounds, at_least=5)
    pairs = [
        ("compiled", "eager", case.target),
        ("compiled, filtered", "eager, filtered", case.target),
        ("compiled, filtered", "compiled", 1.3),
        ("compiled, reversible", "compiled", 1.6),
        ("compiled", DIFFRAX, 1.0 if case.width < 64 else None),
        ("compiled, forward", f"{DIFFRAX}, forward", 1.5),
        ("compiled ab4", "diffrax Tsit5, jitted", 2.0),
        ("compiled ab4", "diffrax Dopri5, jitted", 2.0),
    ]
    return {
        "first call, s": first,
        "ratios": [
            {"what": what, "against": against, "target": target, **vars(contest.ratio(what, against))}
            for what, against, target in pairs
            if {what, against} <= contest.times.keys()
        ],
        "milliseconds": {name: contest.milliseconds(name).median for name in contest.times},
        "errors": errors,
        "absent": contest.absent,
    }


def _error(found: Any, exact: Any) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _equally_accurate(
    field: Any, parameters: Any, start: Any, horizon: float, solver: str, error: float, exact: Any
) -> tuple[Callable[[], Any], float] | None:
    """A solve with the largest tolerance whose error is no larger; None where diffrax is not there."""
    run = diffrax_gradient(field, parameters, start, horizon, solver, 1e-6)
    for exponent in range(4, 25):
        tolerance = 10 ** (-exponent / 2)
        try:
            (_, end), _ = run(tolerance)
        except ModuleNotFoundError:
            return None
        if (found := _error(np.asarray(end), exact)) <= error:
            return partial(run, tolerance), found
    return None


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every case; in haste the first alone, with fewer rounds."""
    results: dict[str, Any] = {"cases": {}, "absent": {}}
    for number, case in enumerate(CASES[: 1 if quick else None]):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            command = [sys.executable, str(Path(__file__)), str(number), "--rounds", "3" if quick else "15"]
            found = []
            for again in (command, [*command[:3], "--rounds", "0"]):
                try:
                    done = subprocess.run(
                        again, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False
                    )
                except subprocess.TimeoutExpired:
                    results["absent"][str(case)] = f"not done within {LIMIT_S} s"
                    break
                if done.returncode:
                    lines = done.stderr.strip().splitlines() or ["no message"]
                    results["absent"][str(case)] = lines[-1][:160]
                    break
                found.append(json.loads(done.stdout.splitlines()[-1]))
            else:
                results["cases"][str(case)] = {**found[0], "first call, warm cache, s": found[1]["first call, s"]}
    return results


def table(results: dict[str, Any]) -> str:
    """One table per case."""
    parts = []
    for name, case in results["cases"].items():
        times, errors = case["milliseconds"], case["errors"]
        rows = [
            (
                row["what"],
                row["against"],
                f"{row['median']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                verdict(row["median"], row["target"]),
                f"{times[row['what']]:.2f}",
                f"{times[row['against']]:.2f}",
                f"{errors[row['what']]:.1e}, {errors[row['against']]:.1e}" if row["against"] in errors else "",
            )
            for row in case["ratios"]
        ]
        header = ("what", "against", "ratio", "quartiles", "target", "ms", "against, ms", "errors")
        first = f"first call {case['first call, s']:.1f} s, with a warm cache {case['first call, warm cache, s']:.1f} s"
        parts.append(f"{name}; {first}\n\n{markdown(header, rows)}{absences(case['absent'])}")
    return "\n\n".join(parts) + absences(results["absent"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time one case and print it as JSON.")
    parser.add_argument("case", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(run_case(CASES[given.case], given.rounds)))
