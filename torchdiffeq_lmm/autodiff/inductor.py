"""What is asked of Inductor: to compile functions, and a library in C++."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from .kept_products import is_light

_ON_CPU = {
    # A block is one loop where it can be; what lies between two loops is a buffer.
    "max_fusion_size": 100_000,
}

_WRAPPED = {
    "cpp_wrapper": True,
    # The wrapper has little to do, and to optimise it takes as long as all the rest.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
"""Where operations of PyTorch are called beside kernels, or the function is called by itself."""

_LONGEST = 500
"""So many characters of an error are quoted."""


class Compiled(NamedTuple):
    """A compiled function.

    Attributes:
        run: takes and returns tensors.
        code: what it calls, see `kernel_calls`; None where that is unknown.
        wants_graphs: whether it is on a GPU, and the user wants a CUDA graph of it.
    """

    run: Callable[..., Sequence[Tensor]]
    code: Callable[..., Any] | None
    wants_graphs: bool


def compiled(
    traced: GraphModule, inputs: list[Any], mode: str | None, options: Mapping[str, Any], *, in_loops: bool
) -> Compiled:
    """Compile a traced function.

    Args:
        traced: the function.
        inputs: as it has been traced with.
        mode, options: see `Compile`.
        in_loops: whether its kernels are to be called without it.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    is_on_gpu = any(given.device.type == "cuda" for given in inputs)
    in_loops = in_loops and not is_on_gpu and _has_kernels_alone(traced)
    settings: dict[str, Any] = {} if is_on_gpu else {**_ON_CPU, **({} if in_loops else _WRAPPED)}
    mode = "reduce-overhead" if is_on_gpu and mode is None else mode
    if mode is not None:
        settings.update(inductor.list_mode_options(mode))
    settings.update(options)
    # Of Inductor's graphs one call's outputs are overwritten by the next one's.
    wants_graphs = settings.pop("triton.cudagraphs", False)
    found: list[Any] = []

    def inner(*given: Any, **keywords: Any) -> Any:
        found.append(compile_fx_inner(*given, **keywords))
        return found[-1]

    try:
        # What that cache has, comes without what `inner` returns.
        with functorch_config.patch(enable_autograd_cache=False):
            run: Any = compile_fx(traced, inputs, inner_compile=inner, config_patches=settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise RuntimeError(
            f"compile failed in Inductor, {type(error).__name__}: {reason}. Inductor needs a C++ compiler such as "
            f"g++ on the CPU, Triton on a GPU; see that one is installed, or solve without compile"
        ) from error
    code = getattr(found[0], "current_callable", None) if len(found) == 1 and in_loops else None
    return Compiled(run, code, wants_graphs and is_on_gpu)


def shared_library(source: str) -> ctypes.CDLL:
    """A library of functions in C++, compiled where Inductor has not compiled the same before."""
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source)
    return library


def _has_kernels_alone(traced: GraphModule) -> bool:
    """Whether Inductor makes kernels of all operations, as far as one can tell beforehand."""
    values = (node.meta.get("val") for node in traced.graph.nodes)
    is_real = not any(isinstance(value, Tensor) and value.is_complex() for value in values)
    return is_real and is_light(traced)
