"""The gradient of drift parameters through a stochastic multistep method, on fixed Brownian paths.

A pendulum with a torque θ(t) and noise, which depends on the state (multiplicative) or not (additive), is solved by
leapfrog. The loss sees the state half-way and at the end. Its gradient with respect to the torque at every step
oscillates around the functional gradient on the same path by an amount that does not shrink with the step; with
``options={"grad_filter": "leapfrog"}`` it converges. The reference is auto-differentiation of torchsde's srk on the
same paths with a much smaller step, which does not oscillate.

    python examples/sde_gradients.py
"""

from typing import NamedTuple

import numpy as np
import torch
import torchsde
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_lmm import GridParameter

HORIZON = 2.0
STEPS = (16, 32, 64, 128)
SHOWN = 32
GRADIENTS = {"auto-differentiation": None, "filtered": "leapfrog"}


class Noise(NamedTuple):
    """What drives the pendulum.

    Attributes:
        type: torchsde's: ``"additive"``, or ``"diagonal"``, and then depending on the state.
        size: of the noise.
    """

    type: str
    size: float


NOISES = {
    "additive, 0.3": Noise("additive", 0.3),
    "multiplicative, 0.003": Noise("diagonal", 0.003),
    "multiplicative, 0.3": Noise("diagonal", 0.3),
}


class Pendulum(nn.Module):
    """dx = v dt, dv = (θ(t) - sin x) dt + noise, in Itô's calculus, for torchsde; every path has a torque of its own.

    Args:
        noise: its noise.
        steps: of the torque's grid.
        kind: of the torque as a `GridParameter`.
        paths: their number.
    """

    sde_type = "ito"

    def __init__(self, noise: Noise, steps: int, kind: str, paths: int) -> None:
        super().__init__()
        self.noise_type, self.size = noise.type, noise.size
        nodes = torch.linspace(0, HORIZON, steps + 1, dtype=torch.float64)
        values = torch.cos(nodes if kind == "linear" else nodes[:-1])[:, None]
        self.torque = GridParameter(values.expand(-1, paths), nodes, kind)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift, of shape (paths, 2)."""
        x, v = y.unbind(dim=1)
        return torch.stack([v, self.torque(t) - torch.sin(x)], dim=1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """The diffusion: of shape (paths, 2, 1), or its diagonal, of shape (paths, 2)."""
        if self.noise_type == "additive":
            return self.size * torch.tensor([[0.0], [1.0]], dtype=y.dtype).expand(len(y), 2, 1)
        x, v = y.unbind(dim=1)
        return self.size * torch.stack([0.5 * torch.sin(x), 1 + v], dim=1)


def density(
    noise: Noise, steps: int, method: str, grad_filter: str | None, brownian: torchsde.BaseBrownian
) -> np.ndarray:
    """The gradients for the torque over time, of shape (steps, paths): those of the steps, or of the nodes for srk."""
    paths = brownian.shape[0]
    sde = Pendulum(noise, steps, "linear" if method == "srk" else "step", paths)
    y0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(paths, 2)
    ts = [0.0, HORIZON / 2, HORIZON]
    options = {} if grad_filter is None else {"grad_filter": grad_filter}
    y = torchsde.sdeint(sde, y0, ts, bm=brownian, method=method, dt=HORIZON / steps, options=options)
    (y[1, :, 0] ** 2 + torch.sin(y[2, :, 0]) + y[2, :, 1] ** 2).sum().backward()
    gradient = sde.torque.values.grad
    assert gradient is not None
    return (gradient / sde.torque.widths[:, None]).numpy()[:steps]


def measure(noise: Noise, grids: tuple[int, ...], paths: int, finer: int, seed: int) -> dict:
    """Errors at the worst node of each path, root mean squares over the paths; and the gradients on one path.

    The reference has `finer` steps for each of the finest grid's.
    """
    brownian = torchsde.BrownianInterval(
        0.0, HORIZON, size=(paths, 1 if noise.type == "additive" else 2), dtype=torch.float64, entropy=seed,
        levy_area_approximation="space-time", cache_size=None,
    )  # fmt: skip
    truth = density(noise, grids[-1] * finer, "srk", None, brownian)
    errors: dict = {gradient: [] for gradient in GRADIENTS}
    shown: dict = {"truth": truth[:: finer // 4, 0].tolist()}
    for n in tqdm(grids, unit="grid"):
        for gradient, grad_filter in GRADIENTS.items():
            found = density(noise, n, "leapfrog", grad_filter, brownian)
            # Where the loss sees a node the costate jumps, and a step has both sides of it.
            unseen = np.arange(n) != n // 2
            worst = np.abs(found - truth[:: len(truth) // n])[unseen].max(axis=0)
            errors[gradient].append(float(np.sqrt(np.square(worst).mean())))
            if n == SHOWN:
                shown[gradient] = found[:, 0].tolist()
    return {"errors": errors, "shown": shown}


def slope(grids: tuple[int, ...], errors: list[float]) -> float:
    """The measured order."""
    return -float(np.polyfit(np.log(grids), np.log(errors), 1)[0])


def report(results: dict, grids: tuple[int, ...]) -> str:
    """The results as a table."""
    rows = [
        (noise, gradient, *(f"{error:.1e}" for error in errors), f"{slope(grids, errors):.2f}")
        for noise, found in results.items()
        for gradient, errors in found["errors"].items()
    ]
    return table(("noise", "gradient", *(f"{n} steps" for n in grids), "order"), rows)


def draw(results: dict, grids: tuple[int, ...]) -> Figure:
    """Above one path's gradients over time, below the errors against the steps; a column for each noise."""
    figure = Figure(figsize=(3.7 * len(results), 5.6), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False, sharey="row")
    styles = {
        "auto-differentiation": {"lw": 0.8, "marker": ".", "ms": 4},
        "filtered": {"ls": "", "marker": "o", "ms": 3.5},
    }
    for (over_time, over_step), (noise, found) in zip(panels.T, results.items(), strict=True):
        for gradient, style in styles.items():
            values = found["shown"][gradient]
            times = np.arange(len(values)) * HORIZON / len(values)
            over_time.plot(times, values, color=COLORS[gradient], label=gradient, **style)
            errors = found["errors"][gradient]
            label = f"{gradient}, order {slope(grids, errors):.2f}"
            over_step.loglog(grids, errors, "o-", ms=4, lw=1, color=COLORS[gradient], label=label)
        truth = found["shown"]["truth"]
        over_time.plot(np.arange(len(truth)) * HORIZON / len(truth), truth, color=COLORS["truth"], lw=1, label="fine")
        over_time.set(xlabel="time", title=noise)
        over_step.set(xlabel="steps", xscale="log", xticks=grids, xticklabels=grids)
        over_step.minorticks_off()
        over_step.legend(frameon=False, fontsize=8, loc="upper right")
        for axes in (over_time, over_step):
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("gradient over time, one path")
    panels[1, 0].set_ylabel("error at the worst node")
    # Room for the legends.
    panels[1, 0].set_ylim(top=40)
    panels[0, -1].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    args = arguments(__doc__, "two kinds of noise, three grids, few paths", seed=0)
    noises = tuple(NOISES)[: 2 if args.quick else None]
    grids, paths, finer = ((16, 32, 64), 8, 12) if args.quick else (STEPS, 256, 32)
    results = {noise: measure(NOISES[noise], grids, paths, finer, args.seed) for noise in noises}
    print(report(results, grids))
    write(args.output, "sde_gradients", results, {"sde_gradients": draw(results, grids)})


if __name__ == "__main__":
    main()
