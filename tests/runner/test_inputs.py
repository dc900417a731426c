"""The inputs of a task: each file from one source, in their directory, whoever works in it."""

from __future__ import annotations

import io
import multiprocessing
import os
import stat
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shim.contract.errors import UserSafeError
from shim.contract.tasks import InferenceIO, InferenceTask
from shim.files.workspace import Workspace
from shim.http.errors import RemoteError
from shim.http.stream import unchecked
from shim.runner.inputs import Inputs, Source, Sources
from shim.s3.directory import DirectoryStore
from shim.s3.store import ObjectSummary
from shim.s3.transfer import Transfers
from tests.support import UNPRIVILEGED_UID, needs_root


class MemoryStore:
    """A bucket whose keys are spelled as they like; `delays` says which come last."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = objects
        self.downloaded: list[str] = []

    def list(self, bucket: str, prefix: str) -> Iterator[ObjectSummary]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield ObjectSummary(key=key, size=len(self.objects[key]))

    def download(self, bucket: str, key: str, directory: int, name: str, **_: Any) -> None:
        self.downloaded.append(key)
        temporary = f".{os.urandom(8).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, dir_fd=directory), "wb") as file:
            file.write(self.objects[key])
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


class QuietLog:
    def debug(self, message: str) -> None: ...

    warning = error = debug


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return buffer.getvalue()


def plain(path: str, key: str) -> InferenceIO:
    return InferenceIO(relative_path=path, bucket_name="b", bucket_key=key)


def zip_at(path: str, key: str) -> InferenceIO:
    return InferenceIO(relative_path=path, bucket_name="b", bucket_key=key, decompress=True)


def bring(
    root: Path,
    store: Any,
    *inputs: InferenceIO,
    concurrency: int = 4,
    linked: bool = True,
    before: Callable[[], object] = lambda: None,
) -> bool:
    log: Any = QuietLog()
    workspace = Workspace(
        input_path=root / "input",
        output_path=root / "output",
        linked_input_parent=root / "linked" if linked else None,
        log=log,
    )
    workspace.reset("pk")
    before()
    task = InferenceTask(pk="pk", inputs=inputs, output_bucket_name="b", output_prefix="o/")
    transfers = Transfers(store, concurrency=concurrency, check=unchecked)
    return Inputs(task, store=store, workspace=workspace, log=log).bring(transfers)


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root / "input")) for p in (root / "input").rglob("*"))


OBJECTS = {
    "a": b"1",
    "b": b"2",
    "p/./x": b"3",
    "p/x": b"4",
    "q/x": b"5",
    "q/d/y": b"6",
    "r/d": b"7",
    "z1": zipped("top/x", "top/y"),
    "z2": zipped("y", "w"),
    "z3": zipped("x/below", "w"),
    "z4": zipped("v"),
}
COLLISIONS = {
    "two keys of a prefix": ([plain("in", "p/")], "in/x", "p/./x", "p/x"),
    "two keys of a prefix that is everything": ([plain(".", "p/")], "x", "p/./x", "p/x"),
    "a prefix over a plain input": ([plain(".", "q/"), plain("x", "a")], "x", "a", "q/x"),
    "a plain input over a prefix": ([plain("x", "a"), plain(".", "q/")], "x", "a", "q/x"),
    "two prefixes": ([plain("i", "q/"), plain("i/d", "q/d/")], "i/d/y", "q/d/y", "q/d/y"),
    "a zip over a plain input": ([zip_at("z.zip", "z1"), plain("x", "a")], "x", "a", "z1"),
    "a zip over a prefix": ([zip_at("z", "z1"), plain(".", "q/")], "x", "q/x", "z1"),
    "two zips": ([zip_at("1.zip", "z1"), zip_at("2.zip", "z2")], "y", "z1", "z2"),
    "one zip twice": ([zip_at("1.zip", "z1"), zip_at("2.zip", "z1")], "x", "z1", "z1"),
    "a file where a prefix needs a directory": (
        [plain(".", "q/"), plain("d", "a")], "d", "a", "q/d/y"),
    "a prefix's file where another has a directory": (
        [plain(".", "r/"), plain(".", "q/")], "d", "r/d", "q/d/y"),
    "a directory of a prefix where another has a file": (
        [plain(".", "q/"), plain(".", "r/")], "d", "q/d/y", "r/d"),
    "a file where a zip needs a directory": ([zip_at("z", "z3"), plain("x", "a")], "x", "a", "z3"),
    "a zip's file where another has a directory": (
        [zip_at("z", "z1"), plain("y/below", "a")], "y", "a", "z1"),
    "a zip's file where another zip has a directory": (
        [zip_at("1", "z3"), zip_at("2", "z1")], "x", "z3", "z1"),
    "a zip into what a prefix makes a file": (
        [zip_at("d/z", "z4"), plain(".", "r/")], "d", "z4", "r/d"),
}  # fmt: skip


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(("inputs", "path", "first", "second"), COLLISIONS.values(), ids=COLLISIONS)
def test_two_sources_of_one_file_fail_the_task_and_are_named(
    tmp_path: Path,
    inputs: list[InferenceIO],
    path: str,
    first: str,
    second: str,
    concurrency: int,
) -> None:
    for order in (inputs, inputs[::-1]):
        with pytest.raises(UserSafeError) as caught:
            bring(tmp_path, MemoryStore(OBJECTS), *order, concurrency=concurrency)
        named, _, uris = str(caught.value).partition(": ")
        assert f"Two inputs need one place, {path!r}" == named
        assert {f"s3://b/{first}", f"s3://b/{second}"} == set(uris.split(" and "))


def test_named_inputs_that_collide_with_each_other_are_refused_before_any_download(
    tmp_path: Path,
) -> None:
    store = MemoryStore(OBJECTS)
    with pytest.raises(UserSafeError, match="'d'"):
        bring(tmp_path, store, plain("c", "b"), plain("d", "a"), zip_at("d/z", "z4"))
    assert [] == store.downloaded


def test_sources_that_only_share_directories_all_arrive(tmp_path: Path) -> None:
    inputs = (plain("d/a", "a"), plain("d", "q/"), zip_at("d/z", "z4"), zip_at("z", "z2"))
    assert bring(tmp_path, MemoryStore(OBJECTS), *inputs)
    assert ["d", "d/a", "d/d", "d/d/y", "d/v", "d/x", "w", "y"] == files(tmp_path)
    assert "content of v" == (tmp_path / "input/d/v").read_text()


@pytest.mark.parametrize("inputs", [(), (plain(".", "none/"),)], ids=["none", "an empty prefix"])
def test_inputs_without_a_file_are_told(tmp_path: Path, inputs: tuple[InferenceIO, ...]) -> None:
    assert not bring(tmp_path, MemoryStore({}), *inputs)


def test_a_path_that_nobody_can_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserSafeError, match="longer than 4095 bytes"):
        bring(tmp_path, MemoryStore({"z": zipped("d/" * 3000 + "f", "x")}), zip_at("z", "z"))


def test_a_key_that_names_no_file_is_an_error_of_the_bucket(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="p/../x"):
        bring(tmp_path, MemoryStore({"p/../x": b""}), plain(".", "p/"))


def test_a_file_is_known_with_little_memory() -> None:
    """Including the path itself, of some 60 characters, and one directory for ten files."""
    paths = [f"study-{n // 1000:06}/series-{n // 10:06}/image-{n:012}.dcm" for n in range(20_000)]
    source = Source("s3://bucket/prefix/", "")
    tracemalloc.start()
    sources = Sources()
    for path in paths:
        sources.claim(path[:1] + path[1:], source)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / len(paths) < 200


@needs_root
def test_what_arrives_is_readable_for_the_user_whatever_the_umask(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    for key, body in OBJECTS.items():
        if "." not in key:
            store.put("b", key, body)
    open_up(tmp_path)
    umask = os.umask(0o077)
    try:
        bring(tmp_path, store, plain("d/e/a", "a"), plain("q", "q/"), zip_at("u/z", "z3"))
    finally:
        os.umask(umask)
    found = read_as_nobody(tmp_path / "input")
    assert {"d/e/a": "1", "q/x": "5", "q/d/y": "6", "u/w": "content of w"}.items() <= found.items()
    assert "content of x/below" == found["u/x/below"]
    modes = {oct(stat.S_IMODE(p.lstat().st_mode)) for p in (tmp_path / "linked").rglob("*")}
    assert {"0o755", "0o644"} == modes


def open_up(path: Path) -> None:
    """Let everybody pass through the directories of a test."""
    for parent in (path, *path.parents):
        if stat.S_IMODE(parent.stat().st_mode) & 0o001 == 0:
            parent.chmod(0o711)


def read_as_nobody(directory: Path) -> dict[str, str]:
    def read(results: Any) -> None:
        os.setgroups([])
        os.setgid(UNPRIVILEGED_UID)
        os.setuid(UNPRIVILEGED_UID)
        results.put(
            {
                os.path.relpath(os.path.join(parent, name), directory): Path(
                    parent, name
                ).read_text()
                for parent, _, names in os.walk(directory)
                for name in names
            }
        )

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=read, args=(results,))
    process.start()
    process.join(10)
    assert 0 == process.exitcode
    found: dict[str, str] = results.get()
    return found


def lure(directory: Path, outside: Path) -> None:
    """As a hostile user: put links out of here where directories and files are to be."""
    os.setuid(UNPRIVILEGED_UID)
    while True:
        for name in ("d", "x", "y"):
            with suppress(OSError):
                (directory / name).rename(directory / f"{os.urandom(4).hex()}.away")
            with suppress(OSError):
                (directory / name).symlink_to(outside)
        for entry in directory.glob(".*.zip"):
            with suppress(OSError):
                entry.rename(directory / "zip.away")
                entry.symlink_to("/etc/shadow")
        for entry in directory.glob("*.away"):
            with suppress(OSError):
                entry.unlink()


@needs_root
def test_root_writes_nothing_where_links_of_the_user_point(tmp_path: Path) -> None:
    """The input directory is in place, writable for the user, whose server is at work in it."""
    store = MemoryStore({"z": zipped("d/evil", "y"), "p/d/evil": b"", "p/x": b""})
    (outside := tmp_path / "cron.d").mkdir()
    (directory := tmp_path / "input").mkdir()
    directory.chmod(0o777)
    open_up(tmp_path)
    user = multiprocessing.get_context("fork").Process(target=lure, args=(directory, outside))
    user.start()
    try:
        # Most tasks are refused before they begin: the directory could not be made empty.
        deadline = time.monotonic() + 30
        rounds = 0
        while rounds < 60 or (len(set(store.downloaded)) < 3 and time.monotonic() < deadline):
            rounds += 1
            for inputs in ([plain("d", "p/d/"), plain("x", "p/x")], [zip_at("z", "z")]):
                with suppress(UserSafeError):
                    bring(tmp_path, store, *inputs, linked=False)
            assert [] == os.listdir(outside)
    finally:
        user.kill()
        user.join()
    assert {"z", "p/d/evil", "p/x"} == set(store.downloaded)


@needs_root
@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "missing"])
def test_a_zip_that_was_replaced_by_the_user_is_not_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.zip").write_bytes(zipped("secret"))

    class Replacing(MemoryStore):
        def download(self, bucket: str, key: str, directory: int, name: str, **_: Any) -> None:
            place = tmp_path / "input" / name
            if kind == "link":
                place.symlink_to(tmp_path / "secret.zip")
            if kind == "hard link":
                os.link(tmp_path / "secret.zip", place)
            if kind == "fifo":
                os.mkfifo(place)

    with pytest.raises(UserSafeError, match="The input directory was changed meanwhile"):
        bring(tmp_path, Replacing({}), zip_at("z", "z"), linked=False)
    assert not (tmp_path / "input/secret").exists()


def test_descriptors_do_not_grow_with_the_number_of_objects(tmp_path: Path) -> None:
    counts = []

    class Counting(MemoryStore):
        def download(self, *arguments: Any, **options: Any) -> None:
            counts.append(len(os.listdir("/proc/self/fd")))
            super().download(*arguments, **options)

    before = len(os.listdir("/proc/self/fd"))
    bring(tmp_path, Counting({f"p/{n}/f": b"" for n in range(300)}), plain(".", "p/"))
    assert 300 == len(counts)
    assert max(counts) <= before + 4 * 4
    # The descriptor of Stop stays.
    assert len(os.listdir("/proc/self/fd")) <= before + 1
