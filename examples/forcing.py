"""A time series with forcing: which gradient recovers what drove it?

The carbon dioxide of the air over Mauna Loa (statsmodels' bundled series, weekly, with gaps), 1958 to 1978, is taken
for the balance c' = θ(t) - k (c - 280 ppm) of a source θ(t), free at every step of the solver, and an uptake at a known
rate, with a seasonal cycle on top. Source, initial state and seasons are fitted to the weeks as they fall between the
nodes; a fifth of the weeks and two whole years are held out. The same with a synthetic twin, whose source is known.

    python examples/forcing.py
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import statsmodels.api as sm
import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_lmm import GridParameter, odeint

YEARS = 20.0
BLOCK = (12.0, 14.0)
"""The years that are held out."""
UPTAKE = 0.02
NATURAL = 280.0
NOISE = 0.3
ITERATIONS = 100


class Series(NamedTuple):
    """Concentrations in ppm.

    Attributes:
        times: in years from the beginning of 1958, of shape (n,).
        values: of the same shape.
        use: for each, 0 for the fit, 1 for the test at random weeks, 2 for that in the block.
        source: the true θ, if it is known: from times to ppm per year.
    """

    times: np.ndarray
    values: np.ndarray
    use: np.ndarray
    source: Callable[[np.ndarray], np.ndarray] | None

    def part(self, use: int) -> tuple[Tensor, Tensor]:
        """Times and values of one use."""
        chosen = self.use == use
        return torch.tensor(self.times[chosen]), torch.tensor(self.values[chosen])


def mauna_loa(generator: np.random.Generator) -> Series:
    """The weeks of the first years, but for those without a measurement."""
    data = sm.datasets.co2.load_pandas().data["co2"].dropna()
    times = np.asarray((data.index - np.datetime64("1958-01-01")) / np.timedelta64(1, "D")) / 365.2425
    early = times < YEARS
    times, values = times[early], data.to_numpy()[early]
    use = np.where(generator.random(len(times)) < 0.2, 1, 0)
    use[(BLOCK[0] < times) & (times < BLOCK[1])] = 2
    return Series(times, values, use, None)


def twin(like: Series, generator: np.random.Generator) -> Series:
    """A series with the same weeks and a known source, seasons and noise."""

    def source(t: np.ndarray) -> np.ndarray:
        return 1.7 + 0.05 * t + 0.5 * np.sin(2 * np.pi * t / 3.7) + 0.6 * np.exp(-(((t - 9) / 0.7) ** 2))

    def slope(t: float, c: np.ndarray) -> np.ndarray:
        return source(np.asarray(t)) - UPTAKE * (c - NATURAL)

    solution = solve_ivp(slope, (0, YEARS), [314.5], rtol=1e-9, atol=1e-9, dense_output=True).sol
    cycle = (seasons(torch.tensor(like.times)) @ torch.tensor([2.5, 1.0, 0.8, 0.2], dtype=torch.float64)).numpy()
    noise = NOISE * generator.standard_normal(len(like.times))
    return like._replace(values=solution(like.times)[0] + cycle + noise, source=source)


def seasons(times: Tensor) -> Tensor:
    """The first two harmonics of the year, of shape (n, 4)."""
    angle = 2 * np.pi * times
    return torch.stack([f(m * angle) for m in (1, 2) for f in (torch.sin, torch.cos)], dim=-1)


class Gradient(NamedTuple):
    """One way of solving the ODE and differentiating the loss.

    Attributes:
        solve: ``odeint`` with all but ``func, y0, t, options``.
        kind: of the source as a `GridParameter`.
        offset: which time of its step a value stands for, as a part of the step.
    """

    solve: Callable[..., Tensor]
    kind: str
    offset: float


def leapfrog(grad_filter: str | None) -> Callable[..., Tensor]:
    def solve(func: Callable, y0: Tensor, t: Tensor, options: dict) -> Tensor:
        return odeint(func, y0, t, method="leapfrog", options=options, grad_filter=grad_filter)

    return solve


def midpoint(func: Callable, y0: Tensor, t: Tensor, options: dict) -> Tensor:
    return torchdiffeq.odeint(func, y0, t, method="midpoint", options=options)


GRADIENTS = {
    "auto-differentiation": Gradient(leapfrog(None), "step", 0.0),
    "filtered": Gradient(leapfrog("leapfrog"), "step", 0.0),
    "smooth": Gradient(leapfrog("smooth"), "linear", 0.0),
    "midpoint": Gradient(midpoint, "step", 0.5),
}
"""By name; the last one through torchdiffeq's midpoint, with two evaluations a step."""


