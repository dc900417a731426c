"""Unpack the archives of strangers beneath one directory, in bounded memory.

Every file is made by its name in an open directory that was reached without the kernel following a
link, so an archive cannot write through a link to a place outside. tarfile and zipfile only parse:
their own extraction depends on filters that Debian's 3.11 lacks, and that early 3.12 and 3.13 get
wrong.
"""

from __future__ import annotations

import bz2
import errno
import io
import itertools
import lzma
import os
import posixpath
import queue
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Protocol

from shim.contract.errors import ShimError, UserSafeError
from shim.files.descriptors import closing_descriptor, make_directories
from shim.process.users import User, may_read


class Readable(Protocol):
    def readinto(self, buffer: Any, /) -> int: ...


TAR_MESSAGE = "Tarfile could not be extracted"
ZIP_MESSAGE = "Input zip file could not be extracted"
ZIP_PATHS_MESSAGE = "Zip file contains invalid paths"
ZIP_METHOD_MESSAGE = "Zip file contains an unsupported compression method"
ZIP_SIZE_MESSAGE = "Contents of zip file too large"

BLOCK_BYTES = 1 << 18
# zlib copies what it has not taken yet at each call: little in, and room for all that comes out.
PACKED_BLOCK_BYTES = 1 << 16
UNPACKED_BLOCK_BYTES = 1 << 20
PIECES_AHEAD = 8
# zipfile inflates a block of these methods in one go, up to 20,000 times its size.
SMALL_BLOCK_BYTES = 1 << 12
# zipfile holds the whole directory, and some 700 bytes for each entry.
MAX_ZIP_ENTRIES = 200_000
MAX_ZIP_DIRECTORY_BYTES = 32 << 20
ZIP_ENTRIES_MESSAGE = f"Zip file contains more than {MAX_ZIP_ENTRIES:,} entries"
ZIP_DIRECTORY_MESSAGE = (
    f"The list of contents of the zip file is longer than {MAX_ZIP_DIRECTORY_BYTES >> 20} MiB"
)
# Room for the attributes and the sparse map of one member; tarfile holds them in memory.
MAX_TAR_HEADER_BYTES = 1 << 20
# `xz -9` needs 65 MiB.
MAX_LZMA_BYTES = 100 << 20
MAX_LINKS = 40  # path_resolution(7)
# Years 1425 to 2514: more than ext4, XFS and NFS can hold.
MAX_TIME_SECONDS = 1 << 34

_DROPPED = {"__MACOSX", ".DS_Store", "desktop.ini"}  # what desktops leave behind
_UNICODE_PATH = 0x7075  # APPNOTE.TXT, 4.6.9
_UTF8_FLAG = 0x800
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
    errno.ENOTEMPTY,
)
# What network file systems, and containers without CAP_CHOWN and CAP_FOWNER, say to an owner, a
# mode or a time that they cannot set.
_NOT_TO_BE_SET = (
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EROFS,
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR)  # a link or a file, where a directory is needed


def _never() -> None:
    """Do not stop."""


def extract_zip(
    source: io.RawIOBase,
    directory: int,
    claim: Callable[[Sequence[str]], None],
    *,
    check: Callable[[], None] = _never,
) -> None:
    """Unpack the files of a zip into a directory, without the directory that all have in common.

    Directories and what desktops leave behind are dropped; nothing but plain files is made.

    - directory: an open descriptor, the caller's to close
    - claim: called with the names that lead to each file, for all before the first is made; what
      it raises refuses the archive
    - check: called before each block is written; what it raises ends the work

    Raises UserSafeError for what is wrong with the archive.
    """
    try:
        with zipfile.ZipFile(_ZipSource(source)) as archive:
            files = _plan(archive.infolist())
            for _, names in files:
                claim(names)
            for member, names in files:
                with (
                    archive.open(member) as content,
                    closing_descriptor(make_directories(directory, names[:-1])) as parent,
                    _create(parent, names[-1]) as file,
                ):
                    os.fchmod(file.fileno(), 0o644)
                    size = BLOCK_BYTES if member.compress_type in _STREAMED else SMALL_BLOCK_BYTES
                    while block := content.read(size):
                        check()
                        file.write(block)
    except ShimError:  # ours, or what claim and check raise
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserSafeError(ZIP_SIZE_MESSAGE) from error
        if error.errno in _CAUSED_BY_ARCHIVE:
            raise UserSafeError(ZIP_MESSAGE) from error
        raise
    except Exception as error:  # zipfile meets hostile bytes with any exception there is
        raise UserSafeError(ZIP_MESSAGE) from error


