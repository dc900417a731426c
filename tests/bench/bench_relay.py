"""Lines per second from a process's stdout to log lines: the relay against the tool it replaces.

    python tests/bench/bench_relay.py [--peer PYTHON] [--bytes N] [--repeat N]

PYTHON is an interpreter that has sagemaker-shim 0.8.3; the environment variable PEER_PYTHON does
the same. Each measurement is a process of its own, the two take turns, the best of each counts.
The log goes to /dev/null; the output comes from a file, through a pipe, by cat.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINE = b"epoch 12 step 345 loss 0.123456 accuracy 0.987654\n"
KINDS: dict[str, bytes] = {
    "short lines": LINE,
    "long lines": b"x" * 9_999 + b"\n",
    "non-ASCII": "Épöche 12 → Verlust 0,1 ✓ ünd mehr Text dahinter\n".encode(),
    "quotes": b'{"step": 345, "path": "C:\\\\data", "loss": 0.123456}\n',
    "progress (CR)": b"\r 12%|#####     | 345/2875 [00:12<01:30, 28.11it/s]" * 20 + b"\n",
}


def measure(relay: Callable[[int], None], path: str) -> None:
    """Relay a file; print the seconds that took and the peak of our memory in MiB."""
    before = peak_kib()
    began = time.perf_counter()
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        relay(source.stdout.fileno())
    seconds = time.perf_counter() - began
    after = peak_kib()
    report = {"seconds": seconds, "grown_mib": (after - before) / 1024, "rss_mib": after / 1024}
    os.write(3, json.dumps(report).encode())


def peak_kib() -> int:
    """Return the peak of our resident memory; getrusage would count our parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def relay_ours(fd: int) -> None:
    sys.path.insert(0, str(ROOT))
    from shim.log.log import Log
    from shim.log.relay import Relay

    relay = Relay(Log(), task="00000000-0000-0000-0000-000000000000")
    relay.attach(os.dup(fd), source="stdout")
    relay.start()
    relay._thread.join()
    relay.finish()


def relay_peer(fd: int) -> None:
    import asyncio
    import logging.config

    from sagemaker_shim.logging import LOGGING_CONFIG
    from sagemaker_shim.models import UserProcess

    logging.config.dictConfig(LOGGING_CONFIG)

    async def stream() -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(fd), "rb")
        )
        process = UserProcess()
        process._current_task_pk = "00000000-0000-0000-0000-000000000000"
        await process._stream_to_external(stream=reader, level=logging.INFO)

    asyncio.run(stream())


def run_once(python: str, who: str, path: str) -> dict[str, float]:
    reader, writer = os.pipe()
    with open(os.devnull, "wb") as sink:
        command = [python, __file__, "--measure", who, path]
        # The report comes back on descriptor 3: the streams hold log lines.
        wrapped = ["sh", "-c", f'exec "$@" 3>&{writer}', "sh", *command]
        subprocess.run(wrapped, stdout=sink, pass_fds=[writer], check=True)
    os.close(writer)
    with open(reader, "rb") as file:
        report: dict[str, float] = json.load(file)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=os.environ.get("PEER_PYTHON"), metavar="PYTHON")
    parser.add_argument("--bytes", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        who, path = options.measure
        measure({"ours": relay_ours, "peer": relay_peer}[who], path)
        return
    tools = {"ours": sys.executable}
    if options.peer:
        tools["peer"] = options.peer
    else:
        print("no --peer: only our own figures")
    print(
        f"{'output':15}{'tool':6}{'lines/s':>12}{'MB/s':>8}{'RSS MiB':>9}{'grown':>8}{'ratio':>8}"
    )
    for kind, block in KINDS.items():
        with tempfile.NamedTemporaryFile() as file:
            data = block * (options.bytes // len(block))
            file.write(data)
            file.flush()
            compare(kind, data, file.name, tools, options.repeat)


def compare(kind: str, data: bytes, path: str, tools: dict[str, str], repeat: int) -> None:
    best: dict[str, dict[str, float]] = {}
    for _ in range(repeat):
        for who, python in tools.items():
            report = run_once(python, who, path)
            if who not in best or report["seconds"] < best[who]["seconds"]:
                best[who] = report
    lines = len(data.decode().splitlines())
    for who, report in best.items():
        seconds = report["seconds"]
        ratio = f"{best['peer']['seconds'] / seconds:.1f}" if "peer" in best else "-"
        print(
            f"{kind:15}{who:6}{lines / seconds:12,.0f}{len(data) / seconds / 1e6:8.1f}"
            f"{report['rss_mib']:9.1f}{report['grown_mib']:8.1f}{ratio:>8}"
        )


if __name__ == "__main__":
    main()
