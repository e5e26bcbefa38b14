"""On a GPU: a training step eager, compiled and by CUDA graphs, beside torchdiffeq's midpoint and diffrax, jitted.

Where there is no GPU nothing is measured.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchdiffeq
from batches import Func, robertson
from compiled import DIFFRAX, FIELDS, Case, FieldModule, network_field
from networks import Network
from peers import diffrax_batch, diffrax_gradient
from report import absences, markdown
from timing import round_robin

import torchdiffeq_lmm
from torchdiffeq_lmm import Compile

CASES = (
    Case("network", 64, 100, 2),
    Case("Lotka–Volterra", 64, 1000),
    Case("network", 256, 100, 64),
    Case("network", 512, 50, 256),
    Case("network", 16384, 100, 64),
)
GRAPHS, NO_GRAPHS = Compile(), Compile(mode="default")


def _awaited(run: Callable[[], object]) -> Callable[[], object]:
    def awaited() -> None:
        run()
        torch.cuda.synchronize()

    return awaited


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of a training step by everybody."""
    torch.manual_seed(0)
    if case.problem == "network":
        func: torch.nn.Module = Network(case.width).cuda()
        y0, horizon = torch.randn(case.batch, case.width, device="cuda"), 1.0
        field, flat = network_field([weight.detach().cpu().numpy() for weight in func.parameters()])
    else:
        field, parameters, start, horizon = FIELDS[case.problem]
        func = FieldModule(field, parameters).cuda()
        y0 = torch.tensor(np.array(start) * np.ones((case.batch, 1)), device="cuda")
        flat = np.array(parameters)
    t = torch.tensor([0.0, horizon], dtype=y0.dtype, device="cuda")

    def training_step(steps: int = case.steps, odeint: Callable[..., Any] = torchdiffeq_lmm.odeint, **more: Any) -> Any:
        keywords = {"method": "leapfrog", "options": {"step_size": horizon / steps}, **more}

        def step() -> None:
            func.zero_grad()
            odeint(func, y0, t, **keywords)[-1].square().mean().backward()

        return _awaited(step)

    contestants = {
        "eager": training_step(),
        "eager, filtered": training_step(grad_filter="auto"),
        "eager, checkpoints": training_step(backward="checkpoint", adjoint_params=tuple(func.parameters())),
        "compiled": training_step(compile=NO_GRAPHS),
        "CUDA graphs": training_step(compile=GRAPHS),
        "compiled, filtered": training_step(compile=NO_GRAPHS, grad_filter="auto"),
        "CUDA graphs, filtered": training_step(compile=GRAPHS, grad_filter="auto"),
        "torchdiffeq midpoint, half the steps": training_step(case.steps // 2, torchdiffeq.odeint, method="midpoint"),
        DIFFRAX: diffrax_gradient(field, flat, y0.cpu().numpy(), horizon, "LeapfrogMidpoint", case.steps),
    }
    contest = round_robin(contestants, rounds=rounds)
    return {
        "milliseconds": {name: vars(contest.milliseconds(name)) for name in contest.times},
        "absent": contest.absent,
    }


def run_batch(rounds: int) -> dict[str, Any]:
    """1,024 unlike samples of Robertson's problem by the adaptive bdf, forward and both ways."""
    problem = robertson(1024, True)
    func = Func(problem, slice(None), torch.float64).cuda()
    func.y0 = func.y0.cuda()
    made: list[Any] = []

    def peer(which: int) -> Callable[[], object]:
        def run() -> object:
            if not made:
                made.extend(diffrax_batch(problem.field, problem.parameters, problem.start, problem.t[-1]))
            return made[which](1e-6)

        return run

    contest = round_robin(
        {
            "bdf, forward": _awaited(lambda: func.forward_only("bdf")),
            "bdf, forward and backward": _awaited(lambda: func.both("bdf")),
            "diffrax Kvaerno5, forward": peer(0),
            "diffrax Kvaerno5, forward and backward": peer(1),
        },
        rounds=rounds,
    )
    return {
        "milliseconds": {name: vars(contest.milliseconds(name)) for name in contest.times},
        "absent": contest.absent,
    }


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Every case; in haste with fewer rounds."""
    if not torch.cuda.is_available():
        return {"device": None, "cases": {}}
    rounds = 3 if quick else 15
    cases = {str(case): run_case(case, rounds) for case in CASES}
    cases["Robertson, 1,024 samples"] = run_batch(3)
    return {"device": torch.cuda.get_device_name(), "cases": cases}


def table(results: dict[str, Any]) -> str:
    """One table per case."""
    if results["device"] is None:
        return "There is no GPU here."
    parts = []
    for name, case in results["cases"].items():
        rows = [
            (who, f"{found['median']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}")
            for who, found in case["milliseconds"].items()
        ]
        parts.append(f"{name}\n\n{markdown(('what', 'ms', 'quartiles'), rows)}{absences(case['absent'])}")
    return f"{results['device']}\n\n" + "\n\n".join(parts)
