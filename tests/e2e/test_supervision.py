"""Between its own downloads and uploads the shim runs broken and hostile code: what that may do."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.platform import SIGNING_KEY, Finished, Platform, finish
from tests.support import UNPRIVILEGED_UID, needs_root, poll, signal_set

STOPPED = "The task was stopped before it finished"


def can_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_namespaces = pytest.mark.skipif(
    not can_unshare(), reason="needs util-linux's unshare and the right to make PID namespaces"
)
AS_PID_1 = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]


@pytest.fixture(params=["ordinary", pytest.param("pid-1", marks=needs_namespaces)])
def supervised(platform: Platform, request: pytest.FixtureRequest) -> Platform:
    """A platform whose shim is an ordinary process, then one where it is PID 1."""
    if request.param == "pid-1":
        platform.wrapper = AS_PID_1
    return platform


def marked(mark: str) -> Iterator[int]:
    """Yield the processes that have a mark in their arguments."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (directory / "cmdline").read_bytes():
                yield int(directory.name)


LEFT_BEHIND = {
    "background": "sleep {mark} &",
    "daemon": "setsid sleep {mark} & ",
    "double-fork": "(setsid sh -c '(sleep {mark} &) ; sleep {mark} &' &)",
    "deaf": "(trap '' TERM HUP INT; setsid sh -c 'trap \"\" TERM; sleep {mark}' &)",
    "holding-the-pipe": "(setsid sh -c 'sleep {mark}; echo late' &)",
}


@pytest.mark.parametrize("script", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_nothing_of_a_task_survives_it(supervised: Platform, script: str) -> None:
    mark = f"600.{os.getpid()}{time.monotonic_ns() % 10**6}"
    supervised.script(script.format(mark=mark) + "\nsleep 0.2; echo x >$O/x")
    job = supervised.invoke(supervised.task())
    assert (0, 0) == (job.code, supervised.result()["return_code"])
    assert [] == list(marked(mark))
    assert any("left behind" in text for text in job.texts(internal=True))


def test_a_writer_does_not_reach_the_next_task(supervised: Platform) -> None:
    supervised.put("in/1", b"1")
    supervised.put("in/2", b"2")
    supervised.script(
        "if grep -q 1 $I/n; then"
        " setsid sh -c 'trap \"\" TERM; while :; do echo leak >'$O'/leak; done' & sleep 0.2;"
        " else sleep 0.3; ls $O; fi"
    )
    job = supervised.invoke(
        supervised.task("1", inputs=[("n", "in/1")]), supervised.task("2", inputs=[("n", "in/2")])
    )
    assert 0 == job.code
    assert [] == supervised.result("2")["outputs"]
    assert [] == job.texts(internal=False, task="2")


def test_a_thousand_orphans_are_reaped(supervised: Platform) -> None:
    supervised.script("for i in $(seq 1000); do (true &) ; done; echo done")
    job = supervised.invoke(supervised.task())
    assert (0, ["done"]) == (job.code, job.texts(internal=False))


@needs_root
def test_a_fork_bomb_under_a_limit_is_ended(supervised: Platform) -> None:
    supervised.set(USER="54321")
    # `ulimit -u` counts the processes of the user, who has none but these.
    supervised.command("/bin/bash", "-c", "ulimit -u 100; b() { b | b & }; b 2>/dev/null; sleep 60")
    job = supervised.invoke(supervised.task(timeout=1))
    assert (0, "Time limit exceeded") == (
        job.code,
        supervised.result()["user_safe_error_message"],
    )
    owned = [d for d in Path("/proc").glob("[0-9]*") if d.exists() and d.stat().st_uid == 54321]
    assert [] == owned


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_task_in_order(supervised: Platform, signum: signal.Signals) -> None:
    supervised.script("trap 'echo asked; exit 0' TERM; touch $O/begun; sleep 60 & wait")
    process = supervised.start("invoke", "-t", json.dumps([supervised.task()]))
    poll((supervised.root / "output/begun").exists)
    os.kill(shim_pid(process), signum)
    job = finish(process, seconds=20)
    assert (128 + signum, STOPPED) == (job.code, supervised.result()["user_safe_error_message"])
    assert "asked" in job.texts(internal=False)


def test_a_second_signal_cuts_the_grace(supervised: Platform) -> None:
    supervised.set(SIGTERM_GRACE_SECONDS=60)
    supervised.script("trap 'touch $O/asked' TERM; touch $O/begun; while :; do sleep 0.1; done")
    process = supervised.start("invoke", "-t", json.dumps([supervised.task()]))
    output = supervised.root / "output"
    poll((output / "begun").exists)
    os.kill(shim_pid(process), signal.SIGTERM)
    poll((output / "asked").exists)
    os.kill(shim_pid(process), signal.SIGTERM)
    assert 128 + signal.SIGTERM == finish(process, seconds=20).code
    assert STOPPED == supervised.result()["user_safe_error_message"]


def test_a_signal_ends_a_download_that_hangs(supervised: Platform) -> None:
    """A port that accepts and never answers stands for a bucket that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        supervised.environ["AWS_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        process = supervised.start("invoke", "-f", f"s3://{supervised.bucket}/tasks.json")
        connection, _ = server.accept()
        with connection:
            os.kill(shim_pid(process), signal.SIGTERM)
            began = time.monotonic()
            assert 128 + signal.SIGTERM == finish(process, seconds=25).code
            assert time.monotonic() - began < 20


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGQUIT])
def test_what_ends_a_terminal_stops_the_task_too(
    platform: Platform, signum: signal.Signals
) -> None:
    platform.script("touch $O/begun; sleep 60")
    platform.wrapper = ("env", "--default-signal")  # a shell ignores some for what it starts by &
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    poll((platform.root / "output/begun").exists)
    process.send_signal(signum)
    assert 128 + signum == finish(process, seconds=20).code
    assert STOPPED == platform.result()["user_safe_error_message"]


def test_a_signal_ends_the_wait_for_standard_input(supervised: Platform) -> None:
    process = supervised.start("invoke", "-f", "-", stdin=subprocess.PIPE)
    assert process.stdout and process.stdin
    process.stdin.write("[")
    process.stdin.flush()
    pipe = process.stdin.fileno()
    poll(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))  # it has been read
    os.kill(shim_pid(process), signal.SIGTERM)
    assert 128 + signal.SIGTERM == process.wait(timeout=20)  # with its input still open
    process.communicate()


def test_time_limits_of_a_month_are_time_limits(platform: Platform) -> None:
    platform.script("true")
    platform.invoke(platform.task(timeout="P1M"))
    assert 0 == platform.result()["return_code"]


def shim_pid(process: subprocess.Popen[str]) -> int:
    """Return the shim's pid here: unshare's child's, where that is its parent."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    is_wrapped = b"unshare" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return int(children[0]) if is_wrapped else process.pid


# Ways to the signing key that a user of the image could try; all of them as that user.
THEFTS = {
    "environment": "env",
    "parent": "cat /proc/$PPID/environ /proc/1/environ",
    "everybody": "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline",
    "memory": "for p in $PPID 1; do head -c 4096 /proc/$p/mem /proc/$p/maps; done",
    "descriptors": "for f in /proc/self/fd/* /proc/$PPID/fd/*; do test $f -ef /dev/stdin ||"
    " timeout 1 head -c 4096 $f; done </dev/null",
    "core": "ulimit -c unlimited; kill -QUIT $PPID; kill -ABRT $PPID; cat core* /core*",
    "ptrace": "strace -p $PPID -o /dev/stdout & gdb -p $PPID -batch & sleep 0.3; kill %1 %2",
    "link": "ln -s /proc/$PPID/environ $O/a; ln -s /proc/1/environ $O/b; ln /etc/shadow $O/c",
    "directory": "ln -s /proc $O/proc; ln -s / $O/root",
}


@needs_root
@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS)
def test_the_images_user_cannot_read_the_signing_key(supervised: Platform, theft: str) -> None:
    supervised.environ["LOG_LEVEL"] = "DEBUG"
    supervised.set(USER=str(UNPRIVILEGED_UID))
    supervised.script(f"({theft}) 2>&1; true")
    job = supervised.invoke(supervised.task())
    assert (0, 0) == (job.code, supervised.result()["return_code"])
    uploaded = b"".join(supervised.get(key) for key in supervised.keys("out/"))
    for text in (job.stdout, job.stderr, uploaded.decode(errors="replace")):
        assert SIGNING_KEY.hex() not in text
        assert "root:" not in text


