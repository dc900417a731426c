"""Keep two processes from emptying each other's directories.

Rule 1: a directory is locked itself (flock(2)), whatever name leads to it; it is made where it is
        missing. The input path, a link that each task replaces, is locked by a file beside it.
Rule 2: the kernel ends a lock with the process that holds it. No command inherits the descriptor;
        what of an earlier life is still alive can refuse itself the next run, no more.
Rule 3: where there are no locks, as on some network file systems, a warning says so.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from shim.contract.errors import UsageError
from shim.contract.settings import VARIABLES, Settings
from shim.files.descriptors import is_mount_point, open_directory
from shim.log.log import Log

LOCKS = Path("/proc/locks")
ATTEMPTS = 10
_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def exclusive(settings: Settings, log: Log) -> Iterator[None]:
    """Be the only process that uses the directories of the tasks.

    Raises UsageError, and keeps no lock, where another process uses one of them.
    """
    path = settings.input_path
    is_mounted = False
    with suppress(OSError):
        is_mounted = is_mount_point(path)
    is_linked = settings.use_linked_input and not is_mounted
    with ExitStack() as locks:
        _keep(locks, path, log, is_link=is_linked or path.is_symlink())
        _keep(locks, settings.output_path, log, mode=0o777)
        if is_linked:
            _keep(locks, settings.linked_input_parent, log)
        yield


def _keep(
    locks: ExitStack, path: Path, log: Log, *, mode: int = 0o755, is_link: bool = False
) -> None:
    """Lock a directory, or what stands for a link, until `locks` ends."""
    place = path.with_name(f".{path.name}.lock") if is_link else path
    try:
        descriptor = _lock(place, mode=0 if is_link else mode)
    except BlockingIOError as error:
        raise UsageError(_explain(path, error.args[0])) from None
    except OSError as error:
        log.warning(f"Cannot keep other processes from using {path}: {error}")
        return
    locks.callback(os.close, descriptor)
    if is_link:
        locks.callback(_remove, place)


def _lock(place: Path, *, mode: int) -> int:
    """Return a descriptor that holds the lock of a directory, or of a file where mode is 0.

    Raises BlockingIOError(status) when another process holds it.
    """
    for _ in range(ATTEMPTS):
        descriptor = open_directory(place, mode=mode, follow=True) if mode else _open_file(place)
        status = os.fstat(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(place) and os.path.samestat(status, os.stat(place)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(status) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it removed it as he went
    raise FileNotFoundError(f"it is removed again and again: {place}")


def _open_file(path: Path) -> int:
    os.close(open_directory(path.parent, mode=0o755, follow=True))
    return os.open(path, _FILE, 0o600)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _explain(path: Path, status: os.stat_result) -> str:
    names = [VARIABLES[name].name for name in ("input_path", "output_path", "linked_input_parent")]
    return (
        f"{path} is in use by {_find_holder(status)}, and each empties it: "
        f"give this one directories of its own in {names[0]}, {names[1]} and {names[2]}"
    )


def _find_holder(status: os.stat_result) -> str:
    """Name the process that holds a lock: proc(5), /proc/locks."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with suppress(OSError):
        for line in LOCKS.read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == f"{device}:{status.st_ino}":
                return f"process {words[4]}"
    return "another process that cannot be seen from here"
