"""Keep the directories of a task: made and emptied around it, its outputs found afterwards.

Rule 1: user code is hostile and may still be running. Every step below our directories is one
        name in an open directory, never followed through a link.
Rule 2: a link in place of one of our directories is refused. A link inside is removed as a link;
        as an output it counts only where it leads to a file inside.
Rule 3: what is mounted inside belongs to the operator and is left alone by cleaning.
Rule 4: memory does not grow with the number of files, nor descriptors with the depth of a tree.
Rule 5: cleaning after a task only warns; the reset before the next one raises.
Rule 6: nothing is opened for the user that he could not have read himself.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shim.errors import UserSafeError
from shim.users import may_read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.logs import Log
    from shim.users import User

RESET_MESSAGE = "The containers input and output directories could not be reset"
OUTPUT_MESSAGE = "The containers output directory is not a directory"

# The shim's own objects lie below this name; the user's files must not pass for them.
RESERVED_DIRECTORY = ".sagemaker_shim"

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html; it also bounds the walk.
MAX_KEY_BYTES = 1024
MAX_LINKS = 40  # path_resolution(7)
MAX_WARNINGS = 20
MAX_PENDING = 10_000  # names held of one directory
ATTEMPTS = 3

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
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
    size: int
    open: Callable[[], int] = field(repr=False)


class Workspace:
    """The input and output directories of one task after the other.

    - linked_input_parent: where `{pk}-input` is made for input_path to be a link to; None to put
      the inputs into input_path itself, which is also done where that is a mount point
    """

    def __init__(
        self, *, input_path: Path, output_path: Path, linked_input_parent: Path | None, log: Log
    ) -> None:
        self._input_path = input_path
        self._output_path = output_path
        self._linked_input_parent = linked_input_parent
        self._log = log
        self._input_root = input_path

    def reset(self, pk: str) -> None:
        """Make empty directories for the task pk; UserSafeError when that cannot be done."""
        try:
            is_empty = self._reset_directory(self._output_path, mode=0o777)
            is_empty = self._reset_input(pk) and is_empty
        except OSError as error:
            self._log.error(f"Could not reset a directory: {error}")
            raise UserSafeError(RESET_MESSAGE) from error
        if not is_empty:
            raise UserSafeError(RESET_MESSAGE)

    def clean(self) -> bool:
        """Empty the directories after a task and return whether nothing is left in them."""
        is_clean = clean_directory(self._output_path, self._log)
        return clean_directory(self._input_root, self._log) and is_clean

    def input_file(self, relative_path: str) -> Path:
        """Return where an input belongs, with its parents made; UserSafeError if not inside."""
        path = Path(relative_path)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in relative_path:
            raise UserSafeError(f"The path of an input is not valid: {relative_path!r}")
        with closing_descriptor(os.open(self._input_root, _DIRECTORY)) as root:
            os.close(make_directories(root, path.parts[:-1]))
        return self._input_root / path

    def walk_outputs(self, user: User) -> Iterator[OutputFile]:
        """Yield every file that is an output of the user's process; warn of what is left out.

        Raises UserSafeError when the output directory has become something else.
        """
        pending = [""]
        while pending:
            directory = pending.pop()
            for entry in self._scan(directory, user):
                path = os.path.join(directory, entry.name)
                try:
                    _check_key(path)
                    if entry.is_dir(follow_symlinks=False):
                        if path == RESERVED_DIRECTORY:
                            raise NotAnOutput("the name is reserved")
                        pending.append(path)
                        continue
                    file = self._output_file(path, entry, user)
                except OSError as error:
                    self._skip(path, error)
                else:
                    yield file

    def _reset_input(self, pk: str) -> bool:
        previous, self._input_root = self._input_root, self._input_path
        if self._linked_input_parent is None or is_mount_point(self._input_path):
            return self._reset_directory(self._input_path, mode=0o755)
        linked = self._linked_input_parent / f"{pk}-input"
        if previous not in (self._input_path, linked):
            try:
                self._remove(previous)
            except OSError as error:
                self._log.warning(f"Could not remove the inputs of the previous task: {error}")
        self._remove(linked)
        self._remove(self._input_path)
        os.close(_open_or_make(linked, mode=0o755))
        os.close(_open_or_make(self._input_path.parent, mode=0o755, follow=True))
        self._input_path.symlink_to(linked, target_is_directory=True)
        self._input_root = linked
        return True

    def _reset_directory(self, path: Path, *, mode: int) -> bool:
        with closing_descriptor(_open_or_make(path, mode=mode)) as directory:
            return _Emptying(directory, str(path), self._log).run()

    def _remove(self, path: Path) -> None:
        """Remove a link, a file or a directory with everything in it, if there is one."""
        try:
            path.unlink(missing_ok=True)
        except IsADirectoryError:
            clean_directory(path, self._log)
            path.rmdir()

    def _scan(self, path: str, user: User) -> Iterator[os.DirEntry[str]]:
        """Yield the entries of a directory below the output directory."""
        try:
            directory = self._open_output_directory(path.split("/") if path else [], user)
        except OSError as error:
            if not path and error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise UserSafeError(OUTPUT_MESSAGE) from error
            self._skip(path, error)
            return
        with closing_descriptor(directory), os.scandir(directory) as entries:
            yield from entries

    def _skip(self, path: str, error: OSError) -> None:
        """Warn of what the user's doing made no output; any other error must not lose one."""
        if error.errno not in _CAUSED_BY_USER:
            raise error
        self._log.warning(f"Skipping the output {path!r}: {error}")

    def _output_file(self, path: str, entry: os.DirEntry[str], user: User) -> OutputFile:
        if entry.is_symlink():
            target = self._resolve(path, user)
            with closing_descriptor(self._open_output(target, user)) as file:
                status = os.fstat(file)
        else:
            target = path
            status = entry.stat(follow_symlinks=False)
            _check_file(status, user)
        return OutputFile(
            relative_path=path, size=status.st_size, open=partial(self._open_output, target, user)
        )

    def _resolve(self, path: str, user: User) -> str:
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
                target = self._read_link(names, name, user)
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
        for root in (str(self._output_path), os.path.realpath(self._output_path)):
            if f"{target}/".startswith(f"{root}/"):
                return target[len(root) :]
        raise NotAnOutput("it is a link that leads out of the output directory")

    def _read_link(self, names: Sequence[str], name: str, user: User) -> str | None:
        with closing_descriptor(self._open_output_directory(names, user)) as directory:
            try:
                return os.readlink(name, dir_fd=directory)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return None
                raise

    def _open_output_directory(self, names: Sequence[str], user: User) -> int:
        """Open a directory below the output directory if the user may read all that leads there."""
        if len(names) > MAX_KEY_BYTES:
            raise NotAnOutput("it lies too deep")
        here = os.open(self._output_path, _DIRECTORY)
        for name in names:
            with closing_descriptor(here):
                here = os.open(name, _DIRECTORY, dir_fd=here)
            if not may_read(os.fstat(here), user):
                os.close(here)
                raise NotAnOutput("the user may not read the directory")
        return here

    def _open_output(self, path: str, user: User) -> int:
        """Open a file below the output directory; neither `path` nor a part of it may be a link."""
        *names, name = path.split("/")
        try:
            with closing_descriptor(self._open_output_directory(names, user)) as directory:
                # A device or a FIFO is not even opened, unless it takes the name just now.
                _check_file(os.stat(name, dir_fd=directory, follow_symlinks=False), user)
                file = os.open(name, _FILE, dir_fd=directory)
        except OSError as error:
            if error.errno in _CAUSED_BY_USER and not isinstance(error, FileNotFoundError):
                raise NotAnOutput("it is not what it was") from error
            raise
        try:
            _check_file(os.fstat(file), user)
        except NotAnOutput:
            os.close(file)
            raise
        return file


