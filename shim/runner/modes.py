"""The ways in which an image's command does a task; here the one that most images use.

exec    the command is started for each task and runs to its end
invoke  the command is a server, started once: see shim.runner.invoke_mode
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from shim.contract.settings import Settings
from shim.contract.tasks import InferenceTask
from shim.log.log import Log
from shim.process.stopping import Stop
from shim.runner.user_command import SURVIVORS_MESSAGE, UserCommand

TYPE_CHECKING = False  # typing: 3 ms, process: 12 ms
if TYPE_CHECKING:
    from typing import Protocol

    from shim.process.process import Ending
else:
    Protocol = object

TIME_LIMIT_MESSAGE = "Time limit exceeded"
MEMORY_MESSAGE = (
    "The algorithm was ended because it needed more memory than is available to it; "
    "reduce its memory use or ask for an instance with more"
)
# What a shell reports for SIGKILL: platforms read it as "exceeded its memory limit".
OUT_OF_MEMORY_RETURN_CODE = 137
# As the process itself ends by SIGBUS, and as a shell reports it of what it ran.
BUS_ERROR_RETURN_CODES = (-signal.SIGBUS, 128 + signal.SIGBUS)
FATAL_SIGNALS = {
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGSYS,
}
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one run.

    - durations: None when the run never began
    - is_healthy: whether another task may follow in this process
    """

    return_code: int
    user_safe_error_message: str = ""
    last_stderr_lines: tuple[str, ...] = ()
    exec_duration: timedelta | None = None
    invoke_duration: timedelta | None = None
    is_healthy: bool = True
    stopped: bool = False


class Mode(Protocol):
    """One API method. Every call may raise UserSafeError."""

    def setup(self) -> None:
        """Make ready for the first task."""

    def run(self, task: InferenceTask) -> Outcome:
        """Do one task; nothing that it started is alive when this returns."""

    def is_alive(self) -> bool:
        """Tell whether what setup() started can still do a task; must not block."""

    def teardown(self) -> None:
        """End what setup() started; never raises."""


class ExecMode:
    """Start the command for each task and wait for its end."""

    def __init__(
        self,
        *,
        command: UserCommand,
        settings: Settings,
        log: Log,
        stop: Stop,
        clock: Callable[[], float],
    ) -> None:
        self._command, self._settings, self._log = command, settings, log
        self._stop, self._clock = stop, clock

    def setup(self) -> None:
        """Refuse an image without a command before any task begins."""
        self._command.find()

    def run(self, task: InferenceTask) -> Outcome:
        """Run the command to its end, its time limit or a stop; the limit covers the run alone."""
        if task.timeout is not None and task.timeout <= timedelta(0):
            return refuse_time_limit(self._log, task)
        began = self._clock()
        process, relay = self._command.start(task.pk)
        try:
            ending = process.wait(
                timeout=task.timeout, grace=self._settings.sigterm_grace, stop=self._stop
            )
            duration = timedelta(seconds=self._clock() - began)
        finally:
            is_over = self._command.end(process, relay)
        return_code, message = read_ending(ending)
        if not is_over and not message:
            return_code, message = 1, SURVIVORS_MESSAGE
        if return_code in BUS_ERROR_RETURN_CODES:
            self._log.error(_explain_bus_error(), internal=False, task=task.pk)
        elif not message and (cause := _explain_signal(return_code)):
            self._log.error(cause, internal=False, task=task.pk)
        if message:
            self._log.error(message, internal=False, task=task.pk)
        return Outcome(
            return_code=return_code,
            user_safe_error_message=message,
            last_stderr_lines=relay.last_stderr_lines,
            exec_duration=duration,
            is_healthy=is_over and not ending.timed_out,
            stopped=ending.stopped,
        )

    def is_alive(self) -> bool:
        """Each task has a process of its own."""
        return True

    def teardown(self) -> None:
        """Nothing outlives a task."""


def refuse_time_limit(log: Log, task: InferenceTask) -> Outcome:
    """Start nothing for a task that has no time."""
    log.error(TIME_LIMIT_MESSAGE, internal=False, task=task.pk)
    return Outcome(return_code=1, user_safe_error_message=TIME_LIMIT_MESSAGE)


def _explain_bus_error() -> str:
    """Name what most often causes it: data loaders that share more memory than there is."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        size = "is missing"
    else:
        size = f"holds at most {status.f_blocks * status.f_frsize >> 20} MiB"
    return (
        f"The algorithm was ended by SIGBUS: often shared memory is full; {SHARED_MEMORY} {size}. "
        "Use fewer worker processes, or keep what they share in files"
    )


def name_signal(number: int) -> str:
    """Return the number of a signal and its name, which real-time ones have not."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _explain_signal(return_code: int) -> str:
    """Name the signal that the author did not send; a shell reports that of what it ran."""
    if return_code < 0:
        return f"The algorithm was ended by {name_signal(-return_code)}"
    if return_code - 128 in FATAL_SIGNALS:
        return f"What the algorithm ran was ended by {name_signal(return_code - 128)}"
    return ""


def read_ending(ending: Ending) -> tuple[int, str]:
    """Return the return code and what the author is told."""
    if ending.timed_out:
        return 1, TIME_LIMIT_MESSAGE
    if ending.oom_killed:
        return OUT_OF_MEMORY_RETURN_CODE, MEMORY_MESSAGE
    return ending.return_code, ""
