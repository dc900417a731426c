"""What a command finds when it starts, observed by the command itself."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.contract.errors import UserSafeError
from shim.process.privacy import find_prctl
from shim.process.users import User
from tests.processes import (
    ENVIRONMENT,
    GRACE,
    NEVER,
    PYTHON,
    begin,
    close,
    count_zombies,
    open_fds,
    run,
)
from tests.support import UNPRIVILEGED_UID, needs_root, poll, signal_set

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


@pytest.fixture
def privileged_cat() -> Iterator[Callable[[str], str]]:
    """Yield what makes a copy of cat that gives who runs it more rights, and returns its path."""
    with tempfile.TemporaryDirectory() as directory:
        if os.statvfs(directory).f_flag & os.ST_NOSUID:
            pytest.skip(f"needs a file system without nosuid, {directory} is on one")
        os.chmod(directory, 0o755)
        path = f"{directory}/cat"
        shutil.copy("/bin/cat", path)

        def grant(how: str) -> str:
            os.chmod(path, {"setuid": 0o4755, "setgid": 0o2755}.get(how, 0o755))
            if how == "capability":  # linux/capability.h: version 2, effective; all of the first 32
                os.setxattr(
                    path, "security.capability", struct.pack("<5I", 0x2000001, 255, *[0] * 3)
                )
            return path

        yield grant


RIGHTS = {
    "setuid": ("Uid", [str(UNPRIVILEGED_UID), "0", "0", "0"]),
    "setgid": ("Gid", [str(UNPRIVILEGED_UID), "0", "0", "0"]),
    "capability": ("CapEff", ["00000000000000ff"]),
}


@needs_root
@pytest.mark.parametrize("how", RIGHTS)
@pytest.mark.parametrize("through", ["", "exec", "true;"], ids=["itself", "exec", "a child"])
def test_privileged_program_gives_the_command_nothing_unless_it_may(
    privileged_cat: Callable[[str], str], how: str, through: str
) -> None:
    path = privileged_cat(how)
    field, gained = RIGHTS[how]
    argv = (path, "/proc/self/status")
    if through:
        argv = ("/bin/sh", "-c", f"{through} {path} /proc/self/status")

    def rights(**options: bool) -> list[str]:
        lines = run(*argv, user=NOBODY, **options).stdout.splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(f"{field}:"))

    own = {"CapEff": ["0" * 16]}.get(field, [str(UNPRIVILEGED_UID)] * 4)
    assert (own, gained) == (rights(), rights(no_new_privileges=False))


def test_a_kernel_that_cannot_keep_privileges_away_is_told_of_and_no_obstacle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "_ctypes", None)  # as in a Python built without it
    find_prctl.cache_clear()
    try:
        process = begin("echo", "x")
    finally:
        find_prctl.cache_clear()
    process.wait(timeout=None, grace=GRACE, stop=NEVER)
    assert ("x\n", "") == close(process)
    assert (
        "The command may gain privileges from setuid programs: "
        "the kernel refuses PR_SET_NO_NEW_PRIVS",
    ) == process.warnings


# What a container without rights looks like, and the uid that the shim has in it.
WITHOUT_RIGHTS = {
    "rootless": ["unshare", "--user", "--map-root-user"],
    "no capabilities": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
    "neither root": [],
}


def start_without_rights(how: str, groups: str, user: User) -> str:
    """Return the warnings of a command's start and what it is, or what refuses it."""
    program = """
import os, sys
from shim.frozen import load_everything
from shim.process.privacy import find_prctl
from shim.process.users import User
from tests.processes import GRACE, NEVER, begin, close
find_prctl(), load_everything()  # while the interpreter's files can be read
if sys.argv[1] == "neither root":
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    process = begin("sh", "-c", "echo $(id -u; id -g; id -G)", user=eval(sys.argv[2]))
except Exception as error:
    sys.exit(str(error))
process.wait(timeout=None, grace=GRACE, stop=NEVER)
print(*process.warnings, *close(process))
"""
    done = subprocess.run(
        ["setpriv", *groups.split(), *WITHOUT_RIGHTS[how], PYTHON, "-c", program, how, repr(user)],
        capture_output=True,
        text=True,
    )
    return (done.stdout + done.stderr).strip()


KEEPS_GROUPS = (
    "The command keeps the supplementary groups that this program was started with: "
    "setting others is not permitted here"
)


@needs_root
@pytest.mark.parametrize(
    ("how", "groups", "user", "expected"),
    [
        ("rootless", "--groups=0", User(uid=0, gid=0, groups=(0,)), "0 0 0"),
        ("rootless", "--clear-groups", User(uid=0, gid=0, groups=(0,)), "0 0 0"),
        ("rootless", "--groups=0", User(uid=0, gid=0), "0 0 0"),
        ("rootless", "--groups=0", User(), "0 0 0"),
        (
            "rootless",
            "--groups=0,4",
            User(uid=0, gid=0, groups=(0,)),
            f"{KEEPS_GROUPS} 0 0 0 65534",
        ),
        ("no capabilities", "--groups=0", User(uid=0, gid=0, groups=(0,)), "0 0 0"),
        ("no capabilities", "--groups=0,4", User(uid=0, gid=0), f"{KEEPS_GROUPS} 0 0 0 4"),
        ("neither root", "--clear-groups", NOBODY, "65534 65534 65534"),
    ],
)
def test_nothing_is_switched_that_is_right_already(
    how: str, groups: str, user: User, expected: str
) -> None:
    if how == "rootless" and subprocess.run([*WITHOUT_RIGHTS[how], "true"]).returncode:
        pytest.skip("needs util-linux's unshare and the right to make user namespaces")
    assert expected == start_without_rights(how, groups, user)


@needs_root
@pytest.mark.parametrize("user", [NOBODY, User(uid=0, gid=5), User(uid=5, gid=0)])
def test_a_switch_that_is_not_permitted_is_refused(user: User) -> None:
    assert "cannot be run as uid" in start_without_rights("no capabilities", "--groups=0", user)


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
from shim.frozen import load_everything
from shim.process.users import User
from tests.processes import run
load_everything()
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
    poll(lambda: count_zombies() == 0)  # others leave orphans, which are collected in a second
