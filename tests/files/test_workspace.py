"""What stays in the directories of a task, and what leaves them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from shim.contract.errors import UserSafeError
from shim.files.descriptors import open_directory
from shim.files.emptying import Emptying, clean_directory
from shim.files.outputs import Outputs
from shim.files.workspace import (
    Workspace,
    ensure_writable_directories,
)
from shim.process.users import User
from tests.support import UNPRIVILEGED_UID, needs_root

RESET_MESSAGE = "The containers input and output directories could not be reset"
ROOT = User(uid=None, gid=None, groups=(), home=None, name=None)
AUTHOR = User(
    uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID, groups=(UNPRIVILEGED_UID,), home=None, name=None
)


class RecordingLog:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.author_lines: list[str] = []

    def warning(self, message: str, *, internal: bool = True, task: str | None = None) -> None:
        self.lines.append(message)
        if not internal:
            assert task in ("pk", "one")
            self.author_lines.append(message)

    error = warning

    def __str__(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def log() -> RecordingLog:
    return RecordingLog()


@pytest.fixture
def workspace(tmp_path: Path, log: RecordingLog) -> Workspace:
    return build(tmp_path, log)


def build(root: Path, log: RecordingLog, *, linked: bool = True) -> Workspace:
    return Workspace(
        input_path=root / "input",
        output_path=root / "output",
        linked_input_parent=root / "opt" / "data" if linked else None,
        log=log,
    )


def make_input(workspace: Workspace, directory: str, name: str) -> None:
    with opened(workspace.open_input(directory)) as there:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=there))


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    yield descriptor
    os.close(descriptor)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_reset_makes_what_is_missing_whatever_the_umask(
    tmp_path: Path, workspace: Workspace
) -> None:
    umask = os.umask(0o077)
    try:
        workspace.reset("pk")
    finally:
        os.umask(umask)

    linked = tmp_path / "opt" / "data" / "pk-input"
    assert os.readlink(tmp_path / "input") == str(linked)
    assert {str(p.relative_to(tmp_path)): mode(p) for p in [*linked.parents[:2], linked]} == {
        "opt": "0o755",
        "opt/data": "0o755",
        "opt/data/pk-input": "0o755",
    }
    assert mode(tmp_path / "output") == "0o777"


def test_reset_without_linked_input_uses_the_directory(tmp_path: Path, log: RecordingLog) -> None:
    (tmp_path / "input").mkdir(mode=0o700)
    (tmp_path / "input" / "old").write_text("")
    inode = (tmp_path / "input").stat().st_ino

    build(tmp_path, log, linked=False).reset("pk")

    assert (tmp_path / "input").lstat().st_ino == inode
    assert names(tmp_path / "input") == []


@pytest.mark.parametrize("kind", ["missing", "directory", "full", "file", "link", "dangling"])
def test_reset_puts_the_link_in_place_of_anything(
    tmp_path: Path, workspace: Workspace, kind: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    path = tmp_path / "input"
    if kind in ("directory", "full"):
        path.mkdir()
    if kind == "full":
        (path / "d").mkdir()
        (path / "d" / "l").symlink_to(elsewhere)
    if kind == "file":
        path.write_text("")
    if kind == "link":
        path.symlink_to(elsewhere)
    if kind == "dangling":
        path.symlink_to("nowhere")

    workspace.reset("pk")

    assert os.readlink(path) == str(tmp_path / "opt" / "data" / "pk-input")
    assert names(path) == []
    assert names(elsewhere) == ["kept"]


@pytest.mark.parametrize("kind", ["link", "full directory", "file"])
def test_reset_makes_the_linked_directory_anew(
    tmp_path: Path, workspace: Workspace, kind: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "kept").write_text("")
    linked = tmp_path / "opt" / "data" / "pk-input"
    linked.parent.mkdir(parents=True)
    if kind == "link":
        linked.symlink_to(elsewhere)
    if kind == "file":
        linked.write_text("")
    if kind == "full directory":
        linked.mkdir(mode=0o777)
        (linked / "old").write_text("")

    workspace.reset("pk")

    assert (names(linked), mode(linked)) == ([], "0o755")
    assert (names(elsewhere), mode(elsewhere)) == (["kept"], "0o700")


def test_next_reset_removes_the_directory_of_the_task_before(
    tmp_path: Path, workspace: Workspace
) -> None:
    workspace.reset("one")
    make_input(workspace, "d", "a")
    assert workspace.clean() is True
    assert names(tmp_path / "opt" / "data" / "one-input") == []

    workspace.reset("two")

    assert names(tmp_path / "opt" / "data") == ["two-input"]
    assert os.readlink(tmp_path / "input") == str(tmp_path / "opt" / "data" / "two-input")


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo"])
def test_output_that_is_no_directory_is_refused_and_not_followed(
    tmp_path: Path, workspace: Workspace, log: RecordingLog, kind: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    workspace.reset("pk")
    output = tmp_path / "output"
    output.rmdir()
    if kind == "file":
        output.write_text("")
    elif kind == "fifo":
        os.mkfifo(output)
    else:
        output.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")

    with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
        workspace.reset("pk")
    assert workspace.clean() is False
    with pytest.raises(UserSafeError):
        list(workspace.outputs(ROOT, prefix="").walk())

    assert str(output) in str(log)
    assert names(elsewhere) == ["kept"]
    assert output.exists() is (kind != "dangling")


def fill(directory: Path) -> None:
    """Leave one of everything that a user can leave."""
    for path in ("d/e/f", ".hidden/.f", "closed/f"):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("x")
    (directory / "closed" / "f").chmod(0)
    (directory / "closed").chmod(0)
    (directory / os.fsdecode(b"caf\xe9")).write_text("x")
    (directory / "new\nline").write_text("x")
    (directory / ("n" * 255)).write_text("x")
    (directory / "link").symlink_to("/etc")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "fifo")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(os.path.relpath(directory / "socket"))
    if os.geteuid() == 0:
        os.mknod(directory / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def test_clean_removes_everything_inside(
    tmp_path: Path, workspace: Workspace, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace.reset("pk")
    fill(tmp_path / "output")
    fill(tmp_path / "input")

    assert workspace.clean() is True
    assert (names(tmp_path / "output"), names(tmp_path / "input")) == ([], [])
    assert log.lines == []
    assert os.path.exists("/etc/passwd")


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    change = subprocess.run(["chattr", "+i", path], capture_output=True)
    if change.returncode:
        pytest.skip(f"needs a file system with immutable files: {change.stderr!r}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@needs_root
def test_immutable_file_is_a_warning_first_and_refuses_the_next_task(
    tmp_path: Path, workspace: Workspace, log: RecordingLog
) -> None:
    workspace.reset("one")
    output = tmp_path / "output"
    (output / "d" / "e").mkdir(parents=True)
    for path in ("a", "d/e/stuck", "d/e/b", "z"):
        (output / path).write_text("")
    with immutable(output / "d" / "e" / "stuck"):
        assert workspace.clean() is False
        assert [os.path.relpath(p, output) for p in output.rglob("*")] == ["d", "d/e", "d/e/stuck"]
        assert f"Could not remove '{output}/d/e/stuck': Operation not permitted" in log.lines
        with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
            workspace.reset("two")
    workspace.reset("two")


@needs_root
def test_many_immutable_files_leave_few_warnings(tmp_path: Path, log: RecordingLog) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    for number in range(50):
        (directory / str(number)).write_text("")
    with immutable(directory):
        assert clean_directory(directory, log) is False

    assert len(log.lines) == 21
    assert log.lines[-1] == f"Could not remove 50 entries of {directory} in all"


def in_mount_namespace(script: str, *arguments: object) -> str:
    """Run Python with mounts of its own; skip where that is not allowed."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare(1)")
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"needs mount namespaces: {probe.stderr!r}")
    prelude = (
        "import os, subprocess, sys\nfrom pathlib import Path\n"
        "from tests.files.test_workspace import *\n"
        "def mount(*a): subprocess.run(['mount', *map(str, a)], check=True)\n"
        "root, log = Path(sys.argv[1]), RecordingLog()\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", prelude + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1].parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_mounts_inside_are_left_alone(tmp_path: Path) -> None:
    """A bind mount from the same file system, another file system, a mounted file."""
    script = """
output = root / "output"
for name in ("source/kept", "output/d/bind/x", "output/d/tmpfs/x", "output/a"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("")
mount("--bind", root / "source", output / "d" / "bind")
mount("-t", "tmpfs", "none", output / "d" / "tmpfs")
(output / "d" / "tmpfs" / "kept").write_text("")
(output / "file").write_text("")
mount("--bind", root / "source" / "kept", output / "file")
workspace = build(root, log)
assert workspace.clean() is False
print(sorted(str(p.relative_to(root)) for p in [*output.rglob("*"), *(root / "source").rglob("*")]))
assert sum("Device or resource busy" in line for line in log.lines) == 3, log
try:
    workspace.reset("pk")
except UserSafeError:
    print("refused")
"""
    assert in_mount_namespace(script, tmp_path).splitlines() == [
        "['output/d', 'output/d/bind', 'output/d/bind/kept', 'output/d/tmpfs', "
        "'output/d/tmpfs/kept', 'output/file', 'source/kept']",
        "refused",
    ]


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_input_that_is_a_mount_point_is_used_in_place(tmp_path: Path, kind: str) -> None:
    script = """
for name in ("source", "input", "output"):
    (root / name).mkdir()
(root / "source" / "old").write_text("")
if sys.argv[2] == "bind":
    mount("--bind", root / "source", root / "input")
else:
    mount("-t", "tmpfs", "none", root / "input")
mount("-t", "tmpfs", "none", root / "output")
(root / "output" / "old").write_text("")
workspace = build(root, log)
for pk in ("one", "two"):
    workspace.reset(pk)
    assert (os.listdir(root / "input"), os.listdir(root / "output")) == ([], [])
    make_input(workspace, "d", "a")
    print(sorted(str(p.relative_to(root)) for p in (root / "input").rglob("*")), end="")
    assert workspace.clean() is True
print(os.path.islink(root / "input"), log)
"""
    assert in_mount_namespace(script, tmp_path, kind) == "['input/d', 'input/d/a']" * 2 + "False"


