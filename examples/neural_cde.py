"""Neural controlled differential equations by torchcde: which method for which path?

Spirals in the plane, clockwise or not, are seen at times that are drawn at random; some coordinates are missing.
torchcde makes a path X of each series, and a network is given z' = f(z) X'(t), whose end tells the direction. It is
trained on cubic paths through `abm4`, and on linear ones through torchdiffeq's `rk4`. Then the logits of both
networks by several methods are compared with those of a fine solve, for the evaluations of f in the mean interval
between two times.

A linear path has a slope that jumps at every time of the series, a cubic one a slope with a bend there. Methods are
told of these times by `jump_t`, or by steps that end there, or not at all. It needs torchcde: pip install torchcde.

    python examples/neural_cde.py
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from harness import arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm

MISSING = 0.2
"""The part of the coordinates that is not seen."""
BUDGETS = (1, 2, 4, 8, 16, 32)
"""Evaluations per interval, but for those of starts."""
AT_MOST = (1.25, 2.5, 5, 10, 20, 40)
"""With them."""
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
EVALUATIONS = {"midpoint": 2, "rk4": 4, "ab4": 1, "abm4": 2}
"""Of a step."""
ADAPTIVE = ("adams", "dopri5")
OURS = ("ab4", "abm4", "adams")


class Series(NamedTuple):
    """Series of the same times.

    Attributes:
        times: of shape (m,), from 0 to 1.
        values: time and coordinates, of shape (n, m, 3); NaN where not seen.
        labels: 1 for a spiral that goes round clockwise, else 0; of shape (n,).
    """

    times: Tensor
    values: Tensor
    labels: Tensor


class Field(nn.Module):
    """f(z), of shape (n, hidden, 3) for z of shape (n, hidden); it counts its evaluations."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, hidden * 3), nn.Tanh())
        self.count = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """By this X' is multiplied."""
        self.count += 1
        return self.layers(z).unflatten(-1, (z.shape[-1], 3))


class Model(nn.Module):
    """A neural CDE, from paths to logits of shape (n,)."""

    def __init__(self, hidden: int = 8, width: int = 32) -> None:
        super().__init__()
        self.begin, self.field, self.end = nn.Linear(3, hidden), Field(hidden, width), nn.Linear(hidden, 1)

    def forward(self, path: nn.Module, **settings: Any) -> Tensor:
        """The logits by a method, with its settings, of torchdiffeq."""
        import torchcde

        begin = self.begin(path.evaluate(path.interval[0]))
        z = torchcde.cdeint(path, self.field, begin, path.interval, adjoint=False, **settings)
        return self.end(z[:, -1]).squeeze(-1)


def spirals(times: Tensor, count: int) -> Series:
    """Spirals that go round twice, from random angles, with noise of 0.01."""
    angles, labels = 4 * math.pi * times, torch.arange(count) % 2
    phase = 2 * math.pi * torch.rand(count, 1) + (1 - 2 * labels[:, None]) * angles
    places = torch.stack([phase.cos(), phase.sin()], dim=-1) / (1 + 0.5 * angles)[:, None]
    places += 0.01 * torch.randn_like(places)
    gone = torch.rand_like(places) < MISSING
    gone[:, 0] = False
    places[gone] = torch.nan
    return Series(times, torch.cat([times.expand(count, -1)[..., None], places], dim=-1), labels)


def path_of(series: Series, kind: str, dtype: torch.dtype) -> nn.Module:
    """The path through all that was seen."""
    import torchcde

    times, values = series.times.to(dtype), series.values.to(dtype)
    if kind == "linear":
        return torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(values, times), times)
    return torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(values, times), times)


def grid_of(times: Tensor, parts: int) -> Callable[..., Tensor]:
    """A `grid_constructor`: all times, and the intervals between them in equal parts."""
    inside = torch.arange(parts, dtype=times.dtype) / parts
    nodes = torch.cat([torch.lerp(times[:-1, None], times[1:, None], inside).flatten(), times[-1:]])
    return lambda func, y0, t: nodes  # noqa: ARG005


