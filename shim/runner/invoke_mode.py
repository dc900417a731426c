"""The API method in which the image's command is a server.

It is started once:  GET /health until 200, then POST /invoke for each task
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from shim.contract.errors import UserSafeError
from shim.contract.settings import Settings
from shim.contract.tasks import InferenceTask
from shim.http.errors import TransportError
from shim.http.loopback import CannotConnect, TimedOut, exchange
from shim.log.log import Log
from shim.log.relay import Relay
from shim.process.process import Process
from shim.process.sockets import find_listening_ports
from shim.process.stopping import Stop
from shim.runner.modes import (
    TIME_LIMIT_MESSAGE,
    Outcome,
    name_signal,
    read_ending,
    refuse_time_limit,
)
from shim.runner.user_command import UserCommand

START_MESSAGE = "Failed to start the algorithm container's inference server"
CONNECT_MESSAGE = "Could not connect to invoke endpoint"
HTTP_MESSAGE = "HTTP error calling invoke endpoint"
HEALTH_MESSAGE = (
    "The algorithm container's inference server didn\u2019t pass the health check within {} "
    "seconds or the /health endpoint took to long to respond ({} seconds per call). "
    "Verify that the container starts correctly and that /health responds quickly. "
    "It is expected to listen on port {}{}."
)
STATUS_MESSAGE = "Invoke endpoint returned status {}, expected {}"
HEALTHY_STATUS = 200
INVOKED_STATUS = 201
FIRST_POLL_SECONDS = 0.05
LAST_POLL_SECONDS = 1.0
# How much of the server's stderr an author is shown at once when it died.
SHOWN_STDERR_LINES = 10


class InvokeMode:
    """Start the command once, as a server, and ask it to do each task."""

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
        self._process: Process | None = None
        self._relay: Relay | None = None

    def setup(self) -> None:
        """Start the server and wait until it is healthy."""
        try:
            self._process, self._relay = self._command.start(None)
            self._await_health(self._process)
        except TimeoutError as error:
            message = self._explain_health()
            self.teardown()
            raise UserSafeError(message) from error
        except UserSafeError as error:
            self._report_death(f"Could not start server: {error}", task=None)
            self.teardown()
            raise UserSafeError(START_MESSAGE) from error

    def run(self, task: InferenceTask) -> Outcome:
        """Ask the server to do the task; a whole answer of 201 says that it has."""
        if task.timeout is not None and task.timeout <= timedelta(0):
            return refuse_time_limit(self._log, task)
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
                return_code, message = read_ending(ending)
            self._report_death("The inference server has ended", task=task.pk)
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
            self._command.end(self._process, self._relay)
            self._process = None

    def _explain_health(self) -> str:
        """Return what the author is told of a server that did not become healthy in time."""
        port = self._settings.user_webserver_port
        others = [str(found) for found in find_listening_ports() if found != port]
        return HEALTH_MESSAGE.format(
            f"{self._settings.start_and_health_timeout.total_seconds():.0f}",
            f"{self._settings.health_check_call_timeout.total_seconds():.0f}",
            port,
            f"; the command listens on {', '.join(others)}" if others else "",
        )

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
        except TransportError as error:
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
        except TimedOut:
            return 1, TIME_LIMIT_MESSAGE, False
        except TransportError as error:
            message = CONNECT_MESSAGE if isinstance(error, CannotConnect) else HTTP_MESSAGE
            self._log.error(f"{message}: {error}")
            # Connections are closed some time before the process that held them has ended.
            has_ended = process.await_end(deadline=time.monotonic() + LAST_POLL_SECONDS)
            return 1, message, not has_ended and message != CONNECT_MESSAGE
        if status == INVOKED_STATUS:
            return 0, "", True
        assert self._relay is not None
        self._relay.flush()  # what the author's own code says of it comes first
        self._log.error(STATUS_MESSAGE.format(status, INVOKED_STATUS), internal=False, task=task.pk)
        return 1, "", True

    def _is_abandoned(self) -> bool:
        return self._stop.requested or self._process is None or self._process.poll() is not None

    def _report_death(self, message: str, *, task: str | None) -> None:
        """Show the author how the server ended and what it said last."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            message += f", by {name_signal(-code)}" if code < 0 else f", exit status {code}"
        if self._relay is not None:
            self._relay.flush()
            shown = self._relay.last_stderr_lines[-SHOWN_STDERR_LINES:]
            message += "".join(["; its last lines on stderr:\n" * bool(shown), *shown])
        self._log.error(message, internal=False, task=task)
