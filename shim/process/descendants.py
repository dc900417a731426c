"""Tell whose child is whose: reap orphans, find the descendants of a task, end them.

Rule 1: whoever started a process collects its status; nobody else ever does.
Rule 2: orphans come to us, as PID 1 or as their subreaper. They are ours to reap because we did
        not start them, and a task's because their session is not ours: a process may leave a
        session, but never joins one.
Rule 3: nothing of a task survives it. A process is stopped when it is first seen and killed when
        it is seen again: its children, were they born in between, are still found below it.
Rule 4: signals go to groups: a group that forks faster than we read /proc ends at one blow.
Rule 5: who was not seen may have moved on, from parent to child, while we looked: then it has left
        an orphan that ended, and we look again.
Rule 6: some thousand processes that do nothing but fork outrun every look: where it may, a killer
        ends them at one blow (shim.process.killer). Whoever is left all the same is named.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from shim.process.privacy import find_prctl

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_REAP_SECONDS = 1.0
KILL_SECONDS = 10.0  # what does not die of SIGKILL for so long hangs in the kernel
# One to find them, one to collect them, two without them, and as much again.
LEAST_LOOKS = 8
_SCAN_SECONDS = 0.002

_lock = threading.Lock()  # held from fork to registration, and to reap
_own: set[int] = set()  # the pids that we started and have not collected
_reaped = 0  # how many orphans we have collected
_is_adopting = False


def adopt_orphans() -> None:
    """Have the descendants of our children come to us when they are orphaned, and reap them.

    Once and for all. Where the kernel refuses (no prctl), orphans of a task are still found by the
    sessions that it is seen to use.
    """
    global _is_adopting
    with _lock:
        if _is_adopting:
            return
        _is_adopting = True
    find_prctl()(_PR_SET_CHILD_SUBREAPER, 1)
    with suppress(RuntimeError):  # no more threads: end() reaps too
        threading.Thread(target=_reap_for_ever, name="reaper", daemon=True).start()


def fork() -> int:
    """Fork as os.fork does; the child is ours to collect()."""
    with _lock, warnings.catch_warnings():
        # Python 3.12 warns of fork beside threads; see the rules of shim.process.launch.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
        if pid:
            _own.add(pid)
    return pid


def collect(pid: int) -> int | None:
    """Return the return code of a child of ours when it has ended; None before and ever after.

    -n means that signal n ended it, 1 that the kernel was told to throw its status away.
    """
    with _lock:
        if pid not in _own:
            return None
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # whoever started us ignores SIGCHLD
            _own.discard(pid)
            return 1
        if not ended:
            return None
        _own.discard(pid)
        return os.waitstatus_to_exitcode(status)


def signal_group(pid: int, signum: int) -> None:
    """Send a signal to the group that a child of ours leads, unless it has been collected."""
    with _lock, suppress(OSError):
        if pid in _own:  # else the number may be somebody else's by now
            os.killpg(pid, signum)


def is_uncollected(pid: int) -> bool:
    """Tell whether a process is a child of ours whose status nobody has collected."""
    with _lock:
        return pid in _own


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftovers:
    """What a process left behind.

    - ended: how many processes outlived it until now, as far as they were seen
    - alive: the pids of those who were seen to do so still
    - is_over: nobody does; False also when there were signs of somebody up to the end
    """

    ended: int
    alive: tuple[int, ...]
    is_over: bool


def signal_process(pid: int, signum: int) -> None:
    """Send a signal to a child of ours, unless it has been collected."""
    with _lock, suppress(OSError):
        if pid in _own:
            os.kill(pid, signum)


def end_descendants(
    session: int, *, kill_all: Callable[[list[Stat], set[int]], object] = lambda *_: None
) -> Leftovers:
    """Kill what is left of a task.

    Ends when two looks in a row find nobody and no sign of anybody, or after KILL_SECONDS, which a
    storm of forks may leave us too few moments in for that: not before LEAST_LOOKS then.

    - session: the one that the task's first process led; others are found from there
    - kill_all: called with all that /proc shows, and our other children, while there is somebody
    """
    # A look at /proc takes longer than a process may live, so no look tells the truth about one
    # moment. What is new is stopped, so that it makes no more children; what is seen a second time
    # is killed; orphans that we collected meanwhile are signs of somebody whom we did not see.
    # Only two looks in a row without anybody and without a sign prove that nobody is left.
    sessions = {session}
    seen: set[int] = set()
    living: list[Stat] = []
    deadline = time.monotonic() + KILL_SECONDS
    is_quiet, looks, quiet_looks = True, 0, 0
    while quiet_looks < 2 and (looks < LEAST_LOOKS or time.monotonic() < deadline):
        looks += 1
        reaped_before = _reaped
        _stop_orphans()
        processes = list(read_processes())
        living = _find_descendants(processes, sessions)
        if living or not is_quiet:
            kill_all(processes, _own - {session})
        for target, signum in _choose_signals(living, seen):
            with suppress(OSError):
                os.kill(target, signum)
        seen.update(process.pid for process in living)
        _reap()
        is_quiet = not living and _reaped == reaped_before
        quiet_looks = quiet_looks + 1 if is_quiet else 0
        if living:
            time.sleep(_SCAN_SECONDS)
    alive = tuple(process.pid for process in living)
    return Leftovers(ended=len(seen.difference(alive)), alive=alive, is_over=quiet_looks == 2)


def _stop_orphans() -> None:
    """Stop who came to us, before a look at all of /proc takes longer than they live."""
    with suppress(OSError):  # a kernel without this file
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            pids = {int(pid) for pid in file.read().split()}
        with _lock:  # after the look: who was forked before it is registered now
            pids -= _own
        for pid in pids:
            with suppress(ProcessLookupError):
                if os.getsid(pid) != os.getsid(0):
                    os.kill(pid, signal.SIGSTOP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """What /proc/PID/stat tells of a process."""

    pid: int
    ppid: int
    pgrp: int
    session: int
    is_alive: bool


def read_processes() -> Iterator[Stat]:
    """Yield every process; nobody where there is no /proc, or that of another PID namespace."""
    names: list[str] = []
    with suppress(OSError):
        if os.readlink("/proc/self") == str(os.getpid()):
            names = os.listdir("/proc")
    for name in names:
        if name.isdigit():
            with suppress(OSError):  # it is gone
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # a name may hold anything
                # A zombie whose other threads live on is alive (num_threads, proc(5)).
                is_alive = fields[0] not in (b"Z", b"X") or int(fields[17]) > 1
                ppid, pgrp, session = map(int, fields[1:4])
                yield Stat(pid=int(name), ppid=ppid, pgrp=pgrp, session=session, is_alive=is_alive)


def _find_descendants(processes: Iterable[Stat], sessions: set[int]) -> list[Stat]:
    """Return the living processes of a task; add the sessions they are in to `sessions`.

    Those are: whoever is in one of its sessions, orphans that came to us, and all below them.
    """
    us, our_session = os.getpid(), os.getsid(0)
    children: dict[int, list[Stat]] = {}
    pending: list[Stat] = []
    for process in processes:
        children.setdefault(process.ppid, []).append(process)
        is_orphan = process.ppid == us and process.session != our_session
        if is_orphan or process.session in sessions:
            pending.append(process)
    with _lock:  # after the look, as above
        own = set(_own)
    found: dict[int, Stat] = {}
    pending = [process for process in pending if process.pid not in own]
    while pending:
        process = pending.pop()
        if process.pid not in found:
            found[process.pid] = process
            sessions.add(process.session)
            pending += children.get(process.pid, [])
    return [process for process in found.values() if process.is_alive]


def _choose_signals(living: Iterable[Stat], seen: set[int]) -> set[tuple[int, int]]:
    """Return what kill(2) is to be called with: stop who is new, kill who was seen (rules 3, 4)."""
    not_theirs = (0, 1, os.getpgrp())
    return {
        (
            process.pid if process.pgrp in not_theirs else -process.pgrp,
            signal.SIGKILL if process.pid in seen else signal.SIGSTOP,
        )
        for process in living
    }


def _reap_for_ever() -> None:
    while True:
        time.sleep(_REAP_SECONDS)
        _reap()


def _reap() -> None:
    """Collect orphans that have ended (rules 1 and 2)."""
    global _reaped
    with _lock, suppress(ChildProcessError, ProcessLookupError):
        while True:
            # The first zombie, whoever it is; one of our own is collected soon by its owner.
            zombie = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if zombie is None or zombie.si_pid in _own:
                return
            if os.getsid(zombie.si_pid) == os.getsid(0):  # somebody else here started it
                return
            os.waitpid(zombie.si_pid, 0)
            _reaped += 1
