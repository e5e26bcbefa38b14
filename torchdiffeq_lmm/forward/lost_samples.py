"""Samples that steps of adaptive length go on without: for them no step was short enough."""

import numpy as np
import torch
from torch import Tensor

from .implicit_equation import Flags
from .samples import Samples


class LostSamples:
    """Which samples of one solve are lost.

    Args:
        samples: how the state is made of them.

    Attributes:
        samples: as given.
        flags: for each sample whether it is lost.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.flags: Flags = np.zeros(samples.count, bool)

    def add(self, failed: Flags) -> bool:
        """Lose some samples; False where none of them is new, or no sample would be left."""
        all_lost = self.flags | failed
        if all_lost.all() or (all_lost == self.flags).all():
            return False
        self.flags = all_lost
        return True

    def filled(self, y: Tensor, value: float) -> Tensor:
        """A state with a number in place of all entries of lost samples."""
        if not self.flags.any():
            return y
        gone = torch.from_numpy(self.flags).to(y.device)[:, None]
        return self.samples.join(self.samples.split(y).masked_fill(gone, value))

    def too_large(self, ratios: Tensor) -> Flags:
        """The samples whose errors are larger than the tolerance, by the root mean square of their ratios to it."""
        rows = self.samples.split(ratios).abs().square().mean(1)
        return (~(rows <= 1)).cpu().numpy()
