"""What is captured of a func is kept from solve to solve, for as long as the func, its object or its code is there."""

from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.vector_field import HostedFunction, VectorField

from .func_capture import Dependencies, FuncCapture

ByName = dict[str | None, FuncCapture]
"""The captures of an object, by the method that is solved with; None for the object itself."""

_captures: WeakKeyDictionary[Any, ByName] = WeakKeyDictionary()

_left: WeakKeyDictionary[type, ByName] = WeakKeyDictionary()
"""What an object had that is gone, for the next one of its class: wrappers of a func are often made for every solve."""


def capture_of(call: Any) -> FuncCapture:
    """What is kept of a function.

    Raises:
        TypeError: it has no weak references or no hash.
    """
    owner, name = call, None
    if isinstance(call, MethodType):
        owner, name = call.__self__, call.__func__.__qualname__
    elif isinstance(call, FunctionType):
        # A function that is made anew for every solve has the same code.
        owner = call.__code__
    try:
        of_owner = _captures.get(owner)
        if of_owner is None:
            of_owner = _captures[owner] = _left.pop(type(owner), {})
            if not isinstance(owner, CodeType):
                finalize(owner, _hand_on, type(owner), of_owner).atexit = False
    except TypeError as error:
        raise TypeError(
            f"func must be a function, a method or an object with weak references and a hash where compile is given, "
            f"got {type(call).__name__}; wrap it in a function, or in an nn.Module"
        ) from error
    if name not in of_owner:
        of_owner[name] = FuncCapture()
    return of_owner[name]


def dependencies_of(
    hosted: HostedFunction, vector_field: VectorField, time: Tensor, y0: Tensor, dynamic: bool
) -> Dependencies:
    """What func depends on now: see `FuncCapture`.

    Args:
        hosted: the user's function.
        vector_field: the same with its checks: what is wrong with func in an eager solve is said in the same words.
        time, y0, dynamic: see there.

    Raises:
        RuntimeError: func cannot be captured.
    """
    capture = capture_of(hosted.call)
    captures = capture.captures
    try:
        found = capture.dependencies(hosted, time, y0, dynamic)
    except RuntimeError:
        _check_func(vector_field, time, y0)
        raise
    if capture.captures > captures:
        _check_func(vector_field, time, y0)
    return found


def _check_func(vector_field: VectorField, time: Tensor, y0: Tensor) -> None:
    """Raise the errors that func and its values may have in an eager solve, too."""
    with torch.no_grad():
        vector_field(time, y0.detach())


def _hand_on(of_class: type, of_owner: ByName) -> None:
    for capture in of_owner.values():
        capture.is_inherited = True
    _left[of_class] = of_owner
