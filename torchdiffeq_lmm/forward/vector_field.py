"""The user's function as the solver sees it: one flat state, one direction of time, every answer checked."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Callback = Callable[[Tensor, Tensor, Tensor], object]
"""Of the user's, called at a step with t, y and dt."""

Side = Literal["left", "right", "neither"]

_DIRECTIONS: dict[Side, int] = {"left": -1, "right": 1, "neither": 0}


def precision_of(dtype: torch.dtype, device: torch.device) -> float:
    """The unit in the last place of what is computed in a dtype on a device, under autocast too."""
    lowered = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
    return max(torch.finfo(lowered).eps, torch.finfo(dtype).eps)


def entry_name(name: str, index: int, shape: Sequence[int]) -> str:
    """What an entry of a flattened tensor is called by its indices."""
    indices = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        indices.append(rest)
    return f"{name}[{', '.join(map(str, reversed(indices)))}]" if indices else name


@dataclass(frozen=True)
class HostedFunction:
    """The user's function and what torchdiffeq's wrappers around it do.

    Attributes:
        call: the user's ``func(t, y)``, in the user's time and with the user's structure of the state.
        reversed: whether the solver's time, always increasing, is the negative of the user's.
        shapes: the shapes of the components where the user's state is a tuple, else None.
        callback_step, callback_accept_step, callback_reject_step: ``callback_step(t, y, dt)`` in the solver's time and
            state, or None where the user has none.
        in_adjoint: whether it is `torchdiffeq.odeint_adjoint` that solves, and will find the gradient by itself.
        is_adjoint: whether `call` is the backward dynamics that odeint_adjoint made, whose components may have
            different dtypes.
        options_reversed: whether times in options that torchdiffeq negates, of which there are tensors alone, are the
            negative of the solver's even so: odeint_adjoint does not negate those of its backward solve where the
            user's time is decreasing.
    """

    call: Callable[[Tensor, Any], Any]
    reversed: bool
    shapes: tuple[torch.Size, ...] | None
    callback_step: Callback | None
    in_adjoint: bool
    is_adjoint: bool
    options_reversed: bool = False
    callback_accept_step: Callback | None = None
    callback_reject_step: Callback | None = None


