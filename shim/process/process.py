"""Start a process, wait for it with a limit, end it with everything it left behind.

Rule 1: a start either gives a running process or a sentence that says what to do.
Rule 2: a wait has a monotonic deadline, ends at once when the process ends or a stop is requested,
        and does not spin.
Rule 3: a process is asked to end (SIGTERM to its group), given its grace, then made to (SIGKILL).
Rule 4: a return code is an exit status, or -n after signal n; nobody else collects it.
Rule 5: SIGKILL that nobody here sent, with a rise of the cgroup's oom_kill counter, is the
        kernel's answer to too much memory.
Rule 6: nothing that the process started survives end(), or it is named.
Rule 7: a process may have ended although its status cannot be had: a tracer has it first, and is
        most likely of the process's own making. Then its descendants are ended at once.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from shim.contract.errors import UserSafeError
from shim.process import descendants, ipc, killer
from shim.process.descendants import Leftovers
from shim.process.executables import (
    NOT_FOUND,
    NOT_PERMITTED_ERRORS,
    describe_missing,
    describe_permission,
    explain_exec_error,
)
from shim.process.launch import Launched, ProcessSpec, StartError, launch
from shim.process.stopping import Stop
from shim.process.users import User

_LONGEST_WAIT_SECONDS = 3600.0
_SLICE_SECONDS = 0.05  # where we must look again: no pidfd before Linux 5.3, second signals
_DYING_SECONDS = 1.0  # who takes longer to die of SIGKILL is traced, or hangs in the kernel
_MAX_HELPER_BYTES = 1 << 20
_NO_TIME = timedelta(0)
NO_ROOM_MESSAGE = (
    "The command could not be started: there is no room for another process or thread; "
    "raise the limit on processes (pids) of the container"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a process ended.

    - return_code: its exit status, or -n when signal n ended it
    - timed_out, stopped: it was made to end, by its time limit or by a signal to the shim
    - oom_killed: the kernel ended it for want of memory
    """

    return_code: int
    timed_out: bool = False
    stopped: bool = False
    oom_killed: bool = False


def start(spec: ProcessSpec, *, memory_events: MemoryEvents | None = None) -> Process:
    """Start the user's command, its streams on two new pipes.

    Raises UserSafeError with a sentence that says what to do.
    """
    descendants.adopt_orphans()
    killer.prepare(spec.user.uid)
    objects = ipc.Objects.of(spec.user.uid)
    events = memory_events or MemoryEvents()
    oom_kills = events.count_oom_kills()
    try:
        return Process(launch(spec), lambda: events.count_oom_kills() > oom_kills, objects=objects)
    except StartError as error:
        failure = UserSafeError(_explain(error, spec))
        if detail := _name(error, spec):  # beside a sentence that must stay as platforms know it
            failure.add_note(detail)
        raise failure from error
    except BlockingIOError as error:  # EAGAIN, of fork(2)
        raise UserSafeError(NO_ROOM_MESSAGE) from error


def run_helper(
    argv: Sequence[str], env: Mapping[str, str], timeout: timedelta, *, user: User | None = None
) -> bytes:
    """Run a program as a user, by default as ourselves, and return what it wrote to stdout.

    Raises OSError: it could not be started, failed (with the end of its stderr), wrote more than
    1 MiB, or did not end in time (TimeoutError).
    """
    process = Process(launch(ProcessSpec(argv=tuple(argv), env=env, user=user or User())))
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        output = _read_all((process.stdout_fd, process.stderr_fd), deadline=deadline)
        if not process.await_end(deadline=deadline):
            raise TimeoutError(errno.ETIMEDOUT, "The helper program did not end in time", argv[0])
    finally:
        process.kill()
        os.close(process.stdout_fd)
        os.close(process.stderr_fd)
    stdout, stderr = output
    if process.poll() != 0:
        reason = stderr[-1000:].decode("utf-8", "replace").strip()
        raise ChildProcessError(f"{argv[0]} ended with status {process.poll()}: {reason}")
    return stdout


