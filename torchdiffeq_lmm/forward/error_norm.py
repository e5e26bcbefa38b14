"""The size of a local error in terms of the tolerance, as torchdiffeq measures it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.variable_order import Estimate
from torchdiffeq_lmm.schemes.weighted_sum import weighted_sum

from .lost_samples import LostSamples
from .stepping import History

ROUNDING = 16
"""So many units in the last place of a state are rounding, which no step is short enough for."""

Norm = Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class ErrorNorm:
    """The norm of errors over atol + rtol |y|; over so many units in the last place of y, where that is more.

    It is 0 where the state has no entries.

    Attributes:
        rtol, atol: torchdiffeq's, numbers or tensors that broadcast with the state.
        norm: torchdiffeq's, of the state.
        lost: samples whose errors do not count; None for none.
    """

    rtol: float | Tensor
    atol: float | Tensor
    norm: Norm
    lost: LostSamples | None = None

    def scale(self, *states: Tensor) -> Tensor:
        """The tolerance of each entry."""
        level = states[0].abs()
        for state in states[1:]:
            level = torch.maximum(level, state.abs())
        rounding = ROUNDING * torch.finfo(level.dtype).eps
        if isinstance(self.rtol, Tensor):
            return self.atol + self.rtol.clamp(min=rounding) * level
        return self.atol + max(self.rtol, rounding) * level

    def ratios(self, estimates: Sequence[Estimate | None], history: History) -> list[float | None]:
        """The sizes of some estimates after a step, read by the host at once; None for those that there are none of.

        Args:
            estimates: of the errors.
            history: the past, with the step.
        """
        assert history.previous is not None
        if history.x.numel() == 0:
            return [None if estimate is None else 0.0 for estimate in estimates]
        scale = self.scale(history.previous, history.x)
        sizes = [self.norm(self.relative(estimate, history, scale)) for estimate in estimates if estimate is not None]
        numbers = iter(self._read(sizes))
        return [None if estimate is None else next(numbers) for estimate in estimates]

    def error(self, estimate: Estimate, history: History) -> Tensor:
        """An estimate of the error, entry by entry."""
        terms = [
            *((weight, history.increments[lag]) for lag, weight in estimate.increments),
            *((weight, history.slopes[lag]) for lag, weight in estimate.slopes),
        ]
        return weighted_sum([weight for weight, _ in terms], [tensor for _, tensor in terms])

    def relative(self, estimate: Estimate, history: History, scale: Tensor) -> Tensor:
        """The same in terms of a scale; 0 for lost samples."""
        return self._counted(self.error(estimate, history) / scale)

    def size(self, y: Tensor, scale: Tensor) -> float:
        """The norm of something in terms of a scale."""
        return abs(float(self.norm(self._counted(y / scale)))) if y.numel() > 0 else 0.0

    def _counted(self, ratios: Tensor) -> Tensor:
        return ratios if self.lost is None else self.lost.filled(ratios, 0.0)

    @staticmethod
    def _read(sizes: Sequence[Tensor | float]) -> list[float]:
        tensors = [size.detach().double().reshape(()) for size in sizes if isinstance(size, Tensor)]
        if len(tensors) == len(sizes) and len(sizes) > 1:
            return list(torch.stack(tensors).abs().tolist())
        return [abs(float(size)) for size in sizes]
