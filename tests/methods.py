"""The methods that tests go through, and what marks those as slow that the others of their family stand for."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

from torchdiffeq_lmm import method_info
from torchdiffeq_lmm.schemes.methods import METHODS

NAMES = [method.name for method in METHODS]
ORDER = {method.name: method.order for method in METHODS}
IMPLICIT = {name for name in NAMES if method_info(name).kind == "implicit"}

FAMILIES = ("leapfrog", "nystrom3", "ab3", "abm2", "am3", "milne_simpson", "bdf2")
"""One of every family; a two-stage method may stand beside them."""

FAST_EXPLICIT = ("leapfrog", "nystrom3", "ab3", "abm2")
FAST = (*FAST_EXPLICIT, "bdf2")
"""Of these all that are explicit, and one implicit method, whose steps take many times as long."""


def slow_but(fast: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, or tuples for several parameters, all marked slow but those in `fast`."""
    return [pytest.param(*_as_tuple(value), marks=[] if value in fast else pytest.mark.slow) for value in values]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def in_turn(settings: Sequence[Any], few: int, fast: Collection[str] = FAST, names: Iterable[str] = NAMES) -> list[Any]:
    """Methods with settings: of the explicit families each has half of them, every other method has `few`.

    Leapfrog and nystrom3 have a half each, and so have ab3 and abm2. The other methods have those of their turn, so
    that the methods of a family share the settings out; the implicit ones take many times as long. A setting is one
    parameter, or a tuple of several. Of each method of `fast` one setting is not slow, of the next family the next one.
    """
    chosen, names, half = [], list(names), (len(settings) + 1) // 2
    halved = [name for name in FAMILIES if name in names and name not in IMPLICIT]
    for position, name in enumerate(names):
        begin, count = position, few
        if name in halved:
            count, rank = max(few, half), halved.index(name)
            # The second one of a pair goes on where the first one has ended.
            begin = names.index(halved[rank - 1]) + half if rank % 2 else position
        of_method = [(begin + turn) % len(settings) for turn in range(count)]
        not_slow = FAMILIES.index(name) % len(of_method) if name in fast else None
        for turn, number in enumerate(sorted(of_method)):
            marks = [] if turn == not_slow else pytest.mark.slow
            chosen.append(pytest.param(name, *_as_tuple(settings[number]), marks=marks))
    return chosen


EVERY_METHOD = slow_but(FAST, NAMES)
