"""A latent SDE fitted to sunspots through a multistep method, beside torchsde's euler and reversible_heun.

The yearly numbers of sunspots (statsmodels' bundled series, from 1700 on), their square roots, in windows of 48 years,
are taken for a noisy view of a latent SDE dz = h(z) dt + g dW. An encoder sees a window and steers the drift of its
posterior, dz = f(z, t) dt + g dW; both are trained by the evidence lower bound, whose path term torchsde works out with
``logqp=True``. All methods solve the same SDE with the same step; what each has learned is then judged by one solver
with a much smaller step, on the windows of training and on later years.

    python examples/latent_sde.py
"""

import time
from typing import NamedTuple

import numpy as np
import statsmodels.api as sm
import torch
import torchsde
from harness import arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm  # noqa: F401

WINDOW = 48
LATENT, HIDDEN, CONTEXT = 4, 32, 16
STEP, FINE_STEP = 0.1, 0.0125
"""In decades."""
TRAINING = 240
"""So many years are for training, the rest for the test."""
BATCH = 32
RATE = 5e-3

# Drift evaluations per step, and how torchsde is to read an SDE whose noise does not depend on the state.
METHODS = {
    "ab2": (1, "ito"),
    "ab3": (1, "ito"),
    "euler": (1, "ito"),
    "reversible_heun": (1, "stratonovich"),
}
COLORS = dict(zip(METHODS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))


class LatentSDE(nn.Module):
    """The posterior SDE as torchsde wants it, and the maps between observations and latent states.

    Attributes:
        noise_type, sde_type: for torchsde; the noise does not depend on the state, so that both types are the same.
    """

    noise_type = "diagonal"

    def __init__(self) -> None:
        super().__init__()
        self.sde_type = "ito"
        self.encoder = nn.GRU(1, HIDDEN)
        self.context = nn.Linear(HIDDEN, CONTEXT)
        self.begin = nn.Linear(CONTEXT, 2 * LATENT)
        self.posterior = nn.Sequential(nn.Linear(LATENT + CONTEXT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, LATENT))
        self.prior = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, LATENT))
        self.log_noise = nn.Parameter(torch.full((LATENT,), -0.5))
        self.prior_begin = nn.Parameter(torch.zeros(2, LATENT))
        self.read = nn.Linear(LATENT, 1)
        self.log_error = nn.Parameter(torch.tensor(-1.0))
        self._contexts: tuple[Tensor, Tensor]

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """The posterior's drift, of shape (B, LATENT)."""
        times, contexts = self._contexts
        index = int(torch.searchsorted(times, t.detach(), right=True).clamp(max=len(times) - 1))
        return self.posterior(torch.cat([z, contexts[index]], dim=1))

    def h(self, t: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """The prior's drift."""
        return self.prior(z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """The diffusion of both, diagonal."""
        return self.log_noise.exp().expand_as(z)

    def forward(self, times: Tensor, windows: Tensor, method: str, step: float) -> tuple[Tensor, Tensor]:
        """The negative evidence lower bound per observation, 0-d, and the reconstruction, of shape (T, B).

        Args:
            times: in decades, of shape (T,).
            windows: observations, of shape (T, B).
            method: of torchsde.
            step: in decades.
        """
        hidden, _ = self.encoder(windows.flip(0)[..., None])
        contexts = self.context(hidden.flip(0))
        self._contexts = times, contexts
        mean, log_scale = self.begin(contexts[0]).chunk(2, dim=1)
        q = torch.distributions.Normal(mean, log_scale.exp())
        p = torch.distributions.Normal(self.prior_begin[0], self.prior_begin[1].exp())
        self.sde_type = METHODS[method][1]
        z, path = torchsde.sdeint(self, q.rsample(), times, method=method, dt=step, logqp=True)
        reconstruction = self.read(z)[..., 0]
        likelihood = torch.distributions.Normal(reconstruction, self.log_error.exp()).log_prob(windows)
        divergence = torch.distributions.kl_divergence(q, p).sum(1) + path.sum(0)
        return (divergence - likelihood.sum(0)).mean() / len(times), reconstruction


class Data(NamedTuple):
    """Observations, standardised.

    Attributes:
        times: of a window, in decades, of shape (T,).
        train, test: windows, of shape (T, number).
        years: at which the last window of the test begins.
    """

    times: Tensor
    train: Tensor
    test: Tensor
    years: np.ndarray


def data() -> Data:
    """All windows of the first years, and those of the years after."""
    table_of_years = sm.datasets.sunspots.load_pandas().data
    roots = np.sqrt(table_of_years["SUNACTIVITY"].to_numpy())
    values = torch.tensor((roots - roots[:TRAINING].mean()) / roots[:TRAINING].std(), dtype=torch.float32)
    train, test = (part.unfold(0, WINDOW, 1).T for part in (values[:TRAINING], values[TRAINING:]))
    years = table_of_years["YEAR"].to_numpy()[-WINDOW:]
    return Data(torch.arange(WINDOW) / 10, train, test, years)


class Training:
    """One model in training.

    Args:
        method: of torchsde.
        iterations: how many there will be.
    """

    def __init__(self, method: str, iterations: int) -> None:
        self.method = method
        self.model = LatentSDE()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._trainer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._trainer, iterations)

    def iterate(self, series: Data) -> None:
        """One iteration, on some windows."""
        begin = time.perf_counter()
        batch = series.train[:, torch.randint(series.train.shape[1], (BATCH,))]
        self._trainer.zero_grad()
        loss, _ = self.model(series.times, batch, self.method, STEP)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self._trainer.step()
        self._schedule.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(float(loss.detach()))

    def found(self, series: Data, seed: int) -> dict:
        """What the table needs; the model is judged by euler with the fine step."""
        found = {"losses": self.losses, "milliseconds": 1e3 * float(np.median(self.seconds))}
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with torch.no_grad():
            for name, windows in (("train", series.train[:, ::6]), ("test", series.test)):
                repeated = windows.repeat(1, 4)
                bound, reconstruction = self.model(series.times, repeated, "euler", FINE_STEP)
                found[f"bound, {name}"] = float(bound)
                found[f"error, {name}"] = float((reconstruction - repeated).square().mean().sqrt())
        return found


def report(results: dict[str, list[dict]]) -> str:
    """Means over the seeds, with the standard deviation."""
    keys = ("bound, train", "error, train", "bound, test", "error, test")
    header = ("method", "evaluations per step", "ms per iteration", "last losses", *keys)
    rows = []
    for method, runs in results.items():
        milliseconds = np.mean([run["milliseconds"] for run in runs])
        last = [np.mean(run["losses"][-20:]) for run in runs]
        columns = [last, *([run[key] for run in runs] for key in keys)]
        cells = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in columns]
        rows.append((method, METHODS[method][0], f"{milliseconds:.0f}", *cells))
    return table(header, rows)


