"""Keep the directories of a task: made and emptied around it, its outputs found afterwards.

Rule 1: user code is hostile and may still be running: everything goes by descriptor.
Rule 2: a link in place of one of our directories is refused, unless the image came with it.
Rule 3: cleaning after a task only warns; the reset before the next one raises.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from shim.contract.errors import UserSafeError
from shim.files.descriptors import (
    closing_descriptor,
    is_mount_point,
    make_directories,
    open_directory,
)
from shim.files.emptying import Emptying, clean_directory
from shim.files.outputs import Outputs, warn_of_link
from shim.log.log import Log
from shim.process.users import User

RESET_MESSAGE = "The containers input and output directories could not be reset"

# Shared by users who must not remove each other's files, whatever an image made of them.
SHARED_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")


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

    def reset(self, pk: str) -> None:
        """Make empty directories for the task pk; UserSafeError when that cannot be done.

        A link that is there the first time is the image's: the output's is followed if it is
        root's, the input's replaced.
        """
        self._pk = pk
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
            warn_of_link(self._output_path, self._warn_author)
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

    def outputs(self, user: User, *, prefix: str) -> Outputs:
        """Return what the user's process leaves, for keys below the prefix."""
        return Outputs(
            self._output_path,
            user=user,
            prefix=prefix,
            warn=self._warn_author,
            is_link=self._output_is_link,
        )

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
            return Emptying(directory, str(path), self._log).run()

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