def test_read_only_root_with_mounts_works_and_without_is_reported(tmp_path: Path) -> None:
    script = """
for name in ("input", "output", "opt"):
    (root / name).mkdir()
mount("--bind", root, root)
mount("-o", "remount,bind,ro", root)
mount("-t", "tmpfs", "none", root / "output")
os.chdir("/")
try:
    build(root, log).reset("pk")
except UserSafeError as error:
    print(error, log, sep="\\n")
mount("-t", "tmpfs", "none", root / "input")
build(root, log).reset("pk")
"""
    message, reason = in_mount_namespace(script, tmp_path).splitlines()
    assert message == RESET_MESSAGE
    assert "Read-only file system" in reason


def deep_tree(directory: Path, depth: int) -> None:
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        there = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(os.open("f", os.O_CREAT, dir_fd=here))
    os.close(here)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on a file system that is fast, where there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_very_deep_tree_needs_few_descriptors(in_memory: Path, log: RecordingLog) -> None:
    directory = in_memory / "d"
    directory.mkdir()
    deep_tree(directory, 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        assert clean_directory(directory, log) is True
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert (names(directory), log.lines) == ([], [])


def test_wide_tree_is_emptied_in_pieces(
    in_memory: Path, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shim.files.emptying.MAX_PENDING", 7)
    held: list[int] = []
    sweep = Emptying._sweep

    def sweep_and_count(emptying: Emptying) -> list[os.DirEntry[str]]:
        held.append(len(todo := sweep(emptying)))
        return todo

    monkeypatch.setattr(Emptying, "_sweep", sweep_and_count)
    for number in range(300):
        (in_memory / f"{number}" / "e").mkdir(parents=True)
        (in_memory / f"f{number}").write_text("")

    assert clean_directory(in_memory, log) is True
    assert (names(in_memory), log.lines) == ([], [])
    assert 7 == max(held)


def test_directory_moved_away_while_it_is_emptied_leads_nowhere_else(
    tmp_path: Path, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours / "d" / "f", theirs / "kept"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    real_unlink = os.unlink

    def unlink_after_a_move(*arguments: Any, **named: Any) -> None:
        with suppress(FileNotFoundError):
            (ours / "d").rename(theirs / "d")
        real_unlink(*arguments, **named)

    monkeypatch.setattr(os, "unlink", unlink_after_a_move)

    assert clean_directory(ours, log) is True
    assert names(theirs) == ["d", "kept"]
    assert len(log.lines) == 1


def test_clean_directory_tolerates_what_is_missing_or_a_link(
    tmp_path: Path, log: RecordingLog
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_text("")
    (tmp_path / "link").symlink_to("kept")

    results = [clean_directory(tmp_path / name, log) for name in ("missing", "link")]

    assert results == [True, False]
    assert names(tmp_path / "kept") == ["f"]
    assert len(log.lines) == 1


@pytest.mark.parametrize("path", ["", "d/e", "./d//e", "caf\u00e9/new\nline"])
def test_directories_of_inputs_are_made_readable_whatever_the_umask(
    tmp_path: Path, workspace: Workspace, path: str
) -> None:
    workspace.reset("pk")
    umask = os.umask(0o077)
    try:
        make_input(workspace, path, "a")
    finally:
        os.umask(umask)

    directory = tmp_path / "input" / path
    assert names(directory) == ["a"]
    assert mode(directory.resolve()) == mode(directory.resolve().parent) == "0o755"


@pytest.mark.parametrize("path", ["/", "/etc/x", "..", "../x", "d/../../x", "a\0b"])
def test_inputs_outside_are_refused(tmp_path: Path, workspace: Workspace, path: str) -> None:
    workspace.reset("pk")

    with pytest.raises(UserSafeError):
        workspace.open_input(path)
    assert names(tmp_path / "input") == []


def test_inputs_go_through_no_link(tmp_path: Path, workspace: Workspace) -> None:
    workspace.reset("pk")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "input" / "d").symlink_to(tmp_path / "elsewhere")

    for path in ("d", "d/e"):
        with pytest.raises(OSError):
            workspace.open_input(path)
    assert names(tmp_path / "elsewhere") == []


@needs_root
def test_what_the_shim_itself_may_not_read_is_skipped(in_memory: Path, log: RecordingLog) -> None:
    """Without root, where modes bind the shim too."""
    in_memory.chmod(0o777)
    found: list[str] = []

    def walk() -> None:
        os.setgroups([])
        os.setgid(UNPRIVILEGED_UID)
        os.setuid(UNPRIVILEGED_UID)
        output = in_memory / "out"
        (output / "closed/d").mkdir(parents=True)
        for path in ("a", "closed/d/b", "z"):
            (output / path).write_text("")
        (output / "closed").chmod(0)
        outputs = Outputs(output, user=AUTHOR, prefix="", warn=log.author_lines.append)
        found.extend(file.relative_path for file in outputs.walk())
        (output / "closed").chmod(0o700)
        assert (["a", "z"], 1) == (sorted(found), len(log.author_lines)), (found, log.author_lines)
        assert "closed" in log.author_lines[0]

    child = multiprocessing.get_context("fork").Process(target=walk)
    child.start()
    child.join(30)
    assert 0 == child.exitcode


def read_outputs(workspace: Workspace, user: User = ROOT) -> dict[str, str]:
    found = {}
    for file in workspace.outputs(user, prefix="").walk():
        with open(file.open(), encoding="utf-8") as stream:
            found[file.relative_path] = stream.read()
    return found


@pytest.fixture
def output(tmp_path: Path, workspace: Workspace) -> Path:
    """Return an empty output directory with a secret beside it."""
    workspace.reset("pk")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "output"


def test_walk_finds_every_regular_file(output: Path, workspace: Workspace) -> None:
    contents = {
        "a": "a",
        ".hidden": "h",
        ".d/.e/f": "",
        "sp ace/caf\u00e9": "b",
        "new\nline": "c",
        "sub/.sagemaker_shim.x/y": "d",
        "w" * 200 + "/" + "w" * 200: "e",
    }
    for path, content in contents.items():
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_text(content)

    assert read_outputs(workspace) == contents


def test_walk_leaves_out_what_must_not_be_opened(
    output: Path, workspace: Workspace, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(output)
    fill(output)
    (output / "closed").chmod(0o700)
    for path in (".sagemaker_shim", "d/.sagemaker_shim"):
        (output / path).mkdir()
        (output / path / "inference_result.json").write_text("forged")
    (output / "d" / "e" / ".sagemaker_shim").write_text("in the way")
    (output / "closed" / ".sagemaker_shim").symlink_to("f")

    assert sorted(read_outputs(workspace)) == [
        ".hidden/.f",
        "closed/f",
        "d/e/f",
        "new\nline",
        "n" * 255,
    ]
    skipped = ["'caf\\udce9'", "'link'", "'loop'", "'fifo'", "'socket'", "'.sagemaker_shim'"]
    skipped += [f"'{path}/.sagemaker_shim'" for path in ("d", "d/e", "closed")]
    skipped += ["'null'"] if os.geteuid() == 0 else []
    assert log.author_lines == log.lines
    assert sorted(line.split(": ")[0] for line in log.lines) == sorted(
        f"Skipping the output {name}" for name in skipped
    )


LINKS = {
    "to a file": ("d/f", "inside"),
    "dots": ("d/../d/./f", "inside"),
    "through a link to a directory": ("dir-link/f", "inside"),
    "to a link": ("file-link", "inside"),
    "absolute": ("{output}/d/f", "inside"),
    "absolute, through a link": ("{output}/dir-link/../d/f", "inside"),
    "absolute, by another name of the directory": ("{real}/d/f", "inside"),
    "out": ("../secret", None),
    "out and in again": ("../output/d/f", None),
    "out through a directory": ("d/../../secret", None),
    "out through a link": ("up-link/secret", None),
    "out, absolute": ("{output}/../secret", None),
    "out, like the directory": ("{output}-2/x", None),
    "to the environment of a process": ("/proc/1/environ", None),
    "to our own root": ("/proc/self/root{output}/d/f", None),
    "to itself": ("link", None),
    "to a directory": ("d", None),
    "to the output directory": (".", None),
    "to a FIFO": ("fifo", None),
    "to nothing": ("nothing", None),
    "below a file": ("d/f/x", None),
}


@pytest.mark.parametrize(("target", "expected"), LINKS.values(), ids=LINKS)
def test_walk_follows_links_inside_only(
    tmp_path: Path, log: RecordingLog, target: str, expected: str | None
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    workspace = build(tmp_path / "alias", log)
    workspace.reset("pk")
    output = tmp_path / "alias" / "output"
    (tmp_path / "real" / "secret").write_text("secret")
    (tmp_path / "real" / "output-2").mkdir()
    (tmp_path / "real" / "output-2" / "x").write_text("secret")
    (output / "d").mkdir()
    (output / "d" / "f").write_text("inside")
    (output / "dir-link").symlink_to("d")
    (output / "file-link").symlink_to("d/f")
    (output / "up-link").symlink_to("..")
    os.mkfifo(output / "fifo")
    (output / "link").symlink_to(target.format(output=output, real=tmp_path / "real" / "output"))

    assert read_outputs(workspace).get("link") == expected
    assert ("'link'" in str(log)) is (expected is None)


@needs_root
@pytest.mark.parametrize("user", [AUTHOR, ROOT], ids=["author", "root"])
def test_walk_opens_nothing_that_the_user_could_not_read(
    tmp_path: Path, output: Path, workspace: Workspace, log: RecordingLog, user: User
) -> None:
    (tmp_path / "secret").chmod(0o600)
    os.link(tmp_path / "secret", output / "hard")
    (output / "to-hard").symlink_to("hard")
    (output / "locked").mkdir(mode=0o700)
    (output / "locked" / "f").write_text("x")
    (output / "to-locked").symlink_to("locked/f")
    (output / "public").write_text("x")
    (output / "own").write_text("x")
    (output / "own").chmod(0)
    os.chown(output / "own", UNPRIVILEGED_UID, UNPRIVILEGED_UID)

    everything = ["hard", "locked/f", "own", "public", "to-hard", "to-locked"]
    assert sorted(read_outputs(workspace, user)) == (
        ["own", "public"] if user is AUTHOR else everything
    )
    assert len(log.lines) == (4 if user is AUTHOR else 0)


def replace_by_link(output: Path) -> None:
    (output / "f").unlink()
    (output / "f").symlink_to(output.parent / "secret")


def replace_by_fifo(output: Path) -> None:
    (output / "f").unlink()
    os.mkfifo(output / "f")


def replace_by_root_owned_file(output: Path) -> None:
    (output.parent / "secret").chmod(0o600)
    (output / "f").unlink()
    os.link(output.parent / "secret", output / "f")


def replace_output(output: Path) -> None:
    output.rename(output.parent / "moved")
    output.symlink_to("moved")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda output: (output / "f").unlink(), id="gone"),
        replace_by_link,
        replace_by_fifo,
        pytest.param(replace_by_root_owned_file, marks=needs_root),
        replace_output,
    ],
)
def test_output_that_changed_since_the_walk_is_not_found(
    output: Path, workspace: Workspace, change: Callable[[Path], None]
) -> None:
    (output / "f").write_text("x")
    [file] = workspace.outputs(AUTHOR, prefix="").walk()
    change(output)

    with pytest.raises(FileNotFoundError):
        file.open()


@pytest.mark.parametrize(
    "change",
    [
        replace_by_link,
        replace_by_fifo,
        pytest.param(replace_by_root_owned_file, marks=needs_root),
    ],
)
def test_output_that_changes_just_when_it_is_opened_is_not_found(
    output: Path,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    (output / "f").write_text("x")
    [file] = workspace.outputs(AUTHOR, prefix="").walk()
    real_stat = os.stat

    def stat_then_change(*arguments: Any, **named: Any) -> os.stat_result:
        monkeypatch.undo()
        status = real_stat(*arguments, **named)
        change(output)
        return status

    monkeypatch.setattr(os, "stat", stat_then_change)
    with pytest.raises(FileNotFoundError):
        file.open()


def test_walk_of_a_missing_output_directory_finds_nothing(
    tmp_path: Path, workspace: Workspace, log: RecordingLog
) -> None:
    workspace.reset("pk")
    (tmp_path / "output").rmdir()
    assert list(workspace.outputs(ROOT, prefix="").walk()) == []
    assert len(log.author_lines) == 1


def test_walk_without_descriptors_fails_and_loses_no_output(
    output: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output / "d").mkdir()
    (output / "d" / "f").write_text("x")
    real_open = os.open

    def open_few(path: Any, *rest: Any, **named: Any) -> int:
        if path == "d":
            raise OSError(errno.EMFILE, "Too many open files")
        return real_open(path, *rest, **named)

    monkeypatch.setattr(os, "open", open_few)
    with pytest.raises(OSError, match="Too many open files"):
        list(workspace.outputs(ROOT, prefix="").walk())


def test_walk_of_a_very_deep_tree_ends_where_keys_end(in_memory: Path, log: RecordingLog) -> None:
    workspace = build(in_memory, log)
    workspace.reset("pk")
    output = in_memory / "output"
    deep_tree(output, 1_100)
    (output / "f").write_text("x")

    assert read_outputs(workspace) == {"f": "x"}
    assert len(log.lines) == 1
    assert "longer than 1024 bytes" in log.lines[0]
    assert workspace.clean() is True


def test_a_key_that_is_too_long_only_with_its_prefix_is_skipped(
    output: Path, workspace: Workspace, log: RecordingLog
) -> None:
    long = "/".join(["n" * 200] * 5) + "/" + "m" * 12  # 1,017 bytes
    for path in (long, long[:-1], "\u00e9"):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_text("x")

    files = workspace.outputs(ROOT, prefix="pre/fix/").walk()
    assert sorted(file.relative_path for file in files) == [long[:-1], "\u00e9"]
    assert log.author_lines == [
        f"Skipping the output {long!r}: its key would be longer than 1024 bytes"
    ]


def test_few_of_very_many_skipped_outputs_are_named(
    output: Path, workspace: Workspace, log: RecordingLog
) -> None:
    for number in range(200):
        os.mkfifo(output / f"{number}")

    assert list(workspace.outputs(ROOT, prefix="").walk()) == []
    assert len(log.author_lines) == 101
    assert log.author_lines[-1] == "Skipping more outputs, which are not named any more"


LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_lease_on_an_output_is_its_holders_doing(output: Path, workspace: Workspace) -> None:
    (output / "leased").write_text("x")
    holder = subprocess.Popen(
        [sys.executable, "-c", LEASE, output / "leased"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == b"ready\n"
    try:
        [file] = workspace.outputs(ROOT, prefix="").walk()
        with pytest.raises(UserSafeError, match="'leased' is locked by a lease"):
            file.open()
        (output / "link").symlink_to("leased")
        with pytest.raises(UserSafeError, match="'leased' is locked by a lease"):
            list(workspace.outputs(ROOT, prefix="").walk())
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.kill()
        holder.wait()


def test_open_files_of_a_walk_do_not_grow(output: Path, workspace: Workspace) -> None:
    for number in range(300):
        (output / f"{number}").mkdir()
        (output / f"{number}" / "f").write_text("")
    before = len(os.listdir("/proc/self/fd"))

    files = []
    for file in workspace.outputs(ROOT, prefix="").walk():
        files.append(file)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(files) == 300
    assert len(os.listdir("/proc/self/fd")) == before


def swap_for_ever(directory: Path, outside: Path) -> None:
    """As a hostile user: exchange a directory, a link out of here and other places, quickly."""
    os.setuid(UNPRIVILEGED_UID)
    while True:
        with suppress(OSError):
            (directory / "d" / "e").mkdir(parents=True)
            (directory / "d" / "e" / "f").write_text("mine")
        with suppress(OSError):
            (directory / "d" / "e").rename(directory / "x")
        with suppress(OSError):
            (directory / "d" / "e").symlink_to(outside)
        with suppress(OSError):
            (directory / "d").rename(directory / "y")
        with suppress(OSError):
            (directory / "d").symlink_to(outside)
        for name in ("d/e", "d", "x", "y"):
            with suppress(OSError):
                (directory / name).unlink()
        with suppress(OSError):
            (directory / "x").rename(outside.parent / "open" / "x")
        with suppress(OSError):
            (outside.parent / "open" / "x").rename(directory / "d")


@pytest.fixture
def swapper(output: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a directory outside, full of secrets, that the swapper points links at."""
    outside = tmp_path / "outside"
    for path in (outside / "e", tmp_path / "open"):
        path.mkdir(parents=True)
    (tmp_path / "open").chmod(0o1777)
    (tmp_path / "open" / "kept").write_text("")
    for path in ("f", "e/f"):
        (outside / path).write_text("secret")
    for parent in tmp_path.parents:
        if stat.S_IMODE(parent.stat().st_mode) & 0o001 == 0:
            parent.chmod(0o711)
    tmp_path.chmod(0o711)
    process = multiprocessing.get_context("fork").Process(
        target=swap_for_ever, args=(output, outside)
    )
    process.start()
    yield outside
    process.kill()
    process.join()


@needs_root
def test_nothing_outside_is_read_or_removed_while_a_user_swaps_links(
    tmp_path: Path, output: Path, workspace: Workspace, swapper: Path
) -> None:
    deadline = time.monotonic() + 1.5
    contents = set()
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            for file in workspace.outputs(AUTHOR, prefix="").walk():
                with open(file.open()) as stream:
                    contents.add(stream.read())
        workspace.clean()

    assert contents <= {"", "mine"}
    assert "mine" in contents
    assert sorted(str(p.relative_to(swapper)) for p in swapper.rglob("*")) == ["e", "e/f", "f"]
    assert "kept" in names(tmp_path / "open")


def test_writable_directories_are_made_and_keep_a_sticky_bit(
    tmp_path: Path, log: RecordingLog
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1755)
    (tmp_path / "plain").mkdir(mode=0o700)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("plain")
    paths = [tmp_path / name for name in ("file", "new/deep", "tmp", "link")]

    ensure_writable_directories(paths, log)

    assert {name: mode(tmp_path / name) for name in ("new", "new/deep", "tmp", "plain")} == {
        "new": "0o755",
        "new/deep": "0o777",
        "tmp": "0o1777",
        "plain": "0o777",
    }
    assert len(log.lines) == 1


@needs_root
def test_writable_directory_is_not_reached_through_the_link_of_a_user(
    tmp_path: Path, log: RecordingLog
) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("private")
    os.chown(tmp_path / "link", UNPRIVILEGED_UID, UNPRIVILEGED_UID, follow_symlinks=False)

    ensure_writable_directories([tmp_path / "link"], log)

    assert mode(tmp_path / "private") == "0o700"
    assert len(log.lines) == 1


def owned_link(path: Path, target: Path, uid: int = 0) -> None:
    path.symlink_to(target)
    os.chown(path, uid, uid, follow_symlinks=False)


@pytest.mark.parametrize("target", ["directory", "missing"])
def test_a_link_of_roots_that_the_image_has_for_the_output_is_followed(
    tmp_path: Path, workspace: Workspace, target: str
) -> None:
    out = tmp_path / "data" / "out"
    if target == "directory":
        out.mkdir(parents=True)
        (out / "old").write_text("")
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "output").symlink_to(tmp_path / "link" / "out")

    for pk in ("one", "pk"):
        workspace.reset(pk)
        assert names(out) == []
        (out / "f").write_text("x")
        (out / "absolute").symlink_to(tmp_path / "output" / "f")
        assert read_outputs(workspace) == {"f": "x", "absolute": "x"}
        assert workspace.clean() is True
    assert (tmp_path / "output").is_symlink()


@needs_root
@pytest.mark.parametrize("where", ["output", "parent", "target"])
def test_a_link_of_the_users_that_was_left_for_the_output_is_refused(
    tmp_path: Path, log: RecordingLog, where: str
) -> None:
    """In a container that is started again, what the user made is there from the beginning."""
    kept = tmp_path / "elsewhere" / "output" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    (root := tmp_path / "root").mkdir()
    if where == "output":
        owned_link(root / "output", kept.parent, UNPRIVILEGED_UID)
    if where == "target":
        (root / "output").symlink_to(root / "theirs")
        owned_link(root / "theirs", kept.parent, UNPRIVILEGED_UID)
    if where == "parent":
        root.rmdir()
        owned_link(root, tmp_path / "elsewhere", UNPRIVILEGED_UID)

    with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
        build(root, log).reset("pk")
    assert kept.exists()


def test_output_that_became_a_link_is_named_so(
    tmp_path: Path, output: Path, workspace: Workspace, log: RecordingLog
) -> None:
    output.rename(tmp_path / "moved")
    output.symlink_to("moved")

    with pytest.raises(UserSafeError, match="^The containers output directory is not a directory$"):
        list(workspace.outputs(ROOT, prefix="").walk())
    with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
        workspace.reset("pk")
    assert log.author_lines == [f"{output} is a link, in place of a directory"] * 2


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_that_the_image_has_for_an_unlinked_input_is_replaced(
    tmp_path: Path, log: RecordingLog, target: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "input").symlink_to(target)
    workspace = build(tmp_path, log, linked=False)

    workspace.reset("pk")

    assert (mode(tmp_path / "input"), names(tmp_path / "input")) == ("0o755", [])
    assert names(tmp_path / "elsewhere") == ["kept"]
    (tmp_path / "input").rmdir()
    (tmp_path / "input").symlink_to(target)
    with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
        workspace.reset("pk")


@needs_root
@pytest.mark.parametrize("place", ["opt", "opt/data", "opt/data/pk-input"])
def test_the_linked_input_is_not_made_behind_a_link_of_the_users(
    tmp_path: Path, log: RecordingLog, place: str
) -> None:
    (outside := tmp_path / "outside").mkdir()
    (tmp_path / "root" / place).parent.mkdir(parents=True)
    owned_link(tmp_path / "root" / place, outside, UNPRIVILEGED_UID)

    workspace = build(tmp_path / "root", log)
    if place.endswith("input"):  # a name of our own is taken back
        workspace.reset("pk")
        make_input(workspace, "", "f")
        assert names(tmp_path / "root" / place) == ["f"]
    else:
        with pytest.raises(UserSafeError, match=f"^{RESET_MESSAGE}$"):
            workspace.reset("pk")
    assert names(outside) == []


def test_clean_directory_goes_through_links_of_roots_above_it(
    tmp_path: Path, log: RecordingLog
) -> None:
    (tmp_path / "real" / "d").mkdir(parents=True)
    (tmp_path / "real" / "d" / "f").write_text("")
    (tmp_path / "link").symlink_to("real/../real")

    assert clean_directory(tmp_path / "link" / "d", log) is True
    assert names(tmp_path / "real" / "d") == []


@needs_root
def test_clean_directory_empties_nothing_behind_a_link_of_the_users(
    tmp_path: Path, log: RecordingLog
) -> None:
    (tmp_path / "real" / "d").mkdir(parents=True)
    (tmp_path / "real" / "d" / "f").write_text("")
    owned_link(tmp_path / "link", tmp_path / "real", UNPRIVILEGED_UID)

    assert clean_directory(tmp_path / "link" / "d", log) is False
    assert names(tmp_path / "real" / "d") == ["f"]
    assert len(log.lines) == 1


def test_links_in_a_loop_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=str(tmp_path / "a/x")):
        open_directory(tmp_path / "a" / "x", mode=0o755)
    assert len(os.listdir("/proc/self/fd")) == before


def test_directories_on_the_way_are_for_everybody_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        os.close(open_directory(tmp_path / "a" / "b" / "c", mode=0o777))
    finally:
        os.umask(umask)

    assert [mode(tmp_path / path) for path in ("a", "a/b", "a/b/c")] == ["0o755"] * 2 + ["0o777"]


def test_shared_temporary_directories_get_the_sticky_bit(tmp_path: Path) -> None:
    """Also where an image forgot it, and where there is none yet."""
    script = """
mount("-t", "tmpfs", "-o", "mode=0777", "none", "/tmp")
mount("-t", "tmpfs", "-o", "mode=0755", "none", "/var")
mount("-t", "tmpfs", "-o", "mode=0700", "none", "/dev/shm")
paths = ["/tmp", "/var/tmp", "/dev/shm", "/var/other", "/var/none/../tmp/"]
ensure_writable_directories([Path(path) for path in paths], log)
print([mode(Path(path)) for path in paths[:4]], log.lines)
"""
    assert in_mount_namespace(script, tmp_path) == ("['0o1777', '0o1777', '0o1777', '0o777'] []")
