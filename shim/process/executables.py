"""Say in a sentence why a command could not be executed."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct

from shim.process.users import User

NOT_FOUND = "The command defined by the containers ENTRYPOINT and CMD instructions does not exist"
NOT_PERMITTED = (
    "The user defined in the containers USER instruction does not have permission to execute "
    "the command defined by the containers ENTRYPOINT and CMD instructions"
)
NO_DIRECTORY = (
    "The working directory of the container does not exist; "
    "set one that does in the WORKDIR instruction"
)

# e_machine of the ELF header (elf.h), in the words of uname(2).
_MACHINES = {
    3: "i686",
    21: "ppc64le",
    22: "s390x",
    40: "armv7l",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
}
NOT_PERMITTED_ERRORS = (errno.EACCES, errno.EPERM)
_PT_INTERP = 3
_HEAD_BYTES = 4096
# A script's interpreter may be a script; the kernel follows that about as far (fs/exec.c).
_MAX_DEPTH = 5


def explain_exec_error(path: str, error_number: int) -> str:
    """Return a sentence for the author of an image in which execve(path) failed.

    - error_number: what execve reported; the file is read to find out what is behind it
    """
    if error_number == errno.E2BIG:
        return (
            "The arguments and the environment of the command are longer than the operating "
            "system allows; pass long values in files"
        )
    if error_number in NOT_PERMITTED_ERRORS:
        return _is_a_directory(path) if os.path.isdir(path) else NOT_PERMITTED
    if error_number in (errno.ENOENT, errno.ENOTDIR, errno.ENOEXEC):
        return _explain_file(path, error_number)
    return f"The command {path!r} could not be started: {os.strerror(error_number)}"


def describe_missing(name: str, search_path: str) -> str:
    """Name the command that NOT_FOUND speaks of, and where it was looked for."""
    if not name:
        return "The name of the command is empty"
    if "/" not in name:
        return f"The command {name!r} is in none of the directories of PATH, {search_path!r}"
    if os.path.isabs(name):
        return f"The command {name!r} does not exist"
    return f"The command {name!r} does not exist in the working directory, {os.getcwd()!r}"


def describe_permission(path: str, user: User, depth: int = 0) -> str:
    """Name what the user may not execute; "" where nothing is found that explains it."""
    parents = itertools.accumulate(os.path.abspath(path).split("/")[:-1], "{}/{}".format)
    try:
        for directory in parents:
            if not _may_execute(os.stat(directory or "/"), user):
                return f"The user may not enter the directory {directory!r}, where {path!r} lies"
        status = os.stat(path)
        head = _read_head(path)
    except OSError:
        return ""
    if not status.st_mode & 0o111:
        return f"The file {path!r} is not executable: chmod +x it when the image is built"
    if not _may_execute(status, user):
        return (
            f"The file {path!r} has mode {stat.S_IMODE(status.st_mode):04o} and belongs to uid "
            f"{status.st_uid} and gid {status.st_gid}: chmod a+rx it when the image is built"
        )
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        return f"The file {path!r} lies on a file system that is mounted noexec"
    words = head[2:].split(None, 1) if head.startswith(b"#!") else []
    if words and depth < _MAX_DEPTH:
        return describe_permission(os.fsdecode(words[0]), user, depth + 1)
    return ""


def _may_execute(status: os.stat_result, user: User) -> bool:
    """Tell whether the kernel would let the user execute a file, or enter a directory."""
    uid = os.geteuid() if user.uid is None else user.uid
    groups = {user.gid, *user.groups} if user.gid is not None else {os.getegid(), *os.getgroups()}
    if uid == 0:
        return bool(status.st_mode & 0o111) or stat.S_ISDIR(status.st_mode)
    shift = 6 if uid == status.st_uid else 3 if status.st_gid in groups else 0
    return bool(status.st_mode >> shift & 1)


def _is_a_directory(path: str) -> str:
    return (
        f"The command {path!r} is a directory; "
        "name a program in it in the ENTRYPOINT or CMD instruction"
    )


def _explain_file(path: str, error_number: int, depth: int = 0) -> str:
    try:
        head = _read_head(path)
    except OSError:
        return NOT_FOUND if os.path.isabs(path) or _has_working_directory() else NO_DIRECTORY
    if head.startswith(b"#!"):
        return _explain_script(path, head, error_number, depth)
    if head.startswith(b"\x7fELF"):
        return _explain_elf(path, head, error_number)
    if not head:
        return f"The command {path!r} is an empty file"
    return (
        f"The command {path!r} is not a program that Linux can execute; a script must name its "
        "interpreter in the first line, for example #!/bin/sh"
    )


def _explain_script(path: str, head: bytes, error_number: int, depth: int) -> str:
    line = head[2:].split(b"\n", 1)[0]
    words = line.strip(b" \t").split(None, 1)
    if line.endswith(b"\r"):
        return (
            f"The first line of the command {path!r} ends in a carriage return; "
            "save the file with Unix line endings (LF, not CRLF)"
        )
    if not words:
        return f"The first line of the command {path!r} does not name an interpreter after #!"
    interpreter = os.fsdecode(words[0])
    if os.path.exists(interpreter) and depth < _MAX_DEPTH:
        return _explain_file(interpreter, error_number, depth + 1)
    return (
        f"The interpreter {interpreter!r}, named in the first line of the command {path!r}, "
        "does not exist; install it or name another"
    )


def _explain_elf(path: str, head: bytes, error_number: int) -> str:
    try:
        machine, loader = _parse_elf(head)
    except (struct.error, IndexError, OverflowError):
        return f"The command {path!r} is a damaged program: its ELF header is not complete"
    if error_number == errno.ENOENT:
        return (
            f"The command {path!r} needs {loader!r}, which does not exist: it was built for "
            "another C library (glibc or musl); build it in the image that it runs in"
        )
    ours = os.uname().machine
    if machine != ours:
        return (
            f"The command {path!r} was built for {machine} machines, but this machine is "
            f"{ours}; build the container image for this platform (docker build --platform)"
        )
    return f"The command {path!r} is a program that this machine cannot execute"


def _parse_elf(head: bytes) -> tuple[str, str]:
    """Return the machine and the loader (PT_INTERP; "" without one) that an ELF header names.

    Raises struct.error, IndexError or OverflowError when head ends before what its header says.
    """
    order = "<" if head[5] == 1 else ">"
    is_64_bit = head[4] == 2
    word = f"{order}Q" if is_64_bit else f"{order}I"

    def read(form: str, *, at_64: int, at_32: int, start: int = 0) -> int:
        value: int = struct.unpack_from(form, head, start + (at_64 if is_64_bit else at_32))[0]
        return value

    machine = read(f"{order}H", at_64=18, at_32=18)
    first = read(word, at_64=32, at_32=28)
    size = read(f"{order}H", at_64=54, at_32=42)
    count = read(f"{order}H", at_64=56, at_32=44)
    loader = b""
    for start in range(first, first + size * count, max(size, 1)):
        if read(f"{order}I", at_64=0, at_32=0, start=start) == _PT_INTERP:
            begin = read(word, at_64=8, at_32=4, start=start)
            length = read(word, at_64=32, at_32=16, start=start)
            loader = head[begin : begin + length].rstrip(b"\0")
    return _MACHINES.get(machine, f"ELF type {machine}"), os.fsdecode(loader)


def _read_head(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(fd, _HEAD_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b"?"
    finally:
        os.close(fd)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
