"""Unpack the archives of strangers beneath one directory, in bounded memory.

Every file is made by its name in an open directory that was reached without following a link, so
an archive cannot write through a link that it brought along. tarfile and zipfile only parse: their
own extraction depends on filters that Debian's 3.11 lacks, and that early 3.12 and 3.13 get wrong.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

from shim.errors import ShimError, UserSafeError
from shim.workspace import closing_descriptor, make_directories

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, BinaryIO, Protocol

    class Readable(Protocol):
        def read(self, size: int, /) -> bytes: ...


TAR_MESSAGE = "Tarfile could not be extracted"
ZIP_MESSAGE = "Input zip file could not be extracted"
ZIP_PATHS_MESSAGE = "Zip file contains invalid paths"
ZIP_METHOD_MESSAGE = "Zip file contains an unsupported compression method"
ZIP_SIZE_MESSAGE = "Contents of zip file too large"

BLOCK_BYTES = 1 << 18
# zipfile inflates a block of these methods in one go, up to 20,000 times its size.
SMALL_BLOCK_BYTES = 1 << 12
# Room for the extended attributes and the sparse map of one member; tarfile holds them in memory.
MAX_TAR_HEADER_BYTES = 1 << 20

_STREAMED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SUPPORTED = (*_STREAMED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the names and offsets in an archive can cause; bz2 reports broken data without a number.
_CAUSED_BY_ARCHIVE = (
    None,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)


def extract_zip(source: Path | BinaryIO, dest: Path) -> None:
    """Unpack the files of a zip into a directory, without the directory that all have in common.

    Directories and what desktops leave behind are dropped, a later entry replaces an earlier one,
    and nothing but plain files is made. zipfile holds about 1 KiB of memory for each entry.

    Raises UserSafeError for what is wrong with the archive.
    """
    try:
        with (
            zipfile.ZipFile(source) as archive,
            closing_descriptor(os.open(dest, os.O_RDONLY | os.O_DIRECTORY)) as root,
        ):
            for member, names in _plan(archive.infolist()):
                block = BLOCK_BYTES if member.compress_type in _STREAMED else SMALL_BLOCK_BYTES
                with (
                    archive.open(member) as content,
                    closing_descriptor(make_directories(root, names[:-1])) as directory,
                    _create(directory, names[-1], mode=0o644) as file,
                ):
                    shutil.copyfileobj(content, file, block)
    except ShimError:  # ours, or what reading the source raises to stop
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserSafeError(ZIP_SIZE_MESSAGE) from error
        if error.errno in _CAUSED_BY_ARCHIVE:
            raise UserSafeError(ZIP_MESSAGE) from error
        raise
    except Exception as error:  # zipfile meets hostile bytes with any exception there is
        raise UserSafeError(ZIP_MESSAGE) from error


def extract_tar(stream: Readable, dest: Path, *, uid: int | None, gid: int | None) -> None:
    """Unpack a tar (plain, gz, bz2, xz) into a directory while it is read, to its very end.

    Modes are those of tarfile's `data` filter; all that is made belongs to uid and gid (None = as
    the shim). Raises UserSafeError for what is wrong with the archive or the disk; an exception of
    the stream itself passes as it is.
    """
    source = _Source(stream)
    owner = (-1 if uid is None else uid, -1 if gid is None else gid)
    try:
        with closing_descriptor(os.open(dest, os.O_RDONLY | os.O_DIRECTORY)) as root:
            packed = io.BufferedReader(source, BLOCK_BYTES)
            content = _open_decompressed(packed)
            _extract_members(_Blocks(content), root, owner)
            # What proves the length and the checksum comes last.
            for rest in (content, packed):
                while rest.read(BLOCK_BYTES):
                    pass
    except Exception as error:  # tarfile meets hostile bytes with any exception there is
        if source.error is not None:
            raise source.error from None
        raise UserSafeError(TAR_MESSAGE) from error


def _plan(members: Iterable[zipfile.ZipInfo]) -> Iterator[tuple[zipfile.ZipInfo, list[str]]]:
    """Yield each file to unpack, with the names that lead to it, once all have been checked."""
    files: list[tuple[zipfile.ZipInfo, list[str]]] = []
    for member in members:
        names = member.filename.split("/")
        if member.is_dir() or "__MACOSX" in names or names[-1] in (".DS_Store", "desktop.ini"):
            continue
        if member.filename.startswith("/"):
            raise UserSafeError(ZIP_PATHS_MESSAGE)
        names = _normalise(member.filename)
        if not names or names[0] == "..":
            raise UserSafeError(ZIP_PATHS_MESSAGE)
        if member.compress_type not in _SUPPORTED:
            raise UserSafeError(ZIP_METHOD_MESSAGE)
        files.append((member, names))
    parents = [names[:-1] for _, names in files]
    depth = len(os.path.commonprefix(parents)) if parents else 0
    for member, names in files:
        yield member, names[depth:]


def _normalise(path: str) -> list[str]:
    """Return the names in a path, `..` only at its beginning."""
    return [name for name in posixpath.normpath(path).split("/") if name not in ("", ".")]


def _create(directory: int, name: str, *, mode: int) -> BinaryIO:
    """Open a new file for writing, in place of whatever had its name."""
    _unlink(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    file = open(os.open(name, flags, 0o600, dir_fd=directory), "wb")
    os.fchmod(file.fileno(), mode)
    return file


def _unlink(directory: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


class _Source(io.RawIOBase):
    """A stream whose own exception can be told from one that its content causes."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer with one read of the stream."""
        view = memoryview(buffer)
        try:
            data = self._stream.read(len(view))
        except Exception as error:
            self.error = error
            raise
        view[: len(data)] = data
        return len(data)


