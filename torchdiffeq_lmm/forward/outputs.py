"""What the outputs of a solve are made of: states and slopes at nodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.schemes.weighted_sum import Weight

from .grid import Placement
from .interpolation import Interpolation, cubic_hermite, linear_interpolation, slide


@dataclass(frozen=True)
class Trajectory:
    """The states x_n and the values of f that outputs are made of, by node.

    Attributes:
        states: x_n.
        slopes: f_n of the recurrence.
        end_slopes: f where the recurrence has no value for it: at the last node, with `perturb` from the left of any,
            and at the first node for methods that do not evaluate it there.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    slopes: dict[int, Tensor] = field(default_factory=dict)
    end_slopes: dict[int, Tensor] = field(default_factory=dict)

    def start_slope(self, node: int) -> Tensor:
        """f at the left end of the step that starts at `node`."""
        return self.slopes[node] if node in self.slopes else self.end_slopes[node]

    def end_slope(self, node: int) -> Tensor:
        """f at the right end of the step that ends at `node`."""
        return self.end_slopes[node] if node in self.end_slopes else self.slopes[node]


class Wanted(NamedTuple):
    """The nodes whose states and slopes outputs are made of: see `Trajectory`."""

    states: set[int]
    slopes: set[int]
    end_slopes: set[int]

    def add_neighbours(self, evaluated: Sequence[bool]) -> None:
        """Add what smoothed values of the states need: the node before each, and the slope; see `OutputRule.wanted`."""
        for node in sorted(self.states - {0}):
            self.states.add(node - 1)
            (self.slopes if evaluated[node] else self.end_slopes).add(node)


@dataclass(frozen=True)
class OutputRule:
    """How outputs are made.

    Attributes:
        interp: between nodes.
        left_slopes: whether the slope at the end of a step is another than that at the beginning of the next one, as
            with `perturb`, and the recurrence has the latter.
        has_straight_gradient: whether the gradient of an output between nodes is that of the straight line, whatever
            its value.
    """

    interp: Interpolation
    left_slopes: bool
    has_straight_gradient: bool

    def wanted(self, placements: Sequence[Placement], evaluated: Sequence[bool]) -> Wanted:
        """What outputs need; f at a node is taken from the recurrence where that evaluates it.

        Args:
            placements: of the outputs.
            evaluated: whether the recurrence evaluates f, by node.
        """
        states: set[int] = set()
        slopes: set[int] = set()
        end_slopes: set[int] = set()
        for node, fraction, shift in placements:
            states.add(node)
            if fraction is not None:
                states.add(node + 1)
            is_cubic = fraction is not None and self.interp == "cubic"
            ends = [node + 1] if is_cubic else []
            if shift is not None and node == len(evaluated) - 1:
                ends = [node]
            elif shift is not None or is_cubic:
                (slopes if evaluated[node] else end_slopes).add(node)
            for end in ends:
                (end_slopes if self.left_slopes or not evaluated[end] else slopes).add(end)
        return Wanted(states, slopes, end_slopes)

    def output(self, placement: Placement, steps: Sequence[Weight], trajectory: Trajectory) -> Tensor:
        """The output at a place; `steps` are h."""
        node, fraction, shift = placement
        if fraction is not None:
            return self.inside(node, fraction, steps[node], trajectory)
        if shift is not None:
            # At the last node the slope from the left, of which there may be no other.
            slope = trajectory.end_slope if node == len(steps) else trajectory.start_slope
            return slide(trajectory.states[node], shift, slope(node))
        return trajectory.states[node]

    def inside(self, node: int, fraction: Weight, step: Weight, trajectory: Trajectory) -> Tensor:
        """The state at a fraction of the way over the step after a node."""
        x0, x1 = trajectory.states[node], trajectory.states[node + 1]
        if self.interp == "linear":
            return linear_interpolation(fraction, x0, x1)
        f0, f1 = trajectory.start_slope(node), trajectory.end_slope(node + 1)
        if not self.has_straight_gradient:
            return cubic_hermite(fraction, step, x0, f0, x1, f1)
        # Slopes would start one parity alone; as far as the states are concerned a straight line is exact enough.
        value = cubic_hermite(fraction, step, x0.detach(), f0.detach(), x1.detach(), f1.detach())
        line = linear_interpolation(fraction.detach() if isinstance(fraction, Tensor) else fraction, x0, x1)
        return value + (line - line.detach())