def extract_tar(
    stream: Readable,
    directory: int,
    *,
    user: User,
    warn: Callable[[str], None],
    check: Callable[[], None] = _never,
) -> None:
    """Unpack a tar (plain, gz, bz2, xz, lzma) into a directory while it is read, to its very end.

    What GNU tar and tarfile's `data` filter take is taken; a later entry replaces an earlier one.
    Modes are those of that filter; all that is made belongs to the user.

    - directory: an open descriptor, the caller's to close
    - warn: told, once for each kind, what was left out or could not be set
    - check: called before each block is written; what it raises ends the work

    Raises UserSafeError for what is wrong with the archive or the disk; an exception of the stream
    itself passes as it is.
    """
    source = _Source(stream)
    try:
        packed, content = _open_unpacked(source, warn)
        with packed, content:
            _extract_members(_Blocks(content, warn, check), _Tree(directory, user, warn))
            # What proves the length and the checksum comes last.
            goes_on = False
            for block in itertools.chain(_blocks_of(content), _blocks_of(packed)):
                check()
                goes_on |= bool(block.strip(b"\0"))
        if goes_on:
            warn("The archive goes on behind its end: what is there is left out")
    except ShimError:
        raise
    except Exception as error:  # tarfile meets hostile bytes with any exception there is
        if source.error is not None:
            raise source.error from None
        raise UserSafeError(TAR_MESSAGE) from error


class _ZipSource(io.BufferedReader):
    """The file of a zip, of which zipfile reads the directory in one piece: it is bounded here."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_ZIP_DIRECTORY_BYTES:
            raise UserSafeError(ZIP_DIRECTORY_MESSAGE)
        data = super().read(size)
        if data.count(zipfile.stringCentralDir) > MAX_ZIP_ENTRIES:  # type: ignore[attr-defined]
            raise UserSafeError(ZIP_ENTRIES_MESSAGE)
        return data


def _plan(members: Sequence[zipfile.ZipInfo]) -> list[tuple[zipfile.ZipInfo, list[str]]]:
    """Return each file to unpack with the names that lead to it, once all have been checked.

    What the names share is taken away as it is spelled: `/data/a` with `/data/b`, and `../x/a`
    with `../x/b`, give `a` and `b`. A leading `./` in all of them is such a directory by itself:
    `./a/x` with `./a/y` gives `a/x` and `a/y`.
    """
    paths = [_path(member) for member in members]
    if not any("/" in path for path in paths):  # some Windows programs write these instead
        paths = [path.replace("\\", "/") for path in paths]
    files = [
        (member, path, [name for name in path.split("/") if name not in ("", ".")])
        for member, path in zip(members, paths, strict=True)
        if not path.endswith("/") and not _DROPPED.intersection(path.split("/"))
    ]
    shared = os.path.commonprefix([names[:-1] for _, _, names in files]) if files else []
    if all(path.startswith("./") for _, path, _ in files):
        shared = []
    is_absolute = {path.startswith("/") for _, path, _ in files}
    seen: set[str] = set()
    for member, path, names in files:
        place = posixpath.normpath("/".join(names[len(shared) :]))
        names[:] = place.split("/")
        if names[0] in ("..", ".") or len(is_absolute) > 1:
            raise UserSafeError(ZIP_PATHS_MESSAGE)
        if place in seen:
            raise UserSafeError(f"Zip file contains two entries for one file: {path!r}")
        if member.compress_type not in _SUPPORTED:
            raise UserSafeError(ZIP_METHOD_MESSAGE)
        seen.add(place)
    return [(member, names) for member, _, names in files]


def _path(member: zipfile.ZipInfo) -> str:
    """Return the name of an entry: that of the Unicode path field, where it is this entry's."""
    extra = member.extra
    while len(extra) > 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and size > 5 and extra[4] == 1:
            encoding = "utf-8" if member.flag_bits & _UTF8_FLAG else "cp437"
            if extra[5:9] == struct.pack("<L", zlib.crc32(member.orig_filename.encode(encoding))):
                return extra[9 : 4 + size].decode()
        extra = extra[4 + size :]
    return member.filename


