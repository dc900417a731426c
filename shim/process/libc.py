"""Functions of the C library that Python has no name for.

By `_ctypes`, which is there at once: the ctypes package would cost more than all else at a start.
"""

from __future__ import annotations

from collections.abc import Callable


def find_function(name: str) -> Callable[..., int]:
    """Return a function that takes integers, bytes and None, and returns an int.

    It may be called between fork and exec. Raises ImportError in an odd build without _ctypes,
    OSError where there is no such function.
    """
    import _ctypes  # 1 ms

    address = _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]  # NULL
    call = _ctypes.call_function
    return lambda *arguments: call(address, arguments)
