"""Memory of tensors, to the byte."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Inside this context, count the bytes of every storage that an operation makes, until that storage is gone.

    A storage counts once, however many views there are, and as long as anything keeps it: a variable, autograd's graph,
    a context of a custom function. What was there before (parameters, the initial state) does not count, nor do buffers
    that live within one kernel, nor Python's and autograd's own objects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def forget(self, *tensors: torch.Tensor) -> None:
        """Do not count the storages of these, which were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # Most operations return one tensor; the search through anything else is slow.
        for leaf in (made,) if isinstance(made, torch.Tensor) else tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.alive -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)
