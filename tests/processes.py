"""Start commands in tests as the shim does, and see what came of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from shim.process.launch import ProcessSpec
from shim.process.process import Ending, Process, start
from shim.process.stopping import Stop
from shim.process.users import User

PYTHON = sys.executable
ENVIRONMENT = {"PATH": os.environ["PATH"]}
GRACE = timedelta(seconds=5)
NEVER = Stop()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a command: how it ended, what it wrote, how many it left behind."""

    ending: Ending
    stdout: str
    stderr: str
    ended: int


def spec(*argv: str, user: User | None = None, **options: object) -> ProcessSpec:
    return ProcessSpec(argv=argv, user=user or User(), **{"env": ENVIRONMENT, **options})


def begin(*argv: str, **options: object) -> Process:
    return start(spec(*argv, **options))


def close(process: Process) -> tuple[str, str]:
    """Return what is left to read of the process's streams, to their ends."""
    texts = []
    for fd in (process.stdout_fd, process.stderr_fd):
        with open(fd, encoding="utf-8") as file:
            texts.append(file.read())
    return texts[0], texts[1]


def run(*argv: str, timeout: timedelta | None = None, **options: object) -> Ran:
    """Run a command that writes little, to its end."""
    process = begin(*argv, **options)
    ending = process.wait(timeout=timeout, grace=GRACE, stop=NEVER)
    ended = process.end().ended
    stdout, stderr = close(process)
    return Ran(ending=ending, stdout=stdout, stderr=stderr, ended=ended)


def read_line(process: Process) -> str:
    """Return the next line of stdout: a command announces itself so."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(process.stdout_fd, 1)
        assert data, f"ended early: {line!r}"
        line += data
    return line.decode().strip()


def read_stat(pid: int | str) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; [] when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    return read_stat(pid)[:1] not in ([], ["Z"], ["X"])


def count_zombies() -> int:
    """Return how many of our children nobody has collected."""
    us = str(os.getpid())
    return sum(read_stat(pid)[:2] == ["Z", us] for pid in os.listdir("/proc") if pid.isdigit())


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))
