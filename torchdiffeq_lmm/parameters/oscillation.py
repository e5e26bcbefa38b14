"""Is a gradient oscillating over the steps? A diagnostic for finished gradients."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .alternation import coherence, largest_local, sums_and_entry, without_empty_ends
from .grid_parameter import GridParameter

Stack = Tensor | Sequence[Tensor]

_ALTERNATES = 0.03
"""The local index above which a gradient is not smooth; and the index above which it oscillates, if it is coherent."""

_ROUGH = 0.1
"""The index above which a gradient that is neither smooth nor coherent is called rough."""

_COHERENT = 0.65
"""The coherence above which what alternates is called a zigzag."""

_TELLING = 30
"""Of white noise of fewer numbers, N - 2 over their concentration, a tenth and more passes for a zigzag."""


@dataclass(frozen=True)
class Oscillation:
    """How much of a gradient alternates from step to step; `verdict` says it in words.

    With G_n the gradient of the n-th row divided by its width, s_n = ¼ (G_{n-1} + 2 G_n + G_{n+1}) is what varies
    slowly in it and d_n = ¼ (-G_{n-1} + 2 G_n - G_{n+1}) what alternates; for smooth G the latter is -¼ h² G''.

    Attributes:
        index: Σ |d_n|² / (Σ |s_n|² + Σ |d_n|²), over all entries and inner rows: 0 where nothing alternates, 1 where
            nothing else is there. About ½ through leapfrog without a filter, and for white noise.
        local: the largest such index of three inner rows on end, of which only what changes its sign from each to the
            next counts, or of the two at an end. A jump, as at an observation, does not count, for it alternates
            between two rows alone; nor does the first or the last row by itself, for it may own half a step, a whole
            one, or none. The index itself where there are fewer than 6 rows.
        row: where that is, if it stands out: by 10 times what a row has in the median, or 20 times where a single entry
            alternates. Else None.
        coherence: how far d_n changes its sign from each row to the next in every entry: Σ -d_n · d_{n+1} /
            Σ |d_n| |d_{n+1}|, on a scale from 0 for white noise, or less, to 1 for a zigzag. Where a single entry
            alternates, of which also noise often changes the sign, it is Σ d_n · d_{n+2} / Σ |d_n| |d_{n+2}| instead.
        certain: False where what alternates may as well be rough: where it stands out near a row, but a random walk of
            a few entries may so, too; and where it alternates everywhere, in so few numbers that white noise may so.
        entry: the entry of a row that alternates most.
        density: G_n of that entry, of shape (N,), float64 or complex128, without a graph, on the CPU.
        smooth: its s_n at the inner rows, of shape (N - 2,).
    """

    index: float
    local: float
    row: int | None
    coherence: float
    certain: bool
    entry: tuple[int, ...]
    density: Tensor
    smooth: Tensor

    @property
    def oscillates(self) -> bool:
        """Whether it alternates, or may, everywhere or near a row, or is not a number; False where it is rough."""
        return self.verdict.startswith(("oscillates", "not finite"))

    @property
    def verdict(self) -> str:
        """What it is, in words.

        ``"smooth"`` where the local index is at most 0.03. Else ``"oscillates near row 97"`` where its rows stand out,
        as in the layers of Adams and BDF methods, at both ends and before observations; the row is that of the largest.
        Else ``"oscillates"`` where the index is above 0.03 and the coherence above 0.65. Else ``"rough: random rather
        than alternating"`` where the index is above 0.1, and else ``"smooth"``, too. ``"not finite"`` where there are
        infinities or NaN.

        Where it is not `certain`, for chance can look the same in a few numbers, the verdict is ``"oscillates near row
        97, or is rough there"``, or ``"oscillates, or is rough"``. Which it is, a `grad_filter` tells: it removes an
        oscillation and leaves a random gradient as it is.
        """
        if not math.isfinite(self.index):
            return "not finite"
        if not self.local > _ALTERNATES:
            return "smooth"
        if self.row is not None:
            return f"oscillates near row {self.row}" + ("" if self.certain else ", or is rough there")
        if self.index > _ALTERNATES and self.coherence > _COHERENT:
            return "oscillates" + ("" if self.certain else ", or is rough")
        return "rough: random rather than alternating" if self.index > _ROUGH else "smooth"


class OscillationReport(Mapping[str, Oscillation]):
    """What `oscillation` has found, by the name of the parameter; `print` it."""

    def __init__(self, found: Mapping[str, Oscillation]) -> None:
        self._found = dict(found)

    def __getitem__(self, name: str) -> Oscillation:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def index(self) -> float:
        """The largest index of all, for a training log."""
        return max((of.index for of in self.values()), key=lambda index: (index != index, index))

    @property
    def oscillates(self) -> bool:
        """Whether any of them oscillates."""
        return any(of.oscillates for of in self.values())

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{'parameter':<{max(width, 9)}}  rows  index  local"]
        for name, of in self.items():
            lines.append(
                f"{name:<{max(width, 9)}}  {len(of.density):>4}  {of.index:5.3f}  {of.local:5.3f}  {of.verdict}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw, for every parameter, the entry that alternates most over the rows, and what is smooth in it.

        Of complex ones the real part is drawn with solid, the imaginary part with dashed lines.

        Args:
            path: where to write the picture; None to write none.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib, which is not installed; pip install matplotlib") from error
        figure = Figure(figsize=(6, 2.4 * len(self)), layout="constrained")
        for axes, (name, of) in zip(figure.subplots(len(self), squeeze=False)[:, 0], self.items(), strict=True):
            inner = range(1, len(of.density) - 1)
            for part, density, smooth in _real_parts(of):
                line = "--" if part else "-"
                axes.plot(density, f".{line}", lw=0.8, ms=4, color="#D55E00", label=f"gradient / width{part}")
                axes.plot(inner, smooth, line, color="#0072B2", label=f"its smooth part{part}")
            axes.set(xlabel="row", title=f"{name}, entry {list(of.entry)}: index {of.index:.3f}, {of.verdict}")
            axes.legend(frameon=False, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure


def _real_parts(of: Oscillation) -> list[tuple[str, Tensor, Tensor]]:
    if not of.density.is_complex():
        return [("", of.density, of.smooth)]
    return [(", real", of.density.real, of.smooth.real), (", imaginary", of.density.imag, of.smooth.imag)]


def oscillation(
    parameters: nn.Module | Stack | Mapping[str, Stack], widths: Tensor | Sequence[float] | None = None
) -> OscillationReport:
    """Tell whether the gradients of per-step parameters oscillate over the steps.

    Call it after ``backward()``, in a training loop too. It reads every gradient a few times, whatever the batch: on
    one core, beside a training step through tanh(x W_n) with 50 matrices W_n of 256 × 256, it takes 7 % of the time for
    a batch of 512 and 30 % for one of 64; there call it every tenth step.

    It looks at finished gradients only. A gradient may be rough for another reason, as where weights of their own per
    step are freshly drawn at random. Where that is random it says so, and counts it as no oscillation; a zigzag twice
    as large is seen beside it. In a few numbers chance can look like either; then it says that it may be rough. Whether
    it is the solver, a `grad_filter` tells: with it both indices fall.

    A first or last row that is off by itself is no oscillation, and is not seen: through ab2, abm2 to abm4, bdf2 and
    am2 to am4, as through Runge–Kutta methods, little else is off. A `GridParameter` that is linear between nodes has
    half a step at either end, as trapezoid weights give it; a filter with step weights gives it a whole one there,
    which on coarse grids shows in the index, but not in the local one.

    Args:
        parameters: whose gradients. Of a module: those of every `GridParameter` in it, and of parameters that are equal
            in name but for a number which counts from one to the next, and equal in shape, as
            ``layers.0.weight, layers.1.weight, ...``, where there are at least 3; frozen ones, and those without a
            dense gradient, are left out. Else one stack, or stacks by name: a tensor whose leading dimension counts the
            steps, or a sequence of tensors of one shape. A tensor that requires a gradient stands for its ``grad``, one
            that is not a parameter for itself.
        widths: the lengths of the steps, of shape (N,), by which gradients are divided where they are unequal. Those of
            a `GridParameter` are known.

    Returns:
        The index of each, and what it takes to draw it.

    Raises:
        TypeError: `parameters` or `widths` are none of these.
        ValueError: a module has no parameter per step that is left; or what is given has a frozen parameter, no dense
            gradient, fewer than 3 rows, rows of different shapes; or `widths` are not positive, or another number.

    Source: the filter (¼, ½, ¼) of Xu, Chen, Li, Wright (arXiv 2306.02192) and its complement.
    """
    given = None if widths is None else _checked_widths(widths)
    return OscillationReport({name: _measured(name, stack, given) for name, stack in _stacks(parameters).items()})


class _Gradient(NamedTuple):
    rows: Tensor | list[Tensor]
    widths: Tensor | None = None


def _checked_widths(widths: Tensor | Sequence[float]) -> Tensor:
    try:
        found = torch.as_tensor(widths, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"widths must be a sequence of numbers, got {widths!r}") from None
    if not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(f"widths must be positive and finite, got {widths!r}")
    return found


def _stacks(parameters: object) -> dict[str, _Gradient]:
    if isinstance(parameters, nn.Module):
        return _per_step(parameters)
    if isinstance(parameters, Mapping) and parameters:
        for name, stack in parameters.items():
            if not _is_stack(stack):
                raise TypeError(
                    f"parameters[{name!r}] must be a tensor or a sequence of tensors, got {stack!r}; a module is given "
                    "as it is, not in a mapping"
                )
        return {name: _given(name, stack) for name, stack in parameters.items()}
    if _is_stack(parameters):
        return {"parameters": _given("parameters", parameters)}
    raise TypeError(
        f"parameters must be a module, a tensor, a sequence of tensors or a mapping from names to these, got "
        f"{parameters!r}"
    )


def _is_stack(stack: object) -> TypeGuard[Stack]:
    if isinstance(stack, Sequence):
        return len(stack) > 0 and all(isinstance(part, Tensor) for part in stack)
    return isinstance(stack, Tensor)


def _per_step(module: nn.Module) -> dict[str, _Gradient]:
    """The gradients of the parameters per step of a module, by name."""
    found: dict[str, _Gradient] = {}
    left_out: list[str] = []
    taken: set[int] = set()
    for name, part in module.named_modules():
        if isinstance(part, GridParameter):
            taken.add(id(part.values))
            gradient = part.values.grad
            if part.values.requires_grad and _is_dense(gradient) and len(part.values) >= 3:
                found[name or "values"] = _Gradient(gradient.detach(), part.widths)
            else:
                left_out.append(name or "values")
    groups: dict[tuple[str, str, torch.Size], dict[int, Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            for number in re.finditer(r"(?<![^.])\d+(?![^.])", name):
                before, after = name[: number.start()], name[number.end() :]
                groups.setdefault((before, after, parameter.shape), {})[int(number.group())] = parameter
    # The largest first: of two numbers in a name the one that takes more values counts the steps.
    for (before, after, _), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        numbers = sorted(group)
        consecutive = all(b - a == 1 for a, b in pairwise(numbers))
        if len(group) >= 3 and consecutive and not taken & {id(part) for part in group.values()}:
            taken |= {id(part) for part in group.values()}
            gradients = [group[number].grad for number in numbers]
            present = [part for part in gradients if part is not None]
            if present and all(map(_is_dense, present)):
                found[f"{before}*{after}"] = _Gradient(_filled(gradients))
            else:
                left_out.append(f"{before}*{after}")
    if not found and left_out:
        raise ValueError(
            f"parameters must have a gradient, got none that is dense and has at least 3 rows: {', '.join(left_out)}; "
            "call backward() before"
        )
    if not found:
        raise ValueError(
            "parameters must have parameters per step, got a module with neither a GridParameter nor at least 3 "
            "parameters that require a gradient and are equal in shape, and in name but for a number; give stacks of "
            "them by name"
        )
    return found


def _given(name: str, stack: Stack) -> _Gradient:
    """The gradient of a stack that was given as such."""
    gradients = []
    for part in [stack] if isinstance(stack, Tensor) else stack:
        if isinstance(part, nn.Parameter) and not part.requires_grad:
            raise ValueError(f"parameters[{name!r}] must require a gradient, got a frozen parameter")
        gradients.append(part.grad if part.requires_grad else part)
    present = [part for part in gradients if part is not None]
    if not present:
        raise ValueError(f"parameters[{name!r}] must have a gradient, got none; call backward() before")
    if not all(map(_is_dense, present)):
        raise ValueError(f"parameters[{name!r}] must have a dense gradient, got a sparse one")
    if len({part.shape for part in present}) > 1:
        raise ValueError(f"parameters[{name!r}] must be tensors of one shape, got {[tuple(p.shape) for p in present]}")
    rows = present[0].detach() if isinstance(stack, Tensor) else _filled(gradients)
    shape = rows.shape if isinstance(rows, Tensor) else (len(rows), *rows[0].shape)
    if not shape or shape[0] < 3:
        raise ValueError(f"parameters[{name!r}] must have at least 3 rows, got shape {tuple(shape)}")
    return _Gradient(rows)


def _is_dense(gradient: Tensor | None) -> TypeGuard[Tensor]:
    return gradient is not None and gradient.layout is torch.strided


def _filled(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """With zeros for rows that the loss does not depend on."""
    zero = next(torch.zeros_like(part) for part in gradients if part is not None)
    return [zero if part is None else part.detach() for part in gradients]


def _measured(name: str, stack: _Gradient, widths: Tensor | None) -> Oscillation:
    gradient = stack.rows if isinstance(stack.rows, Tensor) else torch.stack(stack.rows)
    if gradient.dtype is torch.bool:
        raise TypeError(f"parameters[{name!r}] must hold real or complex numbers, got dtype torch.bool")
    count = len(gradient)
    widths = stack.widths if widths is None else widths
    widths = torch.ones(count, dtype=torch.float64, device="cpu") if widths is None else widths
    if widths.shape != (count,):
        raise ValueError(f"widths must have shape ({count},) for {name!r}, got {tuple(widths.shape)}")
    if gradient.numel() == 0:
        nothing = torch.zeros(count, dtype=torch.float64, device="cpu")
        return Oscillation(0.0, 0.0, None, 0.0, True, (), nothing, nothing[1:-1])
    rows = gradient.reshape(count, -1)
    sums, entry = sums_and_entry(rows, widths)
    alternating, slow = float(sums.alternating.sum()), float(sums.slow.sum())
    index = alternating / (alternating + slow) if alternating + slow != 0 else 0.0
    begin, sums = without_empty_ends(sums)
    local, place, certain = largest_local(sums) or (index, None, False)
    row = None if place is None else begin + place
    if row is None:
        certain = len(sums.slow) >= _TELLING * sums.concentration
    density = rows[:, entry].cpu()
    density = density.to(torch.promote_types(density.dtype, torch.float64)) / widths
    smooth = (density[:-2] + 2 * density[1:-1] + density[2:]) / 4
    of_entry = tuple(int(i) for i in torch.unravel_index(torch.tensor(entry, device="cpu"), gradient.shape[1:]))
    return Oscillation(index, local, row, coherence(sums, density), certain, of_entry, density, smooth)
