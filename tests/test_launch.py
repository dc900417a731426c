"""What a command finds when it starts, observed by the command itself."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.errors import UserSafeError
from shim.users import User
from tests.processes import ENVIRONMENT, PYTHON, begin, count_zombies, open_fds, run
from tests.support import UNPRIVILEGED_UID, needs_root, signal_set

NOBODY = User(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID, groups=(UNPRIVILEGED_UID, 4, 20))


def status(**options: object) -> dict[str, list[str]]:
    # Not Python, which ignores some signals itself.
    text = run("cat", "/proc/self/status", **options).stdout
    return {key: value.split() for key, value in (row.split(":", 1) for row in text.splitlines())}


def test_no_signal_is_ignored_or_blocked() -> None:
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        actual = status()
        mask_of_shim = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGUSR1, previous)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    assert [set()] * 3 == [signal_set(actual[key][0]) for key in ("SigIgn", "SigBlk", "SigCgt")]
    assert {signal.SIGUSR2} == mask_of_shim


def test_a_thread_can_start_a_command() -> None:
    results: list[dict[str, list[str]]] = []
    thread = threading.Thread(target=lambda: results.append(status()))
    thread.start()
    thread.join()
    assert [set()] * 2 == [signal_set(results[0][key][0]) for key in ("SigIgn", "SigBlk")]


def test_command_has_three_descriptors_although_we_leak_some() -> None:
    leaked = os.open("/", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        shown = run("sh", "-c", "ls -l /proc/$$/fd; true").stdout
    finally:
        os.close(leaked)
    links = [line.split()[-3:] for line in shown.splitlines() if "->" in line]
    assert ["0", "1", "2"] == [number for number, _, _ in links]
    assert "/dev/null" == links[0][2]


def test_command_starts_although_we_have_no_standard_streams() -> None:
    program = """
