"""What several test modules share: skips with their reasons, free ports, polling."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: switches users")

UNPRIVILEGED_UID = 65534


def can_unshare() -> bool:
    """Tell whether PID namespaces can be made here."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def poll(condition: Callable[[], object], *, seconds: float = 10, every: float = 0.01) -> object:
    """Return the first true value of condition(); fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {seconds} s: {condition}")
        time.sleep(every)
    return value


def limit_rate(sock: socket.socket, bytes_a_second: int) -> None:
    """Have the kernel send no faster on a connection."""
    so_max_pacing_rate = 47  # the socket module has no name for it
    sock.setsockopt(socket.SOL_SOCKET, so_max_pacing_rate, bytes_a_second)


def signal_set(mask: str) -> set[int]:
    """Return the signals of a mask in /proc/PID/status but for 32 and 33.

    Those belong to the C library; glibc's posix_spawn has them ignored in what it starts, and so
    in all that descends from it.
    """
    bits = int(mask, 16)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1} - {32, 33}


# Hundreds of processes that do nothing but fork, leave their session, and end: who looks at /proc
# finds hardly anybody at home.
STORM = """
import os, resource, sys
COUNT = 400
resource.setrlimit(resource.RLIMIT_NPROC, (COUNT, COUNT))
for _ in range(COUNT):
    try:
        if os.fork() == 0:
            while True:
                try:
                    if os.fork():
                        os._exit(0)
                    os.setsid()
                except OSError:
                    pass
    except OSError:
        break
print("ready", flush=True)
"""
