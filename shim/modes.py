"""The two ways in which an image's command does a task.

exec    the command is started for each task and runs to its end
invoke  the command is a server, started once:  GET /health until 200, then POST /invoke per task
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from shim.command import child_environment, resolve_argv
from shim.errors import UserSafeError
from shim.logs import Log
from shim.loopback import Abandoned, BrokenAnswer, CannotConnect, exchange
from shim.launch import ProcessSpec
from shim.process import Ending, Process, start
from shim.relay import Relay
from shim.settings import Settings
from shim.stopping import Stop
from shim.tasks import InferenceTask
from shim.users import resolve_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol
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
SHARED_MEMORY = "/dev/shm"

START_MESSAGE = "Failed to start the algorithm container's inference server"
CONNECT_MESSAGE = "Could not connect to invoke endpoint"
HTTP_MESSAGE = "HTTP error calling invoke endpoint"
HEALTH_MESSAGE = (
    "The algorithm container's inference server didn\u2019t pass the health check within {} "
    "seconds or the /health endpoint took to long to respond ({} seconds per call). "
    "Verify that the container starts correctly and that /health responds quickly."
)
HEALTHY_STATUS = 200
INVOKED_STATUS = 201
FIRST_POLL_SECONDS = 0.05
LAST_POLL_SECONDS = 1.0
# How much of the server's stderr an author is shown at once when it died.
SHOWN_STDERR_LINES = 10


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


def resolve_spec(settings: Settings, environ: Mapping[str, str]) -> ProcessSpec:
    """Say how the image's command is started: argv, user, environment and limits.

    Raises UserSafeError when the image has no command or its USER cannot be resolved.
    """
    argv = resolve_argv(entrypoint=settings.entrypoint, cmd=settings.cmd)
    user = resolve_user(settings.user)
    return ProcessSpec(
        argv=argv,
        env=child_environment(environ, home=user.home),
        user=user if settings.set_extra_groups else replace(user, groups=()),
        memory_limit_bytes=settings.max_memory_mb * 1024 * 1024 or None,
    )


class _BaseMode:
    """What both methods need."""

    def __init__(
        self,
        *,
        settings: Settings,
        environ: Mapping[str, str],
        log: Log,
        stop: Stop,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._log = log
        self._stop = stop
        self._clock = clock

    def _start(self, task: str | None) -> tuple[Process, Relay]:
        """Start the command and relay what it writes."""
        spec = resolve_spec(self._settings, self._environ)
        self._log.info(f"Running {list(spec.argv)}")
        relay = Relay(self._log, task=task)
        process = start(spec)
        relay.attach(process.stdout_fd, source="stdout")
        relay.attach(process.stderr_fd, source="stderr")
        relay.start()
        return process, relay

    def _end(self, process: Process, relay: Relay) -> None:
        """End the command with everything that it started, and write all that it wrote."""
        ended = process.end(grace=self._settings.sigterm_grace)
        relay.finish()
        if ended:
            self._log.info(f"Ended {ended} processes that the command left behind")


class ExecMode(_BaseMode):
    """Start the command for each task and wait for its end."""

    def setup(self) -> None:
        """Refuse an image without a command before any task begins."""
        resolve_argv(entrypoint=self._settings.entrypoint, cmd=self._settings.cmd)

    def run(self, task: InferenceTask) -> Outcome:
        """Run the command to its end, its time limit or a stop; the limit covers the run alone."""
        if task.timeout is not None and task.timeout <= timedelta(0):
            return _refuse_time_limit(self._log, task)
        began = self._clock()
        process, relay = self._start(task.pk)
        try:
            ending = process.wait(
                timeout=task.timeout, grace=self._settings.sigterm_grace, stop=self._stop
            )
            duration = timedelta(seconds=self._clock() - began)
        finally:
            self._end(process, relay)
        return_code, message = _read_ending(ending)
        if return_code in BUS_ERROR_RETURN_CODES:
            self._log.error(_explain_bus_error(), internal=False, task=task.pk)
        if message:
            self._log.error(message, internal=False, task=task.pk)
        return Outcome(
            return_code=return_code,
            user_safe_error_message=message,
            last_stderr_lines=relay.last_stderr_lines,
            exec_duration=duration,
            is_healthy=not ending.timed_out,
            stopped=ending.stopped,
        )

    def is_alive(self) -> bool:
        """Each task has a process of its own."""
        return True

    def teardown(self) -> None:
        """Nothing outlives a task."""


class InvokeMode(_BaseMode):
    """Start the command once, as a server, and ask it to do each task."""

    _process: Process | None = None
    _relay: Relay | None = None

    def setup(self) -> None:
        """Start the server and wait until it is healthy."""
        try:
            self._process, self._relay = self._start(None)
            self._await_health(self._process)
        except TimeoutError as error:
            self.teardown()
            raise UserSafeError(
                HEALTH_MESSAGE.format(
                    f"{self._settings.start_and_health_timeout.total_seconds():.0f}",
                    f"{self._settings.health_check_call_timeout.total_seconds():.0f}",
                )
            ) from error
        except UserSafeError as error:
            self._tell_death(f"Could not start server: {error}", task=None)
            self.teardown()
            raise UserSafeError(START_MESSAGE) from error

    def run(self, task: InferenceTask) -> Outcome:
        """Ask the server to do the task; 201 says that it has."""
        if task.timeout is not None and task.timeout <= timedelta(0):
            return _refuse_time_limit(self._log, task)
        assert self._process is not None and self._relay is not None
        self._relay.set_task(task.pk)
        began = self._clock()
        return_code, message, is_healthy = self._invoke(self._process, task)
        duration = timedelta(seconds=self._clock() - began)
        self._relay.flush()
        if self._process.poll() is not None:
            is_healthy = False
            ending = self._process.wait(timeout=None, grace=timedelta(0), stop=self._stop)
            if ending.oom_killed:
                return_code, message = _read_ending(ending)
            self._tell_death("The inference server has ended", task=task.pk)
        if message:
            self._log.error(message, internal=False, task=task.pk)
        return Outcome(
            return_code=return_code,
            user_safe_error_message=message,
            last_stderr_lines=self._relay.last_stderr_lines,
            invoke_duration=duration,
            is_healthy=is_healthy,
            stopped=self._stop.requested and return_code != 0,
        )

    def is_alive(self) -> bool:
        """Tell whether the server is there."""
        return self._process is not None and self._process.poll() is None

    def teardown(self) -> None:
        """End the server, whatever holds its pipes."""
        if self._process is not None and self._relay is not None:
            self._end(self._process, self._relay)
            self._process = None

    def _await_health(self, process: Process) -> None:
        """Poll until 200. Raises TimeoutError, or UserSafeError when it will never be healthy."""
        deadline = self._clock() + self._settings.start_and_health_timeout.total_seconds()
        pause = FIRST_POLL_SECONDS
        while self._check_health(process, deadline) != HEALTHY_STATUS:
            self._stop.check()
            remaining = deadline - self._clock()
            if remaining <= 0:
                raise TimeoutError
            process.await_end(deadline=time.monotonic() + min(pause, remaining), stop=self._stop)
            pause = min(pause * 1.5, LAST_POLL_SECONDS)
        self._log.info("The inference server is healthy")

    def _check_health(self, process: Process, deadline: float) -> int | None:
        """Return what /health answers, or None."""
        if process.poll() is not None:
            raise UserSafeError("it ended before it was healthy")
        call = self._settings.health_check_call_timeout.total_seconds()
        try:
            status = exchange(
                "GET",
                "/health",
                port=self._settings.user_webserver_port,
                timeout_seconds=min(call, deadline - self._clock()),
                is_abandoned=self._is_abandoned,
            )
        except (CannotConnect, BrokenAnswer, Abandoned, TimeoutError) as error:
            self._log.debug(f"No answer from /health: {error!r}")
            return None
        if 300 <= status < 400:
            raise UserSafeError("Health endpoint returned redirect response")
        self._log.debug(f"/health answered {status}")
        return status

    def _invoke(self, process: Process, task: InferenceTask) -> tuple[int, str, bool]:
        """Return the return code, what the author is told, and whether the server can go on."""
        try:
            status = exchange(
                "POST",
                "/invoke",
                port=self._settings.user_webserver_port,
                timeout_seconds=None if task.timeout is None else task.timeout.total_seconds(),
                is_abandoned=self._is_abandoned,
            )
        except TimeoutError:
            return 1, TIME_LIMIT_MESSAGE, False
        except (CannotConnect, BrokenAnswer, Abandoned) as error:
            message = CONNECT_MESSAGE if isinstance(error, CannotConnect) else HTTP_MESSAGE
            self._log.error(f"{message}: {error}")
            # Connections are closed some time before the process that held them has ended.
            has_ended = process.await_end(deadline=time.monotonic() + LAST_POLL_SECONDS)
            return 1, message, not has_ended and message != CONNECT_MESSAGE
        if status == INVOKED_STATUS:
            return 0, "", True
        self._log.error(
            f"Invoke endpoint returned status {status}, expected {INVOKED_STATUS}",
            internal=False,
            task=task.pk,
        )
        return 1, "", True

    def _is_abandoned(self) -> bool:
        return self._stop.requested or self._process is None or self._process.poll() is not None

    def _tell_death(self, message: str, *, task: str | None) -> None:
        """Show the author how the server ended and what it said last."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            message += f" (signal {-code})" if code < 0 else f" (exit status {code})"
        if self._relay is not None:
            self._relay.flush()
            shown = self._relay.last_stderr_lines[-SHOWN_STDERR_LINES:]
            message += "".join(["; its last lines on stderr:\n" * bool(shown), *shown])
        self._log.error(message, internal=False, task=task)


def _refuse_time_limit(log: Log, task: InferenceTask) -> Outcome:
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


def _read_ending(ending: Ending) -> tuple[int, str]:
    """Return the return code and what the author is told."""
    if ending.timed_out:
        return 1, TIME_LIMIT_MESSAGE
    if ending.oom_killed:
        return OUT_OF_MEMORY_RETURN_CODE, MEMORY_MESSAGE
    return ending.return_code, ""
