"""A time series with forcing: which gradient recovers what drove it?

The carbon dioxide of the air over Mauna Loa (statsmodels' bundled series, weekly, with gaps), 1958 to 1978, is taken
for the balance c' = θ(t) - k (c - 280 ppm) of a source θ(t), free at every step of the solver, and an uptake at a known
rate, with a seasonal cycle on top. Source, initial state and seasons are fitted to the weeks as they fall between the
nodes; a fifth of the weeks and two whole years are held out. The same with a synthetic twin, whose source is known.

A penalty on the slope of the source sees a zigzag, the more the finer the grid; one on its size, as weight decay is,
does not see it.

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

from torchdiffeq_lmm import GridParameter, odeint, oscillation

YEARS = 20.0
BLOCK = (12.0, 14.0)
"""The years that are held out."""
UPTAKE = 0.02
NATURAL = 280.0
NOISE = 0.3
GUESS = 2.0
"""A source to begin with, and to measure its size from; in ppm per year."""
REFERENCE_STEPS = 1280


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


class Penalty(NamedTuple):
    """What is added to the loss: an integral over time, so that it means the same on every grid.

    Attributes:
        of: the slope of the source, or its size, from `GUESS`.
        weight: of half of its square.
    """

    of: str
    weight: float

    def __call__(self, source: Tensor, widths: Tensor) -> Tensor:
        """For values of a source, of shape (rows, m), and how much of the time they stand for, of shape (rows,)."""
        if self.of == "slope":
            return 0.5 * self.weight * source.diff(dim=0).square().sum(0) / widths.max()
        return 0.5 * self.weight * widths @ (source - GUESS).square()

    def __str__(self) -> str:
        return f"{self.weight:g} on the {self.of}"


PENALTIES = (Penalty("slope", 3.0), Penalty("slope", 0.03), Penalty("size", 10.0))


class Balance(nn.Module):
    """The model, with a source that is free on a grid of equal steps; several of them at once.

    Args:
        gradient: how it is solved.
        nodes: of the grid, of shape (N + 1,).
        parameters: of shape (rows + 5, m): the source, the initial state, four of the seasons.
    """

    def __init__(self, gradient: Gradient, nodes: Tensor, parameters: Tensor) -> None:
        super().__init__()
        source, self.begin, self.cycle = map(nn.Parameter, parameters.split([len(parameters) - 5, 1, 4]))
        self.gradient = gradient
        self.source = GridParameter(source, nodes, gradient.kind)
        self.step = YEARS / (len(nodes) - 1)

    def field(self, t: Tensor, c: Tensor) -> Tensor:
        """c', of shape (m,) like c."""
        return self.source(t) - UPTAKE * (c - NATURAL)

    def forward(self, times: Tensor) -> Tensor:
        """The concentrations, of shape (n, m), at some times, of shape (n,), by the solver of the fit."""
        # To the end of the last step, for "smooth" is for equal steps.
        t = torch.cat([times.new_zeros(1), times, times.new_tensor([YEARS])])
        c = self.gradient.solve(self.field, self.begin[0], t, {"step_size": self.step})
        return c[1:-1] + seasons(times) @ self.cycle

    def misfit(self, times: Tensor, values: Tensor) -> Tensor:
        """Half of the squared errors, in units of the noise, of shape (m,)."""
        return 0.5 * ((self(times) - values[:, None]) / NOISE).square().sum(0)

    def row_times(self) -> np.ndarray:
        """Which times the values of the source stand for."""
        nodes = self.source.nodes.numpy()
        return nodes[: len(self.source.values)] + self.gradient.offset * self.step

    def refined(self, finer: int) -> "Balance":
        """The same balance with its source interpolated linearly, by a Runge–Kutta method of so much smaller steps."""
        nodes = torch.linspace(0, YEARS, (len(self.source.nodes) - 1) * finer + 1, dtype=torch.float64)
        source = GridParameter(self.source.values, torch.tensor(self.row_times()), "linear")(nodes)
        return Balance(Gradient(_fine, "linear", 0.0), nodes, torch.cat([source, self.begin, self.cycle]).detach())


def _fine(func: Callable, y0: Tensor, t: Tensor, options: dict) -> Tensor:
    return torchdiffeq.odeint(func, y0, t, method="rk4", options={**options, "interp": "cubic"})


def fit(series: Series, gradient: Gradient, steps: int, penalty: Penalty) -> Balance:
    """Find where the gradient is zero, as training would in the end.

    The model is linear and the loss quadratic, so that the gradient is affine, filtered or not: its values at as many
    points as there are parameters, and one, tell all of it.
    """
    nodes = torch.linspace(0, YEARS, steps + 1, dtype=torch.float64)
    rows = steps + (gradient.kind == "linear")
    guess = start(rows)
    probes = Balance(gradient, nodes, torch.cat([guess, guess + torch.eye(rows + 5, dtype=torch.float64)], dim=1))
    loss = probes.misfit(*series.part(0)) + penalty(probes.source.values, probes.source.widths)
    grads = torch.autograd.grad(loss.sum(), (probes.source.values, probes.begin, probes.cycle))
    first, others = torch.cat(grads).split([1, rows + 5], dim=1)
    return Balance(gradient, nodes, guess - torch.linalg.solve(others - first, first))


def start(rows: int) -> Tensor:
    """The parameters from which training would start, of shape (rows + 5, 1)."""
    return torch.tensor([GUESS] * rows + [315.0] + [0.0] * 4, dtype=torch.float64)[:, None]


