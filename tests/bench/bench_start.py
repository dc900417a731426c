"""Start: from exec to the first 200 on /ping, and the memory at that moment.

    python -m tests.bench.bench_start [--peer PYTHON] [--peer-binary FILE] [--rounds N]

Each form of the shim in turn, N times; the existing tool as well where PYTHON is an interpreter
that has it, or FILE its static binary. Prints medians, and their ratios to the static binary's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.s3_servers import rclone_server
from tests.support import free_port

ROOT = Path(__file__).parents[2]
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# The least with which every form starts; the existing tool wants a bucket for its first result.
VARIABLES = {
    "GRAND_CHALLENGE_COMPONENT_CMD_B64J": "WyJ0cnVlIl0=",
    "GRAND_CHALLENGE_COMPONENT_USE_LINKED_INPUT": "False",
    "GRAND_CHALLENGE_COMPONENT_RUNTIME_OUTPUT_PREFIX": "runtime",
    "GRAND_CHALLENGE_COMPONENT_SIGNING_KEY_HEX": "00",
}
DIRECTORIES = {
    "GRAND_CHALLENGE_COMPONENT_INPUT_PATH": "input",
    "GRAND_CHALLENGE_COMPONENT_OUTPUT_PATH": "output",
    "GRAND_CHALLENGE_COMPONENT_LINKED_INPUT_PARENT": "linked",
    "GRAND_CHALLENGE_COMPONENT_MODEL_DEST": "model",
    "GRAND_CHALLENGE_COMPONENT_GROUND_TRUTH_DEST": "truth",
    "GRAND_CHALLENGE_COMPONENT_WRITABLE_DIRECTORIES": "writable",
    "GRAND_CHALLENGE_COMPONENT_POST_CLEAN_DIRECTORIES": "writable",
}


@dataclass(frozen=True)
class Start:
    """What one start took; memory and processes at the moment of the first answer."""

    seconds: float
    rss_mb: float
    processes: int


def build(form: str) -> str:
    """Return the path of a form of the shim; build.sh prints it last."""
    done = subprocess.run(
        [ROOT / "build.sh", form], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()[-1]


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(child))


def measure(argv: list[str], port: int, root: Path, variables: Mapping[str, str]) -> Start:
    (root / "tmp").mkdir(parents=True)
    places = {name: str(root / directory) for name, directory in DIRECTORIES.items()}
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(root / "tmp")}
    began = time.monotonic()
    process = subprocess.Popen(
        argv,
        env={**environ, **VARIABLES, **places, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=root,
    )
    try:
        while not is_healthy(port):
            assert process.poll() is None, f"{argv} ended: {process.returncode}"
            assert time.monotonic() < began + 30, f"{argv} does not answer"
            time.sleep(0.001)
        seconds = time.monotonic() - began
        resident = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family(process.pid)
        ]
    finally:
        process.terminate()
        process.wait()
    return Start(seconds, sum(resident) * PAGE_BYTES / 1e6, len(resident))


def is_healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(100).split()[1:2] == [b"200"]
    except OSError:
        return False


@contextmanager
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="bench-start-"))
    try:
        yield directory / "job"
    finally:
        shutil.rmtree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="an interpreter that has the existing tool")
    parser.add_argument("--peer-binary", type=Path, help="the existing tool's static binary")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    binary = build("binary")
    forms = {
        "static binary": [binary],
        "  no bucket": [binary],
        "zipapp": [sys.executable, build("zipapp")],
        "python -m shim": [sys.executable, "-m", "shim"],
    }
    peers = {}
    if arguments.peer:
        peers["sagemaker-shim"] = [str(arguments.peer.parent / "sagemaker-shim")]
    if arguments.peer_binary:
        peers["  its binary"] = [str(arguments.peer_binary.absolute())]
    forms |= peers
    starts: dict[str, list[Start]] = {name: [] for name in forms}
    with tempfile.TemporaryDirectory() as directory, rclone_server(Path(directory)) as server:
        bucket = server.make_bucket("start")
        for _, (name, argv) in itertools.product(range(arguments.rounds), forms.items()):
            port = 8080 if name in peers else free_port()
            options = [] if name in peers else ["--port", str(port)]
            variables = dict(server.environ)
            if name != "  no bucket":
                variables["GRAND_CHALLENGE_COMPONENT_RUNTIME_OUTPUT_BUCKET_NAME"] = bucket
            with scratch() as root:
                starts[name].append(measure([*argv, "serve", *options], port, root, variables))
    print(f"{'':16}{'s':>8}{'(min)':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}{'processes':>11}")
    base_s = statistics.median(start.seconds for start in starts["static binary"])
    base_mb = statistics.median(start.rss_mb for start in starts["static binary"])
    for name, rounds in starts.items():
        seconds = statistics.median(start.seconds for start in rounds)
        least = min(start.seconds for start in rounds)
        rss_mb = statistics.median(start.rss_mb for start in rounds)
        print(
            f"{name:16}{seconds:8.3f}{least:8.3f}{seconds / base_s:8.2f}"
            f"{rss_mb:8.1f}{rss_mb / base_mb:8.2f}{rounds[-1].processes:11}"
        )
    for path in filter(None, (binary, arguments.peer_binary)):
        print(f"{path} has {os.path.getsize(path) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
