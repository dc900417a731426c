"""What the HTTP edge calls: one task at a time, and the health of the container."""

from __future__ import annotations

import os
import threading

from shim.logs import Log
from shim.runner import Runner
from shim.server import Busy, Unhealthy
from shim.tasks import parse_task

UNHEALTHY_MESSAGE = "Container unhealthy, terminating process"


class Service:
    """Answer invocations with a runner once set-up has succeeded."""

    def __init__(self, *, runner: Runner, log: Log) -> None:
        self._runner = runner
        self._log = log
        self._is_ready = False
        self._running = threading.Lock()
        self._leave = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def open(self) -> None:
        """Accept tasks from now on."""
        self._is_ready = True

    def is_healthy(self) -> bool:
        return self._is_ready and self._runner.is_healthy

    def invoke(self, body: bytes) -> bytes:
        """Run the task that body describes and return its result.

        Raises Unhealthy, InvalidTasks, Busy while another task runs, and what run_task raises.
        """
        if not self.is_healthy():
            raise Unhealthy
        task = parse_task(body)
        if not self._running.acquire(blocking=False):
            raise Busy
        try:
            if not self.is_healthy():
                raise Unhealthy
            return self._runner.run_task(task).to_json()
        finally:
            self._running.release()

    def answered(self) -> None:
        """Ask to leave once the task that made the container unhealthy has been answered."""
        if self._is_ready and not self._runner.is_healthy:
            self._log.error(UNHEALTHY_MESSAGE)
            os.eventfd_write(self._leave, 1)

    def notice_death(self) -> None:
        """Ask to leave when the image's server has ended although no task is in hand."""
        if self._running.acquire(blocking=False):
            try:
                self.answered()
            finally:
                self._running.release()

    def fileno(self) -> int:
        """Return a descriptor that is readable when the process should leave."""
        return self._leave

    def close(self, *, timeout_seconds: float) -> bool:
        """Accept no more tasks; return whether the one in hand ended within the time."""
        self._is_ready = False
        return self._running.acquire(timeout=timeout_seconds)
