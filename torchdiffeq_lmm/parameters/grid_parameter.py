"""A parameter that varies in time, with a value of its own for every step or node of the solver's grid."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .lookups import note

Kind = Literal["step", "linear"]
RegridInterpolation = Literal["linear", "constant"]

_EARLY = 0.01
"""A step is taken to begin by this part of it earlier, or by the rounding of times, for a rounded time to find it."""

_ROUNDINGS = 2
"""So many units of rounding a time may be off."""

_EARLIEST = 0.25
"""No step is taken to begin earlier by more than this part of it, for the middle of a step to find it, too."""


class GridParameter(nn.Module):
    """θ(t) on a grid t_0, ..., t_N: constant over each step, or linear between the nodes.

    A solver whose steps are those of the grid, with ``step_size`` or ``grid_constructor``, then finds at the node t_n
    the n-th value, however the time is rounded; where the dtype of the time does not tell the steps apart, single
    precision for steps of less than a millionth of |t|, a lookup of kind ``"step"`` raises an error. The gradient of a
    multistep method is the one per step that needs a `grad_filter`.

    Called with a 0-d time or a number it returns θ(t), of the shape of one value; with times of any shape, a value for
    each. Before t_0 and after t_N it is what it is there. Where `values` is on the CPU a single value costs the same
    whatever N, also its gradient; elsewhere a time is never read by the host, for the price of a gradient that is added
    up in the size of all values.

    Args:
        values: θ, of shape (N, ...) for ``"step"``, a row for each step, or (N + 1, ...) for ``"linear"``, a row for
            each node; floating or complex. A copy becomes the module's parameter `values`.
        nodes: t_0, ..., t_N, strictly increasing or, for solves backwards in time, decreasing; at least two. They are
            kept in double precision on the CPU, and stored with the module's state; far from zero give them in it.
        kind: ``"step"``, for methods that evaluate func once per step at its beginning, `leapfrog` and `ab1` to `ab5`;
            ``"linear"`` for those that evaluate it at the last node too: implicit ones, predictor–corrector methods,
            ``grad_filter="smooth"``.

    Attributes:
        values: the `torch.nn.Parameter`. `torch.nn.utils.parametrize` cannot take one of this name.
        kind: as given.

    Raises:
        TypeError: `values` is not a floating or complex tensor, or `nodes` no sequence of numbers.
        ValueError: `nodes` are not strictly monotone and finite, `kind` is unknown, or `values` has another number of
            rows than it says.
    """

    values: nn.Parameter

    def __init__(self, values: Tensor, nodes: Tensor | Sequence[float], kind: Kind = "step") -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        if not isinstance(values, Tensor) or not (values.is_floating_point() or values.is_complex()):
            got = f"dtype {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a floating or complex tensor, got {got}")
        self.kind = kind
        self._set_nodes(_checked_nodes("nodes", nodes))
        rows = len(self._nodes) - (kind == "step")
        if values.ndim == 0 or len(values) != rows:
            raise ValueError(
                f"values must have {rows} rows for {len(self._nodes)} nodes and kind {kind!r}, got shape "
                f"{tuple(values.shape)}"
            )
        self.values = nn.Parameter(values.detach().clone())

    def _set_nodes(self, nodes: Tensor) -> None:
        self._nodes = nodes
        self._sign = 1.0 if nodes[-1] > nodes[0] else -1.0
        self._increasing = self._sign * nodes
        self._steps = self._increasing.diff()
        self._lengths = self._steps.tolist()
        begins, sizes = self._increasing[:-1], nodes.abs()
        shorter = torch.minimum(self._steps, torch.cat([self._steps[:1], self._steps[:-1]]))
        self._latest_begins, self._earliest_begins = begins - _EARLY * shorter, begins - _EARLIEST * shorter
        self._largest = float(sizes.max())
        self._finest = float((self._steps / torch.maximum(sizes[:-1], sizes[1:])).min())
        self._begins: dict[torch.dtype, list[float]] = {}
        self._cut: tuple[tuple[Tensor, int, int], tuple[Tensor, ...]] | None = None

    def _begins_for(self, dtype: torch.dtype) -> Tensor:
        """Where the steps begin for times of a dtype, in double precision, on the CPU."""
        if self.kind == "linear":
            return self._increasing[:-1]
        rounding = _ROUNDINGS * torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
        if rounding > _EARLIEST * self._finest:
            raise ValueError(
                f"t must be of a dtype that tells the steps apart, which are as short as {self._finest:.2g} |t|, got "
                f"{dtype}"
            )
        begins = self._increasing[:-1] - rounding * self._largest
        return begins.minimum(self._latest_begins).maximum(self._earliest_begins)

    @property
    def nodes(self) -> Tensor:
        """t_0, ..., t_N, of shape (N + 1,), float64, on the CPU."""
        return self._nodes.clone()

    @property
    def widths(self) -> Tensor:
        """How much of the time each row stands for, float64, on the CPU: its step; half of the steps around its node.

        The gradient with respect to a row, divided by its width, is the density of the gradient in function space.
        """
        steps = self._nodes.diff().abs()
        if self.kind == "step":
            return steps
        zero = steps.new_zeros(1)
        return (torch.cat([steps, zero]) + torch.cat([zero, steps])) / 2

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The rows of `values`, each a tensor of its own, cut from it once for all solves until it changes.

        List them as ``adjoint_params``, in place of `values`, for a func that is not a module.

        Raises:
            ValueError: `values` was made in inference mode, and has a gradient to be recorded.
        """
        values = self.values
        if not (torch.is_grad_enabled() and values.requires_grad):
            return values.detach().unbind()
        if values.is_inference():
            # Its rows would have no graph.
            raise ValueError(
                f"values must not have been made in inference mode where gradients are recorded, got a GridParameter "
                f"of shape {tuple(values.shape)} that was; make it outside, or call it under torch.no_grad()"
            )
        try:
            made_from = values, values._version, values.data_ptr()
        except RuntimeError:
            # Within a transform of torch.func there is no memory to speak of.
            return values.unbind()
        if self._cut is None or self._cut[0][0] is not values or self._cut[0][1:] != made_from[1:]:
            self._cut = made_from, values.unbind()
        return self._cut[1]

    def forward(self, t: Tensor | float) -> Tensor:
        """θ(t).

        Args:
            t: a number, or a real tensor of any shape.

        Returns:
            A tensor of shape (*t.shape, *values.shape[1:]), of the dtype and on the device of `values`. Differentiable
            with respect to `values` and, where it is linear, to t.

        Raises:
            TypeError: t is neither a number nor a real tensor.
            ValueError: t is not a number (NaN) though on the CPU, or of a dtype that does not tell the steps apart.
        """
        if isinstance(t, Tensor):
            if t.is_complex():
                raise TypeError(f"t must be a number or a real tensor, got dtype {t.dtype}")
        elif not isinstance(t, int | float):
            raise TypeError(f"t must be a number or a real tensor, got {t!r}")
        is_single = not isinstance(t, Tensor) or t.ndim == 0
        is_traced = torch.compiler.is_compiling()
        if not is_traced:
            note(self)
        if not is_single or self.values.device.type != "cpu" or is_traced:
            return self._at_all(t)
        time = self._sign * float(t.detach() if isinstance(t, Tensor) else t)
        _check_is_number(time != time)
        begins = self._begins_of(t.dtype if isinstance(t, Tensor) else torch.float64)
        m = min(max(bisect_right(begins, time) - 1, 0), len(begins) - 1)
        if self.kind == "step":
            return self._row(m)
        if isinstance(t, Tensor) and t.requires_grad:
            return self._between(self._row(m), self._row(m + 1), self._fraction(t, begins[m], self._lengths[m]))
        fraction = min(max((time - begins[m]) / self._lengths[m], 0.0), 1.0)
        if fraction in (0.0, 1.0):
            return self._row(m + int(fraction))
        return torch.lerp(self._row(m), self._row(m + 1), fraction)

    def _begins_of(self, dtype: torch.dtype) -> list[float]:
        found = self._begins.get(dtype)
        if found is None:
            found = self._begins[dtype] = self._begins_for(dtype).tolist()
        return found

    def _at_all(self, t: Tensor | float) -> Tensor:
        device = self.values.device
        if not isinstance(t, Tensor):
            _check_is_number(t != t)
            # Filled in on the device, where to copy a number would have the host wait.
            t = torch.full((), t, dtype=torch.float64, device=device)
        elif t.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_is_number(_has_nan(t))
        begins = self._begins_for(t.dtype).to(device, non_blocking=True)
        t = t.to(device, non_blocking=True)
        m = torch.searchsorted(begins, self._sign * t.detach().double(), right=True).sub(1).clamp(0, len(begins) - 1)
        if self.kind == "step":
            return self._rows_at(m)
        lengths = self._steps.to(device, non_blocking=True)
        fraction = self._fraction(t, begins.take(m), lengths.take(m))
        fraction = fraction.reshape(*t.shape, *[1] * (self.values.ndim - 1))
        return self._between(self._rows_at(m), self._rows_at(m + 1), fraction)

    def _rows_at(self, m: Tensor) -> Tensor:
        # Indexing by a 0-d tensor would have its value read.
        return self.values.index_select(0, m.reshape(-1)).reshape((*m.shape, *self.values.shape[1:]))

    def _fraction(self, t: Tensor, begin: Tensor | float, length: Tensor | float) -> Tensor:
        real = self.values.real if self.values.is_complex() else self.values
        return ((self._sign * t.double() - begin) / length).clamp(0, 1).to(real.dtype)

    def _between(self, a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
        return a + fraction * (b - a)

    def _row(self, n: int) -> Tensor:
        # Without a graph there is nothing to share.
        if torch.is_grad_enabled() and self.values.requires_grad:
            return self.rows[n]
        return self.values.detach()[n]

    @torch.no_grad()
    def regrid(self, nodes: Tensor | Sequence[float], interpolation: RegridInterpolation = "linear") -> "GridParameter":
        """The same θ(t) on another grid, as a new module with a parameter of its own, frozen if this one is.

        Args:
            nodes: of the new grid, from the same t_0 to the same t_N.
            interpolation: ``"linear"``: values at the beginnings of steps, or at nodes, are interpolated linearly,
                after the last beginning constantly: second order for the flow. ``"constant"``, for kind ``"step"``:
                every new step gets the mean of the old steps over it, so that a refined parameter is the same function.

        Raises:
            TypeError, ValueError: `nodes` are not as they must be, `interpolation` is unknown or not for this kind.
        """
        new = _checked_nodes("nodes", nodes)
        tolerance = 1e-6 * float((self._nodes[-1] - self._nodes[0]).abs())
        if not torch.allclose(new[[0, -1]], self._nodes[[0, -1]], rtol=0, atol=tolerance):
            raise ValueError(
                f"nodes must lead from {float(self._nodes[0])} to {float(self._nodes[-1])} as the old ones do, got "
                f"from {float(new[0])} to {float(new[-1])}"
            )
        if interpolation not in get_args(RegridInterpolation):
            raise ValueError(f"interpolation must be one of {get_args(RegridInterpolation)}, got {interpolation!r}")
        if interpolation == "constant" and self.kind == "linear":
            raise ValueError("interpolation must be 'linear' for kind 'linear', got 'constant'")
        old, exact = (
            self._sign * self._nodes,
            self.values.to("cpu", torch.promote_types(self.values.dtype, torch.double)),
        )
        at = self._sign * new
        if interpolation == "constant":
            lengths = old.diff().reshape(-1, *[1] * (exact.ndim - 1))
            integral = torch.cat([torch.zeros_like(exact[:1]), (lengths * exact).cumsum(0)])
            integrals = _interpolated(old, integral, at).diff(dim=0)
            found = integrals / at.diff().reshape(-1, *[1] * (exact.ndim - 1))
        elif self.kind == "step":
            found = _interpolated(old[:-1], exact, at[:-1])
        else:
            found = _interpolated(old, exact, at)
        made = GridParameter(found.to(self.values), new, self.kind)
        return made.requires_grad_(self.values.requires_grad)

    def refine(self, factor: int = 2, interpolation: RegridInterpolation = "linear") -> "GridParameter":
        """Divide every step into `factor` equal ones: see `regrid`."""
        factor = _checked_factor(factor)
        parts = torch.arange(factor, dtype=torch.float64, device="cpu") / factor
        inner = (self._nodes[:-1, None] + self._nodes.diff()[:, None] * parts).reshape(-1)
        return self.regrid(torch.cat([inner, self._nodes[-1:]]), interpolation)

    def coarsen(self, factor: int = 2, interpolation: RegridInterpolation = "linear") -> "GridParameter":
        """Make one step of every `factor`, which must divide their number: see `regrid`."""
        factor = _checked_factor(factor)
        steps = len(self._nodes) - 1
        if steps % factor:
            raise ValueError(f"factor must divide the number of steps, {steps}, got {factor}")
        return self.regrid(self._nodes[::factor], interpolation)

    def extra_repr(self) -> str:
        """What `print` tells."""
        first, last = float(self._nodes[0]), float(self._nodes[-1])
        return (
            f"{tuple(self.values.shape)}, {len(self._nodes) - 1} steps from {first:g} to {last:g}, kind={self.kind!r}"
        )

    def get_extra_state(self) -> Tensor:
        """The nodes, for `state_dict`."""
        return self._nodes

    def set_extra_state(self, state: Tensor) -> None:
        """The nodes, from `load_state_dict`."""
        self._set_nodes(_checked_nodes("nodes", state))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        values = state_dict.get(f"{prefix}values", self.values)
        nodes = state_dict.get(f"{prefix}_extra_state", self._nodes)
        try:
            self._check_state(prefix, values, nodes)
        except (TypeError, ValueError) as error:
            # Nothing is set then, neither the values nor the nodes.
            lists[-1].append(str(error))
            return
        self._cut = None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _check_state(self, prefix: str, values: Tensor, nodes: Tensor) -> None:
        count = len(_checked_nodes(f"{prefix}nodes", nodes))
        shape = tuple(values.shape)
        # A row for each node, or for each step: so a state tells its kind.
        kind = {0: "linear", 1: "step"}.get(count - shape[0]) if shape else None
        if kind is None:
            raise ValueError(f"{prefix}values must have a row for each of {count} nodes or steps, got shape {shape}")
        if kind != self.kind:
            raise ValueError(f"{prefix}kind must be {self.kind!r} as the module's, got a state of kind {kind!r}")
        if shape != tuple(self.values.shape):
            raise ValueError(
                f"size mismatch for {prefix}values: must have shape {tuple(self.values.shape)} as the module's, got "
                f"{shape}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GridParameter":
        # Rows with a graph hold the parameter, which then cannot be swapped for the converted one.
        self._cut = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph cannot be copied.
        return {**self.__dict__, "_cut": None}


def parameters_of(module: nn.Module) -> tuple[Tensor, ...]:
    """The tensors of a module that require a gradient, with the rows of grid parameters in place of their stacks.

    The gradient of one row is as large as the row, that of the stack is as large as the stack.
    """
    grids = {
        id(part.values): part
        for part in module.modules()
        if isinstance(part, GridParameter) and part.values.device.type == "cpu"
    }
    found: list[Tensor] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            found += grids[id(parameter)].rows if id(parameter) in grids else (parameter,)
    return tuple(found)


def _interpolated(at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Linear interpolation in the first dimension, constant beyond both ends."""
    if len(at) == 1:
        return values.expand(len(wanted), *values.shape[1:])
    left = torch.searchsorted(at, wanted, right=True).sub(1).clamp(0, len(at) - 2)
    fraction = ((wanted - at[left]) / (at[left + 1] - at[left])).clamp(0, 1)
    return torch.lerp(values[left], values[left + 1], fraction.reshape(-1, *[1] * (values.ndim - 1)).to(values.dtype))


def _checked_nodes(argument: str, nodes: Tensor | Sequence[float]) -> Tensor:
    try:
        found = torch.as_tensor(nodes, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument} must be a sequence of numbers, got {nodes!r}") from None
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"{argument} must be one-dimensional with at least 2 entries, got shape {tuple(found.shape)}")
    steps = found.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())) or not bool(found.isfinite().all()):
        raise ValueError(f"{argument} must be finite and strictly increasing or decreasing, got {nodes!r}")
    return found


def _check_is_number(is_nan: bool) -> None:
    if is_nan:
        raise ValueError("t must be a number, got NaN")


def _has_nan(t: Tensor) -> bool:
    try:
        return bool(t.isnan().any())
    except RuntimeError:
        # Within vmap no value can be read.
        return False


def _checked_factor(factor: int) -> int:
    if isinstance(factor, bool) or not isinstance(factor, Integral):
        raise TypeError(f"factor must be an int, got {factor!r}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return int(factor)
