"""How the backward pass finds the solution again: the ways that users can ask for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

OnDrift = Literal["raise", "checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Keep some states of the forward pass, and run the steps from one to the next again in the backward pass.

    For every method. The gradient is that of auto-differentiation, for one more forward pass; where func draws from
    PyTorch's default random generators, as dropout does, it draws the same numbers again. func must otherwise be
    deterministic: where the steps, run again, end up elsewhere, the backward pass raises a RuntimeError. It must not
    keep what it computes from parameters, for the forward pass is without a graph.

    Args:
        count: how many states are kept. By default √N for N steps, which makes the memory least: that of √N states and
            of √N evaluations of func.

    Raises:
        TypeError: `count` is not an int.
        ValueError: `count` is not positive.

    Source: Griewank, *Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation* (1992), with one level.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is None:
            return
        if not isinstance(self.count, int) or isinstance(self.count, bool):
            raise TypeError(f"count must be an int or None, got {self.count!r}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    def stride(self, steps: int) -> int:
        """The number of steps from one kept state to the next."""
        return math.ceil(steps / (self.count or math.ceil(math.sqrt(steps))))


@dataclass(frozen=True)
class Reversible:
    """Run leapfrog backwards: x_{n-1} from x_{n+1} and x_n, with no stored states but for a fixed few.

    The gradient is that of auto-differentiation but for rounding, from memory that does not grow with the number of
    steps. On the way back rounding errors grow as the parasitic mode of leapfrog does on the way forth: on dissipative
    problems exponentially. By how much is measured, in every backward pass: at the start and at a few states on the way
    that are kept, the drift is max |x reached - x known| / |x known| over the entries of the state, those smaller than
    ε^¼ max |x| counting as so large. From there it goes on with what is known.

    func must be deterministic; a func that draws random numbers, as dropout does, is refused. It must not keep what it
    computes from parameters, for the forward pass is without a graph.

    Args:
        tolerance: the largest drift that is accepted. By default √ε, ε being that of the state's dtype: 1.5e-8 for
            float64, 3.5e-4 for float32. The relative error of the gradient is mostly of the size of the drift, or of
            that of auto-differentiation's own, which on dissipative problems is more.
        on_drift: what to do where the drift is larger. ``"raise"``: raise a `DriftError`. ``"checkpoint"``: begin the
            backward pass again with `Checkpoint()`, at the cost of two more forward passes.
        report: is given the drift, the largest on the way, by every backward pass; with `jump_t` by that of every
            piece between jumps.
        anchors: how many states are kept on the way.

    Raises:
        TypeError: `tolerance` is not a real number, `report` cannot be called, or `anchors` is not an int.
        ValueError: `tolerance` or `anchors` is negative, or `on_drift` is unknown.

    Source: Zhuang, Dvornek, Tatikonda, Duncan, *MALI: A memory efficient and reverse accurate integrator for neural
    ODEs* (ICLR 2021), for another reversible method.
    """

    tolerance: float | None = None
    on_drift: OnDrift = "raise"
    report: Callable[[float], object] | None = None
    anchors: int = 8

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            if not isinstance(self.tolerance, Real) or isinstance(self.tolerance, bool):
                raise TypeError(f"tolerance must be a real number or None, got {self.tolerance!r}")
            if not self.tolerance >= 0:
                raise ValueError(f"tolerance must not be negative, got {self.tolerance}")
        if self.on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift must be one of {get_args(OnDrift)}, got {self.on_drift!r}")
        if self.report is not None and not callable(self.report):
            raise TypeError(f"report must be a callable that takes a float, or None, got {self.report!r}")
        if not isinstance(self.anchors, int) or isinstance(self.anchors, bool):
            raise TypeError(f"anchors must be an int, got {self.anchors!r}")
        if self.anchors < 0:
            raise ValueError(f"anchors must not be negative, got {self.anchors}")

    def stride(self, steps: int) -> int:
        """The number of steps from one kept state to the next."""
        return math.ceil(steps / (self.anchors + 1))


BACKWARDS: dict[str, Checkpoint | Reversible | None] = {
    "autograd": None,
    "reversible": Reversible(),
    "checkpoint": Checkpoint(),
}


def resolve_backward(backward: object, method: str, is_reversible: bool) -> Checkpoint | Reversible | None:
    """The way that the user asks for, checked against the method; None for auto-differentiation.

    Args:
        backward: the name of a way, or a way.
        method: the name of the method.
        is_reversible: whether it can be run backwards.

    Raises:
        ValueError: there is no way of that name, or the method cannot be run backwards.
        TypeError: `backward` is something else.
    """
    known = f"backward must be {', '.join(map(repr, BACKWARDS))}, a Checkpoint or a Reversible, got {backward!r}"
    if isinstance(backward, str):
        if backward not in BACKWARDS:
            raise ValueError(known)
        backward = BACKWARDS[backward]
    if backward is not None and not isinstance(backward, Checkpoint | Reversible):
        raise TypeError(known)
    if isinstance(backward, Reversible) and not is_reversible:
        raise ValueError(
            f"backward {backward!r} needs a method that can be run backwards, as 'leapfrog' can, got method "
            f"{method!r}; use backward='checkpoint'"
        )
    return backward
