"""What happened in an adaptive solve."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any


class SolveReport:
    """What happened in an adaptive solve; give one as ``options={"report": ...}``, and `print` it to read it.

    Used again, it tells of the last solve, and of one that raised an error up to there.

    Attributes:
        times: of the nodes, in the unit of t, from t[0] on. After a jump (see `jump_t`) the steps begin anew.
        orders: of every step.
        rejected: how many attempts were not accurate enough.
        unsolved: how many implicit equations were not solved, so that a shorter step was tried.
        evaluations: of func in the forward pass, those for Jacobians included.
        jacobians: how many times a matrix was made for the Jacobian, of all samples or of some. Under autograd one
            evaluation gives f and the Jacobian, without a graph it takes as many as a sample has entries, and one.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        self.times: list[float] = []
        self.orders: list[int] = []
        self.rejected = 0
        self.unsolved = 0
        self.evaluations = 0
        self.jacobians = 0

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.orders)

    @property
    def _lengths(self) -> list[float]:
        return [abs(after - before) for before, after in pairwise(self.times)]

    def accept(self, time: float, order: int) -> None:
        """Note a step of an order that ends at a time."""
        self.times.append(time)
        self.orders.append(order)

    def __str__(self) -> str:
        if not self.orders:
            return "no steps"
        lengths = self._lengths
        counts = ", ".join(f"{count} of order {order}" for order, count in sorted(Counter(self.orders).items()))
        lines = {
            "steps": f"{self.steps} from t = {self.times[0]:.6g} to {self.times[-1]:.6g}: {counts}",
            "lengths": f"from {min(lengths):.3g} to {max(lengths):.3g}",
            "rejected": f"{self.rejected} not accurate enough, {self.unsolved} with an equation that was not solved",
            "evaluations": f"{self.evaluations} of func, {self.evaluations / self.steps:.3g} per step",
            "Jacobians": str(self.jacobians),
        }
        return "\n".join(f"{label + ':':<13}{value}" for label, value in lines.items())

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the lengths and the orders of the steps over time.

        Args:
            path: where to save the picture; None to only return it.

        Returns:
            The figure, of matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there are no steps.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib; install it with: pip install matplotlib") from error
        if not self.orders:
            raise ValueError("plot needs a report of a solve, got one without steps; give it in options of a solve")
        figure = Figure(figsize=(7, 4), layout="constrained")
        lengths_axes, orders_axes = figure.subplots(2, 1, sharex=True)
        ends = self.times[1:]
        lengths_axes.semilogy(ends, self._lengths, ".-", linewidth=0.8)
        lengths_axes.set_ylabel("step")
        orders_axes.step(ends, self.orders, where="pre", linewidth=0.8)
        orders_axes.set_ylabel("order")
        orders_axes.set_xlabel("t")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