def clean_directory(path: Path, log: Log) -> bool:
    """Empty a directory, warn of what cannot be removed, and return whether it is empty.

    One that is missing is empty; a link in its place is reported, neither followed nor removed.
    """
    try:
        with closing_descriptor(os.open(path, _DIRECTORY)) as directory:
            return _Emptying(directory, str(path), log).run()
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning(f"Could not clean a directory: {error}")
        return False


def ensure_writable_directories(paths: Sequence[Path], log: Log) -> None:
    """Make each directory and let everybody write into it; warn where that fails.

    Only a link that root made is followed: some images have /tmp as one.
    """
    for path in paths:
        try:
            follow = path.is_symlink() and path.lstat().st_uid == 0
            with closing_descriptor(_open_or_make(path, mode=0o777, follow=follow)) as directory:
                mode = stat.S_IMODE(os.fstat(directory).st_mode)
                wanted = 0o777 | mode & stat.S_ISVTX
                if mode != wanted:
                    os.fchmod(directory, wanted)
        except OSError as error:
            log.warning(f"Could not make a directory writable: {error}")


def make_directories(root: int, names: Sequence[str], owner: tuple[int, int] = (-1, -1)) -> int:
    """Return a descriptor of the directory `names` below root.

    Those that are missing are made, for the owner (uid, gid; -1 = the shim's own).
    """
    here = os.dup(root)
    for name in names:
        with closing_descriptor(here):
            is_new = True
            try:
                os.mkdir(name, dir_fd=here)
            except FileExistsError:
                is_new = False
            here = os.open(name, _DIRECTORY, dir_fd=here)
        if is_new:
            os.fchmod(here, 0o755)
            os.fchown(here, *owner)
    return here


