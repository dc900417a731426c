"""Nothing of a task survives it, whatever its processes do to get away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from shim.process import descendants
from tests.processes import (
    GRACE,
    NEVER,
    PYTHON,
    Ran,
    begin,
    close,
    count_zombies,
    is_alive,
    read_line,
    read_stat,
    run,
)
from tests.support import poll

DAEMON = """
import os, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for number in set(signal.valid_signals()) - {9, 19}:
    signal.signal(number, signal.SIG_IGN)
print(os.getpid(), flush=True)
os.closerange(0, 3)
while True:
    signal.pause()
"""

# Each generation leaves its session, and lets its parent go.
RUNAWAY = """
import os, sys
for _ in range(200):
    if os.fork():
        os._exit(0)
    os.setsid()
print("ready", flush=True)
while True:
    pid = os.fork()
    if pid:
        os._exit(0)
    os.setsid()
"""

STORM = """
import os, signal
for number in range(200):
    if os.fork() == 0:
        if number % 2:
            os.setsid()
        signal.pause()
print("ready", flush=True)
"""

# The main thread is gone, and /proc/PID/stat says Z, but the process lives.
LEADERLESS = """
import ctypes, os, threading, time
if os.fork():
    os._exit(0)
os.setsid()
def go_on():
    time.sleep(0.1)
    print(os.getpid(), flush=True)
    time.sleep(600)
