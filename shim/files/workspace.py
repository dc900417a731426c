"""Keep the directories of a task: made and emptied around it, its outputs found afterwards.

Rule 1: user code is hostile and may still be running. Every step is one name in an open directory,
        followed through no link but, above and up to our directories, one of root's.
Rule 2: a link in place of one of our directories is refused, unless the image came with it. A link
        inside is removed as a link; as an output it counts only where it leads to a file inside.
Rule 3: what is mounted inside belongs to the operator and is left alone by cleaning.
Rule 4: memory does not grow with the number of files, nor descriptors with the depth of a tree.
Rule 5: cleaning after a task only warns; the reset before the next one raises.
Rule 6: nothing is opened for the user that he could not have read himself.
Rule 7: what is made for the user is readable for him, whatever the umask.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shim.contract.errors import UserSafeError
from shim.process.users import may_read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.log.log import Log
    from shim.process.users import User

RESET_MESSAGE = "The containers input and output directories could not be reset"
OUTPUT_MESSAGE = "The containers output directory is not a directory"

# The shim's own objects lie below this name; nothing of the user's must pass for them, or be in
# their way where a bucket is a directory.
RESERVED_NAME = ".sagemaker_shim"

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html; it also bounds the walk.
MAX_KEY_BYTES = 1024
MAX_LINKS = 40  # path_resolution(7)
MAX_WARNINGS = 20  # of what one cleaning could not remove
MAX_SKIPPED = 100  # outputs of one task that are named
MAX_PENDING = 10_000  # names held of one directory
ATTEMPTS = 3
# Shared by users who must not remove each other's files, whatever an image made of them.
SHARED_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")
OVERFLOW_UID = 65534  # user_namespaces(7): owns what no uid of ours stands for

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
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
        self._is_first = True
        self._output_is_link = False  # of the image's
        self._pk: str | None = None
        self._skipped = 0

    def reset(self, pk: str) -> None:
        """Make empty directories for the task pk; UserSafeError when that cannot be done.

        A link that is there the first time is the image's: the output's is followed if it is
        root's, the input's replaced.
        """
        self._pk, self._skipped = pk, 0
        try:
            if self._is_first:
                self._output_is_link = self._output_path.is_symlink()
                if self._input_path.is_symlink():
                    self._remove(self._input_path)
            self._is_first = False
            is_empty = self._reset_directory(
                self._output_path, mode=0o777, follow=self._output_is_link
            )
            is_empty = self._reset_input(pk) and is_empty
        except OSError as error:
            self._log.error(f"Could not reset a directory: {error}")
            self._name_link()
            raise UserSafeError(RESET_MESSAGE) from error
        if not is_empty:
            raise UserSafeError(RESET_MESSAGE)

    def clean(self, *, keep_outputs: bool = False) -> bool:
        """Empty the directories after a task and return whether nothing is left in them."""
        is_clean = keep_outputs or clean_directory(
            self._output_path, self._log, follow=self._output_is_link
        )
        return clean_directory(self._input_root, self._log) and is_clean

    def open_input(self, relative_path: str) -> int:
        """Return a descriptor of a directory below the input's, "" for that one itself.

        Those that are missing are made. Raises UserSafeError when it would not lie inside.
        """
        path = Path(relative_path)
        if path.is_absolute() or ".." in path.parts or "\0" in relative_path:
            raise UserSafeError(f"The path of an input is not valid: {relative_path!r}")
        with closing_descriptor(open_directory(self._input_root)) as root:
            return make_directories(root, path.parts)

    def walk_outputs(self, user: User, *, prefix: str = "") -> Iterator[OutputFile]:
        """Yield every file that is an output of the user's process; warn of what is left out.

        Together with the prefix each path is a key that S3 can hold. Raises UserSafeError when
        the output directory has become something else.
        """
        pending = [""]
        while pending:
            directory = pending.pop()
            for entry in self._scan(directory, user):
                path = os.path.join(directory, entry.name)
                try:
                    if entry.name == RESERVED_NAME:
                        raise NotAnOutput("the name is reserved")
                    _check_key(prefix, path)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                        continue
                    file = self._output_file(path, entry, user)
                except OSError as error:
                    self._skip(path, error)
                else:
                    yield file

    def skip_output(self, path: str, reason: object) -> None:
        """Warn the author that a file is no output, and why."""
        self._skipped += 1
        if self._skipped <= MAX_SKIPPED:
            self._warn_author(f"Skipping the output {path!r}: {reason}")
        elif self._skipped == MAX_SKIPPED + 1:
            self._warn_author("Skipping more outputs, which are not named any more")

    def _name_link(self) -> None:
        """Tell the author why the output directory is none, where a link is in its place."""
        if self._output_path.is_symlink():
            self._warn_author(f"{self._output_path} is a link, in place of a directory")

    def _warn_author(self, message: str) -> None:
        self._log.warning(message, internal=False, task=self._pk)

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
        os.close(open_directory(linked, mode=0o755))
        parent = open_directory(self._input_path.parent, mode=0o755, follow=True)
        with closing_descriptor(parent):
            os.symlink(linked, self._input_path.name, dir_fd=parent)
        self._input_root = linked
        return True

    def _reset_directory(self, path: Path, *, mode: int, follow: bool = False) -> bool:
        with closing_descriptor(open_directory(path, mode=mode, follow=follow)) as directory:
            return _Emptying(directory, str(path), self._log).run()

    def _remove(self, path: Path) -> None:
        """Remove a link, a file or a directory with everything in it, if there is one."""
        try:
            with closing_descriptor(open_directory(path.parent, follow=True)) as parent:
                try:
                    os.unlink(path.name, dir_fd=parent)
                except IsADirectoryError:
                    clean_directory(path, self._log)
                    os.rmdir(path.name, dir_fd=parent)
        except FileNotFoundError:
            return

    def _scan(self, path: str, user: User) -> Iterator[os.DirEntry[str]]:
        """Yield the entries of a directory below the output directory."""
        try:
            directory = self._open_output_directory(path.split("/") if path else [], user)
        except OSError as error:
            if not path and error.errno in (errno.ELOOP, errno.ENOTDIR):
                self._name_link()
                raise UserSafeError(OUTPUT_MESSAGE) from error
            self._skip(path or ".", error)
            return
        with closing_descriptor(directory), os.scandir(directory) as entries:
            yield from entries

    def _skip(self, path: str, error: OSError) -> None:
        """Warn of what the user's doing made no output; any other error must not lose one."""
        if error.errno not in _CAUSED_BY_USER:
            raise error
        self.skip_output(path, error)

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
        here = open_directory(self._output_path, follow=self._output_is_link)
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
        except BlockingIOError as error:  # fcntl(2), F_SETLEASE: it has whoever opens the file wait
            raise UserSafeError(f"The output {path!r} is locked by a lease") from error
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


