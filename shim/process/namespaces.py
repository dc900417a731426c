"""Show directories under other names to a process that is not root, and to what it starts.

A user namespace lets it mount (user_namespaces(7)), a mount namespace keeps that to itself. Where a
name does not exist, the whole root is put together anew from what is there:

    ROOT (tmpfs)/bin, etc, home, ...   what lies in /, bound
    ROOT/input, ROOT/output            the directories; then ROOT becomes /
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shim.process.libc import find_function

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000  # linux/sched.h
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000  # linux/mount.h
_MNT_DETACH = 2


def show(directories: Mapping[Path, Path], *, root: Path) -> bool:
    """Make each name lead to its directory; return whether that was possible.

    - root: an empty directory to put a new root together in

    If it is not possible, nothing has changed. To be called before there are threads, and before
    the working directory matters.
    """
    try:
        pid = os.fork()  # a failure half-way could not be undone
        if pid == 0:
            _leave(directories, root)
        if os.waitpid(pid, 0)[1] != 0:
            return False
        _enter(directories, root)
    except OSError:
        return False
    return True


def _leave(directories: Mapping[Path, Path], root: Path) -> None:
    """End this child, saying whether entering succeeded."""
    code = 1
    try:
        _enter(directories, root)
        code = 0
    finally:
        os._exit(code)


def _enter(directories: Mapping[Path, Path], root: Path) -> None:
    uid, gid, here = os.geteuid(), os.getegid(), os.getcwd()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _mount(Path("none"), Path("/"), _MS_REC | _MS_PRIVATE)
    if not all(name.is_dir() and not name.is_symlink() for name in directories):
        _make_root(root, directories)
        os.chdir(root)
        _call("pivot_root", b".", b".")  # the old root lies on top now: pivot_root(2)
        _call("umount2", b".", _MNT_DETACH)
    for name, directory in directories.items():
        _mount(directory, name, _MS_BIND)
    os.chdir(here)


def _make_root(root: Path, names: Mapping[Path, Path]) -> None:
    """Put a root together that has these names too."""
    _mount(Path("none"), root, 0, "tmpfs")
    for entry in os.scandir("/"):
        place = root / entry.name
        if Path(entry) in names:
            continue
        if entry.is_symlink():
            place.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            place.mkdir()
            _mount(Path(entry), place, _MS_BIND | _MS_REC)
        else:
            place.touch()
            _mount(Path(entry), place, _MS_BIND)
    for name in names:
        place = root / name.relative_to("/")
        if place.parent == root:
            place.mkdir()
        elif not place.is_dir():
            raise OSError(f"{name} does not exist, and is not to be made for good")
    # The root is in itself, by way of what it lies in.
    _call("umount2", os.fsencode(f"{root}{root}"), _MNT_DETACH)


def _mount(source: Path, target: Path, flags: int, kind: str | None = None) -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), kind and kind.encode(), flags, None)


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library that returns 0 on success."""
    if find_function(name)(*arguments) != 0:
        raise OSError(f"{name}{arguments} failed")
