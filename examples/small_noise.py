"""Small noise: where multistep methods for stochastic differential equations pay.

A pendulum with noise in speed and torque, dx = v dt + 0.3 ε x dW_1, dv = -sin x dt + 0.5 ε cos x dW_2, is solved
by this package's methods and by torchsde's, all on the same Brownian paths. With noise of size ε a linear multistep
method of order 2 has strong errors of the size of h² + ε h + ε² √h (Buckwar and Winkler): as long as the noise is small
they fall as those of an ODE method do, for one evaluation of the drift per step.

    python examples/small_noise.py
"""

import numpy as np
import torch
import torchsde
from harness import arguments, table, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_lmm  # noqa: F401

HORIZON = 2.0
BEGIN = (1.0, 0.5)
STEPS = (8, 16, 32, 64, 128, 256)
NOISES = (0.0, 0.001, 0.01, 0.1, 1.0)
METHODS = {
    "leapfrog": ("ito", {"color": "#0072B2", "marker": "o"}),
    "ab2": ("ito", {"color": "#009E73", "marker": "s"}),
    "ab3": ("ito", {"color": "#56B4E9", "marker": "^"}),
    "bdf2": ("ito", {"color": "#000000", "marker": "v"}),
    # Larger and hollow, for milstein lies on it where the noise is small.
    "euler": ("ito", {"color": "#D55E00", "marker": "o", "ls": "--", "ms": 9, "mfc": "none"}),
    "milstein": ("ito", {"color": "#CC79A7", "marker": "s", "ls": "--"}),
    "srk": ("ito", {"color": "#E69F00", "marker": "^", "ls": "--"}),
    "midpoint": ("stratonovich", {"color": "#777777", "marker": "v", "ls": "--"}),
}
"""How torchsde is to read the SDE, and how it is drawn; broken lines are torchsde's own."""
OURS = ("leapfrog", "ab2", "ab3", "bdf2")


class Pendulum(nn.Module):
    """The noisy pendulum, for torchsde; counts the evaluations of its drift.

    Args:
        noise: ε.
        sde_type: ``"ito"``, or ``"stratonovich"`` for the same process in the other calculus.
    """

    noise_type = "diagonal"

    def __init__(self, noise: float, sde_type: str) -> None:
        super().__init__()
        self.noise, self.sde_type, self.evaluations = noise, sde_type, 0

    def f(self, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """The drift."""
        self.evaluations += 1
        x, v = y.unbind(dim=1)
        drift = torch.stack([v, -torch.sin(x)], dim=1)
        if self.sde_type == "ito":
            return drift
        # Minus half of g ∂g/∂y; the second component of g does not depend on v.
        return drift - 0.5 * self.noise**2 * torch.stack([0.09 * x, torch.zeros_like(x)], dim=1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """The diagonal of the diffusion."""
        x = y[:, 0]
        return self.noise * torch.stack([0.3 * x, 0.5 * torch.cos(x)], dim=1)


def paths(number: int, seed: int) -> torchsde.BrownianInterval:
    """Brownian paths that every solver is given."""
    return torchsde.BrownianInterval(
        0.0, HORIZON, size=(number, 2), dtype=torch.float64, entropy=seed, levy_area_approximation="space-time",
        cache_size=None,
    )  # fmt: skip


def end(noise: float, method: str, steps: int, brownian: torchsde.BrownianInterval) -> tuple[Tensor, int]:
    """The states at the horizon, of shape (number, 2), and how often the drift was evaluated."""
    sde = Pendulum(noise, METHODS[method][0])
    y0 = torch.tensor(BEGIN, dtype=torch.float64).expand(brownian.shape[0], 2)
    options = {"rtol": 1e-9, "atol": 1e-11} if method == "bdf2" else {}
    with torch.no_grad():
        y = torchsde.sdeint(sde, y0, [0.0, HORIZON], bm=brownian, method=method, dt=HORIZON / steps, **options)
    # torchsde evaluates once for the shape.
    return y[-1], sde.evaluations - 1


def measure(noises: tuple[float, ...], grids: tuple[int, ...], number: int, reference_steps: int, seed: int) -> dict:
    """Strong errors at the end: ``{noise: {method: {"steps", "evaluations", "errors"}}}``."""
    found: dict = {noise: {} for noise in noises}
    with tqdm(total=len(noises) * len(METHODS), unit="method") as progress:
        for noise in noises:
            brownian = paths(number, seed)
            truth, _ = end(noise, "srk", reference_steps, brownian)
            for method in METHODS:
                solved = [end(noise, method, steps, brownian) for steps in grids]
                errors = [float((y - truth).square().sum(1).mean().sqrt()) for y, _ in solved]
                found[noise][method] = {
                    "steps": list(grids), "evaluations": [count for _, count in solved], "errors": errors,
                }  # fmt: skip
                progress.update()
    return found


def report(found: dict) -> str:
    """Errors, and the order over the last three grids."""
    rows = []
    for noise, by_method in found.items():
        for method, runs in by_method.items():
            errors = np.array(runs["errors"])
            slope = np.polyfit(np.log(runs["steps"][-3:]), np.log(errors[-3:]), 1)[0]
            per_step = runs["evaluations"][-1] / runs["steps"][-1]
            rows.append((f"{noise:g}", method, f"{per_step:.1f}", *(f"{e:.1e}" for e in errors), f"{-slope:.2f}"))
    steps = [f"{n} steps" for n in next(iter(next(iter(found.values())).values()))["steps"]]
    return table(("ε", "method", "evaluations per step", *steps, "order"), rows)


def draw(found: dict) -> Figure:
    """Error against evaluations of the drift, a panel for every size of the noise."""
    noises = [noise for noise in found if noise > 0] or list(found)
    figure = Figure(figsize=(3.1 * len(noises) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for axes, noise in zip(panels, noises, strict=True):
        for method, runs in found[noise].items():
            style = {"lw": 1.1, "ms": 4, **METHODS[method][1]}
            axes.loglog(runs["evaluations"], runs["errors"], label=method, **style)
        axes.set(xlabel="evaluations of the drift", title=f"noise of size {noise:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("strong error at the end")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def main() -> None:
    args = arguments(__doc__, "two sizes of the noise, three grids, few paths", seed=0)
    extent = ((0.001, 0.1), (8, 16, 32), 64, 256) if args.quick else (NOISES, STEPS, 1024, 4096)
    found = measure(*extent, args.seed)
    print(report(found))
    write(args.output, "small_noise", found, {"small_noise": draw(found)})


if __name__ == "__main__":
    main()