import os, sys
os.closerange(0, 3)
from tests.processes import run
ran = run("sh", "-c", "echo out; echo err >&2; cat")
open(sys.argv[1], "w").write(ran.stdout + ran.stderr)
"""
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program, f"/dev/fd/{writer}"], pass_fds=[writer]):
        os.close(writer)
        with open(reader) as file:
            assert "out\nerr\n" == file.read()


def test_stdin_is_at_its_end() -> None:
    assert "" == run("cat").stdout


def test_command_leads_a_session_of_its_own() -> None:
    process = begin("sh", "-c", "ps -o sid=,pgid= -p $$ || cat /proc/$$/stat")
    with open(process.stdout_fd) as file:
        numbers = {int(word) for word in file.read().split()[-2:]}
    process.end()
    os.close(process.stderr_fd)
    assert {process.pid} == numbers


def test_umask_and_working_directory_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    previous = os.umask(0o027)
    try:
        shown = run("sh", "-c", "umask; pwd").stdout
    finally:
        os.umask(previous)
    assert f"0027\n{tmp_path}\n" == shown


def test_environment_is_what_it_is_given() -> None:
    shown = run("env", env={**ENVIRONMENT, "A": "ü\n="}).stdout
    assert f"PATH={ENVIRONMENT['PATH']}\nA=ü\n=\n" == shown


def test_arguments_arrive_unchanged() -> None:
    argv = ["", "a b", "ü", "$HOME", "*", "-x", "\udcff"]
    shown = run(PYTHON, "-c", "import sys; print(ascii(sys.argv[1:]))", *argv).stdout
    assert ascii(argv) == shown.strip()


@needs_root
def test_user_and_groups_are_switched_and_ours_are_not() -> None:
    before = (os.getresuid(), os.getresgid(), os.getgroups())
    actual = status(user=NOBODY)
    uid = str(UNPRIVILEGED_UID)
    assert [uid] * 4 == actual["Uid"]
    assert [uid] * 4 == actual["Gid"]
    assert ["4", "20", uid] == sorted(actual["Groups"], key=int)
    assert before == (os.getresuid(), os.getresgid(), os.getgroups())


@needs_root
@pytest.mark.parametrize(
    "user",
    [
        pytest.param(User(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID), id="uid and gid"),
        pytest.param(User(gid=UNPRIVILEGED_UID), id="gid alone"),
        pytest.param(User(uid=0, gid=0), id="root"),
    ],
)
def test_our_supplementary_groups_are_always_dropped(user: User) -> None:
    previous = os.getgroups()
    os.setgroups([0, 4, 20])
    try:
        groups = status(user=user)["Groups"]
    finally:
        os.setgroups(previous)
    assert [] == groups


@needs_root
def test_user_can_open_the_streams_by_name() -> None:
    ran = run("sh", "-c", "echo out > /dev/stdout; echo err > /dev/stderr", user=NOBODY)
    assert ("out\n", "err\n") == (ran.stdout, ran.stderr)


def test_memory_limit_is_of_the_command_and_not_of_us() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = 64 << 20
    assert f"{limit >> 10}\n" == run("sh", "-c", "ulimit -d", memory_limit_bytes=limit).stdout
    assert before == resource.getrlimit(resource.RLIMIT_DATA)


def test_memory_limit_is_felt() -> None:
    ran = run(PYTHON, "-c", "bytearray(100 << 20)", memory_limit_bytes=64 << 20)
    assert 1 == ran.ending.return_code
    assert "MemoryError" in ran.stderr


def test_kernel_prefers_the_command_when_memory_is_short() -> None:
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    assert f"{min(1000, ours + 100)}\n" == run("cat", "/proc/self/oom_score_adj").stdout
    assert ours == int(Path("/proc/self/oom_score_adj").read_text())


@pytest.fixture
def bin_directories() -> Iterator[Callable[[str], str]]:
    """Yield what makes a PATH of directories; each holds `tool`, told apart by what it prints."""
    folder = tempfile.TemporaryDirectory()  # tmp_path is for its owner alone
    root = Path(folder.name)
    root.chmod(0o755)

    def build(modes: str) -> str:
        for name, mode in zip("abc", modes.split(), strict=False):
            directory = root / name
            directory.mkdir()
            if mode != "-":
                tool = directory / "tool"
                tool.write_text(f"#!/bin/sh\necho {name}\n")
                tool.chmod(int(mode, 8))
        return ":".join(str(root / name) for name in "abc")

    yield build
    folder.cleanup()


@needs_root
@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        pytest.param("755 755 755", "a", id="first"),
        pytest.param("- 755 755", "b", id="first that has it"),
        pytest.param("644 755 755", "b", id="first that may be executed"),
        pytest.param("700 755 755", "b", id="first that the user may execute"),
    ],
)
def test_path_of_the_command_is_searched_as_the_user(
    bin_directories: Callable[[str], str], modes: str, expected: str
) -> None:
    path = bin_directories(modes)
    assert f"{expected}\n" == run("tool", env={"PATH": path}, user=NOBODY).stdout


def test_unset_path_means_the_default_path() -> None:
    assert "x\n" == run("echo", "x", env={}).stdout


def test_uid_that_cannot_be_switched_is_told() -> None:
    program = """
import os
from shim.users import User
from tests.processes import run
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    run("true", user=User(uid=1, gid=1))
except Exception as error:
    print(type(error).__name__, error)
"""
    shown = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert shown.stdout == (
        "UserSafeError The command cannot be run as uid 1, gid 1: Operation not permitted; "
        "start the container as root, with the capabilities SETUID and SETGID\n"
    )


@pytest.mark.parametrize("argument", ["a\0b", "\ud800"])
def test_argument_that_no_process_can_get_is_told(argument: str) -> None:
    with pytest.raises(UserSafeError) as caught:
        run("echo", argument)
    assert "An argument or an environment variable of the command is not a valid text" == str(
        caught.value
    )


def test_failed_start_leaves_no_descriptor_and_no_zombie() -> None:
    before = open_fds()
    for _ in range(10):
        with pytest.raises(UserSafeError):
            run("does-not-exist")
    assert before == open_fds()
    assert 0 == count_zombies()
