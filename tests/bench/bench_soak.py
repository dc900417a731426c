"""Soak: 2,000 tasks in one `invoke`, then 2,000 requests to one `serve`; nothing may grow.

    python -m tests.bench.bench_soak [--tasks N]

Prints what the shim holds after a tenth of the tasks and at the end, and exits with 1 if it grew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tests.e2e.platform import Platform
from tests.e2e.test_serve import serving
from tests.s3_servers import rclone_server

# Python's allocator and glibc's arenas settle late; a leak of 1 KiB a task would still show.
ALLOWED_KIB = 1536
# The shim goes on while one looks: a task in hand holds its pipes and a connection or two.
ALLOWED_IN_HAND = 6


@dataclass(frozen=True)
class Holdings:
    """What a process holds; files are those in its temporary directory."""

    rss_kib: int
    descriptors: int
    threads: int
    children: int
    files: int

    @classmethod
    def of(cls, pid: int, temporary: Path) -> Holdings:
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        children = (process / f"task/{pid}/children").read_text().split()
        return cls(
            rss_kib=int(status["VmRSS"].split()[0]),
            descriptors=len(os.listdir(process / "fd")),
            threads=int(status["Threads"]),
            children=len(children),
            files=sum(len(names) for _, _, names in os.walk(temporary)),
        )


@contextmanager
def platforms() -> Iterator[Platform]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        with rclone_server(root / "rclone") as server:
            bucket = server.make_bucket("soak")
            (root / "job").mkdir()
            platform = Platform(
                s3=server.boto3(), bucket=bucket, root=root / "job", environ=dict(server.environ)
            )
            platform.put("in/a", b"x" * 16384)
            platform.script("cat $I/a >$O/b; echo out; echo err >&2; (setsid sleep 60 &)")
            yield platform


def soak_invoke(platform: Platform, count: int) -> tuple[Holdings, Holdings]:
    """Let every task wait for a look at the places that are compared."""
    tasks = [platform.task(f"t{n}", inputs=[("a", "in/a")]) for n in range(count)]
    (platform.root / "tasks.json").write_text(json.dumps(tasks))
    process = platform.start("invoke", "-f", str(platform.root / "tasks.json"))
    assert process.stdout and process.stderr
    threading.Thread(target=process.stderr.read, daemon=True).start()
    seen = []
    done = 0
    for line in process.stdout:
        if '"log": "Task t' in line and "complete" in line:
            done += 1
            if done in (count // 10, count - 1):  # after the last it is gone too soon
                seen.append(Holdings.of(process.pid, platform.root / "tmp"))
    assert 0 == process.wait() and done == count, (process.returncode, done)
    return seen[0], seen[1]


def soak_serve(platform: Platform, count: int) -> tuple[Holdings, Holdings]:
    seen = []
    with serving(platform) as server:
        assert server.process.stdout and server.process.stderr
        for stream in (server.process.stdout, server.process.stderr):
            threading.Thread(target=stream.read, daemon=True).start()
        for number in range(1, count + 1):
            status, result = server.invoke(platform.task(f"s{number}", inputs=[("a", "in/a")]))
            assert (200, 0) == (status, result["return_code"])
            if number in (count // 10, count):
                seen.append(Holdings.of(server.process.pid, platform.root / "tmp"))
        server.process.terminate()
        server.process.wait()
    return seen[0], seen[1]


def report(
    name: str, soak: Callable[[Platform, int], tuple[Holdings, Holdings]], count: int
) -> bool:
    began = time.monotonic()
    with platforms() as platform:
        early, late = soak(platform, count)
    rate = count / (time.monotonic() - began)
    print(f"{name}: {count} tasks, {rate:.0f} a second")
    print(f"  {'':12}{'after ' + str(count // 10):>14}{'after ' + str(count):>14}")
    for field, first, last in zip(fields(Holdings), astuple(early), astuple(late), strict=True):
        print(f"  {field.name:12}{first:>14}{last:>14}")
    counts = zip(astuple(early)[1:], astuple(late)[1:], strict=True)
    grown = late.rss_kib - early.rss_kib > ALLOWED_KIB or any(
        after - before > ALLOWED_IN_HAND for before, after in counts
    )
    print("  GREW" if grown else "  steady")
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--peer", help="accepted as by the other benchmarks; nothing to compare")
    count = parser.parse_args().tasks
    grown = [report("invoke", soak_invoke, count), report("serve", soak_serve, count)]
    return int(any(grown))


if __name__ == "__main__":
    sys.exit(main())
