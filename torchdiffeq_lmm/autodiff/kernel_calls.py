"""A function that Inductor has compiled for the CPU as the calls of its kernels, which can then be made without Python.

Between its kernels such a function does nothing but to allocate memory. So one call of it, with kernels that write down
their arguments, tells what each of them reads and writes: an input, a buffer of its own, or a number.
"""

import ctypes
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Argument(NamedTuple):
    """What a kernel is given.

    Attributes:
        kind: the address of an input, or of a buffer, or a number, or the address of a constant.
        value: which input or buffer; or the number, or the address.
        offset: in bytes, from the address.
    """

    kind: Literal["input", "buffer", "number", "constant"]
    value: int
    offset: int = 0


class Output(NamedTuple):
    """What the function returns.

    Attributes:
        buffer: in which one it lies.
        offset, step: where, and how far it is to the end of the buffer from its beginning, in elements.
        size, stride, dtype: of the tensor.
    """

    buffer: int
    offset: int
    step: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class KernelCalls(NamedTuple):
    """The calls of one function, for inputs of one shape.

    Attributes:
        kernels: the addresses of the kernels, in the order of the calls.
        arguments: those of each.
        buffers: the sizes of the buffers in bytes.
        outputs: what it returns.
        constants: kept, for the arguments are addresses.
    """

    kernels: list[int]
    arguments: list[list[Argument]]
    buffers: list[int]
    outputs: list[Output]
    constants: list[Tensor]


def kernel_calls(call: Callable[..., Any], inputs: Sequence[Tensor]) -> KernelCalls | None:
    """The calls of a function; None where it does more than to call kernels.

    Args:
        call: takes a list of tensors, which it empties, and returns tensors: what Inductor calls `current_callable`.
        inputs: with which it may be called.
    """
    function = getattr(call, "__func__", call)
    if not isinstance(function, FunctionType):
        return None
    copies = [given.detach().clone() for given in inputs]
    pairs = zip(copies, inputs, strict=True)
    if not all(copy.numel() and is_laid_out(copy, given.size(), given.stride()) for copy, given in pairs):
        return None
    recorder = _Recorder(copies)
    known = function.__globals__
    watched: dict[str, Any] = {
        name: recorder.watched(address, value)
        for name, value in known.items()
        if (address := _address_of(value)) is not None
    }
    watched["empty_strided_cpu"] = recorder.allocated
    # With globals of its own, for others may call it meanwhile.
    own = FunctionType(function.__code__, {**known, **watched}, closure=function.__closure__)
    others = _OtherOperations()
    try:
        with others:
            results = own(*(() if function is call else (call.__self__,)), list(copies))  # type: ignore[attr-defined]
    except Exception:
        # Another version of Inductor may write other code. If it is anything else, the function itself raises it.
        return None
    return None if others.found else recorder.calls(results)


def is_laid_out(tensor: Tensor, size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor has a size, and strides wherever they matter."""
    if tuple(tensor.shape) != tuple(size):
        return False
    return all(count == 1 or one == other for count, one, other in zip(size, tensor.stride(), stride, strict=True))


class _Recorder:
    """Writes down what a call does.

    Args:
        inputs: of the call, each with memory of its own.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = {_memory(given): i for i, given in enumerate(inputs)}
        # Each is kept to the end, for then no two are in the same place.
        self._buffers: dict[int, tuple[int, Tensor]] = {}
        self._constants: list[Tensor] = []
        self._kernels: list[int] = []
        self._arguments: list[list[Argument]] = []
        self._is_known = True

    def allocated(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """In place of the function that allocates."""
        buffer = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        self._buffers[_memory(buffer)] = len(self._buffers), buffer
        return buffer

    def watched(self, address: int, kernel: Callable[..., None]) -> Callable[..., None]:
        """In place of a kernel."""

        def call(*given: Any) -> None:
            self._kernels.append(address)
            self._arguments.append([self._argument(value) for value in given])
            kernel(*given)

        return call

    def calls(self, results: Sequence[Tensor]) -> KernelCalls | None:
        """What has been written down; None where it is not all that there is to know."""
        outputs = []
        for result in results:
            if not isinstance(result, Tensor) or _memory(result) not in self._buffers:
                return None
            number, _ = self._buffers[_memory(result)]
            step = result.untyped_storage().nbytes() // result.element_size()
            place = number, int(result.storage_offset()), step
            outputs.append(Output(*place, result.size(), result.stride(), result.dtype))
        written = {argument.value for of_call in self._arguments for argument in of_call if argument.kind == "buffer"}
        if not self._is_known or not {output.buffer for output in outputs} <= written:
            return None
        sizes = [buffer.untyped_storage().nbytes() for _, buffer in self._buffers.values()]
        return KernelCalls(self._kernels, self._arguments, sizes, outputs, self._constants)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, Tensor):
            memory = _memory(value)
            offset = value.data_ptr() - memory
            if memory in self._inputs:
                return Argument("input", self._inputs[memory], offset)
            if memory in self._buffers:
                return Argument("buffer", self._buffers[memory][0], offset)
            self._constants.append(value)
            return Argument("constant", memory, offset)
        # A bool, and a number of another type, is passed otherwise.
        self._is_known = self._is_known and type(value) is int
        return Argument("number", value)


class _OtherOperations(TorchDispatchMode):
    """Finds out whether anything but views is asked of PyTorch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allowed = func.is_view or func.name() in ("inductor::_reinterpret_tensor", "aten::empty_strided")
        self.found = self.found or not allowed
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _address_of(value: Any) -> int | None:
    """Of a kernel; None for anything else."""
    owner = getattr(value, "__self__", None)
    if not isinstance(value, BuiltinFunctionType) or not isinstance(owner, ModuleType):
        return None
    file = getattr(owner, "__file__", None) or ""
    if value.__name__ != "kernel" or not file.endswith(".so"):
        return None
    return ctypes.cast(getattr(ctypes.CDLL(file), value.__name__), ctypes.c_void_p).value