def oscillation_of(balance: Balance, series: Series) -> float:
    """The index of the gradient of the misfit with respect to the source."""
    (gradient,) = torch.autograd.grad(balance.misfit(*series.part(0)), balance.source.values)
    return oscillation(gradient, balance.source.widths).index


def measure(series: Series, balance: Balance, penalty: Penalty, reference: Balance, finer: int) -> dict:
    """What the tables need of a fit; the reference is that of an accurate solver, `finer` is for `refined`."""
    source, times = balance.source.values.detach()[:, 0].numpy(), balance.row_times()
    accurate = np.interp(times, reference.row_times(), reference.source.values.detach()[:, 0].numpy())
    # Nothing tells the source at the very ends.
    inside = (times > 1) & (times < YEARS - 1)
    found = {
        "times": times.tolist(),
        "source": source.tolist(),
        "first index": oscillation_of(Balance(balance.gradient, balance.source.nodes, start(len(source))), series),
        "index": oscillation_of(balance, series),
        "variation": float(np.abs(np.diff(source)).sum()),
        "distance": root_mean_square((source - accurate)[inside]),
    }
    for name, of in (("reported", balance), ("true", balance.refined(finer))):
        with torch.no_grad():
            off = of(torch.tensor(series.times))[:, 0].numpy() - series.values
            misfit = 0.5 * np.square(off[series.use == 0] / NOISE).sum()
            found[name] = float(misfit + penalty(of.source.values, of.source.widths))
    for use, name in ((1, "weeks"), (2, "years")):
        found[f"held-out {name}"] = root_mean_square(off[series.use == use])
    if series.source is not None:
        found["error"] = root_mean_square((source - series.source(times))[inside])
    return found


def root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def report(name: str, penalty: str, found: dict[int, dict[str, dict]]) -> str:
    """The results as a table."""
    keys = {
        "first index": ("index at first", ".2f"),
        "index": ("in the end", ".2f"),
        "error": ("error of θ", ".3f"),
        "distance": ("from the accurate fit", ".3f"),
        "variation": ("variation", ".1f"),
        "reported": ("reported loss", ".1f"),
        "true": ("true loss", ".1f"),
        "held-out weeks": ("held-out weeks", ".3f"),
        "held-out years": ("held-out years", ".3f"),
    }
    if name != "twin":
        del keys["error"]
    rows = [
        (n, gradient, *(format(run[key], format_) for key, (_, format_) in keys.items()))
        for n, runs in found.items()
        for gradient, run in runs.items()
    ]
    return f"{name}, penalty {penalty}\n\n{table(('N', 'gradient', *(title for title, _ in keys.values())), rows)}\n"


def draw(results: dict, series: dict[str, Series], shown: int) -> Figure:
    """The sources that are recovered on one grid, a row for each series, a column for each penalty."""
    columns = len(results["twin"])
    figure = Figure(figsize=(4.4 * columns, 5.8), layout="constrained")
    panels = figure.subplots(len(series), columns, squeeze=False, sharex=True, sharey="row")
    for row, (name, data) in zip(panels, series.items(), strict=True):
        for axes, (penalty, found) in zip(row, results[name].items(), strict=True):
            axes.axvspan(1958 + BLOCK[0], 1958 + BLOCK[1], color="0.9", lw=0, label="held out")
            for gradient in ("auto-differentiation", "filtered"):
                run = found[shown][gradient]
                times = 1958 + np.array(run["times"])
                axes.plot(times, run["source"], color=COLORS[gradient], lw=0.9, label=gradient)
            if data.source is not None:
                fine = np.linspace(0, YEARS, 801)
                axes.plot(1958 + fine, data.source(fine), color=COLORS["truth"], lw=1.1, label="true")
            axes.set_xticks(range(1958, 1979, 4))
            axes.set_title(f"{name}, {shown} steps, penalty {penalty}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("source, ppm per year")
    panels[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def main() -> None:
    args = arguments(__doc__, "one grid, two penalties, two gradients", seed=0)
    generator = np.random.default_rng(args.seed)
    real = mauna_loa(generator)
    series = {"twin": twin(real, generator), "Mauna Loa": real}
    grids = (160,) if args.quick else (80, 160, 320)
    gradients = tuple(GRADIENTS)[: 2 if args.quick else None]
    penalties = PENALTIES[:: 2 if args.quick else 1]
    reference_steps = REFERENCE_STEPS // (8 if args.quick else 1)
    cases = [(name, penalty) for name in series for penalty in penalties]
    results: dict = {name: {} for name in series}
    with tqdm(total=len(cases) * (1 + len(grids) * len(gradients)), unit="fit") as progress:
        for name, penalty in cases:
            reference = fit(series[name], GRADIENTS["midpoint"], reference_steps, penalty)
            progress.update()
            runs: dict = {n: {} for n in grids}
            results[name][str(penalty)] = runs
            for steps in grids:
                for gradient in gradients:
                    fitted = fit(series[name], GRADIENTS[gradient], steps, penalty)
                    runs[steps][gradient] = measure(series[name], fitted, penalty, reference, 2 if args.quick else 8)
                    progress.update()
    for name, by_penalty in results.items():
        for penalty, found in by_penalty.items():
            print(report(name, penalty, found))
    write(args.output, "forcing", results, {"forcing": draw(results, series, 160)})


if __name__ == "__main__":
    main()
