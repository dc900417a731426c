"""One process at a time empties a directory: locks between real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.contract.errors import UsageError
from shim.contract.settings import PREFIX, Settings
from shim.files import locks
from shim.files.locks import exclusive
from shim.log.log import Log
from tests.e2e.platform import ROOT
from tests.files.test_workspace import RecordingLog

HOLD = """
import os, sys
from shim.files.locks import exclusive
from shim.log.log import Log
from shim.contract.settings import Settings
with exclusive(Settings.from_environ(os.environ), Log()):
    print("held", flush=True)
    sys.stdin.read()
"""


def variables(root: Path, **names: str) -> dict[str, str]:
    """Return the variables of directories below root; `names` differ from the usual ones."""
    paths = {"INPUT_PATH": "input", "OUTPUT_PATH": "output", "LINKED_INPUT_PARENT": "linked"}
    others = {"USE_LINKED_INPUT": names.pop("USE_LINKED_INPUT", "True")}
    return {PREFIX + name: str(root / path) for name, path in (paths | names).items()} | {
        PREFIX + name: text for name, text in others.items()
    }


@contextmanager
def holder(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds the locks."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={"PYTHONPATH": str(ROOT), **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert "held\n" == process.stdout.readline()
        yield process


def enter(environ: dict[str, str], log: Log | None = None) -> None:
    with exclusive(Settings.from_environ(environ), log or Log()):
        pass


OTHERS = {"INPUT_PATH": "input2", "OUTPUT_PATH": "output2", "LINKED_INPUT_PARENT": "linked2"}


@pytest.mark.parametrize("linked", ["True", "False"])
@pytest.mark.parametrize("shared", OTHERS)
def test_second_process_is_refused_with_the_pid_and_the_variables(
    tmp_path: Path, shared: str, linked: str
) -> None:
    own = {name: path for name, path in OTHERS.items() if name != shared}
    second = variables(tmp_path, USE_LINKED_INPUT=linked, **own)
    with holder(variables(tmp_path, USE_LINKED_INPUT=linked)) as first:
        if (shared, linked) == ("LINKED_INPUT_PARENT", "False"):
            enter(second)  # it is not used
            return
        with pytest.raises(UsageError) as caught:
            enter(second)
        assert all(word in str(caught.value) for word in (f"process {first.pid},", *OTHERS))
        enter(variables(tmp_path, USE_LINKED_INPUT=linked, **OTHERS))
        assert first.stdin
        first.stdin.close()
        assert 0 == first.wait(10)
        enter(second)


def test_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    with holder(variables(tmp_path)) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    enter(variables(tmp_path))


def test_refused_process_keeps_no_lock(tmp_path: Path) -> None:
    with holder(variables(tmp_path, INPUT_PATH="other", OUTPUT_PATH="other2")):
        with pytest.raises(UsageError):  # the parent, which comes last
            enter(variables(tmp_path))
        enter(variables(tmp_path, LINKED_INPUT_PARENT="free"))


@pytest.mark.parametrize("name", ["OUTPUT_PATH", "LINKED_INPUT_PARENT"])
def test_directory_is_locked_under_every_name(tmp_path: Path, name: str) -> None:
    other = {**OTHERS, name: "alias"}
    (tmp_path / "alias").symlink_to(tmp_path / OTHERS[name])
    with holder(variables(tmp_path, **OTHERS)):
        own = {key: f"{path}x" for key, path in other.items() if key != name}
        with pytest.raises(UsageError):
            enter(variables(tmp_path, **own, **{name: "alias"}))


def test_input_link_that_each_task_replaces_stays_locked(tmp_path: Path) -> None:
    with holder(variables(tmp_path)):
        for target in ("linked/a-input", "linked/b-input"):
            (tmp_path / target).mkdir(parents=True)
            (tmp_path / "input").unlink(missing_ok=True)
            (tmp_path / "input").symlink_to(target)
            with pytest.raises(UsageError):
                enter(variables(tmp_path, OUTPUT_PATH="o", LINKED_INPUT_PARENT="l"))


def test_directories_are_made_as_a_task_needs_them_and_no_file_stays(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        enter(variables(tmp_path, OUTPUT_PATH="a/output"))
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*")}
    assert {"output": 0o777, "linked": 0o755} == {
        name: modes[name] for name in modes if name != "a"
    }


def test_descriptors_of_locks_are_closed_in_what_is_executed(tmp_path: Path) -> None:
    with exclusive(Settings.from_environ(variables(tmp_path)), Log()):
        listed = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False
        )
        assert str(tmp_path) not in listed.stdout
        assert any(
            os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "output")
            for fd in os.listdir("/proc/self/fd")
        )


@pytest.mark.parametrize("kind", ["file", "fifo", "below a file", "loop"])
def test_what_cannot_be_locked_is_a_warning(tmp_path: Path, kind: str) -> None:
    """What to do about it is for the reset of the task to say."""
    path = tmp_path / "output"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
    name = "output/x" if kind == "below a file" else "output"
    log = RecordingLog()
    enter(variables(tmp_path, OUTPUT_PATH=name, INPUT_PATH=name + "-in"), log)
    assert any(f"Cannot keep other processes from using {path}" in w for w in log.lines)


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")  # NFS, of a directory

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    log = RecordingLog()
    enter(variables(tmp_path), log)
    assert 3 == len(log.lines)
    assert before == len(os.listdir("/proc/self/fd"))


def test_user_who_locks_the_directory_meanwhile_takes_nothing(tmp_path: Path) -> None:
    with holder(variables(tmp_path)) as first:
        command = ["flock", "--nonblock", str(tmp_path / "output"), "true"]
        assert 1 == subprocess.run(command).returncode
        assert first.poll() is None


@pytest.mark.parametrize("removals", [1, 3])
def test_directory_that_its_holder_removes_as_it_goes_is_made_and_locked_anew(
    removals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == f"{tmp_path}/output":
            calls.append(descriptor)
            if len(calls) <= removals:
                (tmp_path / "output").rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)
    with exclusive(Settings.from_environ(variables(tmp_path)), Log()):
        monkeypatch.undo()
        assert removals + 1 == len(calls)
        with pytest.raises(UsageError):
            enter(variables(tmp_path, INPUT_PATH="i", LINKED_INPUT_PARENT="l"))
