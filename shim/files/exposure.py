"""Whether somebody else could have written a file that decides what we do.

What a profile, a token or a list of authorities says is done with our rights. Whoever can write one
of them, or put another in its place, has these rights; the command of the image must not.
"""

from __future__ import annotations

import os
import stat

MAX_LINKS = 40  # as in the kernel
ADVICE = "have root own it and nobody else write it, or mount it read-only"


def find_exposure(path: str) -> str:
    """Say why others than root and us could change what a path leads to; "" when nobody could.

    Every directory and link on the way counts. Each must be root's or ours and not writable for
    group or others; in a directory with the sticky bit, such as those that Kubernetes projects
    tokens into, only what is root's or ours is protected. On a read-only mount nothing changes.
    What nobody else can change stays so until it is opened. Raises OSError.
    """
    here, links = "/", 0
    exposed = _judge(here)
    pending = _parts(os.path.join(os.getcwd(), path))
    while pending and not exposed:
        here = os.path.join(here, pending.pop())
        exposed = _judge(here)
        if os.path.islink(here):
            links += 1
            if links > MAX_LINKS:
                return f"{path} leads through too many links"
            # Joining takes an absolute target as it is; what is above a link has been judged.
            target = os.path.join(os.path.dirname(here), os.readlink(here))
            here, pending = "/", pending + _parts(target)
    return exposed


def never_exposed(_: str) -> str:
    """Judge nothing: where the command runs as we do, it needs no file to have our rights."""
    return ""


def _parts(path: str) -> list[str]:
    """Return the names on a path, the last first; ".." is left to the kernel."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _judge(path: str) -> str:
    """Say why one file, directory or link is exposed."""
    status = os.lstat(path)
    is_link = stat.S_ISLNK(status.st_mode)
    is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    is_writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid not in (0, os.geteuid()):
        reason = f"{path} belongs to uid {status.st_uid}"
    elif is_writable and not (is_link or is_sticky):
        reason = f"{path} is writable for others than root"
    else:
        return ""
    mount = os.statvfs(os.path.dirname(path) if is_link else path)
    return "" if mount.f_flag & os.ST_RDONLY else f"{reason}: {ADVICE}"
