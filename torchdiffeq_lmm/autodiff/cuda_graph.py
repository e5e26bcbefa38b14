"""A function of tensors on a GPU as a CUDA graph: all of its kernels are launched at once.

A graph reads and writes the same memory whenever it is replayed. So inputs are copied in and outputs are copied out,
in one launch for each dtype.
"""

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

_WARM_UPS = 2
"""So often the function runs before it is captured, for what is loaded and chosen when kernels first run."""

_KEPT = 8
"""So many graphs of a function, for as many batch sizes, keep their memory."""


class CudaGraphs:
    """A function that is captured once for every shape of its inputs and every stream, then replayed.

    Args:
        run: a function of tensors on one GPU that returns tensors, whose kernels depend on shapes and dtypes alone.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]]) -> None:
        self._run = run
        self._captured: OrderedDict[object, _Captured] = OrderedDict()
        self._lock = Lock()
        self._is_refused = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What the function returns, in memory of its own.

        A function that cannot be captured, for it copies from the CPU say, is run; a UserWarning says so once.
        """
        if self._is_refused or torch.cuda.is_current_stream_capturing():
            return self._run(*inputs)
        stream = torch.cuda.current_stream(inputs[0].device)
        key = stream.cuda_stream, tuple((given.shape, given.dtype) for given in inputs)
        # Between the copies nobody else may replay it.
        with self._lock:
            if key not in self._captured:
                try:
                    self._captured[key] = _Captured(self._run, inputs)
                except RuntimeError as error:
                    self._is_refused = True
                    warnings.warn(
                        f"compile runs a block without a CUDA graph, for it cannot be captured: "
                        f"{str(error).splitlines()[0]} Without this attempt: Compile(mode='default')",
                        stacklevel=2,
                    )
                    # Where it is not for the graph it fails here, too.
                    return self._run(*inputs)
                if len(self._captured) > _KEPT:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            return self._captured[key].replay(inputs)


class _Captured:
    """A CUDA graph with its memory."""

    def __init__(self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self._inputs = [given.detach().clone(memory_format=torch.contiguous_format) for given in inputs]
        side = torch.cuda.Stream(inputs[0].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = list(run(*self._inputs))
        self._of_inputs, self._of_outputs = _by_dtype(self._inputs), _by_dtype(self._outputs)

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for of_dtype in self._of_inputs:
            torch._foreach_copy_([self._inputs[i] for i in of_dtype], [inputs[i] for i in of_dtype])
        self._graph.replay()
        outputs = [torch.empty_like(output) for output in self._outputs]
        for of_dtype in self._of_outputs:
            torch._foreach_copy_([outputs[i] for i in of_dtype], [self._outputs[i] for i in of_dtype])
        return outputs


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of tensors of one dtype, which are copied at once."""
    found: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        found[tensor.dtype].append(i)
    return list(found.values())