class Process:
    """A process that we started, in a session and group of its own.

    Its streams' read ends, stdout_fd and stderr_fd, belong to the caller.
    """

    def __init__(
        self,
        launched: Launched,
        has_oom_kill: Callable[[], bool] = lambda: False,
        *,
        objects: ipc.Objects | None = None,
    ) -> None:
        self.pid = launched.pid
        self.stdout_fd = launched.stdout_fd
        self.stderr_fd = launched.stderr_fd
        self.warnings = launched.warnings
        self._has_oom_kill = has_oom_kill
        self._objects = objects
        self._return_code: int | None = None
        self._ended = 0  # descendants
        self._is_killed = False  # nothing else can be done to it
        self._is_held = False  # it has ended, and its status cannot be had

    def poll(self) -> int | None:
        """Return the return code when the process has ended, else None."""
        code = descendants.collect(self.pid)
        if code is not None:
            self._return_code = code
        return self._return_code

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process alone, if it has not ended."""
        descendants.signal_process(self.pid, signum)

    def wait(self, *, timeout: timedelta | None, grace: timedelta, stop: Stop) -> Ending:
        """Wait for the end of the process; bring it about after timeout (None: no limit) or a stop.

        It is asked with SIGTERM and, after grace or a second signal to the shim, made to with
        SIGKILL, and its group with it. Its other descendants are left to end().
        """
        deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        if self.await_end(deadline=deadline, stop=stop):
            code = self.poll() or 0
            # A shell says 137 when the kernel ended what it ran.
            by_sigkill = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
            return Ending(return_code=code, oom_killed=by_sigkill and self._has_oom_kill())
        stopped = stop.requested
        self._terminate(grace, stop)
        ending_code = self.poll()
        return Ending(
            return_code=-signal.SIGKILL if ending_code is None else ending_code,
            timed_out=not stopped,
            stopped=stopped,
        )

    def end(self, *, grace: timedelta = _NO_TIME) -> Leftovers:
        """End the process if it is alive, then all its descendants; say whether that succeeded.

        Takes every orphan that came to us for one of them. Bounded in time.
        """
        deadline = time.monotonic() + descendants.KILL_SECONDS
        if self.poll() is None and not self._is_killed:
            self._terminate(grace, None)
        leftovers = self._end_descendants()
        if self.poll() is None and not self.await_end(deadline=deadline):
            leftovers = replace(leftovers, alive=(self.pid, *leftovers.alive), is_over=False)
        if self._objects is not None:
            self._objects.remove_new()
        return replace(leftovers, ended=self._ended)

    def kill(self, *, seconds: float = descendants.KILL_SECONDS) -> None:
        """End the process, if it is alive, and its group, at once."""
        descendants.signal_group(self.pid, signal.SIGKILL)
        self._is_killed = True
        self.await_end(deadline=time.monotonic() + seconds)

    def _end_descendants(self) -> Leftovers:
        leftovers = descendants.end_descendants(self.pid, kill_all=killer.kill_all)
        self._ended += leftovers.ended
        return leftovers

    def await_end(
        self, *, deadline: float | None, stop: Stop | None = None, stop_count: int = 1
    ) -> bool:
        """Return whether the process ended before the deadline and the stop_count-th signal."""
        poller = select.poll()
        if stop is not None and stop_count == 1:
            poller.register(stop.fileno(), select.POLLIN)
        with _open_pidfd(self.pid) as pidfd:
            if pidfd is not None and not self._is_held:
                poller.register(pidfd, select.POLLIN)
            while self.poll() is None:
                now = time.monotonic()
                if stop is not None and stop.count >= stop_count:
                    return False
                if deadline is not None and now >= deadline:
                    return False
                must_look_again = pidfd is None or self._is_held or (stop and stop_count > 1)
                waits = [] if deadline is None else [deadline - now]
                waits += [_SLICE_SECONDS] if must_look_again else []
                # poll(2) takes no more milliseconds than an int holds: 24.8 days.
                timeout = min([*waits, _LONGEST_WAIT_SECONDS]) * 1000 + 1 if waits else None
                if pidfd in dict(poller.poll(timeout)) and self._is_status_held():
                    poller.unregister(pidfd)  # it stays readable
                    self._end_descendants()
        return True

    def _is_status_held(self) -> bool:
        """Tell whether the process, which has ended, cannot be collected (rule 7)."""
        self._is_held = self.poll() is None and descendants.is_uncollected(self.pid)
        return self._is_held

    def _terminate(self, grace: timedelta, stop: Stop | None) -> None:
        """Ask the group to end, wait for the process for grace, then make them end."""
        if not self._is_held:
            descendants.signal_group(self.pid, signal.SIGTERM)
            descendants.signal_group(self.pid, signal.SIGCONT)  # who is stopped cannot end in order
            deadline = time.monotonic() + grace.total_seconds()
            self.await_end(deadline=deadline, stop=stop, stop_count=2)
        self.kill(seconds=_DYING_SECONDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEvents:
    """Where the kernel tells of our memory cgroup, v1 or v2."""

    cgroup: Path = Path("/proc/self/cgroup")
    root: Path = Path("/sys/fs/cgroup")

    def count_oom_kills(self) -> int:
        """Return how often the kernel killed there; 0 where nobody knows."""
        for text in self._read(v1="memory.oom_control", v2="memory.events"):
            with suppress(ValueError):
                return int(dict(row.split() for row in text.splitlines()).get("oom_kill", 0))
        return 0

    def read_limit_bytes(self) -> int | None:
        """Return how much memory there is; None without a limit, of which v1 has a huge number."""
        limits = self._read(v1="memory.limit_in_bytes", v2="memory.max")
        return min((int(limit) for limit in limits if limit.strip() != "max"), default=None)

    def _read(self, *, v1: str, v2: str) -> Iterator[str]:
        """Yield what the file of this name says, of our cgroup first."""
        with suppress(OSError, ValueError):
            for line in self.cgroup.read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if "memory" in controllers.split(","):
                    directory, name = self.root / "memory", v1
                elif not controllers:
                    directory, name = self.root, v2
                else:
                    continue
                # In a container our own cgroup is often mounted as the root, whatever its path.
                for place in (directory / path.lstrip("/"), directory):
                    with suppress(OSError):
                        yield (place / name).read_text()


@contextmanager
def _open_pidfd(pid: int) -> Iterator[int | None]:
    """Yield a descriptor that is readable when the process has ended, None where there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # before Linux 5.3, or forbidden by an old container engine
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _explain(error: StartError, spec: ProcessSpec) -> str:
    """Return the sentence for the author of the image."""
    if error.step == "exec":
        return explain_exec_error(error.filename, error.errno or 0)
    if error.step == "user":
        return (
            f"The command cannot be run as uid {spec.user.uid}, gid {spec.user.gid}: "
            f"{os.strerror(error.errno or 0)}; start the container as root, with the "
            "capabilities SETUID and SETGID"
        )
    if error.step == "arguments":
        return "An argument or an environment variable of the command is not a valid text"
    return f"The command could not be started, {error.strerror}"


def _name(error: StartError, spec: ProcessSpec) -> str:
    """Return what else its author can use: which command, and what is wrong with it."""
    if error.step != "exec":
        return ""
    number = error.errno or 0
    if explain_exec_error(error.filename, number) == NOT_FOUND:
        return describe_missing(spec.argv[0] if spec.argv else "", spec.env.get("PATH", os.defpath))
    return describe_permission(error.filename, spec.user) if number in NOT_PERMITTED_ERRORS else ""


def _read_all(fds: tuple[int, int], *, deadline: float) -> tuple[bytes, bytes]:
    """Read both pipes to their ends. Raises TimeoutError, or OSError when it is too much."""
    outputs = {fd: bytearray() for fd in fds}
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    remaining = set(fds)
    while remaining:
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "The helper program did not end in time")
        for fd, _ in poller.poll(timeout * 1000):
            data = os.read(fd, 65536)
            outputs[fd] += data
            if not data:
                poller.unregister(fd)
                remaining.discard(fd)
            if len(outputs[fd]) > _MAX_HELPER_BYTES:
                raise OSError(errno.EFBIG, "The helper program wrote too much")
    return bytes(outputs[fds[0]]), bytes(outputs[fds[1]])
