"""A network with weights that vary over its depth: trained at one number of steps, is it a flow or tied to that number?

Handwritten digits (scikit-learn's bundled set) are classified by x' = tanh(W(t) x + b(t)), with weights of its own for
every step, and a linear layer. Each network is trained with N steps and then run with N/2, 2N and 8N, its weights
interpolated linearly over depth. What was trained through leapfrog by auto-differentiation loses accuracy there; what
was trained with a filter does not.

    python examples/digits.py
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchdiffeq
from harness import COLORS, arguments, table, write
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_lmm import GridParameter, odeint, oscillation

DEPTH = 4.0
WIDTH = 64
BATCH = 128
RATE = 2e-3


class Scheme(NamedTuple):
    """How the network is solved and trained.

    Attributes:
        solve: ``odeint`` but for the filter.
        options: given to it besides ``func, y0, t`` and the step.
        kind: of the weights as a `GridParameter`.
        steps: N here for N in the table.
        depths: if any, every batch is solved with one of so many steps, in units of N, drawn at random, with the
            weights interpolated.
        alone: whether digits are solved one at a time with fewer steps than in the training, where an implicit method
            may fail: else one of them fails for all.
        seeds: how many networks of it are trained.
    """

    solve: Callable[..., Tensor]
    options: dict
    kind: str = "step"
    steps: Callable[[int], int] = lambda n: n
    depths: tuple[float, ...] = ()
    alone: bool = False
    seeds: int = 5


RANDOM = (0.75, 1.0, 1.25, 1.5)
BDF2 = {"method": "bdf2", "rtol": 1e-3, "atol": 1e-3}

SCHEMES = {
    "leapfrog, auto-differentiation": Scheme(odeint, {"method": "leapfrog"}),
    "leapfrog, filtered": Scheme(odeint, {"method": "leapfrog", "grad_filter": "leapfrog"}),
    "leapfrog, smooth": Scheme(odeint, {"method": "leapfrog", "grad_filter": "smooth"}, "linear"),
    "ab2, auto-differentiation": Scheme(odeint, {"method": "ab2"}),
    "ab2, filtered": Scheme(odeint, {"method": "ab2", "grad_filter": "auto"}),
    "bdf2, auto-differentiation": Scheme(odeint, BDF2, "linear", alone=True, seeds=3),
    "bdf2, filtered": Scheme(odeint, {**BDF2, "grad_filter": "auto"}, "linear", alone=True, seeds=3),
    "leapfrog, random depth, auto-differentiation": Scheme(odeint, {"method": "leapfrog"}, "linear", depths=RANDOM),
    "leapfrog, random depth, filtered": Scheme(
        odeint, {"method": "leapfrog", "grad_filter": "leapfrog"}, "linear", depths=RANDOM
    ),
    "midpoint, 2N evaluations": Scheme(torchdiffeq.odeint, {"method": "midpoint"}),
    "midpoint, N evaluations": Scheme(torchdiffeq.odeint, {"method": "midpoint"}, steps=lambda n: n // 2),
    "residual network": Scheme(torchdiffeq.odeint, {"method": "euler"}),
}
QUICK_SCHEMES = tuple(SCHEMES)[:2]


class Network(nn.Module):
    """The classifier, on a grid of equal steps.

    Args:
        scheme: how it is solved.
        steps: how many steps.
        independent: whether the weights of every step are drawn by themselves; else they are the same at first.
    """

    def __init__(self, scheme: Scheme, steps: int, independent: bool) -> None:
        super().__init__()
        self.scheme = scheme
        nodes = torch.linspace(0, DEPTH, steps + 1, dtype=torch.float64)
        rows = steps + (scheme.kind == "linear")
        drawn = torch.randn(rows if independent else 1, WIDTH, WIDTH) / WIDTH**0.5 / 2
        self.weight = GridParameter(drawn.expand(rows, WIDTH, WIDTH), nodes, scheme.kind)
        self.bias = GridParameter(torch.zeros(rows, WIDTH), nodes, scheme.kind)
        self.read = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor, steps: int | None = None) -> Tensor:
        """From pixels, of shape (B, 64), to logits, of shape (B, 10); in so many steps, if given, else in its own."""
        weight, bias = self.weight, self.bias
        own = len(weight.nodes) - 1
        if steps is not None and steps != own:
            weight, bias = resampled(weight, steps), resampled(bias, steps)

        def field(t: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(torch.addmm(bias(t), x, weight(t).T))

        options = {"step_size": DEPTH / (steps or own)}
        ends = torch.tensor([0.0, DEPTH])
        x = self.scheme.solve(field, pixels, ends, options=options, **self.scheme.options)
        return self.read(x[-1])

    def with_steps(self, steps: int) -> "Network":
        """The same network with another number of steps, its weights interpolated over depth."""
        nodes = torch.linspace(0, DEPTH, steps + 1, dtype=torch.float64)
        other = Network(self.scheme, steps, independent=False)
        other.weight, other.bias, other.read = self.weight.regrid(nodes), self.bias.regrid(nodes), self.read
        return other

    def roughness(self) -> float:
        """The root mean square change of the weights from step to step, relative to their own."""
        weight = self.weight.values.detach()
        return float(weight.diff(dim=0).square().mean().sqrt() / weight.square().mean().sqrt())


def resampled(parameter: GridParameter, steps: int) -> Callable[[Tensor], Tensor]:
    """The values of a parameter at the nodes of another grid, from which gradients lead back to its own."""
    rows = parameter(torch.linspace(0, DEPTH, steps + 1, dtype=torch.float64)).unbind()
    return lambda t: rows[round(float(t) * steps / DEPTH)]


class Data(NamedTuple):
    """Pixels from 0 to 1, of shape (n, 64), and digits, of shape (n,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def data() -> Data:
    """A third of the digits is for the test, always the same."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=1 / 3, random_state=0, stratify=digits)
    x, x_test, y, y_test = (torch.tensor(part) for part in split)
    return Data((x.float(), y), (x_test.float(), y_test))


class Score(NamedTuple):
    """Which part of the digits is recognised, and which, through an implicit method, was not solved and is so wrong."""

    accuracy: float
    unsolved: float


def recognised(network: Network, pixels: Tensor, digits: Tensor) -> int | None:
    """How many digits are recognised; None if an implicit equation was not solved."""
    try:
        with torch.no_grad():
            return int((network(pixels).argmax(1) == digits).sum())
    except RuntimeError as error:
        if "was not solved" not in str(error):
            raise
        return None


def score(network: Network, pixels: Tensor, digits: Tensor, at_once: int) -> Score:
    """Test a network, on so many digits at once."""
    parts = list(zip(pixels.split(at_once), digits.split(at_once), strict=True))
    right = [recognised(network, *part) for part in parts]
    unsolved = sum(len(part[1]) for part, count in zip(parts, right, strict=True) if count is None)
    return Score(sum(count or 0 for count in right) / len(digits), unsolved / len(digits))


def train(scheme: Scheme, steps: int, epochs: int, seed: int, independent: bool, digits: Data) -> dict:
    """Train one network; returns what the table needs."""
    torch.manual_seed(seed)
    own = scheme.steps(steps)
    network = Network(scheme, own, independent)
    trainer = torch.optim.Adam(network.parameters(), lr=RATE)
    pixels, labels = digits.train
    indices, losses = [], []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(pixels)).split(BATCH):
            trainer.zero_grad()
            depth = None
            if scheme.depths:
                depth = round(own * scheme.depths[int(torch.randint(len(scheme.depths), ()))])
            loss = nn.functional.cross_entropy(network(pixels[batch], depth), labels[batch])
            loss.backward()
            trainer.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(pixels))
        indices.append(oscillation(network)["weight"].index)
    scores = {}
    for name, depth in {"N": own, "N/2": own // 2, "2N": 2 * own, "8N": 8 * own}.items():
        at_once = 1 if scheme.alone and depth < own else len(digits.test[0])
        scores[name] = score(network.with_steps(depth), *digits.test, at_once)
    return {
        "loss": losses,
        "index": indices,
        "roughness": network.roughness(),
        "accuracy": {name: found.accuracy for name, found in scores.items()},
        "unsolved": {name: found.unsolved for name, found in scores.items()},
        "weight": network.weight.values.detach()[:, 0, :3].tolist(),
    }


def report(steps: int, found: dict[str, list[dict]]) -> str:
    """Means over the seeds, with the standard deviation."""
    header = ("trained with", "loss", "at N", "at N/2", "at 2N", "at 8N", "roughness", "oscillation index", "seeds")
    rows, notes = [], []
    for name, runs in found.items():
        cells = []
        for depth in ("N", "N/2", "2N", "8N"):
            values = [run["accuracy"][depth] for run in runs]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        loss = np.mean([run["loss"][-1] for run in runs])
        rough, index = (np.mean([run["roughness"] for run in runs]), np.mean([run["index"][-1] for run in runs]))
        rows.append((name, f"{loss:.1e}", *cells, f"{rough:.2f}", f"{index:.2f}", len(runs)))
        unsolved = {depth: np.mean([run["unsolved"][depth] for run in runs]) for depth in runs[0]["unsolved"]}
        notes += [f"{name}, at {depth}: {part:.1%} not solved" for depth, part in unsolved.items() if part]
    return "\n\n".join([f"N = {steps}, test accuracy", table(header, rows), *notes, ""])


def draw(found: dict[int, dict[str, list[dict]]]) -> Figure:
    """Left some weights over depth, for most steps; right the accuracy against the number of steps, for fewest."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    over_depth, by_depth = figure.subplots(1, 2)
    colors = {f"leapfrog, {name}": COLORS[name] for name in ("auto-differentiation", "filtered", "smooth")}
    colors |= {"midpoint, 2N evaluations": COLORS["midpoint"], "residual network": "#777777"}
    colors |= {"leapfrog, random depth, auto-differentiation": "#E69F00", "bdf2, filtered": "#56B4E9"}
    steps = max(found)
    for name in QUICK_SCHEMES:
        weights = np.array(found[steps][name][0]["weight"])
        times = np.arange(len(weights)) * DEPTH / steps
        lines = over_depth.plot(times, weights, ".-", lw=1, ms=4, color=colors[name])
        lines[0].set_label(name)
    over_depth.set(xlabel="depth", ylabel="three weights of the first unit", title=f"Weights over depth, {steps} steps")
    over_depth.legend(frameon=False, fontsize=8)
    steps = min(found)
    ratios = {"N/2": 0.5, "N": 1, "2N": 2, "8N": 8}
    for i, name in enumerate(name for name in colors if name in found[steps]):
        values = np.array([[run["accuracy"][depth] for depth in ratios] for run in found[steps][name]])
        # Side by side, for most of them agree.
        places = np.array(list(ratios.values())) * 1.04 ** (i - 3)
        by_depth.errorbar(
            places, values.mean(0), values.std(0), marker="o", ms=4, lw=1, capsize=2, label=name, color=colors[name]
        )
    by_depth.set_xscale("log", base=2)
    by_depth.set_xticks(list(ratios.values()), list(ratios))
    by_depth.set(xlabel="steps in the test", ylabel="test accuracy", title=f"Trained with N = {steps} steps")
    by_depth.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (over_depth, by_depth):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    args = arguments(__doc__, "two ways of training, one seed, few epochs", seed=0)
    schemes = QUICK_SCHEMES if args.quick else tuple(SCHEMES)
    depths, epochs = ((8,), 12) if args.quick else ((8, 16), 30)
    digits = data()
    settings = [("the same weights at first", False), ("weights drawn for every step", True)][: 1 if args.quick else 2]
    # At the second depth, and with freshly drawn weights for every step, through leapfrog alone.
    cases = [
        (setting, independent, steps, name, seed)
        for setting, independent in settings
        for steps in depths
        if not (independent and steps != depths[0])
        for name in (schemes[:3] if independent or steps != depths[0] else schemes)
        for seed in range(args.seed, args.seed + (1 if args.quick else SCHEMES[name].seeds))
    ]
    found: dict = {}
    for setting, independent, steps, name, seed in tqdm(cases, unit="network"):
        run = train(SCHEMES[name], steps, epochs, seed, independent, digits)
        found.setdefault(setting, {}).setdefault(steps, {}).setdefault(name, []).append(run)
    for setting, by_depth in found.items():
        for steps, runs in by_depth.items():
            print(f"{setting}: {report(steps, runs)}")
    write(args.output, "digits", found, {"digits": draw(found[settings[0][0]])})


if __name__ == "__main__":
    main()
