"""Find what a command leaves below its output directory.

Rule 1: nothing is opened for the user that he could not have read himself.
Rule 2: a link counts as an output only where it leads to a file inside.
Rule 3: memory does not grow with the number of files, only with that of directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shim.contract.errors import UserSafeError
from shim.files.descriptors import DIRECTORY, MAX_LINKS, closing_descriptor, open_directory
from shim.process.users import User, may_read

OUTPUT_MESSAGE = "The containers output directory is not a directory"

# The shim's own objects lie below this name; nothing of the user's must pass for them, or be in
# their way where a bucket is a directory.
RESERVED_NAME = ".sagemaker_shim"

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html; it also bounds the walk.
MAX_KEY_BYTES = 1024
MAX_SKIPPED = 100  # outputs of one task that are named

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_CAUSED_BY_USER = (
    None,  # NotAnOutput
    errno.EACCES,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
)


class NotAnOutput(FileNotFoundError):
    """What is here, or is here by now, may not be uploaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFile:
    """A file below the output directory.

    `open` returns a new descriptor, which the caller closes. It raises FileNotFoundError when the
    file has gone, or has become something that may not be uploaded, since it was found.
    """

    relative_path: str
    open: Callable[[], int] = field(repr=False)


class Outputs:
    """What of a directory may be uploaded for the user of the command."""

    def __init__(
        self,
        path: Path,
        *,
        user: User,
        prefix: str,
        warn: Callable[[str], None],
        is_link: bool = False,
    ) -> None:
        """prefix: of the keys; warn(): tells the author; is_link: whether the image came so."""
        self._path, self._user, self._prefix = path, user, prefix
        self._warn, self._is_link = warn, is_link
        self._skipped = 0

    def walk(self) -> Iterator[OutputFile]:
        """Yield every file that is an output of the user's process; warn of what is left out.

        Together with the prefix each path is a key that S3 can hold. Raises UserSafeError when
        the output directory has become something else.
        """
        pending = [""]
        while pending:
            directory = pending.pop()
            for entry in self._scan(directory):
                path = os.path.join(directory, entry.name)
                try:
                    if entry.name == RESERVED_NAME:
                        raise NotAnOutput("the name is reserved")
                    _check_key(self._prefix, path)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                        continue
                    file = self._output_file(path, entry)
                except OSError as error:
                    self._skip(path, error)
                else:
                    yield file

    def skip(self, path: str, reason: object) -> None:
        """Warn the author that a file is no output, and why."""
        self._skipped += 1
        if self._skipped <= MAX_SKIPPED:
            self._warn(f"Skipping the output {path!r}: {reason}")
        elif self._skipped == MAX_SKIPPED + 1:
            self._warn("Skipping more outputs, which are not named any more")

    def _scan(self, path: str) -> Iterator[os.DirEntry[str]]:
        """Yield the entries of a directory below the output directory."""
        try:
            directory = self._open_directory(path.split("/") if path else [])
        except OSError as error:
            if not path and error.errno in (errno.ELOOP, errno.ENOTDIR):
                warn_of_link(self._path, self._warn)
                raise UserSafeError(OUTPUT_MESSAGE) from error
            self._skip(path or ".", error)
            return
        with closing_descriptor(directory), os.scandir(directory) as entries:
            yield from entries

    def _skip(self, path: str, error: OSError) -> None:
        """Warn of what the user's doing made no output; any other error must not lose one."""
        if error.errno not in _CAUSED_BY_USER:
            raise error
        self.skip(path, error)

    def _output_file(self, path: str, entry: os.DirEntry[str]) -> OutputFile:
        if entry.is_symlink():
            target = self._resolve(path)
            os.close(self._open(target))
        else:
            target = path
            _check_file(entry.stat(follow_symlinks=False), self._user)
        return OutputFile(relative_path=path, open=partial(self._open, target))

    def _resolve(self, path: str) -> str:
        """Return the path without links that a link below the output directory leads to."""
        names: list[str] = []
        todo = path.split("/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                if not names:
                    raise NotAnOutput("it is a link that leads out of the output directory")
                names.pop()
            elif name not in ("", "."):
                target = self._read_link(names, name)
                if target is None:
                    names.append(name)
                    continue
                links += 1
                if links > MAX_LINKS:
                    raise NotAnOutput("it is a link in a loop of links")
                if target.startswith("/"):
                    names, target = [], self._make_relative(target)
                todo += target.split("/")[::-1]
        return "/".join(names)

    def _make_relative(self, target: str) -> str:
        """Return an absolute target as a path below the output directory."""
        for root in (str(self._path), os.path.realpath(self._path)):
            if f"{target}/".startswith(f"{root}/"):
                return target[len(root) :]
        raise NotAnOutput("it is a link that leads out of the output directory")

    def _read_link(self, names: Sequence[str], name: str) -> str | None:
        with closing_descriptor(self._open_directory(names)) as directory:
            try:
                return os.readlink(name, dir_fd=directory)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return None
                raise

    def _open_directory(self, names: Sequence[str]) -> int:
        """Open a directory below the output directory if the user may read all that leads there."""
        if len(names) > MAX_KEY_BYTES:
            raise NotAnOutput("it lies too deep")
        here = open_directory(self._path, follow=self._is_link)
        for name in names:
            with closing_descriptor(here):
                here = os.open(name, DIRECTORY, dir_fd=here)
            if not may_read(os.fstat(here), self._user):
                os.close(here)
                raise NotAnOutput("the user may not read the directory")
        return here

    def _open(self, path: str) -> int:
        """Open a file below the output directory; neither `path` nor a part of it may be a link."""
        *names, name = path.split("/")
        try:
            with closing_descriptor(self._open_directory(names)) as directory:
                # A device or a FIFO is not even opened, unless it takes the name just now.
                _check_file(os.stat(name, dir_fd=directory, follow_symlinks=False), self._user)
                file = os.open(name, _FILE, dir_fd=directory)
        except BlockingIOError as error:  # fcntl(2), F_SETLEASE: it has whoever opens the file wait
            raise UserSafeError(f"The output {path!r} is locked by a lease") from error
        except OSError as error:
            if error.errno in _CAUSED_BY_USER and not isinstance(error, FileNotFoundError):
                raise NotAnOutput("it is not what it was") from error
            raise
        try:
            _check_file(os.fstat(file), self._user)
        except NotAnOutput:
            os.close(file)
            raise
        return file


def warn_of_link(path: Path, warn: Callable[[str], None]) -> None:
    """Tell the author why an output directory is none, where a link is in its place."""
    if path.is_symlink():
        warn(f"{path} is a link, in place of a directory")


def _check_key(prefix: str, path: str) -> None:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise NotAnOutput("the name is not UTF-8") from None
    size += len(prefix.encode())
    if size > MAX_KEY_BYTES:
        raise NotAnOutput(f"its key would be longer than {MAX_KEY_BYTES} bytes")


def _check_file(status: os.stat_result, user: User) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotAnOutput("it is not a regular file")
    if not may_read(status, user):
        raise NotAnOutput("the user may not read it")
