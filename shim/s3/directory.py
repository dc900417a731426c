"""The interface of S3 over directories: what a file:// endpoint and a laptop use.

A key is a path below its bucket's directory; empty and "." parts of a key lead nowhere else than
the key without them. Metadata of ROOT/bucket/key lie in ROOT/.metadata/bucket/key.json.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shim.s3.buffers import borrow_buffer
from shim.s3.crew import Crew
from shim.s3.errors import FileChanged, S3ClientError, ServiceError
from shim.s3.store import ObjectHead, ObjectSummary

METADATA = ".metadata"
FILE_MODE = 0o644  # of downloads, whatever the umask


class DirectoryStore:
    """Buckets that are directories."""

    def __init__(self, root: Path | None, *, buckets: Mapping[str, Path] | None = None) -> None:
        """root: holds the buckets and the metadata."""
        self._root, self._buckets = root, buckets or {}

    @classmethod
    def from_buckets(cls, buckets: Mapping[str, Path]) -> DirectoryStore:
        """Use these directories, no other bucket exists; metadata are not kept."""
        return cls(None, buckets=buckets)

    def get(self, bucket: str, key: str, *, max_bytes: int) -> bytes:
        """Return a whole object, refuse one that is longer."""
        with self.open(bucket, key) as file:
            body = file.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise S3ClientError(f"s3://{bucket}/{key} is longer than {max_bytes} bytes")
        return body

    def put(
        self,
        bucket: str,
        key: str,
        body: bytes,
        *,
        metadata: Mapping[str, str] = {},  # noqa: B006
        persistent: bool = False,
    ) -> None:
        """Store a small object."""
        _write(self._path(bucket, key, "PutObject"), [body])
        self._describe(bucket, key, metadata)

    def head(self, bucket: str, key: str) -> ObjectHead:
        """Describe an object."""
        with self.open(bucket, key) as file:
            status = os.fstat(file.fileno())
        described = self._metadata_path(bucket, key)
        metadata = json.loads(described.read_bytes()) if described and described.exists() else {}
        return ObjectHead(size=status.st_size, metadata=metadata)

    def head_bucket(self, bucket: str) -> None:
        """Refuse what cannot be a bucket; one that is missing is made by the first upload."""
        directory = self._path(bucket, "", "HeadBucket")
        if directory.exists() and not directory.is_dir():
            raise _error("HeadBucket", bucket, "", 404, "NoSuchBucket", "It is not a directory")

    def probe(self, bucket: str, prefix: str) -> None:
        """Write a file below a prefix, or as near to it as there are directories, and remove it."""
        directory = self._path(bucket, prefix, "PutObject")
        while not os.path.lexists(directory):
            directory = directory.parent
        file = directory / f".{os.urandom(12).hex()}.part"
        try:
            file.write_bytes(b"probe")
        except OSError as error:
            raise S3ClientError(f"Cannot write into {directory}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def list(self, bucket: str, prefix: str) -> Iterator[ObjectSummary]:
        """Yield what lies below a prefix, in the order of keys."""
        before, slash, _ = prefix.rpartition("/")
        directory = self._path(bucket, before, "ListObjectsV2")
        keys = []
        seen = set()
        for parent, directories, names in os.walk(directory, onerror=_refuse, followlinks=True):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                directories.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in names:
                path = os.path.join(parent, name)
                key = before + slash + os.path.relpath(path, directory)
                if key.startswith(prefix) and os.path.isfile(path):
                    keys.append((key, path))
        for key, path in sorted(keys, key=lambda item: os.fsencode(item[0])):
            yield ObjectSummary(key=key, size=os.path.getsize(path))

    def open(self, bucket: str, key: str) -> io.BufferedReader:
        """Open an object for reading in order."""
        try:
            return self._path(bucket, key, "GetObject").open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            message = "The specified key does not exist."
            raise _error("GetObject", bucket, key, 404, "NoSuchKey", message) from error

    def download(self, bucket: str, key: str, directory: int, name: str, *, crew: Crew) -> None:
        """Make the name in an open directory hold the object's bytes, or leave it as it was."""
        with self.open(bucket, key) as source, borrow_buffer() as buffer:
            size = os.fstat(source.fileno()).st_size
            blocks = _blocks(source.fileno(), size, buffer, crew)
            _replace(directory, name, blocks, mode=FILE_MODE)

    def upload(self, bucket: str, key: str, fd: int, *, size: int, crew: Crew) -> None:
        """Store a file, whose size must not change; its position is neither used nor moved."""
        with borrow_buffer() as buffer:
            _write(self._path(bucket, key, "PutObject"), _unchanged(fd, size, buffer, crew, key))
        self._describe(bucket, key, {})

    def _path(self, bucket: str, key: str, operation: str) -> Path:
        """Return the file of a key; ServiceError for one that would lie elsewhere."""
        top = self._buckets.get(bucket) or (self._root / bucket if self._root else None)
        if top is None or bucket in (METADATA, ".", ".."):
            raise _error(operation, bucket, key, 404, "NoSuchBucket", "There is no such bucket")
        parts = [part for part in key.split("/") if part not in ("", ".")]
        path = top.joinpath(*parts)
        if ".." in parts or "\0" in key or not _is_inside(path, top):
            message = "The key would lie outside of its bucket's directory"
            raise _error(operation, bucket, key, 400, "InvalidArgument", message)
        return path

    def _metadata_path(self, bucket: str, key: str) -> Path | None:
        return self._root / METADATA / bucket / f"{key.strip('/')}.json" if self._root else None

    def _describe(self, bucket: str, key: str, metadata: Mapping[str, str]) -> None:
        described = self._metadata_path(bucket, key)
        if described and metadata:
            _write(described, [json.dumps(dict(metadata)).encode()])
        elif described:
            described.unlink(missing_ok=True)


def _is_inside(path: Path, top: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(top))


def _error(
    operation: str, bucket: str, key: str, status: int, code: str, message: str
) -> ServiceError:
    return ServiceError(
        operation=operation,
        bucket=bucket,
        key=key,
        status=status,
        code=code,
        message=message,
        headers={},
    )


def _refuse(error: OSError) -> None:
    """Leave nothing out of a listing but what is not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise S3ClientError(f"The directory cannot be listed: {error}") from error


def _blocks(fd: int, size: int, buffer: memoryview, crew: Crew) -> Iterator[memoryview]:
    """Yield the first size bytes of a file, or what there is of them, until a stop."""
    position = 0
    while read := os.preadv(fd, [buffer[: size - position]], position):
        crew.check()
        position += read
        yield buffer[:read]


def _unchanged(
    fd: int, size: int, buffer: memoryview, crew: Crew, key: str
) -> Iterator[memoryview]:
    """Yield the bytes of a file that must not change meanwhile."""
    modified = os.fstat(fd).st_mtime_ns
    yield from _blocks(fd, size, buffer, crew)
    status = os.fstat(fd)
    if (status.st_size, status.st_mtime_ns) != (size, modified):
        raise FileChanged(key)


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file of the store, whose directories are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise S3ClientError(f"The file cannot be written: {error}") from error
    try:
        _replace(directory, path.name, blocks)
    finally:
        os.close(directory)


def _replace(
    directory: int, name: str, blocks: Iterable[bytes | memoryview], *, mode: int | None = None
) -> None:
    """Write a file under another name, then give it its own; without a mode, that of the umask."""
    temporary = f".{os.urandom(12).hex()}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, mode or 0o666, dir_fd=directory), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            for block in blocks:
                file.write(block)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        if isinstance(error, OSError):
            raise S3ClientError(f"The file cannot be written: {error}") from error
        raise
