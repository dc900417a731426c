"""System V objects of a user are gone with the processes that made them; nobody else's are."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.support import can_unshare, needs_root

pytestmark = [
    needs_root,
    pytest.mark.skipif(
        not can_unshare(), reason="needs util-linux's unshare and the right to make namespaces"
    ),
]
# They fork beside the thread that reaps, which newer versions warn of.
PYTHON = (sys.executable, "-W", "ignore::DeprecationWarning")
USER, ANOTHER = 54392, 54393
MAKE = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
IPC_PRIVATE, IPC_CREAT = 0, 0o1000
def make():
    return (
        libc.shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0o666),
        libc.semget(IPC_PRIVATE, 1, IPC_CREAT | 0o666),
        libc.msgget(IPC_PRIVATE, IPC_CREAT | 0o666),
    )
assert -1 not in make() + make()
"""
PRELUDE = f"""
import ctypes, os, time
from pathlib import Path
from shim.process.users import User
from tests.processes import GRACE, NEVER, begin, close, read_line
from tests.support import poll
PYTHON, MAKE = "/usr/bin/python3", {MAKE!r}
USER, ANOTHER = (User(uid=uid, gid=uid) for uid in ({USER}, {ANOTHER}))

def run(program, user=USER):
    process = begin(PYTHON, "-c", program, user=user)
    code = process.wait(timeout=None, grace=GRACE, stop=NEVER).return_code
    process.end()
    assert (0, ("", "")) == (code, close(process))

def make_as(user):
    if (pid := os.fork()) == 0:
        os.setresuid(*[user.uid] * 3)
        exec(MAKE, {{}})
        os._exit(0)
    os.waitpid(pid, 0)

def count(uid):
    kinds = ("shm", "sem", "msg")
    tables = [Path("/proc/sysvipc", kind).read_text().splitlines() for kind in kinds]
    rows = [dict(zip(table[0].split(), row.split())) for table in tables for row in table[1:]]
    return sum(row["uid"] == str(uid) for row in rows)
"""


def in_namespace(program: str, *wrapper: str) -> str:
    command = ["unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", *wrapper]
    code = PRELUDE + textwrap.dedent(program)
    done = subprocess.run(
        [*command, *PYTHON, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "" == done.stderr
    return done.stdout.strip()


def test_what_a_task_made_is_removed() -> None:
    assert "0" == in_namespace("run(MAKE); print(count(USER.uid))")


def test_what_a_daemon_of_the_task_made_is_removed() -> None:
    program = """
        run("import os\\nif os.fork(): os._exit(0)\\nos.setsid()" + MAKE + "time.sleep(600)")
        print(count(USER.uid))
    """
    assert "0" == in_namespace(program)


def test_memory_that_is_attached_is_removed_with_who_attached_it() -> None:
    program = """
        attach = "libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)\\n"
        attach += "libc.shmat(make()[0], None, 0)\\n"
        process = begin(PYTHON, "-c", MAKE + attach + "print(1, flush=True); time.sleep(600)",
                        user=USER)
        read_line(process)
        process.end()
        print(count(USER.uid))
    """
    assert "0" == in_namespace(program)


def test_it_takes_none_of_the_capabilities_that_containers_lack() -> None:
    wrapper = (
        "setpriv",
        "--bounding-set",
        "-sys_admin,-ipc_owner,-dac_override",
        "--inh-caps",
        "-all",
    )
    assert "0" == in_namespace("run(MAKE); print(count(USER.uid))", *wrapper)


def test_what_was_there_before_stays() -> None:
    assert "6" == in_namespace("make_as(USER); run(MAKE); print(count(USER.uid))")


def test_what_belongs_to_others_stays() -> None:
    program = """
        process = begin(PYTHON, "-c", "import time; print(1, flush=True); time.sleep(600)",
                        user=USER)
        read_line(process)
        make_as(ANOTHER)
        exec(MAKE, {})
        process.end()
        print(count(ANOTHER.uid), count(0), count(USER.uid))
    """
    assert "6 6 0" == in_namespace(program)
