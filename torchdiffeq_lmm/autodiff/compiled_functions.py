"""Functions of a captured func, traced and compiled once: then they serve for any times, values and batch sizes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .block_loop import BlockFunction
from .compile_settings import Compile
from .func_capture import CapturedFunc, Dependencies
from .tracing import Shapes, TracedBlock, axis_apart, has_light_slope

Made = TypeVar("Made")

compilations = 0
"""How many functions have been compiled by this process."""


class CompiledFunctions:
    """What is compiled of one func.

    Args:
        dependencies: func and what it depends on.
        settings: how to compile.
        x, time: a state and a time, whose values do not matter.

    Attributes:
        dependencies: as given.
    """

    _in_loops = False
    """Whether they are run in loops: see `block_loop`."""

    def __init__(self, dependencies: Dependencies, settings: Compile, x: Tensor, time: Tensor) -> None:
        self.dependencies = dependencies
        self._func = dependencies.func
        self._settings = settings
        lookups = self._func.lookups
        shapes = () if lookups is None else lookups.shapes
        looked_up = (stack.detach().new_empty(shape) for stack, shape in zip(dependencies.stacks, shapes, strict=True))
        self._like = Shapes(x.detach(), time.detach(), dependencies.tensors, tuple(looked_up), self._func.is_dynamic)
        self._of_one_size: set[int] = self._func.made.setdefault((self._key, "of one size"), set())
        if self._func.is_dynamic and len(x) in self._of_one_size:
            self._like = self._like._replace(is_dynamic=False)

    def _take_apart(self) -> int:
        """Have the components of states apart from now on, where func gains by it: their axis, as of `laid_out`."""
        axis = self._found("axis", axis_apart)
        self._like = self._like._replace(axis=axis)
        return axis

    @property
    def _is_light(self) -> bool:
        """Whether func is without matrix products, but small ones."""
        return self._found("is light", has_light_slope)

    def _found(self, name: str, find: Callable[[CapturedFunc, Shapes], Made]) -> Made:
        """What is found out of func once."""
        key = self._key, name
        if key not in self._func.made:
            with torch.no_grad():
                self._func.made[key] = find(self._func, self._like)
        found: Made = self._func.made[key]
        return found

    @property
    def _key(self) -> object:
        x = self._like.x
        return self._settings.key, x.shape[1:] if self._like.is_dynamic else x.shape, x.dtype, x.device

    def _for_any_size(self, make: Callable[[], Made]) -> Made:
        """What is made for a batch of any size or, where that cannot be, for this one."""
        if self._like.is_dynamic:
            try:
                return make()
            except RuntimeError:
                # PyTorch has not every derivative and every kernel for symbols. If it is anything else it is so below.
                self._of_one_size.add(len(self._like.x))
                self._like = self._like._replace(is_dynamic=False)
        return make()

    def _made(self, key: object, traced: Callable[[], TracedBlock]) -> tuple[BlockFunction, TracedBlock]:
        """A function, compiled where it has not been before, and what it was before."""
        global compilations
        made = self._func.made
        if (self._key, key) not in made:
            with torch.no_grad():
                block = traced()
                made[self._key, key] = (
                    self._settings.compiled(block.graph, block.inputs, in_loops=self._in_loops),
                    block,
                )
            compilations += 1
        found: tuple[BlockFunction, TracedBlock] = made[self._key, key]
        found[1].check(len(self._like.x) if self._like.is_dynamic else 0)
        return found