class Balance(nn.Module):
    """The model, with a source that is free on a grid of equal steps.

    Args:
        gradient: how it is solved.
        nodes: of the grid, of shape (N + 1,).
    """

    def __init__(self, gradient: Gradient, nodes: Tensor) -> None:
        super().__init__()
        rows = len(nodes) - (gradient.kind == "step")
        self.gradient = gradient
        self.source = GridParameter(torch.full((rows,), 2.0, dtype=torch.float64), nodes, gradient.kind)
        self.hundreds = nn.Parameter(torch.tensor(3.15, dtype=torch.float64))
        self.cycle = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.step = YEARS / (len(nodes) - 1)

    def field(self, t: Tensor, c: Tensor) -> Tensor:
        """c', 0-d like c."""
        return self.source(t) - UPTAKE * (c - NATURAL)

    def forward(self, times: Tensor) -> Tensor:
        """The concentrations at some times, both of shape (n,), by the solver of the fit."""
        # To the end of the last step, for "smooth" is for equal steps.
        t = torch.cat([times.new_zeros(1), times, times.new_tensor([YEARS])])
        c = self.gradient.solve(self.field, 100 * self.hundreds, t, {"step_size": self.step})
        return c[1:-1] + seasons(times) @ self.cycle

    def loss(self, times: Tensor, values: Tensor, penalty: float) -> Tensor:
        """Half of the squared errors, in units of the noise, and of those of the source's slope, over time."""
        errors = (self(times) - values) / NOISE
        return 0.5 * errors.square().sum() + self.roughness(penalty)

    def roughness(self, penalty: float) -> Tensor:
        """The penalty on the source, an integral over time, so that it means the same on every grid."""
        return 0.5 * penalty * self.source.values.diff().square().sum() / self.step

    def row_times(self) -> np.ndarray:
        """Which times the values of the source stand for."""
        nodes = self.source.nodes.numpy()
        return nodes[: len(self.source.values)] + self.gradient.offset * self.step

    def refined(self) -> "Balance":
        """The same balance with its source interpolated linearly, by a Runge–Kutta method with a quarter step."""
        times = torch.tensor(self.row_times())
        fine = Balance(Gradient(_fine, "linear", 0.0), torch.linspace(0, YEARS, len(self.source.nodes) * 4 - 3))
        fine.source = GridParameter(self.source.values, times, "linear")
        fine.hundreds, fine.cycle = self.hundreds, self.cycle
        return fine


def _fine(func: Callable, y0: Tensor, t: Tensor, options: dict) -> Tensor:
    return torchdiffeq.odeint(func, y0, t, method="rk4", options={**options, "interp": "cubic"})


