"""The request to stop, made for a signal and seen by every wait; signals that are the command's."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from shim.contract.errors import TaskStopped

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Protocol

    class HasFileno(Protocol):
        def fileno(self) -> int: ...


STOPPED_MESSAGE = "The task was stopped before it finished"


class Stop:
    """A request that is made once, never taken back, and that poll(2) can wait for.

    - signal_command: sends a signal to the command, while there is one
    """

    def __init__(self) -> None:
        self.signal_command: Callable[[int], None] | None = None
        self.signum: int | None = None
        self.count = 0
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def requested(self) -> bool:
        return self.count > 0

    def request(self, signum: int) -> None:
        """Ask everybody to stop; the first signal is the one that counts for the exit code."""
        if self.signum is None:
            self.signum = signum
        self.count += 1
        os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable from the first request on; nobody reads it."""
        return self._event

    def check(self) -> None:
        """Raise TaskStopped when a stop was requested."""
        if self.requested:
            raise TaskStopped(STOPPED_MESSAGE)


def wait_readable(*sources: HasFileno, seconds: float | None = None) -> bool:
    """Block until one of the descriptors can be read, or for so long; say whether one can."""
    poller = select.poll()
    for source in sources:
        poller.register(source.fileno(), select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))
