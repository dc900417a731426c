"""Make a new process that becomes a command, as a user, in a session of its own.

Rule 1: between fork and exec the child imports nothing, takes no lock and runs no handler of ours:
        other threads may have been anywhere. We fork ourselves, with all signals blocked, because
        subprocess does no better (its preexec_fn is Python code too) and knows less: not which
        step failed, no signal mask, no limit.
Rule 2: the child has descriptors 0-2, default dispositions, an empty mask, the user's ids and
        limits; cwd and umask are inherited. The shim's own limits, ids and groups never change.
Rule 3: what fails before exec is reported over a pipe that exec closes, and so is what could not
        be done but need not prevent the start.
Rule 4: nothing of the user's has run before the shim forbids its own user to look into it.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import signal
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from shim.frozen import load_everything
from shim.process import descendants
from shim.process.privacy import PR_SET_NO_NEW_PRIVS, find_prctl, forbid_inspection
from shim.process.users import User

_OOM_SCORE_RAISE = 100  # of 1000: the child counts for a tenth of all memory more than the shim
_DEV_NULL = os.makedev(1, 3)
# Less than what the kernel adds to a new stack (fs/exec.c, setup_arg_pages), enough for arguments.
_NO_ROOM_BYTES = 64 * 1024
_MAX_FDS = 1 << 20  # fs.nr_open: no descriptor is higher unless an administrator raised it
_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_WARNINGS = {
    "groups": "The command keeps the supplementary groups that this program was started with: "
    "setting others is not permitted here",
    "privileges": "The command may gain privileges from setuid programs: "
    "the kernel refuses PR_SET_NO_NEW_PRIVS",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSpec:
    """What to start, and as whom.

    - user: uid and gid None keep the shim's; else the supplementary groups become user.groups
    - memory_limit_bytes: RLIMIT_DATA of the child and of what it starts
    - no_new_privileges: no setuid program, nor one with capabilities, gives it those of another
    - is_trial: no instruction of the command runs. The kernel accepts or refuses it as ever, but
      has no room to load it and kills the child; long arguments have no room either
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    user: User
    memory_limit_bytes: int | None = None
    no_new_privileges: bool = True
    is_trial: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A running child; the fds are the read ends of its pipes, and the caller's to close.

    - warnings: sentences on what could not be done for it
    """

    pid: int
    stdout_fd: int
    stderr_fd: int
    warnings: tuple[str, ...] = ()


class StartError(OSError):
    """A child could not become the command; `step` says what failed, `filename` on which file."""

    def __init__(self, error_number: int, step: str, path: str) -> None:
        super().__init__(error_number, f"{step}: {os.strerror(error_number)}", path)
        self.step = step


def launch(spec: ProcessSpec) -> Launched:
    """Start a command; return when it runs. Raises StartError."""
    load_everything()
    is_hidden = forbid_inspection()
    command = _Command.from_spec(spec)
    with ExitStack() as ours:
        with ExitStack() as theirs:
            stdin = _open_stdin()
            theirs.callback(os.close, stdin)
            stdout, stdout_end = _open_pipe(ours, theirs)
            stderr, stderr_end = _open_pipe(ours, theirs)
            report, report_end = _open_pipe(ours, theirs)
            if spec.user.uid is not None:
                for end in (stdout_end, stderr_end):  # else the user cannot open /dev/stdout
                    with suppress(OSError):
                        os.fchown(end, spec.user.uid, -1)
            pid = _fork(command, (stdin, stdout_end, stderr_end, report_end))
        *warnings, failure = _read_report(report)
        if failure:
            while descendants.collect(pid) is None:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            raise command.read_failure(failure)
        if is_hidden:  # until exec, the child's files in /proc were root's
            _set_oom_score(f"/proc/{pid}", command.oom_score)
        os.close(report)
        ours.pop_all()
    return Launched(
        pid=pid,
        stdout_fd=stdout,
        stderr_fd=stderr,
        warnings=tuple(_WARNINGS[warning] for warning in warnings),
    )


def _read_report(fd: int) -> list[str]:
    """Return the names of warnings and, last, the failure or an empty text."""
    report = b""
    while data := os.read(fd, 1024):
        report += data
    return report.decode().split("\n")


def _open_pipe(readers: ExitStack, writers: ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    readers.callback(os.close, reader)
    writers.callback(os.close, writer)
    return reader, writer


def _open_stdin() -> int:
    """Open /dev/null, or what reads like it where an image has none or something else there."""
    with suppress(OSError):
        fd = os.open("/dev/null", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEV_NULL:
            return fd
        os.close(fd)
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _fork(command: _Command, fds: tuple[int, int, int, int]) -> int:
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, _SIGNALS)
    try:
        pid = descendants.fork()
        if pid == 0:
            command.become(fds)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Command:
    """All that a child needs to become the command, ready to hand to the kernel."""

    argv: list[bytes]
    env: dict[bytes, bytes]
    candidates: list[bytes]  # the paths to try, in order
    user: User
    memory_limit_bytes: int | None
    oom_score: bytes
    prctl: Callable[[int, int], bool]
    no_new_privileges: bool
    is_trial: bool

    @staticmethod
    def from_spec(spec: ProcessSpec) -> _Command:
        name = spec.argv[0] if spec.argv else ""
        folders = [] if "/" in name else spec.env.get("PATH", os.defpath).split(os.pathsep)
        paths = [os.path.join(folder, name) for folder in folders] or [name]
        if not name:
            raise StartError(errno.ENOENT, "exec", name)
        if any("\0" in text for text in (*spec.argv, *spec.env, *spec.env.values())):
            raise StartError(errno.EINVAL, "arguments", name)
        try:
            return _Command(
                argv=[os.fsencode(text) for text in spec.argv],
                env={os.fsencode(key): os.fsencode(value) for key, value in spec.env.items()},
                candidates=[os.fsencode(path) for path in paths],
                user=spec.user,
                memory_limit_bytes=spec.memory_limit_bytes,
                oom_score=_choose_oom_score(),
                prctl=find_prctl(),
                no_new_privileges=spec.no_new_privileges,
                is_trial=spec.is_trial,
            )
        except UnicodeEncodeError:  # JSON can name half of a surrogate pair
            raise StartError(errno.EINVAL, "arguments", name) from None

    def become(self, fds: tuple[int, int, int, int]) -> NoReturn:
        """Make this child the command, or report why not and leave (rules 1 and 2)."""
        report = fds[3]
        step, number, which = "session", errno.ENOMEM, 0
        try:
            gc.disable()  # no finaliser of ours
            os.setsid()
            step = "streams"
            # First out of the way of each other: any of them may be one of 0 to 3.
            moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 4) for fd in fds]
            for target, fd in enumerate(moved):
                os.dup2(fd, target, inheritable=target < 3)
            report = 3
            os.closerange(4, _MAX_FDS)
            step = "signals"
            for signum in _SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
            _set_oom_score("/proc/self", self.oom_score)
            step = "user"
            self._switch_user(report)
            if self.no_new_privileges and not self.prctl(PR_SET_NO_NEW_PRIVS, 1):
                os.write(report, b"privileges\n")
            step = "memory limit"
            self._limit_memory()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if self.is_trial:
                _leave_no_room()
            step = "exec"
            number, which = self._exec()
        except OSError as error:
            number = error.errno or number
        finally:
            os.write(report, f"{step}:{number}:{which}".encode())
            os._exit(127)

    def _switch_user(self, report: int) -> None:
        """Become the user. Where that changes nothing it may be forbidden, and is not asked for."""
        uid, gid = self.user.uid, self.user.gid
        is_right = uid in (None, os.geteuid()) and gid in (None, os.getegid())
        if (uid is not None or gid is not None) and os.geteuid() == 0:
            primary = os.getegid() if gid is None else gid
            if {primary, *self.user.groups} != {primary, *os.getgroups()}:
                try:
                    os.setgroups(self.user.groups)
                except PermissionError:
                    if not is_right:
                        raise
                    os.write(report, b"groups\n")
        if gid is not None and os.getresgid() != (gid,) * 3:
            os.setresgid(gid, gid, gid)
        if uid is not None and os.getresuid() != (uid,) * 3:
            os.setresuid(uid, uid, uid)

    def _limit_memory(self) -> None:
        """Set RLIMIT_DATA, as the last thing that could need memory itself."""
        limit = self.memory_limit_bytes
        if limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def _exec(self) -> tuple[int, int]:
        """Try each path, as execvpe does; return the error that counts and which path it met."""
        failure = (errno.ENOENT, -1)
        for which, path in enumerate(self.candidates):
            try:
                os.execve(path, self.argv, self.env)
            except OSError as error:
                number = error.errno or errno.EINVAL
                if number not in (errno.ENOENT, errno.ENOTDIR) and failure[1] < 0:
                    failure = (number, which)
        return failure

    def read_failure(self, report: str) -> StartError:
        """Return what the child reported as an exception."""
        step, number, which = report.split(":")
        # "Not found" of a file that is there speaks of its interpreter.
        existing = [path for path in self.candidates if os.path.lexists(path)]
        path = self.candidates[int(which)]
        if int(which) < 0 and existing:
            path = existing[0]
        return StartError(int(number), step, os.fsdecode(path))


def _leave_no_room() -> None:
    """Let the next exec be decided, but never be completed, nor leave a core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # core(5): also for those sent to a program
    resource.setrlimit(resource.RLIMIT_AS, (_NO_ROOM_BYTES, _NO_ROOM_BYTES))


def _choose_oom_score() -> bytes:
    """Return a score at which the kernel ends the user's processes before the shim."""
    try:
        with open("/proc/self/oom_score_adj", "rb") as file:
            return b"%d" % min(1000, int(file.read()) + _OOM_SCORE_RAISE)
    except (OSError, ValueError):
        return b""


def _set_oom_score(directory: str, score: bytes) -> None:
    with suppress(OSError):
        fd = os.open(f"{directory}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, score)
        finally:
            os.close(fd)
