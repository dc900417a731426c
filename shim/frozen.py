"""What only the static binary needs: take over from its launcher (.ci/launcher.c) and PyInstaller.

A checkout, an installed package and the zipapp are not frozen: nothing happens in them.

Rule 1: the image's programs get the environment that the image was started with.
Rule 2: libcrypto is ours; the image's configuration of its own must not reach it.
Rule 3: when the first program of the image starts, all that is needed is in memory, and the
        directory that it was unpacked into is gone: nobody can change or misuse what is not there.
Rule 4: nothing is removed by its path, and only what has our lock.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from functools import cache

_BUNDLE = "cacert.pem"
_MODULES = "modules.txt"
_LIBGCC = "libgcc_s.so.1"
# The launcher's: descriptors of the image's environment, and of the directory with its lock.
_ENVIRONMENT = "SHIM_ENVIRONMENT"
_DIRECTORY = "SHIM_DIRECTORY"
# And the path of the program.
_PROGRAM = "SHIM_PROGRAM"
# At the end of the directory's name; before them stands what the starts on one host share.
_RANDOM_CHARACTERS = 6
# Where PyInstaller looks for modules and libraries.
_HOME = getattr(sys, "_MEIPASS", "")
_descriptors: dict[str, int] = {}
_variables: dict[str, str] = {}


def take_environment(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Return the environment that the image was started with; make environ, the process's, ours.

    To be called before anything loads OpenSSL.
    """
    if not _HOME:
        image = dict(environ)
        if "LC_CTYPE" not in _read_variables("/proc/self/environ"):
            image.pop("LC_CTYPE", None)  # Python's own, under the C locale
        return image
    image = _read_variables(int(environ[_ENVIRONMENT]))
    _descriptors[_DIRECTORY] = int(environ[_DIRECTORY])
    _variables[_PROGRAM] = environ[_PROGRAM]
    os.set_inheritable(_descriptors[_DIRECTORY], False)
    environ.clear()
    environ.update(image)
    environ["OPENSSL_CONF"] = os.devnull
    return image


def _read_variables(file: str | int) -> dict[str, str]:
    """Return the variables in a file of the kernel's form: each ends in a NUL."""
    variables: dict[str, str] = {}
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        for entry in stream.read().split("\0"):
            name, separator, value = entry.partition("=")
            if name and separator:
                variables.setdefault(name, value)  # of several with one name, the first counts
    return variables


def find_program() -> str:
    """Return the path of the binary; "" when nothing is frozen."""
    return _variables.get(_PROGRAM, "")


@cache
def carried_bundle() -> str:
    """Return the path of the carried certificates, which stays valid; "" when nothing is frozen."""
    if not _HOME:
        return ""
    bundle = os.open(f"{_HOME}/{_BUNDLE}", os.O_RDONLY | os.O_CLOEXEC)
    return f"/proc/self/fd/{bundle}"


@cache
def load_everything() -> None:
    """Load all that is left to load, and remove the directory that it came from: rule 3.

    Where nothing is frozen, what a failure needs: its report is to depend on nothing later.
    """
    if not carried_bundle():
        __import__("traceback")
        return
    with open(f"{_HOME}/{_MODULES}", encoding="ascii") as names:
        for name in names.read().split():
            with suppress(ImportError):  # one that needs what was left out
                __import__(name)
    remove_directories()


def remove_directories() -> None:
    """Remove the directory of this process, and those that others on this host left when killed.

    Of those nobody has the lock, which the kernel takes back when the last process that holds the
    directory ends; their name holds the host's boot, they have our owner, and nothing in them that
    is not in ours. Does nothing when there is none, or none any more.
    """
    directory = _descriptors.pop(_DIRECTORY, None)
    if directory is None:
        return
    with suppress(OSError):
        # glibc asks for it by its name when a thread ends, and aborts without it.
        __import__("_ctypes").dlopen(f"{_HOME}/{_LIBGCC}", os.RTLD_NOW)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{directory}"))
        contents = set(os.listdir(directory))
        # By O_PATH: it may be writable and not readable.
        parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        _remove(directory, name, parent)
        _remove_leftovers(name[:-_RANDOM_CHARACTERS], parent, contents)
        os.close(parent)
    os.close(directory)


def _remove_leftovers(prefix: str, parent: int, contents: set[str]) -> None:
    for name in os.listdir(f"/proc/self/fd/{parent}"):
        if name.startswith(prefix):
            with suppress(OSError):
                _remove_leftover(name, parent, contents)


def _remove_leftover(name: str, parent: int, contents: set[str]) -> None:
    directory = _open_directory(name, parent)
    try:
        status = os.fstat(directory)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
        if ours and contents.issuperset(os.listdir(directory)):
            _remove(directory, name, parent)
    finally:
        os.close(directory)


def _open_directory(name: str, parent: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=parent)


def _remove(directory: int, name: str, parent: int) -> None:
    """Empty an open directory and take its name from its parent, if it is still that one's."""
    for entry in os.listdir(directory):
        try:
            os.unlink(entry, dir_fd=directory)
        except IsADirectoryError:
            inner = _open_directory(entry, directory)
            try:
                _remove(inner, entry, directory)
            finally:
                os.close(inner)
    os.rmdir(name, dir_fd=parent)  # another that has got the name is either empty or stays


def describe() -> str:
    """Name what this program is made of, for `--version`."""
    import ssl  # 20 ms

    python = ".".join(map(str, sys.version_info[:3]))
    parts = [f"Python {python}", ssl.OPENSSL_VERSION]
    if carried_bundle():
        with open(carried_bundle(), encoding="ascii") as bundle:
            parts.append(f"certificates of {bundle.readline().strip()}")
    return ", ".join(parts)
