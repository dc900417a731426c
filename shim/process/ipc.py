"""Remove the System V objects that a user's processes left: they outlive whoever made them.

shared memory, semaphores, message queues: see sysvipc(7); the tables are in /proc/sysvipc
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shim.process import descendants
from shim.process.killer import take_place
from shim.process.libc import find_function

_TABLES = Path("/proc/sysvipc")
# The name of the table, the function, and what makes that remove an id: IPC_RMID is 0.
_KINDS = (("shm", "shmctl", (0, 0)), ("sem", "semctl", (0, 0, 0)), ("msg", "msgctl", (0, 0)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """Those that a user had before something was started as that user."""

    uid: int
    known: frozenset[tuple[str, int]]

    @staticmethod
    def of(uid: int | None) -> Objects | None:
        """Return what the user has now; None when that is us, whose objects may be anybody's."""
        if uid is None or uid in os.getresuid():
            return None
        return Objects(uid=uid, known=frozenset(found for found, _ in _find(uid)))

    def remove_new(self) -> None:
        """Remove what the user has made since, but for memory that somebody has attached.

        When all of a task have been ended, that one is not theirs. It is done as the user, in a
        process of its own: root needs a capability for it that containers lack.
        """
        new = {found for found, is_attached in _find(self.uid) if not is_attached} - self.known
        if not new:
            return
        with suppress(Exception):  # an odd build without _ctypes, or no room for a process
            calls = [
                (find_function(function), (number, *command))
                for kind, function, command in _KINDS
                for found, number in new
                if found == kind
            ]
            pid = descendants.fork()
            if pid == 0:
                _remove(self.uid, calls)
            while descendants.collect(pid) is None:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _remove(uid: int, calls: list[tuple[Callable[..., int], tuple[int, ...]]]) -> NoReturn:
    try:
        take_place(uid)
        for function, arguments in calls:
            function(*arguments)
    finally:
        os._exit(0)


def _find(uid: int) -> Iterator[tuple[tuple[str, int], bool]]:
    """Yield (kind, id) of what the user made and owns, and whether it is attached memory."""
    for kind, _, _ in _KINDS:
        with suppress(OSError):  # a kernel without System V IPC
            header, *rows = (_TABLES / kind).read_text().splitlines()
            names = header.split()
            for row in rows:
                fields = dict(zip(names, map(int, row.split()), strict=False))
                if fields["uid"] == fields["cuid"] == uid:
                    # The id is in the second column, whose name has varied.
                    yield (kind, fields[names[1]]), fields.get("nattch", 0) > 0
