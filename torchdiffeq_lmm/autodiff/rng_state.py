"""The state of the random generators and of autocast, so that func can be evaluated once more as the first time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch


class RngState(NamedTuple):
    """The state of PyTorch's default random generators, of the CPU and of the device of the solve.

    Attributes:
        cpu: of the CPU.
        device: of the device, if it is another.
    """

    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RngState":
        """What it is."""
        if device.type == "cpu":
            return cls(torch.get_rng_state(), None)
        return cls(torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device))

    def equals(self, other: "RngState") -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.device is None or other.device is None or torch.equal(self.device, other.device)


class ForwardContext:
    """What evaluations of func depend on besides their arguments: autocast, and random numbers where they draw any.

    Args:
        device: of the solve.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
        ]
        self._caches = torch.is_autocast_cache_enabled()

    def restored(self, random: RngState | None = None) -> AbstractContextManager[None]:
        """A context in which autocast is as it was, and the random generators too, where their state is given."""
        autocast = [
            (kind, enabled, dtype)
            for kind, enabled, dtype in self._autocast
            if torch.is_autocast_enabled(kind) != enabled or (enabled and torch.get_autocast_dtype(kind) != dtype)
        ]
        return nullcontext() if random is None and not autocast else self._restored(autocast, random)

    @contextmanager
    def _restored(self, autocast: list[tuple[str, bool, torch.dtype]], random: RngState | None) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._caches))
            if random is not None:
                devices = [] if random.device is None else [self._device]
                kind = "cuda" if random.device is None else self._device.type
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
                torch.set_rng_state(random.cpu)
                if random.device is not None:
                    torch.get_device_module(self._device).set_rng_state(random.device, self._device)
            yield
