from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from shim.process.process import Ending, MemoryEvents, Process, run_helper, start
from shim.process.stopping import Stop
from shim.process.users import User
from tests.processes import (
    ENVIRONMENT,
    GRACE,
    NEVER,
    PYTHON,
    begin,
    close,
    count_zombies,
    is_alive,
    open_fds,
    read_line,
    run,
    spec,
)
from tests.support import UNPRIVILEGED_UID, needs_root, poll

MOMENT = timedelta(seconds=0.2)
LONG = timedelta(seconds=60)
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
POLITE = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", -signal.SIGTERM),
        ("kill -KILL $$", -signal.SIGKILL),
        ("kill -SEGV $$", -signal.SIGSEGV),
    ],
)
def test_return_code_is_the_status_or_the_signal(script: str, expected: int) -> None:
    assert Ending(return_code=expected) == run("sh", "-c", script).ending


def test_poll_tells_when_the_process_has_ended() -> None:
    process = begin("sleep", "0.1")
    assert process.poll() is None
    poll(lambda: process.poll() is not None)
    assert [0, 0] == [process.poll(), process.poll()]
    process.end()
    close(process)


def test_time_limit_asks_the_group_to_end() -> None:
    process = begin("sh", "-c", f"(trap '' TERM; sh -c 'echo child $PPID'; sleep 60) & {POLITE}")
    lines = {read_line(process), read_line(process)}
    (child,) = (int(line.split()[1]) for line in lines if line.startswith("child"))
    ending = process.wait(timeout=MOMENT, grace=GRACE, stop=NEVER)
    assert Ending(return_code=7, timed_out=True) == ending
    process.end()
    assert not is_alive(child)
    assert "bye\n" == close(process)[0]


def test_time_limit_makes_a_stubborn_process_end_after_its_grace() -> None:
    process = begin("sh", "-c", STUBBORN)
    read_line(process)
    began = time.monotonic()
    ending = process.wait(timeout=MOMENT, grace=MOMENT, stop=NEVER)
    assert 0.4 <= time.monotonic() - began < 3
    assert Ending(return_code=-signal.SIGKILL, timed_out=True) == ending
    process.end()
    close(process)


def test_stopped_process_is_woken_to_end_in_order() -> None:
    process = begin("sh", "-c", POLITE)
    read_line(process)
    os.kill(process.pid, signal.SIGSTOP)
    ending = process.wait(timeout=MOMENT, grace=GRACE, stop=NEVER)
    assert Ending(return_code=7, timed_out=True) == ending
    process.end()
    close(process)


def test_stop_ends_the_wait_at_once() -> None:
    process = begin("sh", "-c", POLITE)
    read_line(process)
    stop = Stop()
    threading.Timer(0.1, stop.request, args=(signal.SIGTERM,)).start()
    began = time.monotonic()
    ending = process.wait(timeout=LONG, grace=GRACE, stop=stop)
    assert time.monotonic() - began < 3
    assert Ending(return_code=7, stopped=True) == ending
    process.end()
    close(process)


def test_second_signal_cuts_the_grace() -> None:
    process = begin("sh", "-c", STUBBORN)
    read_line(process)
    stop = Stop()
    stop.request(signal.SIGTERM)
    threading.Timer(0.2, stop.request, args=(signal.SIGTERM,)).start()
    began = time.monotonic()
    ending = process.wait(timeout=None, grace=LONG, stop=stop)
    assert time.monotonic() - began < 3
    assert Ending(return_code=-signal.SIGKILL, stopped=True) == ending
    process.end()
    close(process)


@needs_root
def test_process_of_another_user_is_ended() -> None:
    user = User(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID)
    process = begin("sh", "-c", STUBBORN, user=user)
    read_line(process)
    ending = process.wait(timeout=MOMENT, grace=MOMENT, stop=NEVER)
    assert Ending(return_code=-signal.SIGKILL, timed_out=True) == ending
    process.end()
    close(process)


def test_wait_without_pidfd_sees_the_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, flags: int = 0) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    assert Ending(return_code=3) == run("sh", "-c", "sleep 0.2; exit 3").ending
    assert run("sleep", "60", timeout=MOMENT).ending.timed_out


def test_waiting_costs_no_processor_time() -> None:
    process = begin("sleep", "0.5")
    before = time.thread_time()
    process.wait(timeout=LONG, grace=GRACE, stop=NEVER)
    assert time.thread_time() - before < 0.05
    process.end()
    close(process)


