"""What the HTTP edge calls: one task at a time, and the health of the container."""

from __future__ import annotations

import os
import threading

from shim.contract.errors import UserSafeError
from shim.contract.tasks import parse_task
from shim.log.log import Log
from shim.process.sockets import Ends, find_client
from shim.process.users import resolve_user
from shim.runner.task import Runner
from shim.serve.protocol import Busy, Forbidden, Unhealthy

FORBIDDEN_MESSAGE = "An algorithm may not ask for tasks itself"
UNHEALTHY_MESSAGE = "Container unhealthy, terminating process"


def resolve_command_uid(user: str) -> int | None:
    """Return the uid of the image's command; None where it is ours, or root's, or nobody's."""
    try:
        uid = resolve_user(user).uid
    except UserSafeError:  # such a command never starts
        return None
    return None if uid in (0, os.geteuid()) else uid


class Service:
    """Answer invocations with a runner once set-up has succeeded.

    - command_uid: whose clients in our network namespace are refused; None where it is ours
    """

    def __init__(self, *, runner: Runner, log: Log, command_uid: int | None = None) -> None:
        self._runner = runner
        self._command_uid = command_uid
        self._log = log
        self._is_ready = False
        self._running = threading.Lock()
        self._leave = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def open(self) -> None:
        """Accept tasks from now on."""
        self._is_ready = True

    def is_healthy(self) -> bool:
        return self._is_ready and self._runner.is_healthy

    def check_client(self, connection: Ends) -> None:
        """Refuse the algorithm, and who may have been it: a socket here that nobody has any more.

        Raises Forbidden.
        """
        if self._command_uid is None:
            return
        client = find_client(connection)
        if client.is_local and client.uid in (None, self._command_uid):
            host, port = connection.client
            owner = "nobody any more" if client.uid is None else f"uid {client.uid}"
            self._log.error(
                f"{FORBIDDEN_MESSAGE}: an invocation from {host}:{port}, the socket of {owner}, "
                "was refused",
                internal=False,
            )
            raise Forbidden(FORBIDDEN_MESSAGE)

    def invoke(self, body: bytes, connection: Ends) -> bytes:
        """Run the task that body describes and return its result.

        Raises Unhealthy, InvalidTasks, Forbidden, Busy while another task runs, and what run_task
        raises.
        """
        if not self.is_healthy():
            raise Unhealthy
        # Parsing too: the largest body takes seconds, and some hundred MiB.
        if not self._running.acquire(blocking=False):
            raise Busy
        try:
            if not self.is_healthy():
                raise Unhealthy
            task = parse_task(body)
            self.check_client(connection)
            return self._runner.run_task(task).to_json()
        finally:
            self._running.release()

    def leave_if_unhealthy(self) -> None:
        """Ask to leave once the task that made the container unhealthy has been answered."""
        if self._is_ready and not self._runner.is_healthy:
            self._log.error(UNHEALTHY_MESSAGE)
            os.eventfd_write(self._leave, 1)

    def notice_death(self) -> None:
        """Ask to leave when the image's server has ended although no task is in hand."""
        if self._running.acquire(blocking=False):
            try:
                self.leave_if_unhealthy()
            finally:
                self._running.release()

    def fileno(self) -> int:
        """Return a descriptor that is readable when the process should leave."""
        return self._leave

    def close(self, *, timeout_seconds: float) -> bool:
        """Accept no more tasks; return whether the one in hand ended within the time."""
        self._is_ready = False
        return self._running.acquire(timeout=timeout_seconds)