def _create(directory: int, name: str) -> BinaryIO:
    """Open a new file for writing, in place of whatever had its name."""
    _remove(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return open(os.open(name, flags, 0o600, dir_fd=directory), "wb")


def _remove(directory: int, name: str) -> None:
    """Remove what has a name: a file, a link or an empty directory."""
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=directory)


class _Source(io.RawIOBase):
    """A stream whose own exception can be told from one that its content causes."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._held = b""
        self.error: Exception | None = None

    def peek(self, size: int) -> bytes:
        """Return the next bytes without taking them, fewer at the end of the stream."""
        view, count = memoryview(bytearray(size)), 0
        while count < size and (more := self.readinto(view[count:])):
            count += more
        self._held = bytes(view[:count])
        return self._held

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer with one read of the stream."""
        if self._held:
            data, self._held = self._held, b""
            memoryview(buffer)[: len(data)] = data
            return len(data)
        try:
            return self._stream.readinto(buffer)
        except Exception as error:
            self.error = error
            raise


class _Inflater:
    """zlib for a member of a gzip stream, with the interface of bz2's and lzma's decompressors."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        unpacked = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(unpacked) < max_length
        return unpacked

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


# By the first bytes of a stream. Those of the last begin also a tar whose first file is named "]";
# but what follows here is the size of a dictionary, which is not 0.
_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": _Inflater,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=MAX_LZMA_BYTES),
    b"]\0\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_LZMA_BYTES),
}


def _unpack(
    packed: io.BufferedReader[Any], magic: bytes, warn: Callable[[str], None]
) -> Iterator[bytes]:
    """Yield the content of a packed stream: of its members, one after the other, up to no member.

    Zeros may lie between them.
    """
    rest = packed.read(len(magic))
    while rest.startswith(magic):
        member, data = _DECOMPRESSORS[magic](), rest
        while not member.eof:
            if not data and member.needs_input and not (data := packed.read1(PACKED_BLOCK_BYTES)):
                raise EOFError("the packed stream ends too early")
            if unpacked := member.decompress(data, UNPACKED_BLOCK_BYTES):
                yield unpacked
            data = b""
        rest = member.unused_data.lstrip(b"\0")
        while not rest and (block := packed.read1(BLOCK_BYTES)):
            rest = block.lstrip(b"\0")
        rest += packed.read(max(0, len(magic) - len(rest)))
    if rest:
        warn("The packed archive goes on behind its end: what is there is left out")
        for _ in _blocks_of(packed):
            pass


class _Ahead(io.RawIOBase):
    """Pieces as a stream, made ahead of whoever reads, in a thread of their own."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece = pieces, memoryview(b"")
        self._made: queue.Queue[bytes | Exception] = queue.Queue(PIECES_AHEAD)
        self._thread: threading.Thread | None = threading.Thread(target=self._make, daemon=True)
        self._is_over = False
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no more threads
            self._thread = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read at least a byte; 0 at the end."""
        if not self._piece and not self._is_over:
            piece = self._made.get() if self._thread else next(self._pieces, b"")
            self._is_over = not piece or isinstance(piece, Exception)
            if isinstance(piece, Exception):
                raise piece
            self._piece = memoryview(piece)
        view = memoryview(buffer)
        count = min(len(view), len(self._piece))
        view[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def close(self) -> None:
        """Make no more."""
        self._is_over = True
        while self._thread and self._thread.is_alive():
            with suppress(queue.Empty):
                self._made.get(timeout=0.1)
        super().close()

    def _make(self) -> None:
        end: bytes | Exception = b""
        try:
            for piece in self._pieces:
                self._made.put(piece)
                if self._is_over:
                    return
        except Exception as error:
            end = error
        self._made.put(end)


def _open_unpacked(
    source: _Source, warn: Callable[[str], None]
) -> tuple[io.BufferedReader[Any], io.BufferedReader[Any]]:
    """Return a stream and its content: unpacked, if its first bytes say that it is packed."""
    beginning = source.peek(6)
    packed = io.BufferedReader(source, BLOCK_BYTES)
    for magic in _DECOMPRESSORS:
        if beginning.startswith(magic) and beginning != b"]".ljust(6, b"\0"):
            return packed, io.BufferedReader(_Ahead(_unpack(packed, magic, warn)), BLOCK_BYTES)
    return packed, packed


def _blocks_of(stream: io.BufferedReader[Any]) -> Iterator[bytes]:
    """Yield what is left of a stream."""
    while block := stream.read(BLOCK_BYTES):
        yield block


class _Blocks:
    """A tar stream, forward only: `read` and `seek` for tarfile's headers, `copy` for the data."""

    def __init__(
        self,
        stream: io.BufferedReader[Any],
        warn: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self._stream, self._warn, self._check = stream, warn, check
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
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
        if not 0 <= size <= self.header_allowance:
            return self._read_attributes(size)
        self.header_allowance -= size
        self.last_read = self._take(size)
        return self.last_read

    def copy(self, size: int, file: BinaryIO | None) -> None:
        """Write the next bytes to a file, or drop them."""
        if size < 0:
            raise tarfile.ReadError("the archive points backwards")
        self._position += size
        while size:
            count = self._stream.readinto(self._buffer[:size])
            if not count:
                raise tarfile.ReadError("unexpected end of data")
            size -= count
            self._check()
            if file is not None:
                file.write(self._buffer[:count])

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def _read_attributes(self, size: int) -> bytes:
        """Return the records of a pax header that there is room for, without those that are longer.

        A record is `LENGTH NAME=VALUE\\n`, LENGTH that of all of it; zeros fill the last block.
        """
        kept = bytearray()
        while size > 0:
            prefix = self._take(1)
            if prefix == b"\0":
                self.copy(size - 1, None)
                break
            while prefix.isdigit() and len(prefix) < len(str(size)):
                prefix += self._take(1)
            if not prefix.endswith(b" "):
                prefix += self._take(1)
            length = int(prefix) if prefix[:-1].isdigit() and prefix.endswith(b" ") else 0
            if not len(prefix) < length <= size:
                raise tarfile.ReadError("the header of a member is too long, or damaged")
            size -= length
            if length <= self.header_allowance:
                self.header_allowance -= length
                kept += prefix + self._take(length - len(prefix))
            else:
                self._warn("An attribute of a file in the archive is too long: it is left out")
                self.copy(length - len(prefix), None)
        return bytes(kept)


class _Tree:
    """The directory that a tar is unpacked into, and whose all of it is to be."""

    def __init__(self, root: int, user: User, warn: Callable[[str], None]) -> None:
        self._root, self._user, self._warn = root, user, warn
        self._owner = (
            -1 if user.uid is None else user.uid,
            -1 if user.gid is None else user.gid,
        )
        self._warned: set[str] = set()

    def open(self, names: Sequence[str]) -> int:
        """Return a descriptor of a directory, made where it is missing.

        The way there may lead through links of the archive's, as long as it stays inside.
        """
        try:
            return self._walk(names, replace=False)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
        return self._walk(self._resolve(names), replace=True)

    def make_directory(self, names: Sequence[str]) -> None:
        """Make a directory in place of whatever else has its name, or take one that is there."""
        *parents, name = names or ["."]
        with closing_descriptor(self.open(parents)) as parent:
            with closing_descriptor(self._open_or_make(parent, name, replace=True)) as directory:
                self._own(directory, name)

    def make_file(self, names: Sequence[str], member: tarfile.TarInfo, blocks: _Blocks) -> None:
        """Make a file with the content that comes next."""
        *parents, name = names
        with (
            closing_descriptor(self.open(parents)) as directory,
            _create(directory, name) as file,
        ):
            with self._setting("mode", name):
                os.fchmod(file.fileno(), _mode(member))
            self._own(file.fileno(), name)
            _write_content(member, blocks, file)
            with self._setting("time", name):
                os.utime(file.fileno(), (_time(member),) * 2)

    def make_symlink(self, names: Sequence[str], target: str) -> None:
        """Make a link that by its text leads inside. The user will follow it as himself."""
        *parents, name = names
        _check_target(parents, target)
        with closing_descriptor(self.open(parents)) as directory:
            _remove(directory, name)
            os.symlink(target, name, dir_fd=directory)
            with self._setting("owner", name):
                os.chown(name, *self._owner, dir_fd=directory, follow_symlinks=False)

    def make_link(self, names: Sequence[str], target: str) -> None:
        """Make another name for a file or a link that was unpacked before."""
        *parents, name = names
        *others, source = _inside(target)
        with (
            closing_descriptor(self.open(others)) as there,
            closing_descriptor(self.open(parents)) as directory,
        ):
            status = os.stat(source, dir_fd=there, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                _check_target(parents, os.readlink(source, dir_fd=there))
            elif not stat.S_ISREG(status.st_mode):
                raise tarfile.ReadError(f"{target!r} is not a file")
            if os.path.samestat(status, _stat_or_none(directory, name) or os.fstat(directory)):
                return
            _remove(directory, name)
            os.link(source, name, src_dir_fd=there, dst_dir_fd=directory, follow_symlinks=False)

    def _walk(self, names: Sequence[str], *, replace: bool) -> int:
        here = os.dup(self._root)
        for name in names:
            with closing_descriptor(here):
                here = self._open_or_make(here, name, replace=replace)
        return here

    def _open_or_make(self, parent: int, name: str, *, replace: bool) -> int:
        """Open a directory; make it where it is missing, or may replace something else."""
        try:
            return os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            if not replace or error.errno not in _IN_THE_WAY:
                raise
            os.unlink(name, dir_fd=parent)
        os.mkdir(name, dir_fd=parent)
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
        with self._setting("mode", name):
            os.fchmod(directory, 0o755)
        self._own(directory, name)
        return directory

    def _resolve(self, names: Sequence[str]) -> list[str]:
        """Return the names without links, as the kernel would follow them below the root."""
        path: list[str] = []
        todo = list(names[::-1])
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                if not path:
                    raise tarfile.ReadError(f"{'/'.join(names)!r} leads outside")
                path.pop()
            elif name not in ("", "."):
                target = self._read_link(path, name)
                if target is None:
                    path.append(name)
                    continue
                links += 1
                if links > MAX_LINKS or target.startswith("/"):
                    raise tarfile.ReadError(f"{'/'.join(names)!r} leads outside, or in circles")
                todo += target.split("/")[::-1]
        return path

    def _read_link(self, path: Sequence[str], name: str) -> str | None:
        """Return the target of a link, None for anything else and for what is not there."""
        here = os.dup(self._root)
        try:
            for step in path:
                there = os.open(step, _DIRECTORY, dir_fd=here)
                os.close(here)
                here = there
            return os.readlink(name, dir_fd=here)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        finally:
            os.close(here)

    def _own(self, descriptor: int, name: str) -> None:
        """Give a file or directory to the user, or see that he can read it all the same."""
        with self._setting("owner", name):
            os.fchown(descriptor, *self._owner)
        if not may_read(os.fstat(descriptor), self._user):
            raise UserSafeError(
                f"{TAR_MESSAGE}: the file system does not let the user of the command own or read "
                f"{name!r}"
            )

    @contextmanager
    def _setting(self, what: str, name: str) -> Iterator[None]:
        """Warn once of what the file system refuses to set."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NOT_TO_BE_SET:
                raise
            if what not in self._warned:
                self._warned.add(what)
                self._warn(
                    f"The file system does not let us set the {what} of {name!r} and perhaps of "
                    f"others: {error.strerror}"
                )


def _extract_members(blocks: _Blocks, tree: _Tree) -> None:
    archive = tarfile.TarFile(fileobj=blocks, encoding="utf-8")  # type: ignore[arg-type]
    while True:
        blocks.header_allowance = MAX_TAR_HEADER_BYTES
        member = archive.next()
        if member is None:
            break
        _extract_member(member, blocks, tree)
        # tarfile would remember every member and every global header.
        archive.members.clear()  # type: ignore[attr-defined]
        archive.pax_headers = {}
    # tarfile takes a damaged header for the end; the end is a block of zeros, or nothing more.
    if blocks.last_read.strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _extract_member(member: tarfile.TarInfo, blocks: _Blocks, tree: _Tree) -> None:
    if member.type == b"V":  # the label of the archive: GNU tar, src/tar.h
        return
    names = _inside(member.name)
    if member.isdir() or member.type == b"D":  # D lists a directory's files for incremental dumps
        tree.make_directory(names)
    elif member.isdev() or member.type == b"M" or not names:
        raise tarfile.ReadError(f"{member.name!r} is a device, goes on elsewhere, or has no name")
    elif member.issym():
        tree.make_symlink(names, member.linkname)
    elif member.islnk():
        tree.make_link(names, member.linkname)
    else:
        tree.make_file(names, member, blocks)


def _inside(path: str) -> list[str]:
    """Return the names in a path below the root; a leading slash counts for nothing."""
    path = posixpath.normpath(path.lstrip("/") or ".")
    names = [] if path == "." else path.split("/")
    if names[:1] == [".."]:
        raise tarfile.ReadError(f"{path!r} lies outside")
    return names


def _check_target(parents: Sequence[str], target: str) -> None:
    """Refuse a link in the directory `parents` that by its text leads outside."""
    if target.startswith("/"):
        raise tarfile.ReadError(f"{target!r} lies outside")
    _inside(posixpath.join(*parents, target))


def _stat_or_none(directory: int, name: str) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    return None


def _mode(member: tarfile.TarInfo) -> int:
    """Return the permissions that tarfile's `data` filter leaves to a file."""
    mode = member.mode & 0o755 | 0o600
    return mode if mode & 0o100 else mode & ~0o111


def _time(member: tarfile.TarInfo) -> float:
    """Return the time of a file, or the nearest one that a clock can hold."""
    time = float(member.mtime)
    return max(-MAX_TIME_SECONDS, min(time, MAX_TIME_SECONDS)) if time == time else 0.0


def _write_content(member: tarfile.TarInfo, blocks: _Blocks, file: BinaryIO) -> None:
    parts: Any = [(0, member.size)] if member.sparse is None else member.sparse
    blocks.seek(member.offset_data)
    for offset, size in parts:
        file.seek(offset)
        blocks.copy(size, file)
    file.truncate(member.size)