def test_end_gives_a_living_process_its_grace() -> None:
    process = begin("sh", "-c", POLITE)
    read_line(process)
    process.end(grace=GRACE)
    assert 7 == process.poll()
    assert "bye\n" == close(process)[0]


def test_nothing_is_left_of_many_runs() -> None:
    run("true")
    before = open_fds()
    for _ in range(20):
        run("sh", "-c", "sleep 60 & exit 1")
    assert (before, 0) == (open_fds(), count_zombies())


def test_lost_status_is_a_failure() -> None:
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert 1 == run("true").ending.return_code
    finally:
        signal.signal(signal.SIGCHLD, previous)


CGROUP_V1 = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n"
CGROUP_V2 = "0::/docker/abc\n"


@pytest.fixture(params=["v1", "v1 mounted as root", "v2", "v2 mounted as root"])
def cgroup(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[MemoryEvents, Callable[[int], None]]:
    """Return where a fake cgroup is, and what sets its number of kills."""
    is_v1 = request.param.startswith("v1")
    directory = tmp_path / "memory" if is_v1 else tmp_path
    if not request.param.endswith("root"):
        directory /= "docker/abc"
    directory.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(CGROUP_V1 if is_v1 else CGROUP_V2)
    name = "memory.oom_control" if is_v1 else "memory.events"
    before = "oom_kill_disable 0\nunder_oom 0\n" if is_v1 else "low 0\nmax 3\noom 1\n"

    def set_kills(count: int) -> None:
        (directory / name).write_text(f"{before}oom_kill {count}\n")

    set_kills(2)
    return MemoryEvents(cgroup=tmp_path / "cgroup", root=tmp_path), set_kills


@pytest.mark.parametrize(
    ("script", "kills", "expected"),
    [
        pytest.param("kill -KILL $$", 3, Ending(return_code=-9, oom_killed=True), id="killed"),
        pytest.param("exit 137", 3, Ending(return_code=137, oom_killed=True), id="shell says so"),
        pytest.param("kill -KILL $$", 2, Ending(return_code=-9), id="killed by somebody else"),
        pytest.param("exit 1", 3, Ending(return_code=1), id="survived the kill of a child"),
    ],
)
def test_kill_for_want_of_memory_is_told_from_others(
    cgroup: tuple[MemoryEvents, Callable[[int], None]], script: str, kills: int, expected: Ending
) -> None:
    events, set_kills = cgroup
    process = start(spec("sh", "-c", f"read line < /dev/null; {script}"), memory_events=events)
    set_kills(kills)
    actual = process.wait(timeout=LONG, grace=GRACE, stop=NEVER)
    process.end()
    close(process)
    assert expected == actual


def test_our_own_kill_is_not_for_want_of_memory(
    cgroup: tuple[MemoryEvents, Callable[[int], None]],
) -> None:
    events, set_kills = cgroup
    process = start(spec("sh", "-c", STUBBORN), memory_events=events)
    read_line(process)
    set_kills(3)
    ending = process.wait(timeout=MOMENT, grace=MOMENT, stop=NEVER)
    process.end()
    close(process)
    assert Ending(return_code=-signal.SIGKILL, timed_out=True) == ending


@pytest.mark.parametrize("text", [None, "", "garbage", "0::/x\n", "4:memory:/x\n"])
def test_unknown_number_of_kills_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cgroup").write_text(text)
    events = MemoryEvents(cgroup=tmp_path / "cgroup", root=tmp_path)
    assert 0 == events.count_oom_kills()


@pytest.mark.parametrize("text", [CGROUP_V1, CGROUP_V2], ids=["v1", "v2"])
def test_our_own_cgroup_counts_before_the_roots(tmp_path: Path, text: str) -> None:
    (tmp_path / "cgroup").write_text(text)
    for top, name in ((tmp_path / "memory", "memory.oom_control"), (tmp_path, "memory.events")):
        for directory, count in ((top / "docker/abc", 5), (top, 2)):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(f"oom_kill {count}\n")
    events = MemoryEvents(cgroup=tmp_path / "cgroup", root=tmp_path)
    assert 5 == events.count_oom_kills()


def test_helper_gives_its_output() -> None:
    assert b'{"Version": 1}\n' == run_helper(["echo", '{"Version": 1}'], ENVIRONMENT, LONG)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        pytest.param(["none-such"], OSError, id="missing"),
        pytest.param(["sh", "-c", "echo why >&2; exit 3"], ChildProcessError, id="failed"),
        pytest.param(["sleep", "60"], TimeoutError, id="too slow"),
        pytest.param(["sh", "-c", "exec >&- 2>&-; sleep 60"], TimeoutError, id="silent"),
        pytest.param(["yes"], OSError, id="too much"),
    ],
)
def test_helper_that_fails_is_an_oserror(argv: list[str], expected: type[OSError]) -> None:
    before = open_fds()
    with pytest.raises(expected):
        run_helper(argv, ENVIRONMENT, timedelta(seconds=0.3))
    assert before == open_fds()
    poll(lambda: count_zombies() == 0)


