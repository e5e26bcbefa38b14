"""Peak memory of a training step against the number of steps, with the error of the gradient that it buys.

What is measured is the memory of tensors alone, by `tracker.TensorMemory`: the most that the storages made in a forward
and a backward pass together hold at any moment, less what remains of them at the end, which is the solution and the
gradients. The parameters and the initial state are not in it, as they were there before. Solves are in single
precision, from 0 to `HORIZON` for every number of steps, through a network without dissipation.

The gradient, with respect to the initial state and all parameters, is compared in the Euclidean norm with two others,
both in double precision: that of the same discrete solve by auto-differentiation, and that of the flow, by
auto-differentiation of a fine solve.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchdiffeq
from networks import HamiltonianNetwork
from peers import asynchronous_leapfrog, mali_solve
from report import absences, markdown
from timing import failure
from torch import Tensor, nn
from tracker import TensorMemory

import torchdiffeq_lmm

WIDTH, BATCH = 32, 256
HORIZON = 4.0

Solve = Callable[[nn.Module, Tensor, int], Tensor]


@dataclass(frozen=True)
class Mode:
    """A way to the gradient, and the same discrete solve in a form that can be auto-differentiated."""

    solve: Solve
    discrete: Solve
    drifts: list[float] = field(default_factory=list)


def host(method: str) -> Solve:
    """A method through `torchdiffeq.odeint`."""

    def solve(func: nn.Module, y0: Tensor, steps: int) -> Tensor:
        t = torch.tensor([0.0, HORIZON], dtype=y0.dtype)
        return torchdiffeq.odeint(func, y0, t, method=method, options={"step_size": HORIZON / steps})[-1]

    return solve


def host_adjoint(method: str) -> Solve:
    """A method through `torchdiffeq.odeint_adjoint`."""

    def solve(func: nn.Module, y0: Tensor, steps: int) -> Tensor:
        t = torch.tensor([0.0, HORIZON], dtype=y0.dtype)
        options = {"step_size": HORIZON / steps}
        return torchdiffeq.odeint_adjoint(func, y0, t, method=method, options=options)[-1]

    return solve


def leapfrog(keywords: Callable[[], dict[str, Any]]) -> Solve:
    """Leapfrog through `torchdiffeq_lmm.odeint`, with keywords made when they are needed."""

    def solve(func: nn.Module, y0: Tensor, steps: int) -> Tensor:
        t, options = torch.tensor([0.0, HORIZON], dtype=y0.dtype), {"step_size": HORIZON / steps}
        return torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, **keywords())[-1]

    return solve


def modes() -> dict[str, Mode]:
    """All ways to the gradient, ours first."""
    drifts: list[float] = []

    def reversible() -> dict[str, Any]:
        return {"backward": torchdiffeq_lmm.Reversible(report=drifts.append)}

    plain = host("leapfrog")
    return {
        "leapfrog, autograd": Mode(plain, plain),
        "leapfrog, reversible": Mode(leapfrog(reversible), plain, drifts),
        "leapfrog, checkpoint": Mode(leapfrog(lambda: {"backward": "checkpoint"}), plain),
        "torchdiffeq midpoint, odeint_adjoint": Mode(host_adjoint("midpoint"), host("midpoint")),
        "TorchDiffEqPack MALI": Mode(
            lambda func, y0, steps: mali_solve(func, y0, HORIZON, steps),
            lambda func, y0, steps: asynchronous_leapfrog(func, y0, HORIZON, steps),
        ),
    }


def case(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The network and the initial state, the same numbers in either precision."""
    torch.manual_seed(0)
    func, y0 = HamiltonianNetwork(WIDTH), torch.randn(BATCH, WIDTH)
    return func.to(dtype), y0.to(dtype).requires_grad_()


def gradient(solve: Solve, steps: int, dtype: torch.dtype, tracker: TensorMemory | None = None) -> Tensor:
    """The gradient of the mean square of the final state, as one vector in double precision."""
    func, y0 = case(dtype)
    leaves = [y0, *func.parameters()]
    if tracker is None:
        solve(func, y0, steps).square().mean().backward()
    else:
        tracker.forget(*leaves)
        with tracker:
            y = solve(func, y0, steps)
            y.square().mean().backward()
    return torch.cat([leaf.grad.double().flatten() for leaf in leaves if leaf.grad is not None])


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Peak and errors of every mode at every number of steps."""
    numbers = (64, 256) if quick else (100, 1_000, 10_000)
    flow = gradient(host("rk4"), 500 if quick else 2_000, torch.float64)
    results: dict[str, Any] = {"steps": list(numbers), "modes": {}, "absent": {}}
    discrete: dict[tuple[Solve, int], Tensor] = {}
    for name, mode in modes().items():
        rows = results["modes"].setdefault(name, [])
        for steps in numbers:
            tracker, made = TensorMemory(), []
            why = failure(lambda: made.append(gradient(mode.solve, steps, torch.float32, tracker)))
            if why is not None:
                results["absent"][f"{name} at N = {steps}"] = why
                break
            (found,) = made
            if (mode.discrete, steps) not in discrete:
                discrete[mode.discrete, steps] = gradient(mode.discrete, steps, torch.float64)
            exact = discrete[mode.discrete, steps]
            rows.append(
                {
                    "steps": steps,
                    "bytes": tracker.peak - tracker.alive,
                    "error of the discrete gradient": float((found - exact).norm() / exact.norm()),
                    "error of the gradient of the flow": float((found - flow).norm() / flow.norm()),
                    "drift": mode.drifts[-1] if mode.drifts else None,
                }
            )
    return results


def table(results: dict[str, Any]) -> str:
    """One row per mode and number of steps."""
    rows = [
        (
            name,
            f"{row['steps']:,}",
            f"{row['bytes'] / 1024:,.0f}",
            f"{row['error of the discrete gradient']:.1e}",
            f"{row['error of the gradient of the flow']:.1e}",
            "" if row["drift"] is None else f"{row['drift']:.1e}",
        )
        for name, rows in results["modes"].items()
        for row in rows
    ]
    header = ("mode", "N", "peak, KiB", "gradient error, discrete", "gradient error, flow", "drift")
    return markdown(header, rows) + absences(results["absent"])
