"""A stiff reaction in batches: its rates from noisy measurements of 256 experiments, solved all at once.

Robertson's reaction, A -> B, B + B -> C + B, B + C -> A + C, at a temperature and from concentrations of each
experiment's own. Its three rates follow Arrhenius' law, log k = log k_0 + E / R (1 / T_0 - 1 / T): six numbers that all
experiments share. The temperature is measured too, and each thermometer is off by about a kelvin: one unknown more for
every experiment. All of them are fitted by L-BFGS with the gradient through `bdf2` or `bdf3` on a logarithmic grid, and
compared with the truth. The same gradient is taken by SciPy's solvers, one experiment after the other, and by
torchdiffeq's `odeint_adjoint` with `dopri5`, which does not get to the end.

    python examples/stiff.py
"""

import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm

GAS = 8.314e-3
"""In kJ / (mol K)."""
MIDDLE = 300.0
"""T_0, in K."""
LOG_RATES = tuple(float(x) for x in np.log([0.04, 3e7, 1e4]))
ENERGIES = (50.0, 30.0, 40.0)
"""In kJ / mol."""
GUESSED_LOG_RATES = tuple(float(x) for x in np.log([0.1, 1e7, 3e4]))
GUESSED_ENERGIES = (40.0, 40.0, 40.0)

NOISE = 0.03
"""Of every measured concentration, relative."""
THERMOMETER = 1.0
"""How far thermometers are off: one standard deviation, in K."""
DECADES = (-5, 4)
"""The first step, and the horizon: powers of ten, in seconds."""
FIRST_MEASURED = -3
PER_DECADE = 4
"""So many measurements in each factor of ten of time."""
ATOL = (1e-9, 1e-13, 1e-9)
"""Of SciPy's solvers: B is a hundred thousand times less than the others."""


@dataclass(frozen=True)
class Experiments:
    """What is known of S experiments.

    Attributes:
        y0: concentrations of A, B and C at the beginning, of shape (S, 3).
        temperatures: as measured, in K, of shape (S,).
        times: of the measurements, in seconds, of shape (M,).
        measured: concentrations, of shape (M, S, 3).
    """

    y0: Tensor
    temperatures: Tensor
    times: Tensor
    measured: Tensor


class Reaction(nn.Module):
    """The reaction in all experiments; counts its evaluations.

    Args:
        temperatures: as measured, in K.
        log_rates, energies: at T_0 and in kJ / mol, to begin with.
        offsets: of the true temperatures from the measured ones, in K, to begin with; None for 0.
    """

    def __init__(
        self,
        temperatures: Tensor,
        log_rates: tuple[float, ...],
        energies: tuple[float, ...],
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("temperatures", temperatures)
        # In units in which the loss is about as curved along all of them, for L-BFGS.
        self._unit = 6 * len(temperatures) ** 0.5
        self.log_rates = nn.Parameter(torch.tensor(log_rates, dtype=torch.float64))
        self.scaled_energies = nn.Parameter(torch.tensor(energies, dtype=torch.float64) / 30)
        self.scaled_offsets = nn.Parameter(
            (torch.zeros_like(temperatures) if offsets is None else offsets) / self._unit
        )
        self.evaluations = 0

    @property
    def energies(self) -> Tensor:
        """In kJ / mol."""
        return 30 * self.scaled_energies

    @property
    def offsets(self) -> Tensor:
        """In K."""
        return self._unit * self.scaled_offsets

    def logs(self) -> Tensor:
        """The logarithms of the rates, of shape (S, 3)."""
        inverse = 1 / MIDDLE - 1 / (self.temperatures + self.offsets)
        return self.log_rates + inverse[:, None] * self.energies / GAS

    def forward(self, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """The field, of shape (S, 3)."""
        self.evaluations += 1
        first, second, third = self.logs().exp().unbind(-1)
        a, b, c = y.unbind(-1)
        decay, growth, back = first * a, second * b * b, third * b * c
        return torch.stack([back - decay, decay - growth - back, growth], -1)


def grid(per_decade: int) -> Tensor:
    """From 0, with steps that grow in proportion to the time."""
    begin, end = DECADES
    rest = torch.logspace(begin, end, (end - begin) * per_decade + 1, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), rest])


