"""Which grid parameters are looked up, as a solve evaluates func."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_noted: ContextVar[dict[int, Any] | None] = ContextVar("noted", default=None)


def note(parameter: object) -> None:
    """Note a grid parameter, where that is asked for."""
    noted = _noted.get()
    if noted is not None:
        noted[id(parameter)] = parameter


@contextmanager
def noted_lookups() -> Iterator[dict[int, Any]]:
    """All that are looked up within, by their ids."""
    noted: dict[int, Any] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)