class VectorField:
    """f(t, x) on the solver's state.

    torchdiffeq hands a solver its user's function in wrappers that flatten a tuple state, turn the time round and
    perturb it. This class does the same, for all nodes at once where it can, and adds the checks.

    Args:
        hosted: the user's function.
        y0: the solver's initial state; every state has its shape, dtype and device.
        perturb: as torchdiffeq's option: evaluate a hair to the right (left) of a node that a step begins (ends) at.
        copies: whether the value is wanted for longer than to the next evaluation. func may return the same memory
            again and again. The first one always may be: a single step of any method uses both of its slopes.

    Attributes:
        time_dtype: the real dtype in which func is given its times.
        is_adjoint: whether f is the backward dynamics of odeint_adjoint, whose components may have several dtypes.
        evaluations: how many times func has been called.
        jacobians: how many matrices have been made for its Jacobian.
    """

    def __init__(self, hosted: HostedFunction, y0: Tensor, perturb: bool, copies: bool = False) -> None:
        self._call: Callable[[Tensor, Any], Any] = hosted.call
        self._reversed = hosted.reversed
        self._shapes = hosted.shapes
        self._offsets = [0, *accumulate(shape.numel() for shape in hosted.shapes or ())][:-1]
        self.is_adjoint = hosted.is_adjoint
        self._perturb = perturb
        self._copies = hosted.shapes is None
        self._goes_on_copying = copies and hosted.shapes is None
        self._shape = y0.shape
        self._device = y0.device
        self.time_dtype = y0.dtype.to_real()
        self.evaluations = 0
        self.jacobians = 0

    def user_times(self, times: Tensor, side: Side = "right") -> Tensor:
        """From the solver's times, of any shape, to what the user's function is given for them.

        That is torchdiffeq's promise: the real dtype and the device of the state, the user's direction of time and,
        with `perturb`, the neighbouring number on the given side, if any. Differentiable.
        """
        return self.beside(times, _DIRECTIONS[side] if self._perturb else 0)

    def beside(self, times: Tensor, directions: int | Sequence[int] = 0) -> Tensor:
        """The same, for the neighbouring numbers on given sides whatever `perturb` is.

        Args:
            times: the solver's.
            directions: 1 for the number after a time, -1 for the one before, 0 for the time itself; of all times, or of
                each.
        """
        times = times.to(self._device, self.time_dtype)
        if directions if isinstance(directions, int) else any(directions):
            with torch.no_grad():
                towards = times.new_tensor(directions)
                # A time as large as 1 / ε does not change by 1.
                nudge = torch.nextafter(times, times + towards * (1 + times.abs())) - times
            times = times + nudge
        return -times if self._reversed else times

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the components of a tuple state, or of the state itself."""
        return (self._shape,) if self._shapes is None else self._shapes

    def count_jacobian(self) -> None:
        """Note that a matrix was made for the Jacobian."""
        self.jacobians += 1

    def count_evaluation(self) -> None:
        """Note that func was evaluated by a compiled function."""
        self.evaluations += 1

    @property
    def part(self) -> slice | None:
        """The entries of the flattened state that f depends on, and the time; None for all of them.

        In the backward dynamics of odeint_adjoint they are y and its adjoint, after the gradient of the time and before
        those of parameters, which are integrals of functions of these.
        """
        if not self.is_adjoint or self._shapes is None:
            return None
        return slice(self._offsets[1], self._offsets[2] + self._shapes[2].numel())

    @property
    def shapes_of_part(self) -> tuple[torch.Size, ...]:
        """As `shapes`, of what f depends on."""
        return self.shapes if self.part is None else self.shapes[1:3]

    @property
    def precision(self) -> float:
        """The unit in the last place of func's values, under autocast too."""
        return precision_of(self.time_dtype, self._device)

    def entry(self, index: int) -> str:
        """What the user calls an entry of the solver's flattened state."""
        if self._shapes is None:
            return entry_name("y", index, self._shape)
        component = bisect_right(self._offsets, index) - 1
        # Components without entries begin where the next one does.
        return entry_name(f"y[{component}]", index - self._offsets[component], self._shapes[component])

    def __call__(self, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate the user's function.

        Args:
            user_time: 0-d, from `user_times`.
            x: the solver's state.

        Returns:
            dx/dt in the solver's time, with the shape, dtype and device of `x`.

        Raises:
            TypeError: func returned something else than a tensor (a tuple of tensors, where the state is a tuple),
                or, outside autocast, another dtype than that of the state.
            ValueError: func returned another number of components, shape or device than the state has.
        """
        self.evaluations += 1
        slope = self.flat_state(self._call(user_time, self.user_state(x)), x, "func")
        if self._reversed:
            return -slope
        copies, self._copies = self._copies, self._goes_on_copying
        return slope.clone() if copies else slope

    @property
    def direction(self) -> int:
        """-1 where the solver's time is the negative of the user's, else 1."""
        return -1 if self._reversed else 1

    def user_state(self, x: Tensor) -> Any:
        """The solver's state in the user's structure."""
        if self._shapes is None:
            return x
        return tuple(
            x.narrow(0, offset, shape.numel()).view(shape)
            for offset, shape in zip(self._offsets, self._shapes, strict=True)
        )

    def flat_state(self, returned: Any, x: Tensor, by: str) -> Tensor:
        """What a function of the user's returned in the user's structure of the state, as the solver's.

        Args:
            returned: it.
            x: a state, whose shape, dtype and device it must have.
            by: what the function is called in messages.

        Raises:
            TypeError, ValueError: it is not as it must be, which is what it must be of func.
        """
        if self._shapes is None:
            return self._checked(returned, x, x.shape, None, by)
        return torch.cat([part.reshape(-1) for part in self._components(returned, x, by)])

    def _components(self, slopes: Any, x: Tensor, by: str) -> tuple[Tensor, ...]:
        assert self._shapes is not None
        try:
            components = tuple(slopes)
        except TypeError:
            raise TypeError(
                f"{by} returned {type(slopes).__name__}; the state y is a tuple, so it must return a tuple of "
                f"{len(self._shapes)} tensors"
            ) from None
        if len(components) != len(self._shapes):
            raise ValueError(
                f"{by} returned {len(components)} components; the state y is a tuple of {len(self._shapes)} tensors"
            )
        return tuple(
            self._checked(component, x, shape, index, by)
            for index, (component, shape) in enumerate(zip(components, self._shapes, strict=True))
        )

    def _checked(self, slope: Any, x: Tensor, shape: torch.Size, index: int | None, by: str) -> Tensor:
        if isinstance(slope, Tensor) and (slope.dtype, slope.device, slope.shape) == (x.dtype, x.device, shape):
            return slope
        returned = f"{by} returned" if index is None else f"{by} returned, as component {index},"
        state = "the state y" if index is None else f"the state y[{index}]"
        if not isinstance(slope, Tensor):
            raise TypeError(
                f"{returned} {type(slope).__name__}; it must return a tensor of shape {tuple(shape)}, like {state}"
            )
        if slope.shape != shape:
            raise ValueError(f"{returned} a tensor of shape {tuple(slope.shape)}; {state} has shape {tuple(shape)}")
        if slope.device != x.device:
            raise ValueError(f"{returned} a tensor on device {slope.device}; {state} is on device {x.device}")
        if not (self.is_adjoint or torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"{returned} a tensor of dtype {slope.dtype}; {state} has dtype {x.dtype}")
        return slope.to(dtype=x.dtype)
