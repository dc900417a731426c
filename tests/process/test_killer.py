"""A killer ends all that runs as a user and nobody else, and that user cannot reach it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from shim.process import killer
from shim.process.descendants import Stat
from tests.support import STORM, can_unshare, needs_root

needs_namespaces = pytest.mark.skipif(
    not can_unshare(), reason="needs util-linux's unshare and the right to make PID namespaces"
)
US = os.getpid()


def stat(pid: int, ppid: int, *, is_alive: bool = True) -> Stat:
    return Stat(pid=pid, ppid=ppid, pgrp=pid, session=pid, is_alive=is_alive)


PARENT, TASK, CHILD, OTHER, THIRD = range(US + 1, US + 6)
CONTAINER = [stat(1, 0), stat(US, 1), stat(TASK, US), stat(CHILD, TASK)]
NAMESPACES = {
    "below an init": (CONTAINER, True),
    "below the binary's own processes": (
        [stat(1, 0), stat(PARENT, 1), stat(US, PARENT), stat(TASK, US)],
        True,
    ),
    "with a child whose parent has just ended": ([*CONTAINER, stat(OTHER, THIRD)], True),
    "with what a launcher has not collected": ([*CONTAINER, stat(OTHER, 1, is_alive=False)], True),
    "with another child of the init": ([*CONTAINER, stat(OTHER, 1)], False),
    "with its grandchild": ([*CONTAINER, stat(OTHER, 1), stat(THIRD, OTHER)], False),
    "started from outside": ([*CONTAINER, stat(OTHER, 0)], False),
    "shared by the containers of a pod": ([stat(1, 0), stat(US, 0), stat(TASK, US)], False),
    "the host's": ([stat(1, 0), stat(2, 0), stat(US, 1), stat(TASK, US)], False),
    "not to be seen": ([], False),
    "without its init": ([stat(US, 0)], False),
    "read while it changed": ([stat(1, 0), stat(US, OTHER), stat(OTHER, US)], False),
}


@pytest.mark.parametrize(("processes", "expected"), NAMESPACES.values(), ids=NAMESPACES)
def test_namespace_is_ours_when_nobody_else_is_there(processes: list[Stat], expected: bool) -> None:
    assert expected == killer.owns_namespace(processes)


def test_this_machine_is_not_ours() -> None:
    if os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC:  # PROC_PID_INIT_INO, linux/proc_ns.h
        pytest.skip("runs in a container")
    killer.prepare(54321)
    assert not killer.kill_all([], set())
    assert killer._killer is None


@pytest.mark.parametrize("uid", [None, *os.getresuid()])
def test_nobody_takes_our_own_place(uid: int | None) -> None:
    killer.prepare(uid)
    assert killer._killer is None


# They fork beside the thread that reaps, which newer versions warn of.
PYTHON = (sys.executable, "-W", "ignore::DeprecationWarning")
USER = 54391
PRELUDE = f"""
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from shim.process import descendants, killer
from shim.process.users import User
from tests.processes import PYTHON, begin, close, read_line
from tests.support import poll
USER = User(uid={USER}, gid={USER})
PYTHON = "/usr/bin/python3"
libc = ctypes.CDLL(None)
LEFT = "setsid sh -c 'echo ready; exec sleep 600' & wait"

def kill_all(process):
    return killer.kill_all(list(descendants.read_processes()), descendants._own - {{process.pid}})

def owned():
    return [int(d.name) for d in Path("/proc").glob("[0-9]*")
            if f"Uid:\\t{USER}\\t{USER}" in (d / "status").read_text()
            and "State:\\tZ" not in (d / "status").read_text()]
"""


def in_namespace(program: str, *wrapper: str) -> list[str]:
    """Run a program as process 1 of a PID namespace, or below a wrapper; return what it printed."""
    command = ["unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", *wrapper]
    code = PRELUDE + textwrap.dedent(program)
    done = subprocess.run(
        [*command, *PYTHON, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "" == done.stderr
    return done.stdout.split()


BELOW_INIT = ("sh", "-c", '"$@"; exit $?', "init")
BESIDE_ANOTHER = ("sh", "-c", f'setpriv --reuid {USER} --clear-groups sleep 600 & "$@"', "init")


@needs_root
@needs_namespaces
@pytest.mark.parametrize("wrapper", [(), BELOW_INIT], ids=["process 1", "below an init"])
def test_storm_is_ended_at_one_blow(wrapper: tuple[str, ...]) -> None:
    program = f"""
        process = begin(PYTHON, "-c", {STORM!r}, user=USER)
        read_line(process)
        print(kill_all(process))
        poll(lambda: not owned())
        leftovers = process.end()
        print(leftovers.alive, owned())
    """
    assert ["True", "()", "[]"] == in_namespace(program, *wrapper)


# Does to the killer whatever a user can do to another process, all the time.
ASSAULT = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
target = int(sys.argv[1])
for _ in range(8):
    if os.fork() == 0:
        break
print("ready", flush=True)
while True:
    for call in (
        lambda: os.kill(target, signal.SIGSTOP),
        lambda: os.kill(target, signal.SIGKILL),
        lambda: libc.ptrace(16, target, 0, 0),
        lambda: open(f"/proc/{target}/mem", "r+b"),
        lambda: libc.prlimit(target, 0, None, None),
    ):
        try:
            if call() in (None, 0):
                print("reached", flush=True)
        except OSError:
            pass
"""