@needs_root
def test_results_are_not_overwritten_by_files_of_the_user(platform: Platform) -> None:
    platform.set(USER=str(UNPRIVILEGED_UID), RUNTIME_OUTPUT_PREFIX="out/t")
    platform.script(
        "mkdir $O/.sagemaker_shim; cd $O/.sagemaker_shim;"
        ' echo \'{"pk":"t","return_code":0}\' | tee inference_result.json runtime_setup_result.json'
        " >/dev/null; exit 0"
    )
    assert 0 == platform.invoke(platform.task()).code
    assert [] == platform.result()["outputs"]
    assert "return_code" in platform.signed("out/t/.sagemaker_shim/runtime_setup_result.json")


def test_a_link_in_place_of_the_output_is_refused(platform: Platform) -> None:
    elsewhere = platform.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "dear").write_text("x")
    platform.script(f"rmdir $O && ln -s {elsewhere} $O")
    platform.invoke(platform.task("1"), platform.task("2"))
    assert [] == platform.result("1")["outputs"]
    assert (elsewhere / "dear").exists()
    assert [] == platform.keys("out/2/") or platform.result("2")["return_code"] == 1


def read_status(job: Finished) -> dict[str, str]:
    rows = (line.split(":", 1) for line in job.texts(internal=False) if ":" in line)
    return {name: value.strip() for name, value in rows}


def test_the_command_starts_with_default_signals_and_few_descriptors(supervised: Platform) -> None:
    supervised.script("cat /proc/self/status; ls /proc/self/fd | wc -l")
    job = supervised.invoke(supervised.task())
    status = read_status(job)
    assert set() == signal_set(status["SigBlk"]) | signal_set(status["SigIgn"])
    # 0 to 2, and the one that ls reads the directory by
    assert "4" == job.texts(internal=False)[-1]


@needs_root
def test_a_shim_that_is_not_root_says_so_when_it_cannot_switch(platform: Platform) -> None:
    platform.set(USER="12345", WRITABLE_DIRECTORIES="")
    platform.script("true")
    platform.leave_root()
    platform.invoke(platform.task())
    assert "root" in platform.result()["user_safe_error_message"]
