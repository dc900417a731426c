"""Directories by descriptor, opened one name after the other.

Rule 1: every step is one name in an open directory, followed through no link but, above and up to
        our directories, one of root's: user code may be at work in whatever it owns.
Rule 2: what is made is readable for its owner, whatever the umask.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_LINKS = 40  # path_resolution(7)
OVERFLOW_UID = 65534  # user_namespaces(7): owns what no uid of ours stands for

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def closing_descriptor(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
                target = read_trusted_link(here, name) if todo or follow else None
                links += 1
                if target is None or links > MAX_LINKS:
                    raise OSError(error.errno, error.strerror, str(path)) from error
            here = os.open("/" if target.startswith("/") else ".", _STEP, dir_fd=here)
            todo += [name for name in target.split("/")[::-1] if name not in ("", ".")]
    with closing_descriptor(here):
        return os.open(".", DIRECTORY, dir_fd=here)


def _open_directly(path: Path) -> int | None:
    """Open a directory in one go if there was no link on the way: proc(5), /proc/pid/fd."""
    try:
        directory = os.open(path, DIRECTORY)
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
    there = os.open(name, DIRECTORY, dir_fd=here)
    os.fchmod(there, mode)  # whatever the umask
    return there, True


def read_trusted_link(directory: int, name: str) -> str | None:
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
            here, is_new = _enter(here, name, DIRECTORY, 0o755)
        if is_new:
            os.fchown(here, *owner)
    return here


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