def draw(series: Data, model: LatentSDE, method: str, results: dict[str, list[dict]]) -> Figure:
    """Left the last window and what the posterior makes of it, right the losses."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    over_time, over_iterations = figure.subplots(1, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        _, paths = model(series.times, series.test[:, -1:].expand(-1, 64), "euler", FINE_STEP)
    low, middle, high = np.quantile(paths.numpy(), (0.05, 0.5, 0.95), axis=1)
    over_time.fill_between(
        series.years, low, high, color=COLORS[method], alpha=0.25, lw=0, label="posterior, 5 to 95 %"
    )
    over_time.plot(series.years, middle, color=COLORS[method], lw=1, label="its median")
    over_time.plot(series.years, series.test[:, -1], "k.", ms=4, label="sunspots")
    over_time.set(xlabel="year", ylabel="root of the number, standardised", title=f"Later years, trained with {method}")
    for name, runs in results.items():
        losses = np.mean([run["losses"] for run in runs], axis=0)
        width = max(1, len(losses) // 30)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        over_iterations.plot(np.arange(len(smooth)) + width / 2, smooth, color=COLORS[name], lw=1, label=name)
    over_iterations.set(xlabel="iteration", ylabel="negative bound per observation", title="Training")
    ticks = (1.2, 1.5, 2, 3, 5)
    over_iterations.set_yscale("log")
    over_iterations.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    over_iterations.minorticks_off()
    for axes in (over_time, over_iterations):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    args = arguments(__doc__, "two methods, one seed, few iterations", seed=0)
    methods = ("ab2", "euler") if args.quick else tuple(METHODS)
    iterations, seeds = (25, 1) if args.quick else (400, 3)
    series = data()
    results: dict[str, list[dict]] = {method: [] for method in methods}
    shown: LatentSDE | None = None
    with tqdm(total=len(methods) * seeds * iterations, unit="iteration") as progress:
        for seed in range(args.seed, args.seed + seeds):
            trainings = []
            for method in methods:
                # All begin with the same weights; torchsde's Brownian motions take their seeds from NumPy.
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                trainings.append(Training(method, iterations))
            # In turn, so that times compare.
            for _ in range(iterations):
                for training in trainings:
                    training.iterate(series)
                    progress.update()
            for training in trainings:
                results[training.method].append(training.found(series, seed))
            shown = shown or trainings[0].model
    assert shown is not None
    print(report(results))
    write(args.output, "latent_sde", results, {"latent_sde": draw(series, shown, methods[0], results)})


if __name__ == "__main__":
    main()
