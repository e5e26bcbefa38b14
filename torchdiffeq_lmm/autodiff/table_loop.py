"""The loop over a table of arguments, in C++: for each row it calls the same kernels."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inductor import shared_library

_KEPT = 256
"""So many loops are remembered, one for each list of kernels with so many arguments."""

_MESSAGE = 1000
"""So many characters of what a kernel raises are passed on."""


class TableLoop:
    """Calls kernels for each row of a table.

    Args:
        kernels: their addresses.
        are_numbers: of each whether its arguments are numbers, the others being addresses.
    """

    def __init__(self, kernels: Sequence[int], are_numbers: Sequence[Sequence[bool]]) -> None:
        self._kernels = np.array(kernels, dtype=np.int64)
        self._at = self._kernels.ctypes.data
        self._loop = _loop_of(tuple(map(tuple, are_numbers)))

    def __call__(self, table: NDArray[np.int64]) -> None:
        """Call them.

        Args:
            table: the arguments of all kernels, of shape (rows, arguments), without gaps.

        Raises:
            RuntimeError: a kernel raises an error.
        """
        message = ctypes.create_string_buffer(_MESSAGE)
        if self._loop(len(table), table.ctypes.data, self._at, message, _MESSAGE):
            reason = message.value.decode(errors="replace")
            raise RuntimeError(f"compile: what func has been compiled to has failed: {reason}")


@lru_cache(_KEPT)
def _loop_of(are_numbers: tuple[tuple[bool, ...], ...]) -> Any:
    calls, column = [], 0
    for number, arguments in enumerate(are_numbers):
        types = ["int64_t" if is_number else "void*" for is_number in arguments]
        given = [
            f"row[{i}]" if is_number else f"reinterpret_cast<void*>(row[{i}])"
            for i, is_number in enumerate(arguments, column)
        ]
        calls.append(f"reinterpret_cast<void (*)({', '.join(types)})>(kernels[{number}])({', '.join(given)});")
        column += len(arguments)
    loop = shared_library(_LOOP.replace("CALLS", "\n".join(calls)).replace("COLUMNS", str(column))).loop
    loop.argtypes = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
    loop.restype = ctypes.c_int64
    return loop


_LOOP = """
#include <cstdint>
#include <cstring>
#include <exception>

extern "C" int64_t loop(int64_t count, const int64_t* row, const int64_t* kernels, char* message, int64_t size) {
    try {
        for (int64_t block = 0; block < count; ++block, row += COLUMNS) {
            CALLS
        }
    } catch (const std::exception& error) {
        std::strncpy(message, error.what(), size - 1);
        return 1;
    }
    return 0;
}
"""
