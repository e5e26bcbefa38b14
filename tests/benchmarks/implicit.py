"""Evaluations of func per step of the implicit methods of order 4, where the problem is not stiff."""

import warnings
from typing import Any

import torch
import torchdiffeq
from problems import Problem, problems
from report import markdown
from torch import Tensor

import torchdiffeq_lmm

# torchdiffeq's implicit_adams of max_order 4 has order 4, as am4; without, it goes up to order 12.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "am4": ("am4", {}),
    "torchdiffeq implicit_adams (order 4)": ("implicit_adams", {"max_order": 4}),
    "torchdiffeq implicit_adams (default)": ("implicit_adams", {}),
}


def solve(problem: Problem, steps: int, method: str, options: dict[str, Any]) -> tuple[float, float]:
    """The evaluations per step, and the error at the end."""
    evaluations = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return problem.field(torch, y)

    y0, t = torch.tensor(problem.start), torch.tensor([0.0, problem.horizon], dtype=torch.float64)
    options = {"step_size": problem.horizon / steps, **options}
    with warnings.catch_warnings(), torch.no_grad():
        # implicit_adams warns of every iteration that did not converge; its error shows it as well.
        warnings.simplefilter("ignore")
        y = torchdiffeq.odeint(func, y0, t, method=method, options=options)
    return evaluations / steps, problem.error(y[-1].numpy())


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every method on the small problems."""
    torchdiffeq_lmm.register()
    rows = []
    for problem in problems()[:3]:
        for steps in (256,) if quick else (256, 1024):
            for name, (method, options) in METHODS.items():
                per_step, error = solve(problem, steps, method, options)
                rows.append(
                    {"problem": problem.name, "steps": steps, "method": name, "per step": per_step, "error": error}
                )
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    """One row per problem, number of steps and method."""
    rows = [
        (row["problem"], row["steps"], row["method"], f"{row['per step']:.2f}", f"{row['error']:.1e}")
        for row in results["rows"]
    ]
    return markdown(("problem", "steps", "method", "evaluations per step", "error at the end"), rows)
