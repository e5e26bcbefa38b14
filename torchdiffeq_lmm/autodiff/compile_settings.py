"""How a solve is compiled: the settings that users can give, and what they lead to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from .cuda_graph import CudaGraphs

CompileBackend = Literal["inductor", "eager"]
Traced = Callable[..., Any]


@dataclass(frozen=True)
class Compile:
    """Settings for ``odeint(..., compile=Compile(...))``; ``compile=True`` takes the defaults.

    Args:
        block: of how many steps the compiled function is. A longer one has less overhead and keeps fewer states; the
            time to compile it is proportional to its length. Of no meaning for implicit methods.
        dynamic: whether it is compiled for all batch sizes, the sizes of the state's first dimension, once there is a
            second one. A tuple state, a batch of 1, and a `func` with a tensor that has a value for each sample are
            compiled for every size by themselves.
        mode: of `torch.compile`: "default", "reduce-overhead" (CUDA graphs), "max-autotune", ... On a GPU
            "reduce-overhead" is taken where none is given: all kernels of a block are launched at once then.
        options: of Inductor, as those of `torch.compile`. On the CPU ``{"cpp_wrapper": True}``, compiled in haste, is
            the default.
        backend: "inductor"; "eager" runs the traced operations one by one, for finding faults.

    Raises:
        TypeError: `block` is not an int, `dynamic` not a bool, or `options` no mapping.
        ValueError: `block` is less than 5, or `backend` unknown.
    """

    block: int = 10
    dynamic: bool = True
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    backend: CompileBackend = "inductor"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or isinstance(self.block, bool):
            raise TypeError(f"block must be an int, got {self.block!r}")
        if self.block < _SHORTEST:
            raise ValueError(f"block must be at least {_SHORTEST} steps, got {self.block}")
        if not isinstance(self.dynamic, bool):
            raise TypeError(f"dynamic must be a bool, got {self.dynamic!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping, got {self.options!r}")
        if self.backend not in get_args(CompileBackend):
            raise ValueError(f"backend must be one of {get_args(CompileBackend)}, got {self.backend!r}")

    @property
    def key(self) -> tuple[object, ...]:
        """What compiled functions depend on."""
        return self.block, self.mode, repr(sorted((self.options or {}).items())), self.backend

    def compiled(self, traced: torch.fx.GraphModule, inputs: list[Any]) -> Traced:
        """A traced function, compiled.

        Args:
            traced: the function.
            inputs: as it has been traced with.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        if self.backend == "eager":
            return traced
        import torch._inductor as inductor

        is_on_gpu = any(given.device.type == "cuda" for given in inputs)
        options: dict[str, Any] = {} if is_on_gpu else dict(_ON_CPU)
        mode = "reduce-overhead" if is_on_gpu and self.mode is None else self.mode
        if mode is not None:
            options.update(inductor.list_mode_options(mode))
        options.update(self.options or {})
        # Of Inductor's graphs one call's outputs are overwritten by the next one's.
        wants_graphs = options.pop("triton.cudagraphs", False)
        try:
            made: Traced = inductor.compile(traced, inputs, options=options)
        except Exception as error:
            reason = " ".join(str(error).split())[:_LONGEST]
            raise RuntimeError(
                f"compile failed in Inductor, {type(error).__name__}: {reason}. Inductor needs a C++ compiler such as "
                f"g++ on the CPU, Triton on a GPU; see that one is installed, or solve without compile"
            ) from error
        return CudaGraphs(made) if is_on_gpu and wants_graphs else made


_ON_CPU = {
    "cpp_wrapper": True,
    # The wrapper has little to do, and to optimise it takes as long as all the rest.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # A block is one loop where it can be; what lies between two loops is a buffer.
    "max_fusion_size": 100_000,
}

_SHORTEST = 5
"""A block has as many steps as any method looks back."""

_LONGEST = 500
"""So many characters of an error are quoted."""


def resolve_compile(compile: object) -> Compile | None:  # noqa: A002
    """The settings that the user asks for; None for not to compile.

    Raises:
        TypeError: `compile` is neither a bool nor settings.
    """
    if compile is None or compile is False:
        return None
    if compile is True:
        return Compile()
    if isinstance(compile, Compile):
        return compile
    raise TypeError(f"compile must be True, False or a Compile, got {compile!r}")
