"""How a solve gets along with torch.compile."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A method that is no part of what torch.compile traces around it; func may be compiled by itself.

    The steps would be unrolled, and compiled for as long as they are many, to gain little over eager ones.
    """
    disabled = cache(torch.compiler.disable)

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # It is not imported for this alone, which takes longer than all else.
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        with repeatedly_differentiable():
            return disabled(method)(*args, **kwargs)  # type: ignore[no-any-return]

    return call


@contextmanager
def repeatedly_differentiable() -> Iterator[None]:
    """Where func is compiled meanwhile, its graph can be gone through more than once, as filters and Newton do."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    import torch._functorch.config as config

    # Before torch 2.6 no buffers are donated. To change a setting takes as long as some steps.
    if not getattr(config, "donated_buffer", False):
        yield
        return
    with config.patch(donated_buffer=False):
        yield