def clean_directory(path: Path, log: Log, *, follow: bool = False) -> bool:
    """Empty a directory, warn of what cannot be removed, and return whether it is empty.

    One that is missing is empty; a link in its place is reported, neither followed nor removed,
    unless a link of root's is to be followed.
    """
    try:
        with closing_descriptor(open_directory(path, follow=follow)) as directory:
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
            with closing_descriptor(open_directory(path, mode=0o755, follow=True)) as directory:
                mode = stat.S_IMODE(os.fstat(directory).st_mode)
                is_shared = os.path.normpath(path) in SHARED_DIRECTORIES
                wanted = 0o777 | (stat.S_ISVTX if is_shared else mode & stat.S_ISVTX)
                if mode != wanted:
                    os.fchmod(directory, wanted)
        except OSError as error:
            log.warning(f"Could not make a directory writable: {path}: {error.strerror}")


def open_directory(path: Path, *, mode: int | None = None, follow: bool = False) -> int:
    """Open a directory step by step from the root on, through no link that root did not make.

    - mode: of the directory when it is missing, those on the way are made with 0755; None to make
      nothing and raise FileNotFoundError
    - follow: whether the last name may be a link of root's too
    """
    direct = _open_directly(path)
    if direct is not None:
        return direct
    todo = [*path.absolute().parts[:0:-1]]
    here = os.open("/", _STEP)
    links = 0
    while todo:
        name = todo.pop()
        with closing_descriptor(here):
            try:
                mode_here = 0o755 if todo and mode is not None else mode
                here, _ = _enter(here, name, _STEP, mode_here)
                continue
            except OSError as error:
                target = _read_trusted_link(here, name) if todo or follow else None
                links += 1
                if target is None or links > MAX_LINKS:
                    raise OSError(error.errno, error.strerror, str(path)) from error
            here = os.open("/" if target.startswith("/") else ".", _STEP, dir_fd=here)
            todo += [name for name in target.split("/")[::-1] if name not in ("", ".")]
    with closing_descriptor(here):
        return os.open(".", _DIRECTORY, dir_fd=here)


def _open_directly(path: Path) -> int | None:
    """Open a directory in one go if there was no link on the way: proc(5), /proc/pid/fd."""
    try:
        directory = os.open(path, _DIRECTORY)
    except OSError:
        return None
    with suppress(OSError):
        if os.readlink(f"/proc/self/fd/{directory}") == str(path):
            return directory
    os.close(directory)
    return None


def _enter(here: int, name: str, flags: int, mode: int | None) -> tuple[int, bool]:
    """Open a directory in an open one; with a mode it is made, if it is missing, and True."""
    try:
        return os.open(name, flags, dir_fd=here), False
    except FileNotFoundError:
        if mode is None:
            raise
    with suppress(FileExistsError):  # another thread needs it too
        os.mkdir(name, dir_fd=here)
    there = os.open(name, _DIRECTORY, dir_fd=here)
    os.fchmod(there, mode)  # whatever the umask
    return there, True


def _read_trusted_link(directory: int, name: str) -> str | None:
    """Return the target of a link that root or we ourselves made; None if it is no such link."""
    try:
        with closing_descriptor(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)) as link:
            owner = os.fstat(link).st_uid
            # In a user namespace without root, root owns nothing that we can see.
            is_roots = owner == OVERFLOW_UID == os.stat("/").st_uid
            if owner in (0, os.geteuid()) or is_roots:
                return os.readlink("", dir_fd=link)
    except OSError:  # it is something else
        pass
    return None


def make_directories(root: int, names: Sequence[str], owner: tuple[int, int] = (-1, -1)) -> int:
    """Return a descriptor of the directory `names` below root.

    Those that are missing are made, for the owner (uid, gid; -1 = the shim's own).
    """
    here = os.dup(root)
    for name in names:
        with closing_descriptor(here):
            here, is_new = _enter(here, name, _DIRECTORY, 0o755)
        if is_new:
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