threading.Thread(target=go_on).start()
EXIT = {"x86_64": 60}.get(os.uname().machine, 93)
ctypes.CDLL(None).syscall(EXIT, 0)
"""


def left_by(program: str, *, lines: int = 1) -> tuple[list[str], int]:
    """Run a program until it has announced itself; return what it said and how many were ended."""
    process = begin(PYTHON, "-c", program)
    said = [read_line(process) for _ in range(lines)]
    process.wait(timeout=None, grace=GRACE, stop=NEVER)
    ended = process.end().ended
    close(process)
    return said, ended


def orphans() -> list[str]:
    """Return our children in other sessions, living or not."""
    children = [pid for pid in os.listdir("/proc") if read_stat(pid)[1:2] == [str(os.getpid())]]
    return [pid for pid in children if read_stat(pid)[3:4] != [str(os.getsid(0))]]


def test_background_children_are_ended() -> None:
    ran: Ran = run("sh", "-c", "sleep 600 & sleep 600 & setsid sleep 600 & echo done")
    assert (0, "done\n", 3) == (ran.ending.return_code, ran.stdout, ran.ended)


def test_daemon_that_ignores_every_signal_is_ended() -> None:
    (pid,), ended = left_by(DAEMON)
    assert ended >= 1
    assert not is_alive(int(pid))


def test_process_whose_main_thread_is_gone_is_ended() -> None:
    (pid,), ended = left_by(LEADERLESS)
    assert ended >= 1
    poll(lambda: not Path(f"/proc/{pid}/task").exists() or len(os.listdir(f"/proc/{pid}/task")) < 2)


def test_two_hundred_processes_are_ended() -> None:
    _, ended = left_by(STORM)
    assert 200 == ended
    assert [] == orphans()


def test_process_that_forks_faster_than_one_can_look_is_ended() -> None:
    _, ended = left_by(RUNAWAY)
    assert ended > 0
    assert [] == orphans()


def test_stopped_process_is_ended() -> None:
    ran = run("sh", "-c", "setsid sleep 600 & echo $!; kill -STOP $!")
    assert 1 == ran.ended
    assert not is_alive(int(ran.stdout))


def test_descendants_of_a_process_ended_by_its_limit_are_ended() -> None:
    process = begin("sh", "-c", "setsid sh -c 'echo $$; sleep 600' & wait")
    pid = int(read_line(process))
    ending = process.wait(timeout=timedelta(seconds=0.1), grace=GRACE, stop=NEVER)
    assert ending.timed_out
    assert process.end().ended >= 1
    assert not is_alive(pid)
    close(process)


def test_daemon_is_found_by_its_session_without_being_our_orphan() -> None:
    # As where the kernel does not let us be a subreaper: somebody else is its parent.
    process = begin("sh", "-c", "sleep 600 & echo $!")
    pid = int(read_line(process))
    process.wait(timeout=None, grace=GRACE, stop=NEVER)
    assert pid in {
        found.pid
        for found in descendants._find_descendants(descendants.read_processes(), {process.pid})
    }
    process.end()
    assert not is_alive(pid)
    close(process)


def test_children_that_others_here_started_are_left_alone() -> None:
    with subprocess.Popen(["sleep", "600"]) as other, subprocess.Popen(["true"]) as ended:
        poll(lambda: read_stat(ended.pid)[:1] == ["Z"])
        run("sh", "-c", "sleep 600 &")
        assert is_alive(other.pid)
        assert 0 == ended.wait()
        other.kill()


def test_another_process_of_ours_is_left_alone() -> None:
    other = begin("sh", "-c", "sleep 600 & echo $!; wait")
    child = int(read_line(other))
    run("sh", "-c", "sleep 600 &")
    assert (True, True) == (is_alive(other.pid), is_alive(child))
    other.end()
    assert (False, False) == (is_alive(other.pid), is_alive(child))
    close(other)


def test_thousand_zombies_are_collected_while_the_task_runs() -> None:
    script = "n=0; while [ $n -lt 1000 ]; do (: &); n=$((n + 1)); done; echo ready; sleep 600"
    process = begin("sh", "-c", script)
    assert "ready" == read_line(process)
    poll(lambda: count_zombies() == 0)
    process.end()
    close(process)


def test_no_status_is_stolen_while_orphans_come_and_go() -> None:
    process = begin("sh", "-c", "while :; do (setsid true &) ; done")
    codes: list[int] = []

    def run_many() -> None:
        for number in range(10):
            child = begin("sh", "-c", f"exit {number}")
            codes.append(child.wait(timeout=None, grace=GRACE, stop=NEVER).return_code)
            descendants._reap()
            close(child)

    threads = [threading.Thread(target=run_many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.end()
    close(process)
    assert sorted([*range(10)] * 3) == sorted(codes)


def test_proc_of_another_namespace_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readlink", lambda path: "1")
    assert [] == list(descendants.read_processes())


@pytest.mark.parametrize(
    ("pgrp", "expected"), [(0, 5), (1, 5), (7, -7), (os.getpgrp(), 5)], ids=str
)
def test_no_signal_goes_to_our_group_or_to_everybody(pgrp: int, expected: int) -> None:
    process = descendants.Stat(pid=5, ppid=4, pgrp=pgrp, session=4, is_alive=True)
    assert {(expected, signal.SIGSTOP)} == descendants._choose_signals([process], set())
    assert {(expected, signal.SIGKILL)} == descendants._choose_signals([process], {5})


IN_NAMESPACE = """
import os, signal, sys
from datetime import timedelta
from shim.process.stopping import Stop
from tests.processes import begin, close, count_zombies, read_line
from tests.support import poll
stop = Stop()
signal.signal(signal.SIGTERM, lambda signum, frame: stop.request(signum))
process = begin("sh", "-c", "trap 'exit 9' TERM; (setsid true &); "
    "setsid sh -c 'trap : TERM; echo ready; while :; do sleep 0.1; done' & "
    "(setsid sh -c 'echo ready; exec sleep 600' &); while :; do sleep 0.05; done")
assert ["ready"] * 2 == [read_line(process) for _ in range(2)]
poll(lambda: count_zombies() == 0)
os.kill(os.getpid(), signal.SIGTERM)
ending = process.wait(timeout=None, grace=timedelta(seconds=5), stop=stop)
ended = process.end().ended
left = [pid for pid in os.listdir("/proc") if pid.isdigit()]
print(os.getpid(), ending.return_code, ending.stopped, ended >= 2, left)
sys.exit(128 + stop.signum)
"""


def has_namespaces() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_namespaces(), reason="needs unshare and the right to a PID namespace")
def test_as_pid_1_all_is_ended_reaped_and_told() -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_NAMESPACE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20)
    assert re.fullmatch(r"1 9 True True \['1'\]\n", done.stdout)
    assert 128 + signal.SIGTERM == done.returncode
