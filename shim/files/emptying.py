"""Make directories empty, whatever their owner does meanwhile.

Rule 1: what is mounted inside belongs to the operator and is left alone.
Rule 2: memory does not grow with the number of files, nor descriptors with the depth of a tree.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shim.files.descriptors import DIRECTORY, closing_descriptor, open_directory
from shim.log.log import Log

MAX_WARNINGS = 20  # of what one cleaning could not remove
MAX_SHOWN_BYTES = 1024  # of a path
MAX_PENDING = 10_000  # names held of one directory
ATTEMPTS = 3


def clean_directory(path: Path, log: Log, *, follow: bool = False) -> bool:
    """Empty a directory, warn of what cannot be removed, and return whether it is empty.

    One that is missing is empty; a link in its place is reported, neither followed nor removed,
    unless a link of root's is to be followed.
    """
    try:
        with closing_descriptor(open_directory(path, follow=follow)) as directory:
            return Emptying(directory, str(path), log).run()
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning(f"Could not clean a directory: {error}")
        return False


class Emptying:
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

        A mount point is never one of them: rmdir says EBUSY before it looks inside (rule 1).
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
            there = os.open(todo[-1].name, DIRECTORY, dir_fd=self._here)
        except OSError as error:
            self._give_up(todo.pop(), error)
            return todo or self._sweep()
        self._above.append((todo, _identity(self._here)))
        self._go(there)
        return self._sweep()

    def _up(self) -> list[os.DirEntry[str]]:
        self._go(os.open("..", DIRECTORY, dir_fd=self._here))
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
            self._log.warning(f"Could not remove {path[-MAX_SHOWN_BYTES:]!r}: {error.strerror}")


def _identity(directory: int) -> tuple[int, int]:
    status = os.fstat(directory)
    return status.st_dev, status.st_ino