@needs_root
@needs_namespaces
def test_user_cannot_reach_the_killer() -> None:
    program = f"""
        killer.prepare({USER})
        waiting = killer._killer
        process = begin(PYTHON, "-c", {ASSAULT!r}, str(waiting.pid), user=USER)
        for _ in range(9):
            read_line(process)
        assert waiting is killer._killer
        # After the switch too, while somebody lives to reach it: it only does not kill.
        os.kill(waiting.pid, 0)
        print(kill_all(process))
        print(*Path(f"/proc/{{waiting.pid}}/status").read_text().split("Uid:")[1].split()[:3])
        process.end()
        print(close(process)[0])
    """
    said = in_namespace(program)
    nobody = str(2**32 - 2)
    assert ["True", nobody, str(USER), nobody] == said[:4]
    assert "reached" not in said


@needs_root
@needs_namespaces
def test_user_cannot_reach_who_has_taken_its_place() -> None:
    """As above, but the switch alone, which otherwise is over before anybody could try."""
    program = f"""
        pid = os.fork()
        if pid == 0:
            killer.take_place({USER})
            while True:
                signal.pause()
        poll(lambda: "Uid:\\t0" not in Path(f"/proc/{{pid}}/status").read_text())
        process = begin(PYTHON, "-c", {ASSAULT!r}, str(pid), user=USER)
        for _ in range(9):
            read_line(process)
        time.sleep(0.5)
        print(Path(f"/proc/{{pid}}/stat").read_text().split()[2])
        process.end()
        print(close(process)[0])
    """
    assert ["S"] == in_namespace(program)


@needs_root
@needs_namespaces
def test_killer_that_kept_a_capability_kills_nobody() -> None:
    program = """
        PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 4
        assert libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
        process = begin("sh", "-c", LEFT, user=USER)
        read_line(process)
        print(kill_all(process))
        print(len(owned()))
        print(process.end().ended, owned())
    """
    assert ["False", "2", "1", "[]"] == in_namespace(program)


@needs_root
@needs_namespaces
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs util-linux's setpriv")
def test_somebody_else_in_the_namespace_is_spared() -> None:
    program = """
        poll(lambda: len(owned()) == 1)
        process = begin("sh", "-c", LEFT, user=USER)
        read_line(process)
        print(killer._killer, process.end().ended, len(owned()))
    """
    assert ["None", "1", "1"] == in_namespace(program, *BESIDE_ANOTHER)


@needs_root
@needs_namespaces
def test_who_came_into_the_namespace_later_is_spared() -> None:
    program = """
        process = begin("sh", "-c", LEFT, user=USER)
        read_line(process)
        os.kill(1, signal.SIGUSR1)
        poll(lambda: len(owned()) == 3)
        print(killer._killer is not None, process.end().ended, len(owned()))
    """
    later = f"trap 'setpriv --reuid {USER} --clear-groups sleep 600 &' USR1; \"$@\" & "
    later += "pid=$!; wait $pid; wait $pid"
    assert ["True", "1", "1"] == in_namespace(program, "sh", "-c", later, "init")


@needs_root
@needs_namespaces
def test_another_child_of_ours_that_runs_as_the_user_is_spared() -> None:
    program = """
        other = begin("sleep", "600", user=USER)
        process = begin("sh", "-c", LEFT, user=USER)
        read_line(process)
        print(process.end().ended, owned() == [other.pid])
        print(other.end().alive, owned())
    """
    assert ["1", "True", "()", "[]"] == in_namespace(program)


@needs_root
@needs_namespaces
def test_process_that_has_changed_its_user_is_ended_too() -> None:
    program = """
        process = begin(
            PYTHON, "-c",
            "import os, sys, time; print('ready', flush=True); time.sleep(600)",
            user=USER,
        )
        read_line(process)
        # An orphan that runs as root, as a setuid program of the image may leave one.
        pid = os.fork()
        if pid == 0:
            os.setsid()
            while True:
                signal.pause()
        leftovers = process.end()
        print(leftovers.alive, Path(f"/proc/{{pid}}").exists())
    """
    assert ["()", "False"] == in_namespace(program)


@needs_root
@needs_namespaces
def test_each_task_finds_a_killer_that_has_not_been_asked() -> None:
    program = """
        pids = []
        for script in ("true", "true", "sleep 600 & true", "true"):
            process = begin("sh", "-c", script, user=USER)
            pids.append(killer._killer.pid)
            process.wait(timeout=None, grace=GRACE, stop=NEVER)
            process.end()
            close(process)
        print(pids[0] == pids[1] == pids[2] != pids[3])
        print(len(os.listdir("/proc/self/task")) < 3, sorted(descendants._own) == pids[3:])
    """
    imports = "from tests.processes import GRACE, NEVER\n"
    assert ["True"] * 3 == in_namespace(imports + textwrap.dedent(program))
