"""Bring the inputs of a task to their places, each file from one source.

    named inputs, prefixes (listed meanwhile) -> files
    zips -> temporary files, each as soon as it is there -> files beside its path

Rule 1: two sources for one file fail the task, whatever the order in which they arrive.
Rule 2: all paths lie below the input directory and are walked by descriptor from there: its user
        may be at work in it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from shim.contract.errors import UserSafeError
from shim.contract.tasks import InferenceIO, InferenceTask, is_safe_relative_path
from shim.files.archives import extract_zip
from shim.files.workspace import Workspace
from shim.log.log import Log
from shim.s3.errors import S3ClientError
from shim.s3.store import Store
from shim.s3.transfer import Download, Transfers

MAX_PATH_BYTES = 4095  # PATH_MAX in limits.h: nobody opens a longer one
# Nothing else gets in the way of files that have a place each.
_CAUSED_BY_USER = (
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
)


@dataclass(frozen=True, slots=True)
class Source:
    """An object; or all below a prefix, whose keys follow from the paths below `directory`."""

    uri: str
    directory: str | None = None

    def name(self, path: str) -> str:
        """Return the URI of the object that a path comes from."""
        if self.directory is None:
            return self.uri
        return self.uri + path.removeprefix(f"{self.directory}/")


class Sources:
    """Which object makes which file of the input directory.

    It holds about 100 bytes and the path for each file, and 100 bytes for each directory.
    """

    def __init__(self) -> None:
        self._files: dict[str, Source] = {}
        self._directories: set[int] = set()  # hashes
        self._lock = threading.Lock()  # zips are unpacked in several threads

    def __bool__(self) -> bool:
        return bool(self._files)

    def claim(self, path: str, source: Source) -> None:
        """Note the source of a file; UserSafeError if another makes it, or a directory there.

        path: normalised, relative to the input directory.
        """
        if len(path.encode(errors="surrogateescape")) > MAX_PATH_BYTES:
            raise UserSafeError(f"The path of an input is longer than {MAX_PATH_BYTES} bytes")
        with self._lock:
            other = self._conflict(path)
            if other is None:
                self._files[path] = source
                return
        names = sorted([self._files[other].name(other), source.name(path)])
        raise UserSafeError(
            f"Two inputs need one place, {min(path, other, key=len)!r}: {' and '.join(names)}"
        )

    def _conflict(self, path: str) -> str | None:
        """Return the file that excludes this one; note the directories that this one needs."""
        if path in self._files:
            return path
        if hash(path) in self._directories:
            below = (file for file in self._files if file.startswith(f"{path}/"))
            if (first := next(below, None)) is not None:
                return first
        while (path := posixpath.dirname(path)) and hash(path) not in self._directories:
            if path in self._files:
                return path
            self._directories.add(hash(path))
        return None

    def claim_directory(self, path: str, source: Source) -> None:
        """Note that a source needs a directory; UserSafeError if another makes a file there."""
        if path and f"{path}/" not in self._files:
            self.claim(f"{path}/", source)


class Inputs:
    """The inputs of one task."""

    def __init__(
        self, task: InferenceTask, *, store: Store, workspace: Workspace, log: Log
    ) -> None:
        self._task, self._store, self._workspace = task, store, workspace
        self._log = log
        self._sources = Sources()

    def bring(self, transfers: Transfers) -> bool:
        """Download and unpack everything; return whether there is any file.

        Raises UserSafeError, RemoteError, OSError, and TaskStopped.
        """
        try:
            self._claim_named()
            transfers.download_all(self._downloads())
        except OSError as error:
            if error.errno in _CAUSED_BY_USER:
                raise UserSafeError(
                    f"The input directory was changed meanwhile: {error}"
                ) from error
            raise
        return bool(self._sources)

    def _claim_named(self) -> None:
        """Claim what is known before anything is listed or downloaded."""
        for item in self._task.inputs:
            source = Source(_uri(item.bucket_name, item.bucket_key))
            if item.decompress and not item.is_prefix:
                self._sources.claim_directory(posixpath.dirname(item.relative_path), source)
            elif not item.is_prefix:
                self._sources.claim(item.relative_path, source)

    def _downloads(self) -> Iterator[Download]:
        """Yield a download for each object; a zip goes to a temporary name."""
        for item in self._task.inputs:
            for key, path in self._objects(item):
                directory, name = posixpath.split(path)
                then = None
                if item.decompress:
                    name = f".{os.urandom(12).hex()}.zip"
                    source = Source(_uri(item.bucket_name, key))
                    self._sources.claim_directory(directory, source)
                    then = partial(self._unpack, name, directory, source)
                    directory = ""
                self._log.debug(f"Downloading {key!r} from {item.bucket_name} to {path!r}")
                yield Download(
                    bucket=item.bucket_name,
                    key=key,
                    open=partial(self._workspace.open_input, directory),
                    name=name,
                    then=then,
                )

    def _objects(self, item: InferenceIO) -> Iterator[tuple[str, str]]:
        """Yield (key, path) of the object or of everything below the prefix, which is claimed."""
        if not item.is_prefix:
            yield item.bucket_key, item.relative_path
            return
        directory = "" if item.relative_path == "." else item.relative_path
        prefix = _uri(item.bucket_name, item.bucket_key)
        source = Source(prefix, directory)
        for summary in self._store.list(item.bucket_name, item.bucket_key):
            rest = summary.key.removeprefix(item.bucket_key)
            if not rest or rest.endswith("/"):
                continue  # a marker of a directory
            if not is_safe_relative_path(rest):
                raise S3ClientError(
                    f"The key {summary.key!r} below the prefix {item.bucket_key!r} names no file"
                )
            below = posixpath.normpath(rest)
            path = posixpath.join(directory, below)
            if not item.decompress:
                is_plain = below == rest
                self._sources.claim(path, source if is_plain else Source(prefix + rest))
            yield summary.key, path

    def _unpack(
        self, archive: str, directory: str, source: Source, check: Callable[[], None]
    ) -> None:
        """Unpack a zip that was downloaded, and remove it."""

        def claim(names: Sequence[str]) -> None:
            self._sources.claim(posixpath.join(directory, *names), source)

        root = self._workspace.open_input("")
        try:
            with open(_open_own(archive, root), "rb", buffering=0) as file:
                there = self._workspace.open_input(directory)
                try:
                    extract_zip(file, there, claim, check=check)
                finally:
                    os.close(there)
            with suppress(FileNotFoundError):
                os.unlink(archive, dir_fd=root)
        finally:
            os.close(root)


def _uri(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}"


def _open_own(name: str, directory: int) -> int:
    """Open a file that we made where somebody else may write; it must not be another's by now."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    status = os.fstat(file)
    # With a second name it could be a file that only root may read.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(file)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    return file
