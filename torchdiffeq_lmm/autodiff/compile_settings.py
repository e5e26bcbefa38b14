"""How a solve is compiled: the settings that users can give, and what they lead to."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from .block_loop import BlockFunction
from .cuda_graph import CudaGraphs
from .inductor import compiled
from .kernel_loop import KernelFunction

CompileBackend = Literal["inductor", "eager"]


@dataclass(frozen=True)
class Compile:
    """Settings for ``odeint(..., compile=Compile(...))``; ``compile=True`` takes the defaults.

    Args:
        block: of how many steps the compiled function is. A longer one keeps fewer states; the time to compile it is
            proportional to its length. None is for 10 steps, and for 5 on the CPU where func has no matrix products but
            small ones: then it takes little time to call it. Of no meaning for implicit methods.
        dynamic: whether it is compiled for all batch sizes, the sizes of the state's first dimension, once there is a
            second one. A tuple state, a batch of 1, and a `func` with a tensor that has a value for each sample are
            compiled for every size by themselves.
        mode: of `torch.compile`: "default", "reduce-overhead" (CUDA graphs), "max-autotune", ... On a GPU
            "reduce-overhead" is taken where none is given: all kernels of a block are launched at once then.
        options: of Inductor, as those of `torch.compile`. On the CPU ``{"cpp_wrapper": True}``, compiled in haste, is
            the default for functions that Python calls.
        backend: "inductor"; "eager" runs the traced operations one by one, for finding faults.

    Raises:
        TypeError: `block` is neither an int nor None, `dynamic` not a bool, or `options` no mapping.
        ValueError: `block` is less than 5, or `backend` unknown.
    """

    block: int | None = None
    dynamic: bool = True
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    backend: CompileBackend = "inductor"

    def __post_init__(self) -> None:
        if self.block is not None and (not isinstance(self.block, int) or isinstance(self.block, bool)):
            raise TypeError(f"block must be an int or None, got {self.block!r}")
        if self.block is not None and self.block < _SHORTEST:
            raise ValueError(f"block must be at least {_SHORTEST} steps, got {self.block}")
        if not isinstance(self.dynamic, bool):
            raise TypeError(f"dynamic must be a bool, got {self.dynamic!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping, got {self.options!r}")
        if self.backend not in get_args(CompileBackend):
            raise ValueError(f"backend must be one of {get_args(CompileBackend)}, got {self.backend!r}")

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What compiled functions depend on."""
        return self.block, self.mode, repr(sorted((self.options or {}).items())), self.backend

    def compiled(self, traced: torch.fx.GraphModule, inputs: list[Any], *, in_loops: bool) -> BlockFunction:
        """A traced function, compiled.

        Args:
            traced: the function.
            inputs: as it has been traced with.
            in_loops: whether it is to be run in loops, by its kernels alone where it has nothing else.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        if self.backend == "eager":
            return BlockFunction(traced)
        run, code, wants_graphs = compiled(traced, inputs, self.mode, self.options or {}, in_loops=in_loops)
        if code is not None:
            return KernelFunction(run, code)
        return BlockFunction(CudaGraphs(run) if wants_graphs else run)


_SHORTEST = 5
"""A block has as many steps as any method looks back."""


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