def _open_decompressed(packed: io.BufferedReader[_Source]) -> Readable:
    """Return the content of a stream, unpacked if its first bytes say that it is packed."""
    magic = packed.peek()
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=packed)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(packed)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(packed)
    return packed


class _Blocks:
    """A tar stream, forward only: `read` and `seek` for tarfile's headers, `copy` for the data."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._position = 0
        self.header_allowance = MAX_TAR_HEADER_BYTES
        self.last_read = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        """Skip forward."""
        self.copy(position - self._position, None)

    def read(self, size: int) -> bytes:
        """Return a part of a header, less at the end of the stream."""
        self.header_allowance -= size
        if size < 0 or self.header_allowance < 0:
            raise tarfile.ReadError("the header of a member is too long")
        self.last_read = self._stream.read(size)
        self._position += len(self.last_read)
        return self.last_read

    def copy(self, size: int, file: BinaryIO | None) -> None:
        """Write the next bytes to a file, or drop them."""
        if size < 0:
            raise tarfile.ReadError("the archive points backwards")
        self._position += size
        while size:
            block = self._stream.read(min(size, BLOCK_BYTES))
            if not block:
                raise tarfile.ReadError("unexpected end of data")
            size -= len(block)
            if file is not None:
                file.write(block)


def _extract_members(blocks: _Blocks, root: int, owner: tuple[int, int]) -> None:
    archive = tarfile.TarFile(fileobj=blocks, encoding="utf-8")  # type: ignore[arg-type]
    while True:
        blocks.header_allowance = MAX_TAR_HEADER_BYTES
        member = archive.next()
        if member is None:
            break
        _extract_member(member, blocks, root, owner)
        # tarfile would remember every member and every global header.
        archive.members.clear()  # type: ignore[attr-defined]
        archive.pax_headers = {}
    # tarfile takes a damaged header for the end; the end is a block of zeros, or nothing more.
    if blocks.last_read.strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _extract_member(
    member: tarfile.TarInfo, blocks: _Blocks, root: int, owner: tuple[int, int]
) -> None:
    names = _inside(member.name)
    if member.isdir():
        with closing_descriptor(make_directories(root, names, owner)) as directory:
            os.fchown(directory, *owner)
        return
    if member.isdev() or not names:
        raise tarfile.ReadError(f"{member.name!r} is a device, or has no name")
    *parents, name = names
    with closing_descriptor(make_directories(root, parents, owner)) as directory:
        if member.issym():
            _make_symlink(member.linkname, parents, directory, name)
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        elif member.islnk():
            _make_link(member.linkname, root, directory, name)
        else:
            with _create(directory, name, mode=_mode(member)) as file:
                os.fchown(file.fileno(), *owner)
                _write_content(member, blocks, file)


def _inside(path: str) -> list[str]:
    """Return the names in a path below the destination; a leading slash counts for nothing."""
    names = _normalise(path.lstrip("/"))
    if names[:1] == [".."]:
        raise tarfile.ReadError(f"{path!r} lies outside")
    return names


def _make_symlink(target: str, parents: Sequence[str], directory: int, name: str) -> None:
    """Make a link that by its text leads inside. We follow none; the user reads as himself."""
    if target.startswith("/"):
        raise tarfile.ReadError(f"{target!r} lies outside")
    _inside(posixpath.join(*parents, target))
    _unlink(directory, name)
    os.symlink(target, name, dir_fd=directory)


def _make_link(target: str, root: int, directory: int, name: str) -> None:
    """Make another name for a file that was unpacked before."""
    *parents, source = _inside(target)
    with closing_descriptor(make_directories(root, parents)) as there:
        status = os.stat(source, dir_fd=there, follow_symlinks=False)
        if target.startswith("/") or not stat.S_ISREG(status.st_mode):
            raise tarfile.ReadError(f"{target!r} lies outside, or is not a file")
        _unlink(directory, name)
        os.link(source, name, src_dir_fd=there, dst_dir_fd=directory, follow_symlinks=False)


def _mode(member: tarfile.TarInfo) -> int:
    """Return the permissions that tarfile's `data` filter leaves to a file."""
    mode = member.mode & 0o755 | 0o600
    return mode if mode & 0o100 else mode & ~0o111


def _write_content(member: tarfile.TarInfo, blocks: _Blocks, file: BinaryIO) -> None:
    parts: Any = [(0, member.size)] if member.sparse is None else member.sparse
    blocks.seek(member.offset_data)
    for offset, size in parts:
        file.seek(offset)
        blocks.copy(size, file)
    file.truncate(member.size)
    os.utime(file.fileno(), (member.mtime, member.mtime))