class _Emptying:
    """Empty one directory, its root, with two descriptors at a time.

    The way back up is "..", which a move can point elsewhere: each step up must arrive at the
    directory that the step down left.
    """

    def __init__(self, root: int, path: str, log: Log) -> None:
        self._root = root
        self._path = path
        self._log = log
        self._failures = 0
        self._stuck: set[int] = set()  # inode numbers of what is not tried twice
        # The directories above the present one: entries that are not empty yet, identity.
        self._above: list[tuple[list[os.DirEntry[str]], tuple[int, int]]] = []

    def run(self) -> bool:
        """Return whether the directory is empty now."""
        for _ in range(ATTEMPTS):
            try:
                self._empty()
                break
            except OSError as error:  # somebody moved or removed the directory we were in
                self._above.clear()
                self._log.warning(f"Could not go on emptying {self._path}: {error}")
        if self._failures > MAX_WARNINGS:
            self._log.warning(f"Could not remove {self._failures} entries of {self._path} in all")
        with os.scandir(self._root) as entries:
            return next(entries, None) is None

    def _empty(self) -> None:
        self._here = os.dup(self._root)
        try:
            todo = self._sweep()
            while todo or self._above:
                todo = self._down(todo) if todo else self._up()
        finally:
            os.close(self._here)

    def _sweep(self) -> list[os.DirEntry[str]]:
        """Remove what can be at once; return some of the directories that are not empty.

        A mount point is never one of them: rmdir says EBUSY before it looks inside (rule 3).
        """
        todo: list[os.DirEntry[str]] = []
        with os.scandir(self._here) as entries:
            for entry in entries:
                if entry.inode() in self._stuck:
                    continue
                try:
                    remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
                    remove(entry.name, dir_fd=self._here)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        todo.append(entry)
                    else:
                        self._give_up(entry, error)
                if len(todo) == MAX_PENDING:
                    break
        return todo

    def _down(self, todo: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
        try:
            there = os.open(todo[-1].name, _DIRECTORY, dir_fd=self._here)
        except OSError as error:
            self._give_up(todo.pop(), error)
            return todo or self._sweep()
        self._above.append((todo, _identity(self._here)))
        self._go(there)
        return self._sweep()

    def _up(self) -> list[os.DirEntry[str]]:
        self._go(os.open("..", _DIRECTORY, dir_fd=self._here))
        todo, identity = self._above.pop()
        if _identity(self._here) != identity:
            raise OSError(errno.ESTALE, "a directory was moved meanwhile")
        entry = todo.pop()
        try:
            os.rmdir(entry.name, dir_fd=self._here)
        except OSError as error:
            self._give_up(entry, error)
        return todo or self._sweep()

    def _go(self, directory: int) -> None:
        os.close(self._here)
        self._here = directory

    def _give_up(self, entry: os.DirEntry[str], error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        self._stuck.add(entry.inode())
        self._failures += 1
        if self._failures <= MAX_WARNINGS:
            parents = [todo[-1].name for todo, _ in self._above]
            path = os.path.join(self._path, *parents, entry.name)
            self._log.warning(f"Could not remove {path[-MAX_KEY_BYTES:]!r}: {error.strerror}")


@contextmanager
def closing_descriptor(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _identity(directory: int) -> tuple[int, int]:
    status = os.fstat(directory)
    return status.st_dev, status.st_ino


def _open_or_make(path: Path, *, mode: int, follow: bool = False) -> int:
    """Open a directory; one that is missing is made with this mode, its parents with 0755."""
    try:
        return os.open(path, _DIRECTORY & ~os.O_NOFOLLOW if follow else _DIRECTORY)
    except FileNotFoundError:
        os.close(_open_or_make(path.parent, mode=0o755, follow=True))
        os.mkdir(path)
    directory = os.open(path, _DIRECTORY)
    os.fchmod(directory, mode)
    return directory


def open_directory(path: Path, *, mode: int, follow: bool = False) -> int:
    """Open a directory, made with this mode where it is missing; root's own links are followed."""
    is_link = follow and path.is_symlink() and path.lstat().st_uid in (0, os.geteuid())
    target = Path(os.path.realpath(path)) if is_link else path
    return _open_or_make(target, mode=mode)


def is_mount_point(path: Path) -> bool:
    """Return whether something is mounted at this very name, be it from the same file system."""
    try:
        return _mount_id(path) != _mount_id(path.parent.resolve())
    except FileNotFoundError:
        return False


def _mount_id(path: Path) -> list[str]:
    """Return the number of the mount that a path lies on: proc(5), /proc/pid/fdinfo."""
    with closing_descriptor(os.open(path, os.O_PATH | os.O_NOFOLLOW)) as descriptor:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return info.partition("mnt_id:")[2].split()[:1]


def _check_key(path: str) -> None:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise NotAnOutput("the name is not UTF-8") from None
    if size > MAX_KEY_BYTES:
        raise NotAnOutput(f"the name is longer than {MAX_KEY_BYTES} bytes")


def _check_file(status: os.stat_result, user: User) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotAnOutput("it is not a regular file")
    if not may_read(status, user):
        raise NotAnOutput("the user may not read it")
