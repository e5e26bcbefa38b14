"""The backward modes that users can ask for, by name. A new one is a file of its own, and an entry here."""

from .checkpoints import Checkpoint
from .reversal import Reversible
from .stored_evaluations import Autograd, BackwardMode

AUTOGRAD = Autograd()

BACKWARD_MODES: dict[str, BackwardMode] = {
    "autograd": AUTOGRAD,
    "reversible": Reversible(),
    "checkpoint": Checkpoint(),
}


def resolve_backward(backward: object) -> BackwardMode:
    """The mode that the user asks for.

    Args:
        backward: the name of a mode, or a mode.

    Raises:
        ValueError: there is no mode of that name.
        TypeError: `backward` is something else.
    """
    types = sorted({type(mode) for mode in BACKWARD_MODES.values()} - {Autograd}, key=lambda of: of.__name__)
    wanted = [*map(repr, BACKWARD_MODES), *(f"a {of.__name__}" for of in types)]
    known = f"backward must be {', '.join(wanted[:-1])} or {wanted[-1]}, got {backward!r}"
    if isinstance(backward, str):
        if backward not in BACKWARD_MODES:
            raise ValueError(known)
        return BACKWARD_MODES[backward]
    for mode in BACKWARD_MODES.values():
        if isinstance(backward, type(mode)):
            return backward
    raise TypeError(known)