def settings_of(times: Tensor, every: int) -> list[tuple[str, dict[str, Any]]]:
    """What is compared: the names of ways to solve, and their settings. Of budgets and tolerances every so many."""
    ways: list[tuple[str, dict[str, Any]]] = []
    jumps, intervals = {"jump_t": times[1:-1]}, len(times) - 1
    for budget in BUDGETS[::every]:
        for name, evaluations in EVALUATIONS.items():
            size = {"step_size": float(times[-1] - times[0]) * evaluations / (budget * intervals)}
            ways.append((f"{name}, equal steps", {"method": name, "options": size}))
            if budget >= evaluations:
                grid = {"grid_constructor": grid_of(times, budget // evaluations)}
                more = jumps if name in OURS else {"perturb": True}
                known = "jump_t" if name in OURS else "steps end there"
                ways.append((f"{name}, {known}", {"method": name, "options": {**grid, **more}}))
    for name in ADAPTIVE:
        for tol in TOLERANCES[::every]:
            setting = {"method": name, "rtol": tol, "atol": tol}
            ways.append((name, setting))
            ways.append((f"{name}, jump_t", {**setting, "options": jumps}))
    return sorted(ways, key=lambda way: way[0])


def learn(series: Series, kind: str, iterations: int) -> tuple[Model, float]:
    """Train a network; also its last loss."""
    model, path = Model(), path_of(series, kind, torch.float32)
    times = series.times.float()
    if kind == "linear":
        settings: dict[str, Any] = {
            "method": "rk4",
            "options": {"grid_constructor": grid_of(times, 1), "perturb": True},
        }
    else:
        settings = {"method": "abm4", "options": {"step_size": 0.5 / len(times)}}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    labels = series.labels.float()
    for _ in tqdm(range(iterations), desc=kind):
        loss = nn.functional.binary_cross_entropy_with_logits(model(path, **settings), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False), loss.item()


def errors_of(model: Model, series: Series, kind: str, every: int) -> dict[str, list[tuple[float, float]]]:
    """For every way to solve the evaluations per interval and the root mean square error of logits."""
    model, path, times = model.double(), path_of(series, kind, torch.float64), series.times
    exact = model(path, method="dopri8", rtol=1e-11, atol=1e-11, options={"jump_t": times[1:-1]})
    found: dict[str, list[tuple[float, float]]] = {}
    for name, settings in settings_of(times, every):
        model.field.count = -1  # torchcde evaluates once more, to see that shapes fit.
        error = (model(path, **settings) - exact).square().mean().sqrt().item()
        found.setdefault(name, []).append((model.field.count / (len(times) - 1), error))
    return {name: sorted(points) for name, points in found.items()}


def best_within(points: list[tuple[float, float]], most: float) -> float | None:
    """The least error with at most so many evaluations; None if there is none."""
    return min((error for evaluations, error in points if evaluations <= most), default=None)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The part of labels that are right."""
    return ((logits > 0) == (labels > 0)).double().mean().item()


def main() -> None:
    """Train both networks, compare the methods, and write the table and the picture."""
    args = arguments(__doc__, quick="train for few iterations, and compare few settings", seed=0)
    try:
        import torchcde  # noqa: F401
    except ImportError:
        raise SystemExit("neural_cde.py needs torchcde: pip install torchcde") from None
    torch.manual_seed(args.seed)
    torchdiffeq_lmm.register()
    length, count, every = (10, 16, 3) if args.quick else (40, 128, 1)
    times = torch.cat([torch.zeros(1), torch.rand(length - 2).sort().values, torch.ones(1)]).double()
    train, test = spirals(times, count), spirals(times, count)
    results: dict[str, Any] = {}
    figure = Figure(figsize=(12, 5), layout="constrained")
    for kind, axes in zip(("cubic", "linear"), figure.subplots(1, 2), strict=True):
        model, loss = learn(train, kind, 3 if args.quick else 60)
        found = errors_of(model, test, kind, every)
        with torch.no_grad():
            logits = model(path_of(test, kind, torch.float64), method="adams", options={"jump_t": times[1:-1]})
        right = accuracy(logits, test.labels)
        results[kind] = {"loss": loss, "accuracy": right, "logits": logits.square().mean().sqrt().item()}
        results[kind]["errors"] = found
        print(f"\n{kind}: loss {loss:.3f}, test accuracy {right:.3f}; least error of logits\n")
        rows = []
        axes.set_prop_cycle(color=mpl.colormaps["tab20"].colors)
        for name, points in found.items():
            errors = [best_within(points, most) for most in AT_MOST[::every]]
            rows.append([name, *("" if error is None else f"{error:.1e}" for error in errors)])
            axes.loglog(*zip(*points, strict=True), "-" if "," in name else "--", marker=".", label=name)
        print(table(["evaluations per interval, at most", *map(str, AT_MOST[::every])], rows))
        axes.set(title=f"{kind} paths", xlabel="evaluations per interval", ylabel="RMS error of logits", xlim=(0.7, 50))
        axes.legend(fontsize="x-small", ncols=2)
    write(args.output, "neural_cde", results, {"neural_cde": figure})


if __name__ == "__main__":
    main()