def test_failed_helper_is_told_with_its_reason() -> None:
    with pytest.raises(ChildProcessError, match="^sh ended with status 3: why$"):
        run_helper(["sh", "-c", "echo why >&2; exit 3"], ENVIRONMENT, LONG)


def test_many_waiting_threads_get_the_same_return_code() -> None:
    process: Process = begin("sh", "-c", "sleep 0.1; exit 5")
    codes: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: codes.append(
                process.wait(timeout=LONG, grace=GRACE, stop=NEVER).return_code
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.end()
    close(process)
    assert [5] * 8 == codes


# The command's child traces it, or another thread of it, before it ends: its status goes there.
HELD = """
import ctypes, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
ATTACH, CONT, SEIZE = 16, 7, 0x4206
ready, told = os.pipe(), os.pipe()
def go():
    os.read(told[0], 1)
    {end}
thread = threading.Thread(target=go)
thread.start()
target = {target}
if os.fork() == 0:
    if {leaves}:
        os.setsid()
    if libc.ptrace(SEIZE, target, 0, 0):
        print("refused", ctypes.get_errno(), flush=True)
    os.write(told[1], b"x")
    time.sleep(600)
time.sleep(600)
"""
MEMBERS = {
    "in its session": {"target": "os.getpid()", "leaves": False, "end": "os._exit(3)"},
    "in another session": {"target": "os.getpid()", "leaves": True, "end": "os._exit(3)"},
    "by a signal": {"target": "os.getpid()", "leaves": True, "end": "os.kill(os.getpid(), 9)"},
}


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
def test_end_that_a_tracer_holds_back_is_seen_at_once(member: dict[str, object]) -> None:
    process = begin(PYTHON, "-c", HELD.format(**member))
    began, before = time.monotonic(), time.thread_time()
    ending = process.wait(timeout=LONG, grace=GRACE, stop=NEVER)
    expected = -signal.SIGKILL if "kill" in str(member["end"]) else 3
    assert Ending(return_code=expected) == ending
    assert time.monotonic() - began < 5
    assert time.thread_time() - before < 1
    assert (1, ()) == (process.end().ended, process.end().alive)
    assert "" == close(process)[0]


def test_tracer_of_one_thread_holds_an_end_back_no_longer_than_the_limit() -> None:
    # Not even the kernel's list of processes tells this from a thread that goes on.
    member = {"target": "thread.native_id", "leaves": True, "end": "os._exit(3)"}
    process = begin(PYTHON, "-c", HELD.format(**member))
    began = time.monotonic()
    ending = process.wait(timeout=timedelta(seconds=1), grace=MOMENT, stop=NEVER)
    leftovers = process.end(grace=GRACE)
    assert time.monotonic() - began < 5
    assert (True, ()) == (ending.timed_out, leftovers.alive)
    assert 3 == process.poll()
    close(process)


def test_tracer_from_elsewhere_is_waited_for_in_peace() -> None:
    process = begin("sh", "-c", END_WHEN_TRACED)
    tracer = subprocess.Popen(
        [PYTHON, "-c", TRACE_AND_WAIT, str(process.pid)], stdout=subprocess.PIPE, text=True
    )
    assert tracer.stdout and "ready\n" == tracer.stdout.readline()
    before = time.thread_time()
    ending = process.wait(timeout=LONG, grace=GRACE, stop=NEVER)
    assert Ending(return_code=3) == ending
    assert time.thread_time() - before < 0.3
    process.end()
    close(process)
    tracer.communicate()


END_WHEN_TRACED = """
pid=0
while [ "$pid" = 0 ]
do while read -r name value; do [ "$name" != TracerPid: ] || pid=$value; done < /proc/$$/status
done
exit 3
"""
TRACE_AND_WAIT = """
import ctypes, sys, time
print("ready" if ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0 else "refused",
      flush=True)
time.sleep(1.5)
"""


def test_a_helper_that_writes_without_end_is_refused() -> None:
    with pytest.raises(OSError, match="wrote too much"):
        run_helper(["sh", "-c", "yes"], dict(os.environ), timedelta(seconds=30))
