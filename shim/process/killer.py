"""Kill all that runs as a user, at one blow, by a process of ours that takes the user's place.

A signal to pid -1 reaches everybody whom its sender may signal, and no fork escapes it: the kernel
lets none begin whose parent is about to die.

Rule 1: only where it meets nobody else: see owns_namespace.
Rule 2: forked before the command starts, which may leave no room for another process.
Rule 3: out of the user's reach, at every moment. It is root until it is asked. Then its effective
        uid alone becomes the user's, which is enough to signal them; its real and its saved one,
        which decide who may signal or trace it (kill(2), ptrace(2)), become one that nobody has.
Rule 4: it kills once the kernel has refused it a signal to us and to whoever started us: what else
        it may do, such as by a capability that outlived the switch, it does not know.
Rule 5: asked once, it goes no further than one task: the user may change its priority by then.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from shim.process import descendants
from shim.process.descendants import Stat

_ANSWER_SECONDS = 5.0
_MAX_FDS = 1 << 20  # as in shim.process.launch
_MAX_UID = 2**32 - 2


@dataclass(kw_only=True, slots=True)
class _Killer:
    """The process that waits, and our end of the line to it."""

    pid: int
    uid: int
    line: socket.socket
    was_asked: bool = False


_killer: _Killer | None = None


def prepare(uid: int | None) -> None:
    """Have a killer ready for what is about to start as uid, where there may be one."""
    global _killer
    if _killer and (_killer.was_asked or _killer.uid != uid):
        _dismiss(_killer)
        _killer = None
    if _killer is None and uid is not None and uid not in os.getresuid():
        family = _find_family(list(descendants.read_processes()))
        if family:
            with suppress(OSError):  # no room: the command will not start either
                _killer = _fork(uid, family)


def kill_all(processes: list[Stat], own: set[int]) -> bool:
    """Kill whoever runs as the user, if they are alone with us; say whether that was done.

    - own: our children; another one than the killer may run as the user, and go on
    """
    if _killer is None or own - {_killer.pid} or not owns_namespace(processes):
        return False
    _killer.was_asked = True
    with suppress(OSError):
        _killer.line.sendall(b"?")
        return _killer.line.recv(1) == b"1"
    return False


def owns_namespace(processes: list[Stat]) -> bool:
    """Tell whether nobody but us, our descendants and our ancestors is in this PID namespace.

    That is, its process 1 is ours or our ancestor, and no other process that lives is a child of an
    ancestor, or has none. It is so in a container, also below an init or the static binary's own
    launcher. It is not on a host (which has kernel threads, at least), in its namespace
    (`--pid=host`), in one shared between containers, nor beside what was started in the container
    from outside (`docker exec`) for as long as that lives.
    """
    return bool(_find_family(processes))


def _find_family(processes: list[Stat]) -> list[int]:
    """Return us and our ancestors, up to process 1; nobody when there are strangers."""
    parents = {process.pid: process.ppid for process in processes}
    family = [os.getpid()]
    while family[-1] != 1 and parents.get(family[-1], 0) not in (0, *family):
        family.append(parents[family[-1]])
    theirs = {0, *family[1:]}
    is_ours = all(
        process.pid in family or process.ppid not in theirs
        for process in processes
        if process.is_alive
    )
    return family if family[-1] == 1 and 1 in parents and is_ours else []


def _fork(uid: int, family: list[int]) -> _Killer:
    ours, theirs = socket.socketpair()
    with theirs:
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        try:
            pid = descendants.fork()
            if pid == 0:
                _serve(theirs.fileno(), uid, family)
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    ours.settimeout(_ANSWER_SECONDS)
    return _Killer(pid=pid, uid=uid, line=ours)


def _serve(line: int, uid: int, family: list[int]) -> NoReturn:
    """Be the killer, until we have closed the line or have ended."""
    try:
        gc.disable()  # no finaliser of ours
        os.dup2(line, 0)
        os.closerange(1, _MAX_FDS)
        while os.read(0, 1):
            os.write(0, b"1" if _kill_as(uid, family) else b"0")
    finally:
        os._exit(0)


def _kill_as(uid: int, family: Iterable[int]) -> bool:
    with suppress(OSError):
        take_place(uid)
        if not any(_may_signal(pid) for pid in family):
            os.kill(-1, signal.SIGKILL)
            return True
    return False


def take_place(uid: int) -> None:
    """Become one who may do to others what the user may, and to whom the user may do nothing.

    There is no way back (rule 3). Raises OSError where this is not allowed.
    """
    if os.geteuid() != uid:
        nobody = _find_unused_uid(uid)
        os.setresuid(nobody, uid, nobody)


def _find_unused_uid(uid: int) -> int:
    """Return the highest uid of this user namespace but for uid."""
    with open("/proc/self/uid_map", "rb") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    highest = max(min(first + count - 1, _MAX_UID) for first, _, count in ranges)
    return highest if highest != uid else highest - 1


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False
    return True


def _dismiss(killer: _Killer) -> None:
    killer.line.close()
    with suppress(OSError):
        os.kill(killer.pid, signal.SIGKILL)
    while descendants.collect(killer.pid) is None and descendants.is_uncollected(killer.pid):
        os.waitid(os.P_PID, killer.pid, os.WEXITED | os.WNOWAIT)
