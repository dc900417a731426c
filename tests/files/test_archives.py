"""What an archive may leave behind, and what it may not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.contract.errors import TaskStopped, UserSafeError
from shim.files import archives
from shim.process.users import User
from tests.support import UNPRIVILEGED_UID, needs_root

TAR_MESSAGE = "Tarfile could not be extracted"
ZIP_MESSAGE = "Input zip file could not be extracted"
PATHS_MESSAGE = "Zip file contains invalid paths"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """Return an empty directory, two levels down so that `../..` stays in tmp_path."""
    directory = tmp_path / "a" / "dest"
    directory.mkdir(parents=True)
    return directory


def tree(directory: Path) -> dict[str, str]:
    """Return path -> content of each file below a directory, -> target of each link."""
    return {
        str(path.relative_to(directory)): f"-> {os.readlink(path)}"
        if path.is_symlink()
        else path.read_text(errors="replace")
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def extract_zip(source: Path, dest: Path, **options: Any) -> list[str]:
    """Unpack a zip; return what it asked for, file by file."""
    claimed: list[str] = []
    directory = os.open(dest, os.O_RDONLY)
    try:
        with source.open("rb", buffering=0) as file:
            archives.extract_zip(
                file, directory, lambda names: claimed.append("/".join(names)), **options
            )
    finally:
        os.close(directory)
    return claimed


def extract_tar(stream: Any, dest: Path, *, user: User | None = None, **options: Any) -> list[str]:
    """Unpack a tar; return the warnings."""
    warnings: list[str] = []
    directory = os.open(dest, os.O_RDONLY)
    try:
        archives.extract_tar(
            stream, directory, user=user or User(), warn=warnings.append, **options
        )
    finally:
        os.close(directory)
    return warnings


def make_zip(
    path: Path, entries: Iterable[tuple[Any, str]], method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return path


def link_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a.txt"], ["a.txt"], id="one file"),
        pytest.param(["d/e/a.txt"], ["a.txt"], id="one file in directories"),
        pytest.param(["d/a", "d/s/b"], ["a", "s/b"], id="a common directory"),
        pytest.param(["d/a", "e/b"], ["d/a", "e/b"], id="no common directory"),
        pytest.param(["dd/a", "d/b"], ["d/b", "dd/a"], id="a common beginning of names"),
        pytest.param(["./d//a", "d/b"], ["a", "b"], id="one directory spelled in two ways"),
        pytest.param(["d/x/../a", "d/b"], ["a", "b"], id="dots that stay inside"),
        pytest.param(["/data/a.txt", "/data/b.txt"], ["a.txt", "b.txt"], id="an absolute one"),
        pytest.param(["/a.txt", "/b.txt"], ["a.txt", "b.txt"], id="the root"),
        pytest.param(["/etc/evil"], ["evil"], id="one absolute file"),
        pytest.param(["../x/a", "../x/b/c"], ["a", "b/c"], id="one outside"),
        pytest.param(["../foo.txt"], ["foo.txt"], id="one file outside"),
        pytest.param(["./a/x", "./a/y"], ["a/x", "a/y"], id="the directory itself, as spelled"),
        pytest.param(["./a"], ["a"], id="one file in the directory itself"),
        pytest.param(["d/x/../a", "d/x/../b"], ["a", "b"], id="one with dots, as spelled"),
        pytest.param(["d/", "d/e/"], [], id="only directories"),
        pytest.param([], [], id="empty"),
        pytest.param(
            ["d/a", "__MACOSX/d/._a", "d/.DS_Store", "desktop.ini", "__MACOSX", "/desktop.ini/x"],
            ["a"],
            id="what desktops leave",
        ),
        pytest.param(
            ["d/notes__MACOSX.txt", "d/desktop-ini", "d/x.DS_Store.txt"],
            ["desktop-ini", "notes__MACOSX.txt", "x.DS_Store.txt"],
            id="what only resembles that",
        ),
        pytest.param(["d\\s\\a", "d\\", "d\\b"], ["b", "s/a"], id="foreign separators"),
        pytest.param(["d/a\\b", "d/C:b"], ["C:b", "a\\b"], id="foreign ones beside our own"),
    ],
)
def test_zip_leaves_files_without_their_common_directory(
    tmp_path: Path, dest: Path, names: list[str], expected: list[str]
) -> None:
    source = make_zip(tmp_path / "x.zip", ((name, "text") for name in names))

    claimed = extract_zip(source, dest)

    assert sorted(tree(dest)) == expected
    assert sorted(claimed) == expected


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["../foo.txt", "../../foo.txt"], id="parents"),
        pytest.param(["ok", "a/../../foo.txt"], id="out after in"),
        pytest.param(["d/../a", "d/b"], id="out of what is shared"),
        pytest.param(["ok", "/etc/foo"], id="absolute"),
        pytest.param(["../x/a", "../../x/b"], id="two places outside"),
        pytest.param(["..\\..\\a", "b"], id="foreign separators"),
        pytest.param(["ok", ".."], id="dots alone"),
        pytest.param(["ok", "a/.."], id="the directory itself"),
    ],
)
def test_zip_with_invalid_paths_leaves_nothing(
    tmp_path: Path, dest: Path, names: list[str]
) -> None:
    source = make_zip(tmp_path / "x.zip", ((name, "text") for name in names))

    with pytest.raises(UserSafeError) as error:
        extract_zip(source, dest)

    assert str(error.value) == PATHS_MESSAGE
    assert tree(tmp_path / "a") == {}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["d/a", "d/a"], id="the same"),
        pytest.param(["d/a", "d//a"], id="spelled in two ways"),
        pytest.param(["d/x/../a", "d/a", "d/b"], id="by way of another directory"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_two_entries_for_one_file_is_refused(
    tmp_path: Path, dest: Path, names: list[str]
) -> None:
    source = make_zip(tmp_path / "x.zip", ((name, "text") for name in names))

    with pytest.raises(UserSafeError, match="two entries for one file: 'd/"):
        extract_zip(source, dest)

    assert tree(dest) == {}


def test_zip_is_refused_by_its_caller_before_anything_is_written(
    tmp_path: Path, dest: Path
) -> None:
    source = make_zip(tmp_path / "x.zip", [("a", "text"), ("b", "text")])

    def claim(names: Sequence[str]) -> None:
        if names == ["b"]:
            raise UserSafeError("taken")

    directory = os.open(dest, os.O_RDONLY)
    with source.open("rb", buffering=0) as file, pytest.raises(UserSafeError, match="^taken$"):
        archives.extract_zip(file, directory, claim)
    os.close(directory)

    assert tree(dest) == {}


def unicode_path(name: str, crc: int) -> bytes:
    """Return Info-ZIP's field 0x7075 for an entry's extra data."""
    text = name.encode()
    return struct.pack("<HHBL", 0x7075, 5 + len(text), 1, crc) + text


@pytest.mark.parametrize(
    ("crc", "expected"),
    [
        pytest.param(zlib.crc32(b"caf_.txt"), "caf\u00e9.txt", id="of this name"),
        pytest.param(1, "caf_.txt", id="of a name that was changed later"),
    ],
)
def test_zip_takes_the_name_of_the_unicode_path_field(
    tmp_path: Path, dest: Path, crc: int, expected: str
) -> None:
    entry = zipfile.ZipInfo("caf_.txt")
    entry.extra = struct.pack("<HH", 0x5455, 0) + unicode_path("caf\u00e9.txt", crc)

    extract_zip(make_zip(tmp_path / "x.zip", [(entry, "text")]), dest)

    assert tree(dest) == {expected: "text"}


def claim_entries(path: Path, *, count: int, name_bytes: int) -> Path:
    """Write a zip whose directory lists so many files; their content is missing."""
    name = b"n" * name_bytes
    header = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, *[0] * 3, len(name), *[0] * 10)
    assert len(header) == 46
    header = header[:28] + struct.pack("<H", len(name)) + header[30:]
    row = header + name
    with path.open("wb") as file:
        for _ in range(count):
            file.write(row)
        size = count * len(row)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 0))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, size, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 0, 0))
    return path


@pytest.mark.parametrize(
    ("count", "name_bytes", "message"),
    [
        pytest.param(500_000, 6, "Zip file contains more than 200,000 entries", id="many"),
        pytest.param(
            1_000,
            60_000,
            "The list of contents of the zip file is longer than 32 MiB",
            id="long names",
        ),
    ],
)
def test_zip_directory_is_counted_before_it_is_parsed(
    tmp_path: Path, dest: Path, count: int, name_bytes: int, message: str
) -> None:
    source = claim_entries(tmp_path / "x.zip", count=count, name_bytes=name_bytes)
    tracemalloc.start()
    with pytest.raises(UserSafeError, match=f"^{message}$"):
        extract_zip(source, dest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 64 << 20


def stop_at_once() -> None:
    raise TaskStopped("stopped")


def test_unpacking_ends_at_a_stop(tmp_path: Path, dest: Path) -> None:
    with pytest.raises(TaskStopped):
        extract_zip(make_zip(tmp_path / "x.zip", [("a", "content")]), dest, check=stop_at_once)
    for packer in (bytes, gzip.compress):
        with pytest.raises(TaskStopped):
            extract_tar(Stream(packer(PLAIN)), dest, check=stop_at_once)


@pytest.mark.parametrize(
    "method",
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
    ids=["stored", "deflated", "bzip2", "lzma"],
)
def test_zip_content_is_readable_by_everybody_whatever_the_umask(
    tmp_path: Path, dest: Path, method: int
) -> None:
    text = "line\n" * 100_000
    source = make_zip(tmp_path / "x.zip", [("d/a", text), ("d/s/b", "b")], method)
    umask = os.umask(0o077)
    try:
        extract_zip(source, dest)
    finally:
        os.umask(umask)

    assert tree(dest) == {"a": text, "s/b": "b"}
    assert stat.S_IMODE((dest / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((dest / "s").stat().st_mode) == 0o755


def test_zip_link_becomes_a_plain_file(tmp_path: Path, dest: Path) -> None:
    source = make_zip(tmp_path / "x.zip", [(link_entry("d/l"), "/etc"), ("d/a", "text")])

    extract_zip(source, dest)

    assert tree(dest) == {"a": "text", "l": "/etc"}


def test_zip_replaces_links_and_does_not_write_through_them(tmp_path: Path, dest: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("safe")
    (dest / "a").symlink_to(outside)

    extract_zip(make_zip(tmp_path / "x.zip", [("a", "new")]), dest)

    assert outside.read_text() == "safe"
    assert tree(dest) == {"a": "new"}


def damage(data: bytes) -> bytes:
    return data.replace(b"content", b"CONTENT", 1)


def encrypt(data: bytes) -> bytes:
    """Set the encryption flag in the local header and in the central directory."""
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.index(signature) + offset
        data = data[:place] + b"\1\0" + data[place + 2 :]
    return data


def name_other_method(data: bytes) -> bytes:
    for signature, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        place = data.index(signature) + offset
        data = data[:place] + struct.pack("<H", 9) + data[place + 2 :]
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(damage, ZIP_MESSAGE, id="wrong checksum"),
        pytest.param(encrypt, ZIP_MESSAGE, id="encrypted"),
        pytest.param(lambda data: data[: len(data) // 2], ZIP_MESSAGE, id="truncated"),
        pytest.param(lambda data: b"", ZIP_MESSAGE, id="empty"),
        pytest.param(lambda data: b"\x89PNG" * 9, ZIP_MESSAGE, id="not a zip"),
        pytest.param(
            name_other_method,
            "Zip file contains an unsupported compression method",
            id="deflate64",
        ),
    ],
)
def test_zip_that_is_broken_is_refused(
    tmp_path: Path, dest: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    source = make_zip(tmp_path / "x.zip", [("a", "content")])
    source.write_bytes(change(source.read_bytes()))

    with pytest.raises(UserSafeError) as error:
        extract_zip(source, dest)

    assert str(error.value) == message


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["z", "a", "a/b"], id="a file as a directory"),
        pytest.param(["z", "a/b", "a"], id="a directory as a file"),
        pytest.param(["z", "n" * 300], id="a name too long"),
    ],
)
def test_zip_that_fits_no_file_system_is_refused(
    tmp_path: Path, dest: Path, names: list[str]
) -> None:
    source = make_zip(tmp_path / "x.zip", ((name, "") for name in names))

    with pytest.raises(UserSafeError, match=f"^{ZIP_MESSAGE}$"):
        extract_zip(source, dest)


def test_zip_on_a_full_disk_is_too_large(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_zip(tmp_path / "x.zip", [("a", "content" * 100_000)])
    real_open = os.open

    def open_full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        return (
            real_open("/dev/full", os.O_WRONLY)
            if path == "a"
            else real_open(path, flags, *rest, **named)
        )

    monkeypatch.setattr(os, "open", open_full)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(UserSafeError, match="^Contents of zip file too large$"):
        extract_zip(source, dest)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_zip_with_any_damage_is_refused_or_unpacked_inside(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dest = tmp_path_factory.mktemp("z") / "dest"
    dest.mkdir()
    source = make_zip(dest.parent / "x.zip", [("d/a", "content"), ("d/b/c", "more")])
    content = bytearray(source.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = value
    source.write_bytes(content)
    try:
        extract_zip(source, dest)
    except UserSafeError as error:
        assert str(error).partition(" for one file")[0] in {
            ZIP_MESSAGE,
            PATHS_MESSAGE,
            "Zip file contains an unsupported compression method",
            "Zip file contains two entries",
        }
    assert sorted(path.name for path in dest.parent.iterdir()) == ["dest", "x.zip"]


def member(
    name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **more: Any
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mtime = kind, target, 1_000_000_000
    for field, value in more.items():
        setattr(info, field, value)
    return info


def make_tar(*members: tuple[tarfile.TarInfo, bytes] | tarfile.TarInfo, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for item in members:
            info, content = item if isinstance(item, tuple) else (item, b"")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Stream:
    """A stream that cannot seek, gives `step` bytes at most, and may fail at its end."""

    def __init__(
        self, data: bytes, *, step: int = 1 << 16, failure: Exception | None = None
    ) -> None:
        self._data = io.BytesIO(data)
        self._step = step
        self._failure = failure
        self.at_end = False

    def readinto(self, buffer: Any, /) -> int:
        count = self._data.readinto(memoryview(buffer)[: self._step])
        if not count:
            self.at_end = True
            if self._failure is not None:
                raise self._failure
        return count


def unpack(data: bytes, dest: Path, *, warnings: Sequence[str] = (), **options: Any) -> Stream:
    stream = Stream(data, **options)
    assert extract_tar(stream, dest) == list(warnings)
    return stream


PACKERS = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "gz in two members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "bz2 in two streams": lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:]),
    "xz in two streams": lambda data: lzma.compress(data[:700]) + lzma.compress(data[700:]),
    "xz in two streams with padding": lambda data: (
        lzma.compress(data[:700]) + bytes(8) + lzma.compress(data[700:]) + bytes(400_000)
    ),
}
SIMPLE = (
    member("./", tarfile.DIRTYPE),
    (member("./a"), b"text"),
    (member("d/e/big"), b"0123456789" * 300_000),
    member("d/l", tarfile.SYMTYPE, "../a"),
    member("hard", tarfile.LNKTYPE, "./a"),
)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("step", [1 << 16, 777])
def test_tar_is_unpacked_from_a_stream_and_read_to_its_end(
    dest: Path, packer: Callable[[bytes], bytes], step: int
) -> None:
    stream = unpack(packer(make_tar(*SIMPLE)), dest, step=step)

    assert tree(dest) == {
        "a": "text",
        "d/e/big": "0123456789" * 300_000,
        "d/l": "-> ../a",
        "hard": "text",
    }
    assert (dest / "a").stat().st_nlink == 2
    assert (dest / "a").stat().st_mtime == 1_000_000_000
    assert stream.at_end is True


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_tar_keeps_long_names(dest: Path, format: int) -> None:
    long = "/".join(["directory-é" * 10] * 4)
    unpack(make_tar((member(long), b"x"), member("l", tarfile.SYMTYPE, long), format=format), dest)

    assert tree(dest) == {long: "x", "l": f"-> {long}"}


@pytest.mark.parametrize("packer", [PACKERS["plain"], PACKERS["gz"]], ids=["plain", "gz"])
def test_tar_without_members_is_fine(dest: Path, packer: Callable[[bytes], bytes]) -> None:
    unpack(packer(make_tar()), dest)

    assert tree(dest) == {}


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_tar_keeps_holes(tmp_path: Path, dest: Path, format: str) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for offset in (0, 1 << 20, 5 << 20):
            file.seek(offset)
            file.write(b"data")
        file.truncate(64 << 20)
    data = subprocess.run(
        ["tar", "-C", tmp_path, "-S", f"--format={format}", "-cf", "-", "sparse"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout

    unpack(data, dest)

    assert (dest / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (dest / "sparse").stat().st_blocks * 512 < 1 << 20


def test_tar_modes_are_those_of_the_data_filter(dest: Path) -> None:
    modes = {"plain": 0o666, "program": 0o4777, "hidden": 0o000, "odd": 0o611}
    unpack(make_tar(*(member(name, mode=mode) for name, mode in modes.items())), dest)

    assert {name: oct(stat.S_IMODE((dest / name).stat().st_mode)) for name in modes} == {
        "plain": "0o644",
        "program": "0o755",
        "hidden": "0o600",
        "odd": "0o600",
    }


@needs_root
def test_tar_belongs_to_the_user_and_what_links_lead_to_does_not(
    tmp_path: Path, dest: Path
) -> None:
    (dest / "mine").write_text("")
    data = make_tar(*SIMPLE, member("l", tarfile.SYMTYPE, "mine"))

    extract_tar(Stream(data), dest, user=User(uid=UNPRIVILEGED_UID, gid=12))

    owners = {
        str(path.relative_to(dest)): (path.lstat().st_uid, path.lstat().st_gid)
        for path in [dest, *dest.rglob("*")]
    }
    assert owners.pop("mine") == (0, 0)
    assert set(owners.values()) == {(UNPRIVILEGED_UID, 12)}


def test_tar_absolute_names_lie_inside(dest: Path) -> None:
    unpack(make_tar((member("/etc/x"), b"x"), (member("//y"), b"y"), (member("d/../z"), b"")), dest)

    assert tree(dest) == {"etc/x": "x", "y": "y", "z": ""}


def test_tar_replaces_what_is_there(tmp_path: Path, dest: Path) -> None:
    (tmp_path / "outside").write_text("safe")
    (dest / "a").symlink_to(tmp_path / "outside")
    unpack(make_tar((member("a"), b"1"), (member("b"), b"1"), (member("b"), b"2")), dest)

    assert tree(dest) == {"a": "1", "b": "2"}
    assert (tmp_path / "outside").read_text() == "safe"


DEEP = "/".join(["d" * 200] * 25)  # longer than PATH_MAX
HOSTILE = {
    "parent": [(member("../x"), b"x")],
    "parent after a directory": [(member("a/../../x"), b"x")],
    "link outside": [member("l", tarfile.SYMTYPE, "../x")],
    "link outside from a directory": [member("d/l", tarfile.SYMTYPE, "../../x")],
    "absolute link": [member("l", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link outside": [member("l", tarfile.LNKTYPE, "../x")],
    "hard link to nothing": [member("l", tarfile.LNKTYPE, "x")],
    "hard link to a link": [
        member("d/l", tarfile.SYMTYPE, "../x"),
        member("m", tarfile.LNKTYPE, "d/l"),
    ],
    "through links that each lie inside": [
        member("a/b/l", tarfile.SYMTYPE, "../.."),
        member("m", tarfile.SYMTYPE, "a/b/l/../.."),
        (member("m/x"), b"x"),
    ],
    "a hard link through links": [
        member("a/b/l", tarfile.SYMTYPE, "../.."),
        member("m", tarfile.SYMTYPE, "a/b/l/../.."),
        member("n", tarfile.LNKTYPE, "m/secret"),
    ],
    "through a link behind a path too long to resolve": [
        member(DEEP, tarfile.DIRTYPE),
        member("l", tarfile.SYMTYPE, DEEP),
        member("e", tarfile.SYMTYPE, "l/" + "../" * 25),
        (member("e/../../x"), b"x"),
    ],
    "character device": [member("x", tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "block device": [member("x", tarfile.BLKTYPE, devmajor=8)],
    "FIFO": [member("x", tarfile.FIFOTYPE)],
    "no name": [(member("."), b"x")],
    "a directory that is not empty as a file": [(member("d/x"), b"x"), (member("d"), b"x")],
    "through a link in circles": [
        member("l", tarfile.SYMTYPE, "m"),
        member("m", tarfile.SYMTYPE, "l"),
        (member("l/x"), b"x"),
    ],
    "a part of another volume": [member("x", b"M")],
    "an attribute that never ends": [
        (member("x", b"x", mode=0), b"9999999 comment=" + b"c" * (2 << 20))
    ],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_tar_that_is_hostile_is_refused_and_touches_nothing_outside(
    tmp_path: Path, dest: Path, members: list[Any]
) -> None:
    (tmp_path / "secret").write_text("secret")
    (dest.parent / "secret").write_text("secret")

    with pytest.raises(UserSafeError, match=f"^{TAR_MESSAGE}$"):
        unpack(make_tar(*members), dest)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "secret"]
    assert sorted(path.name for path in dest.parent.iterdir()) == ["dest", "secret"]
    for _, _, names, directory in os.fwalk(dest):
        for name in names:
            assert os.stat(name, dir_fd=directory, follow_symlinks=False).st_nlink == 1


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


PLAIN = make_tar((member("a"), b"x" * 5000), (member("b"), b"y" * 5000))
NOISE = make_tar((member("a"), random.Random(1).randbytes(50_000)))
BROKEN = {
    "nothing": b"",
    "garbage": b"\x89PNG" * 1000,
    "garbage that begins as gz": b"\x1f\x8b" + bytes(1000),
    "plain, cut in the data": PLAIN[:7000],
    "plain, cut in a header": PLAIN[: 512 + 5120 + 100],
    "plain, a damaged second header": flip(PLAIN, 512 + 5120 + 1),
    "gz, cut": gzip.compress(NOISE)[:-3000],
    "gz, without its trailer": gzip.compress(NOISE)[:-8],
    "gz, a wrong checksum": flip(gzip.compress(NOISE), -6),
    "gz, damaged in the middle": flip(gzip.compress(PLAIN * 50), 100),
    "bz2, cut": bz2.compress(NOISE)[:-10],
    "bz2, damaged": flip(bz2.compress(NOISE), 10_000),
    "xz, cut": lzma.compress(NOISE)[:-10],
    "xz, damaged": flip(lzma.compress(NOISE), 10_000),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_tar_that_is_broken_is_refused(dest: Path, data: bytes) -> None:
    with pytest.raises(UserSafeError, match=f"^{TAR_MESSAGE}$"):
        unpack(data, dest)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PLAIN[:7000], id="in the middle"),
        pytest.param(gzip.compress(NOISE)[:-3000], id="in the middle of gz"),
        pytest.param(PLAIN, id="after the last block"),
        pytest.param(bz2.compress(NOISE), id="after the last block of bz2"),
        pytest.param(bz2.compress(NOISE) + bytes(3 << 20), id="in what follows bz2"),
    ],
)
def test_tar_lets_failures_of_the_stream_pass(dest: Path, data: bytes) -> None:
    failure = ConnectionResetError("reset by peer")

    with pytest.raises(ConnectionResetError) as error:
        unpack(data, dest, failure=failure)

    assert error.value is failure


def endless_sparse_map() -> bytes:
    """Return a member whose sparse map goes on after the archive has ended."""
    info = member("GNUSparseFile.0/x")
    info.size = 512
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "x",
        "GNU.sparse.realsize": "1",
    }
    return info.tobuf(tarfile.PAX_FORMAT) + b"99999999\n".ljust(512, b"9")


def test_tar_header_without_end_is_refused(dest: Path) -> None:
    with pytest.raises(UserSafeError, match=f"^{TAR_MESSAGE}$"):
        unpack(endless_sparse_map(), dest)


def test_tar_attribute_that_is_too_long_is_left_out_and_not_held(dest: Path) -> None:
    """Labels of file systems and embedded icons can be that long."""
    long = "d/" * 60 + "\u00e9"
    attributes = {"SCHILY.xattr.user.icon": "i" * (8 << 20), "comment": "short"}
    data = make_tar((member(long, pax_headers=attributes), b"x"), format=tarfile.PAX_FORMAT)
    tracemalloc.start()
    unpack(
        data, dest, warnings=["An attribute of a file in the archive is too long: it is left out"]
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert tree(dest) == {long: "x"}
    assert peak < 4 << 20


BEHIND = "The archive goes on behind its end: what is there is left out"
BEHIND_PACKED = "The packed archive goes on behind its end: what is there is left out"


@pytest.mark.parametrize(
    ("data", "warnings"),
    [
        pytest.param(PLAIN + b"more", [BEHIND], id="plain"),
        pytest.param(gzip.compress(PLAIN + b"more"), [BEHIND], id="in gz"),
        pytest.param(gzip.compress(PLAIN) + b"more" * 99_999, [BEHIND_PACKED], id="behind gz"),
        pytest.param(gzip.compress(PLAIN) + b"\x1f", [BEHIND_PACKED], id="a byte behind gz"),
        pytest.param(bz2.compress(PLAIN) + b"more", [BEHIND_PACKED], id="behind bz2"),
        pytest.param(lzma.compress(PLAIN) + b"more", [BEHIND_PACKED], id="behind xz"),
        pytest.param(gzip.compress(PLAIN) + bytes(99_999), [], id="zeros behind gz"),
    ],
)
def test_tar_with_bytes_behind_its_end_is_unpacked_with_a_warning(
    dest: Path, data: bytes, warnings: list[str]
) -> None:
    stream = unpack(data, dest, warnings=warnings, step=777)

    assert sorted(tree(dest)) == ["a", "b"]
    assert stream.at_end is True


def test_tar_whose_first_name_looks_like_a_packed_stream_is_plain(dest: Path) -> None:
    unpack(make_tar((member("]"), b"x")), dest)

    assert tree(dest) == {"]": "x"}


@pytest.mark.parametrize(
    ("form", "method"),
    [(lzma.FORMAT_XZ, lzma.FILTER_LZMA2), (lzma.FORMAT_ALONE, lzma.FILTER_LZMA1)],
    ids=["xz", "lzma"],
)
def test_tar_packed_for_more_memory_than_there_may_be_is_refused(
    dest: Path, form: int, method: int
) -> None:
    for size, is_taken in ((8 << 20, True), (256 << 20, False)):
        packed = lzma.compress(
            PLAIN, form, filters=[{"id": method, "preset": 0, "dict_size": size}]
        )
        with nullcontext() if is_taken else pytest.raises(UserSafeError, match=f"^{TAR_MESSAGE}$"):
            unpack(packed, dest)


TAKEN = {
    "a hard link to a link": (
        [
            (member("a"), b"x"),
            member("l", tarfile.SYMTYPE, "a"),
            member("m", tarfile.LNKTYPE, "l"),
        ],
        {"a": "x", "l": "-> a", "m": "-> a"},
    ),
    "below a link to a directory": (
        [
            member("d/e", tarfile.DIRTYPE),
            member("l", tarfile.SYMTYPE, "d/e/../e"),
            (member("l/x"), b"x"),
            member("l/y", tarfile.LNKTYPE, "l/x"),
            member("l/z", tarfile.SYMTYPE, "x"),
        ],
        {"d/e/x": "x", "d/e/y": "x", "d/e/z": "-> x", "l": "-> d/e/../e"},
    ),
    "below a link to a directory that comes later": (
        [member("l", tarfile.SYMTYPE, "d"), (member("l/x"), b"x"), member("d", tarfile.DIRTYPE)],
        {"d/x": "x", "l": "-> d"},
    ),
    "a directory in place of a file": (
        [(member("d"), b""), member("d", tarfile.DIRTYPE), (member("d/x"), b"x")],
        {"d/x": "x"},
    ),
    "a directory that is not named in place of a file": (
        [(member("d"), b""), (member("d/x"), b"x")],
        {"d/x": "x"},
    ),
    "a directory in place of a link": (
        [
            member("e", tarfile.DIRTYPE),
            member("d", tarfile.SYMTYPE, "e"),
            member("d", tarfile.DIRTYPE),
            (member("d/x"), b"x"),
        ],
        {"d/x": "x"},
    ),
    "a file in place of a directory": (
        [member("d", tarfile.DIRTYPE), (member("d"), b"x")],
        {"d": "x"},
    ),
    "a link in place of a directory": (
        [member("d", tarfile.DIRTYPE), member("d", tarfile.SYMTYPE, "x")],
        {"d": "-> x"},
    ),
    "a hard link to itself": (
        [(member("a"), b"x"), member("a", tarfile.LNKTYPE, "./a")],
        {"a": "x"},
    ),
    "absolute names": (
        [(member("/data/a"), b"x"), member("/data/b", tarfile.LNKTYPE, "/data/a")],
        {"data/a": "x", "data/b": "x"},
    ),
    "a list of a directory for incremental dumps": (
        [(member("d", b"D"), b"Yx\0\0"), (member("d/x"), b"x")],
        {"d/x": "x"},
    ),
    "the label of an archive": ([member("label", b"V"), (member("a"), b"x")], {"a": "x"}),
    "a kind of file that is unknown": ([(member("a", b"7"), b"x")], {"a": "x"}),
}


@pytest.mark.parametrize(("members", "expected"), TAKEN.values(), ids=TAKEN)
def test_tar_that_others_take_is_taken(
    dest: Path, members: list[Any], expected: dict[str, str]
) -> None:
    unpack(make_tar(*members), dest)

    assert tree(dest) == expected


GNU_TAR_SCRIPTS = {
    "--label": "echo 1 > a; tar --label=volume -cf x.tar a",
    "-P with hard links": "echo 1 > a; ln a b; tar -P -cf x.tar $PWD/a $PWD/b",
    "-r after a change of kind": "echo 1 > a; tar -cf x.tar a; rm a; mkdir a; echo 2 > a/b; "
    "tar -rf x.tar a",
    "-r after another": "mkdir a; tar -cf x.tar a; rmdir a; echo 2 > a; tar -rf x.tar a",
    "a link's second name": "echo 1 > a; ln -s a l; ln l m; tar -cf x.tar a l m",
    "--lzma": "echo 1 > a; tar -cf - a | xz --format=lzma > x.tar",
    "bytes behind gzip": "echo 1 > a; tar -czf x.tar a; echo more >> x.tar",
    "a time before 1970": "touch -d 1960-01-01 a; tar --format=posix -cf x.tar a",
}


@pytest.mark.parametrize("script", GNU_TAR_SCRIPTS.values(), ids=GNU_TAR_SCRIPTS)
def test_tar_gives_what_gnu_tar_gives(tmp_path: Path, dest: Path, script: str) -> None:
    (tmp_path / "made").mkdir()
    subprocess.run(["sh", "-ec", script], cwd=tmp_path / "made", check=True, capture_output=True)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    archive = tmp_path / "made/x.tar"
    packing = {b"\x1f\x8b": "-z", b"]\0": "--lzma"}.get(archive.read_bytes()[:2], "-v")
    subprocess.run(["tar", packing, "-xf", archive], cwd=theirs, capture_output=True)

    extract_tar(Stream(archive.read_bytes()), dest)

    assert tree(dest) == tree(theirs)
    assert tree(dest) != {}
    for path in dest.rglob("*"):
        if path.is_file():
            assert path.stat().st_mtime == (theirs / path.relative_to(dest)).stat().st_mtime


@pytest.mark.parametrize("time", ["1e30", "-1e30", "inf", "-inf", "nan", "99999999999"])
def test_tar_times_that_no_clock_holds_are_clamped(dest: Path, time: str) -> None:
    data = make_tar((member("a", pax_headers={"mtime": time}), b"x"), format=tarfile.PAX_FORMAT)

    unpack(data, dest)

    assert tree(dest) == {"a": "x"}


@needs_root
@pytest.mark.parametrize(
    ("mode", "refusal"),
    [
        pytest.param(0o644, None, id="readable"),
        pytest.param(0o600, "does not let the user of the command own or read 'a'", id="hidden"),
    ],
)
def test_tar_on_a_file_system_that_knows_no_owners_warns_unless_the_user_cannot_read(
    dest: Path, mode: int, refusal: str | None
) -> None:
    """As on EFS and SMB: a process without the capabilities meets the same errors."""
    data = make_tar((member("a", mode=mode), b"x"), (member("d/b", mode=0o644), b"y"))
    program = (
        "import os, sys; from shim.files import archives; from shim.process.users import User;"
        f"archives.extract_tar(sys.stdin.buffer, os.open({str(dest)!r}, 0),"
        f" user=User(uid={UNPRIVILEGED_UID}, gid=12), warn=print)"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-chown,-fowner", "--inh-caps=-chown,-fowner"]
        + [sys.executable, "-c", program],
        input=data,
        capture_output=True,
    )

    assert b"does not let us set the owner of" in done.stdout
    if refusal is None:
        assert tree(dest) == {"a": "x", "d/b": "y"}
        assert (b"", 1) == (done.stderr, done.stdout.count(b"\n"))
    else:
        assert refusal in done.stderr.decode()


def test_tar_memory_does_not_grow_with_its_members(tmp_path: Path, dest: Path) -> None:
    source = tmp_path / "x.tar"
    header = member("small").tobuf(tarfile.USTAR_FORMAT)
    big = member("big")
    big.size = 20 << 20
    with source.open("wb") as file:
        for _ in range(3_000):
            file.write(header)
        file.write(big.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(file.tell() + big.size + 1024)

    with source.open("rb", buffering=0) as stream:
        tracemalloc.start()
        extract_tar(stream, dest)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert (dest / "big").stat().st_size == big.size
    assert peak < 2 << 20


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tar_with_any_damage_is_refused_or_unpacked_inside(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dest = tmp_path_factory.mktemp("t") / "dest"
    dest.mkdir()
    content = bytearray(
        make_tar((member("d/a" * 60), b"a"), SIMPLE[0], *SIMPLE[3:], (member("b"), b"b"))
    )
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = value
    try:
        unpack(bytes(content), dest)
    except UserSafeError as error:
        assert str(error) == TAR_MESSAGE
    assert [path.name for path in dest.parent.iterdir()] == ["dest"]