def by_scipy(method: str, logs: np.ndarray, y0: np.ndarray, times: np.ndarray, rtol: float) -> tuple[np.ndarray, int]:
    """One experiment by SciPy, with the Jacobian given: states of shape (M, 3), and evaluations of the field."""
    first, second, third = np.exp(logs)

    def field(t: float, y: np.ndarray) -> list[float]:  # noqa: ARG001
        decay, growth, back = first * y[0], second * y[1] * y[1], third * y[1] * y[2]
        return [back - decay, decay - growth - back, growth]

    def jacobian(t: float, y: np.ndarray) -> list[list[float]]:  # noqa: ARG001
        growth, of_b, of_c = 2 * second * y[1], third * y[2], third * y[1]
        return [[-first, of_b, of_c], [first, -growth - of_b, -of_c], [0.0, growth, 0.0]]

    solution = solve_ivp(
        field, (0.0, times[-1]), y0, method=method, t_eval=times, jac=jacobian, rtol=rtol,
        atol=rtol / 1e-6 * np.array(ATOL),
    )  # fmt: skip
    return solution.y.T, solution.nfev


def experiments(number: int, seed: int) -> tuple[Experiments, Tensor]:
    """Experiments made up by SciPy's LSODA, and how far their thermometers are off."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, generator=random, dtype=torch.float64)

    y0 = torch.stack([uniform(0.5, 1.0), torch.zeros(number, dtype=torch.float64), uniform(0.05, 0.3)], 1)
    temperatures = uniform(280.0, 320.0)
    offsets = THERMOMETER * torch.randn(number, generator=random, dtype=torch.float64)
    points = (DECADES[1] - FIRST_MEASURED) * PER_DECADE + 1
    times = torch.logspace(FIRST_MEASURED, DECADES[1], points, dtype=torch.float64)
    with torch.no_grad():
        logs = Reaction(temperatures, LOG_RATES, ENERGIES, offsets).logs().numpy()
    samples = tqdm(zip(logs, y0.numpy(), strict=True), total=number, desc="experiments", unit="experiment")
    states = np.stack([by_scipy("LSODA", *sample, times.numpy(), 1e-9)[0] for sample in samples], 1)
    noise = torch.randn(states.shape, generator=random, dtype=torch.float64)
    return Experiments(y0, temperatures, times, torch.from_numpy(states) * (NOISE * noise).exp()), offsets


def misfit(y: Tensor, known: Experiments) -> Tensor:
    """Half the mean square of what the noise would have to be, for each experiment: of shape (S,)."""
    # What falls below 0 on the way of an optimiser is no concentration.
    return ((y.clamp(min=1e-30) / known.measured).log() / NOISE).square().mean((0, 2)) / 2


def solve(reaction: Reaction, known: Experiments, method: str, per_decade: int) -> Tensor:
    """All experiments at once at the times of the measurements, of shape (M, S, 3)."""
    y = torchdiffeq_lmm.odeint(reaction, known.y0, grid(per_decade), method=method)
    return y[1 + (FIRST_MEASURED - DECADES[0]) * per_decade :: per_decade // PER_DECADE]


def loss_of(reaction: Reaction, known: Experiments, method: str, per_decade: int) -> Tensor:
    """The misfit, and what the thermometers are trusted."""
    prior = (reaction.offsets / THERMOMETER).square() / 2 / known.measured[:, 0].numel()
    return (misfit(solve(reaction, known, method, per_decade), known) + prior).mean()


def guess(known: Experiments) -> Reaction:
    """Where fits begin, and gradients are compared."""
    return Reaction(known.temperatures, GUESSED_LOG_RATES, GUESSED_ENERGIES)


def fit(
    known: Experiments, offsets: Tensor, method: str, per_decade: int, iterations: tuple[int, int]
) -> tuple[Reaction, dict]:
    """The fitted reaction, and how far it is from the truth.

    Args:
        known: the experiments.
        offsets: the truth that is to be found again.
        method, per_decade: how to solve.
        iterations: of L-BFGS for what the experiments share, and then for everything.
    """
    reaction = guess(known)
    losses: list[float] = []
    start = time.perf_counter()
    # Where the laws are still far off, thermometers would be blamed for it.
    stages = (reaction.log_rates, reaction.scaled_energies), tuple(reaction.parameters())
    with tqdm(total=sum(iterations), desc=f"{method}, {per_decade} steps per decade", unit="iteration") as progress:
        for parameters, number in zip(stages, iterations, strict=True):
            optimiser = torch.optim.LBFGS(
                parameters, max_iter=1, max_eval=20, history_size=30, line_search_fn="strong_wolfe"
            )

            def closure(optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
                optimiser.zero_grad()
                loss = loss_of(reaction, known, method, per_decade)
                loss.backward()
                return loss

            for _ in range(number):
                losses.append(float(optimiser.step(closure).detach()))
                progress.update()
    seconds = time.perf_counter() - start
    truth = Reaction(known.temperatures, LOG_RATES, ENERGIES, offsets)
    with torch.no_grad():
        found = {
            "method": method,
            "steps": len(grid(per_decade)) - 1,
            "loss": float(loss_of(reaction, known, method, per_decade)),
            "loss of the truth": float(loss_of(truth, known, method, per_decade)),
            "losses": losses,
            "log rates": reaction.log_rates.tolist(),
            "energies": reaction.energies.tolist(),
            "errors of rates": (reaction.log_rates - truth.log_rates).expm1().tolist(),
            "errors of energies": (reaction.energies - truth.energies).tolist(),
            "error of temperatures": float((reaction.offsets - offsets).square().mean().sqrt()),
            "error of thermometers": float(offsets.square().mean().sqrt()),
            "evaluations": reaction.evaluations,
            "seconds": seconds,
        }
    return reaction, found


def flat(reaction: Reaction) -> Tensor:
    """The gradient with respect to all that is fitted."""
    return torch.cat([parameter.grad.reshape(-1) for parameter in reaction.parameters()])


def gradient_by_scipy(
    known: Experiments, method: str, rtol: float, shift: float, is_central: bool
) -> tuple[Tensor, Tensor, int]:
    """The gradient by differences in the logarithms of the rates of each experiment, and the chain rule.

    Returns:
        The gradient, the states, and the evaluations of the field of one experiment, on average.
    """
    reaction = guess(known)
    logs = reaction.logs()
    states, total = [], 0
    slopes = torch.zeros_like(logs)
    samples = tqdm(range(len(logs)), desc=f"SciPy's {method}", unit="experiment")
    for sample in samples:
        one = Experiments(known.y0[sample], known.temperatures, known.times, known.measured[:, sample : sample + 1])

        def end(logs: np.ndarray, one: Experiments = one) -> tuple[Tensor, float, int]:
            y, count = by_scipy(method, logs, one.y0.numpy(), one.times.numpy(), rtol)
            states = torch.from_numpy(y)
            return states, float(misfit(states[:, None], one)), count

        at = logs[sample].detach().numpy()
        y, value, count = end(at)
        states.append(y)
        total += count
        for rate, unit in enumerate(np.eye(3)):
            _, above, count = end(at + shift * unit)
            total += count
            _, below, count = end(at - shift * unit) if is_central else (None, value, 0)
            total += count
            slopes[sample, rate] = (above - below) / ((1 + is_central) * shift)
    # The offsets are 0 at the guess, where their own part of the loss has no slope.
    (logs * slopes / len(logs)).sum().backward()
    return flat(reaction), torch.stack(states, 1), total // len(logs)


def gradients(known: Experiments, ways: list[tuple[str, int]], number: int) -> list[dict]:
    """What one gradient costs, by this package and by SciPy, and its error.

    Args:
        known: all experiments.
        ways: methods, and steps in each factor of ten of time.
        number: of the first experiments, by which errors are judged. SciPy solves these only; its time is scaled up.
    """
    few = Experiments(known.y0[:number], known.temperatures[:number], known.times, known.measured[:, :number])
    reference, wanted, _ = gradient_by_scipy(few, "LSODA", 1e-10, 1e-3, is_central=True)
    found = []

    def judge(name: str, seconds: float, gradient: Tensor, states: Tensor, evaluations: int) -> None:
        found.append(
            {
                "by": name,
                "seconds": seconds,
                "evaluations": evaluations,
                "error of states": float((states / wanted - 1).abs().max()),
                "error of gradient": float((gradient - reference).norm() / reference.norm()),
            }
        )

    for method, per_decade in ways:
        for those in (few, known):
            reaction = guess(those)
            start = time.perf_counter()
            y = solve(reaction, those, method, per_decade)
            misfit(y, those).mean().backward()
            seconds = time.perf_counter() - start
            if those is few:
                gradient, states = flat(reaction), y.detach()
        name = f"{method}, {len(grid(per_decade)) - 1} steps, all experiments at once"
        judge(name, seconds, gradient, states, reaction.evaluations)
    for method in ("BDF", "Radau", "LSODA"):
        for rtol in (1e-3, 1e-6):
            start = time.perf_counter()
            # The shift balances the error of a difference and that of the solves.
            result = gradient_by_scipy(few, method, rtol, max(1e-3, rtol**0.5), is_central=False)
            seconds = (time.perf_counter() - start) * len(known.y0) / number
            judge(f"SciPy's {method}, rtol {rtol:g}, forward differences, in a loop", seconds, *result)
    return found


def explicit(known: Experiments, most_steps: int) -> list[dict]:
    """How far `odeint_adjoint` with `dopri5` gets: up to longer and longer times, at last to the end."""
    rows = []
    times = [10.0**n for n in range(FIRST_MEASURED, 1)] + [10.0 ** DECADES[1]]
    for end in tqdm(times, desc="dopri5", unit="horizon"):
        reaction = guess(known)
        row: dict = {"horizon": end, "most steps": most_steps}
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = torchdiffeq.odeint_adjoint(
                    reaction, known.y0, torch.tensor([0.0, end], dtype=torch.float64), method="dopri5", rtol=1e-6,
                    atol=1e-9, options={"max_num_steps": most_steps},
                )  # fmt: skip
            # Two evaluations to begin with, and six for every step.
            row["steps"] = (reaction.evaluations - 2) // 6
            row["seconds forward"] = time.perf_counter() - start
            reaction.evaluations = 0
            start = time.perf_counter()
            y[-1, :, 0].sum().backward()
            row["steps backward"] = reaction.evaluations // 6
            row["seconds backward"] = time.perf_counter() - start
        except AssertionError as error:
            row["seconds until it raises"] = time.perf_counter() - start
            row["raises"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def report(found: dict) -> str:
    """Fits, gradients, and what becomes of dopri5."""
    fits = [
        (
            f"{run['method']}, {run['steps']} steps",
            ", ".join(f"{100 * e:+.2f} %" for e in run["errors of rates"]),
            ", ".join(f"{e:+.2f}" for e in run["errors of energies"]),
            f"{run['error of temperatures']:.3f} of {run['error of thermometers']:.2f}",
            f"{run['loss']:.4f}",
            f"{run['loss of the truth']:.4f}",
            f"{run['seconds']:.0f}",
        )
        for run in found["fits"]
    ]
    header = ("fitted by", "errors of rates", "of E, kJ / mol", "of temperatures, K", "loss", "of the truth", "seconds")
    costs = [
        (
            row["by"],
            f"{row['seconds']:.2f}",
            row["evaluations"],
            f"{row['error of states']:.1e}",
            f"{row['error of gradient']:.1e}",
        )
        for row in found["gradients"]
    ]
    columns = ("one gradient by", "seconds", "evaluations", "largest error of states", "error of gradient")
    ends = [
        (
            f"{row['horizon']:g}",
            row.get("steps", "-"),
            row.get("steps backward", "-"),
            f"{row['seconds forward']:.1f}" if "seconds forward" in row else "-",
            row.get("raises", ""),
        )
        for row in found["dopri5"]
    ]
    heads = ("dopri5 to t =", "steps forward", "backward", "seconds forward", "raises")
    return "\n\n".join([table(header, fits), table(columns, costs), table(heads, ends)])


def draw(known: Experiments, offsets: Tensor, reaction: Reaction, found: dict) -> Figure:
    """Measurements and fits, rates over the temperature, temperatures, and steps of dopri5."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    fitted, law, thermometers, steps = figure.subplots(1, 4)
    times, run = known.times.numpy(), found["fits"][-1]
    per_decade = (run["steps"] - 1) // (DECADES[1] - DECADES[0])
    with torch.no_grad():
        y = solve(reaction, known, run["method"], per_decade)
    colors = ("#0072B2", "#D55E00", "#009E73")
    chosen = int(known.temperatures.argmin()), int(known.temperatures.argmax())
    for sample, style in zip(chosen, ("-", "--"), strict=True):
        for entry, (name, color) in enumerate(zip(("A", "B × 10⁴", "C"), colors, strict=True)):
            scale = 1e4 if entry == 1 else 1.0
            label = name if style == "-" else None
            fitted.semilogx(times, scale * y[:, sample, entry].numpy(), style, color=color, lw=1.2, label=label)
            fitted.plot(times, scale * known.measured[:, sample, entry].numpy(), ".", color=color, ms=4)
    cold, hot = (f"{float(known.temperatures[sample]):.0f} K" for sample in chosen)
    fitted.set(xlabel="t, s", ylabel="concentration", title=f"two experiments: {cold}, and {hot} (broken)")
    fitted.legend(frameon=False, fontsize=8)

    temperatures = np.linspace(280, 320, 41)
    inverse = (1 / MIDDLE - 1 / temperatures)[:, None] / GAS
    lines = {
        "truth": (LOG_RATES, ENERGIES, {"color": COLORS["truth"], "lw": 3, "alpha": 0.3}),
        "first guess": (GUESSED_LOG_RATES, GUESSED_ENERGIES, {"color": COLORS["midpoint"], "ls": ":"}),
        "fitted": (run["log rates"], run["energies"], {"color": COLORS["filtered"], "ls": "--", "lw": 1.2}),
    }
    for name, (logs, energies, style) in lines.items():
        rates = np.exp(np.array(logs) + inverse * np.array(energies))
        for rate in range(3):
            law.semilogy(1e3 / temperatures, rates[:, rate], label=name if rate == 0 else None, **style)
    law.set(xlabel="1000 K / T", title="the three rates")
    law.legend(frameon=False, fontsize=8)

    with torch.no_grad():
        thermometers.plot(offsets.numpy(), reaction.offsets.numpy(), ".", color=COLORS["filtered"], ms=4)
    ends = [float(offsets.min()), float(offsets.max())]
    thermometers.plot(ends, ends, color=COLORS["truth"], lw=0.8)
    thermometers.set(xlabel="true, K", ylabel="fitted, K", title="errors of thermometers")

    done = [row for row in found["dopri5"] if "steps" in row]
    steps.loglog(
        [row["horizon"] for row in done], [row["steps"] for row in done], "o-", color="#D55E00", label="dopri5"
    )
    nodes = grid(per_decade)[1:].numpy()
    label = f"{run['method']}, {run['steps']} in all"
    steps.loglog(nodes, np.arange(1, len(nodes) + 1), color=COLORS["filtered"], label=label)
    steps.set(xlabel="up to t, s", title="steps")
    steps.legend(frameon=False, fontsize=8)
    for axes in (fitted, law, thermometers, steps):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    args = arguments(__doc__, "few experiments, a coarse grid, few iterations", seed=0)
    if args.quick:
        number, ways, iterations, most_steps = 4, [("bdf3", 8)], (8, 1), 60
    else:
        number, ways, iterations, most_steps = 256, [("bdf2", 20), ("bdf3", 20)], (12, 16), 5_000
    known, offsets = experiments(number, args.seed)
    fits = [fit(known, offsets, method, per_decade, iterations) for method, per_decade in ways]
    found = {
        "experiments": number,
        "fits": [run for _, run in fits],
        "gradients": gradients(known, ways, min(number // 4, 32)),
        "dopri5": explicit(known, most_steps),
    }
    print(report(found))
    write(args.output, "stiff", found, {"stiff": draw(known, offsets, fits[-1][0], found)})


if __name__ == "__main__":
    main()