def fit(series: Series, gradient: Gradient, steps: int, penalty: float, iterations: int) -> dict:
    """Fit one model by L-BFGS without a line search; returns what the tables need."""
    model = Balance(gradient, torch.linspace(0, YEARS, steps + 1, dtype=torch.float64))
    settings = {"history_size": 50, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    trainer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=1, **settings)
    times, values = series.part(0)

    def closure() -> float:
        trainer.zero_grad()
        loss = model.loss(times, values, penalty)
        loss.backward()
        return float(loss.detach())

    for _ in range(iterations):
        trainer.step(closure)
    learned, row_times = model.source.values.detach().numpy(), model.row_times()
    found = {
        "times": row_times.tolist(),
        "source": learned.tolist(),
        "variation": float(np.abs(np.diff(learned)).sum()),
    }
    fine = model.refined()
    with torch.no_grad():
        found["reported"] = float(model.loss(times, values, penalty))
        found["true"] = float((fine(times) - values).div(NOISE).square().sum() / 2 + model.roughness(penalty))
        for use, name in ((1, "weeks"), (2, "block")):
            held, there = series.part(use)
            found[f"held out, {name}"] = float((fine(held) - there).square().mean().sqrt())
    if series.source is not None:
        # Nothing tells the source at the very ends.
        inside = (row_times > 1) & (row_times < YEARS - 1)
        errors = (learned - series.source(row_times))[inside]
        found["error"] = float(np.sqrt(np.square(errors).mean()))
        found["true variation"] = float(np.abs(np.diff(series.source(row_times))).sum())
    return found


def report(name: str, penalty: float, found: dict[int, dict[str, dict]]) -> str:
    """The results as a table."""
    keys = ("error", "variation", "reported", "true", "held out, weeks", "held out, block")
    titles = ("error of θ", "variation of θ", "reported loss", "true loss", "held-out weeks", "held-out years")
    present = [
        (key, title) for key, title in zip(keys, titles, strict=True) if key in next(iter(found[min(found)].values()))
    ]
    rows = [
        (n, gradient, *(f"{run[key]:.4g}" if key in ("reported", "true") else f"{run[key]:.3f}" for key, _ in present))
        for n, runs in found.items()
        for gradient, run in runs.items()
    ]
    return f"{name}, penalty {penalty:g}\n\n{table(('N', 'gradient', *(title for _, title in present)), rows)}\n"


def draw(results: dict, series: dict[str, Series], penalties: tuple[float, ...]) -> Figure:
    """The sources that are recovered on the middle grid, a row for each series, a column for each penalty."""
    figure = Figure(figsize=(5.2 * len(penalties), 2.9 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), len(penalties), squeeze=False, sharex=True, sharey="col")
    for row, (name, data) in zip(panels, series.items(), strict=True):
        for axes, penalty in zip(row, penalties, strict=True):
            found = results[name][penalty]
            steps = list(found)[len(found) // 2]
            for gradient in ("auto-differentiation", "filtered"):
                run = found[steps][gradient]
                times = 1958 + np.array(run["times"])
                axes.plot(times, run["source"], color=COLORS[gradient], lw=0.9, label=gradient)
            if data.source is not None:
                fine = np.linspace(0, YEARS, 801)
                axes.plot(1958 + fine, data.source(fine), color=COLORS["truth"], lw=1.1, label="true")
            axes.axvspan(1958 + BLOCK[0], 1958 + BLOCK[1], color="0.9", lw=0, label="held out")
            axes.set_xticks(range(1958, 1979, 4))
            axes.set_title(f"{name}, {steps} steps, penalty {penalty:g}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("source, ppm per year")
    panels[0, -1].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def main() -> None:
    args = arguments(__doc__, "one grid, one penalty, two gradients", seed=0)
    generator = np.random.default_rng(args.seed)
    real = mauna_loa(generator)
    series = {"twin": twin(real, generator), "Mauna Loa": real}
    grids, penalties, iterations = ((160,), (0.3,), 60) if args.quick else ((80, 160, 320), (0.3, 0.01), ITERATIONS)
    gradients = tuple(GRADIENTS)[: 2 if args.quick else None]
    cases = [(name, p, n, g) for name in series for p in penalties for n in grids for g in gradients]
    results: dict = {name: {p: {n: {} for n in grids} for p in penalties} for name in series}
    for name, penalty, steps, gradient in tqdm(cases, unit="fit"):
        found = fit(series[name], GRADIENTS[gradient], steps, penalty, iterations)
        results[name][penalty][steps][gradient] = found
    for name, by_penalty in results.items():
        for penalty, found in by_penalty.items():
            print(report(name, penalty, found))
    write(args.output, "forcing", results, {"forcing": draw(results, series, penalties)})


if __name__ == "__main__":
    main()
