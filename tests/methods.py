"""The methods that tests go through, and what marks those as slow that the others of their family stand for."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from torchdiffeq_lmm import method_info
from torchdiffeq_lmm.schemes.methods import METHODS

NAMES = [method.name for method in METHODS]
ORDER = {method.name: method.order for method in METHODS}
IMPLICIT = {name for name in NAMES if method_info(name).kind == "implicit"}

FAMILIES = ("leapfrog", "nystrom3", "ab3", "abm2", "am3", "milne_simpson", "bdf2")
"""One of every family; a two-stage method may stand beside them."""


def slow_but(fast: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, all marked slow but those in `fast`; a tuple is several parameters, first the one."""
    marked = []
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        marked.append(pytest.param(*several, marks=[] if several[0] in fast else pytest.mark.slow))
    return marked


EVERY_METHOD = slow_but(FAMILIES, NAMES)
