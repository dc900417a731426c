"""Keep secrets from processes of our own user: no uid parts them from us.

Rule 1: what the kernel shows as the environment of a process is in that process's memory, as it was
        at the start: values are overwritten there.
Rule 2: a process that is not dumpable shows its user nothing else either: no memory, no descriptor,
        and no debugger gets in. The exec of a child ends that for the child.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from shim.process.libc import find_function

_PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # linux/prctl.h
_SECRET = b"grand_challenge_"
# proc(5): fields 50 and 51 of /proc/PID/stat, counted from the third, which follows the name.
_ENV_START, _ENV_END = 50 - 3, 51 - 3


@cache
def find_prctl() -> Callable[[int, int], bool]:
    """Return prctl(2) of an option and its value; it tells whether that succeeded.

    What it returns may be called between fork and exec.
    """
    try:
        prctl = find_function("prctl")
    except Exception:  # an odd build without _ctypes
        return lambda option, value: False
    return lambda option, value: prctl(option, value, 0, 0, 0) == 0


@cache
def forbid_inspection() -> bool:
    """Follow rule 2 from now on, once and for all; tell whether it was needed.

    From root nothing can be kept, and root's processes are root's alone. Of /proc/self, what is
    for its owner alone (environ, mem) cannot be opened any more, nor anything be written.
    """
    return os.geteuid() != 0 and find_prctl()(_PR_SET_DUMPABLE, 0)


def overwrite_environment() -> None:
    """Follow rule 1, as far as the kernel lets us; os.environ keeps what it has."""
    with suppress(OSError, ValueError):
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        position, end = int(fields[_ENV_START]), int(fields[_ENV_END])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(position)
            for entry in memory.read(end - position).split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name.lower().startswith(_SECRET):
                    memory.seek(position + len(entry) - len(value))
                    memory.write(b"*" * len(value))
                position += len(entry) + 1
