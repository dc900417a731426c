"""The image's USER instruction -> ids, as Docker reads /etc/passwd and /etc/group: without NSS."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shim.errors import UserSafeError

PASSWD = Path("/etc/passwd")
GROUP = Path("/etc/group")

_NO_USER = "The user defined in the containers USER instruction does not exist"
_NO_GROUP = "The group defined in the containers USER instruction does not exist"
_INVALID = "Invalid argument for the containers USER instruction"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*\$?")
_NUMBER = re.compile(r"0*([0-9]{1,10})")
# (uid_t) -1 means "leave it as it is" to the kernel.
_MAX_ID = 2**32 - 2
# A line of /etc/group holds all the members of one group.
_MAX_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """Who runs the user's process. None keeps what the shim itself has."""

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    home: str | None = None
    name: str | None = None


def resolve_user(user: str, *, passwd: Path = PASSWD, group: Path = GROUP) -> User:
    """Resolve `user`, `user:group` or `:group`; each is a name or a number, known or not.

    The groups are the primary one, then the memberships in order, also with an explicit group.
    Raises UserSafeError when a name does not exist, or the argument is not of this form.
    """
    if not user:
        return User()
    user_name, _, group_name = user.partition(":")
    if not user_name and not group_name:
        raise UserSafeError(_INVALID)
    found = _find_user(user_name, passwd) if user_name else User()
    explicit_gid, groups = _find_groups(group_name, member=found.name, group=group)
    gid = found.gid if explicit_gid is None else explicit_gid
    if found.gid is not None:
        groups.add(found.gid)
    return replace(found, gid=gid, groups=tuple(sorted(groups, key=lambda id: (id != gid, id))))


def _find_user(wanted: str, passwd: Path) -> User:
    wanted_uid = _parse_wanted_id(wanted)
    for name, _, *others in _read_entries(passwd):
        uid, gid = (_parse_id(text) for text in (*others, "", "")[:2])
        if uid is None or gid is None:
            continue
        if name == wanted if wanted_uid is None else uid == wanted_uid:
            return User(uid=uid, gid=gid, home="".join(others[3:4]) or "/", name=name)
    if wanted_uid is None:
        raise UserSafeError(_NO_USER if _NAME.fullmatch(wanted) else _INVALID)
    return User(uid=wanted_uid, gid=0, home="/")


def _find_groups(wanted: str, *, member: str | None, group: Path) -> tuple[int | None, set[int]]:
    """Return the id of the group that USER names, if any, and it with those of the member."""
    wanted_gid = _parse_wanted_id(wanted)
    memberships = set()
    for name, _, *others in _read_entries(group):
        gid = _parse_id("".join(others[:1]))
        if gid is None:
            continue
        if name == wanted and wanted_gid is None:
            wanted_gid = gid
        if member is not None and member in "".join(others[1:2]).split(","):
            memberships.add(gid)
    if wanted and wanted_gid is None:
        raise UserSafeError(_NO_GROUP if _NAME.fullmatch(wanted) else _INVALID)
    if wanted_gid is not None:
        memberships.add(wanted_gid)
    return wanted_gid, memberships


def _parse_wanted_id(text: str) -> int | None:
    """A number is always an id, never a name made of digits."""
    number = _parse_id(text)
    if number is None and text.isascii() and text.isdigit():
        raise UserSafeError(_INVALID)
    return number


def _parse_id(text: str) -> int | None:
    # int() refuses texts of thousands of digits, and accepts other digits than these.
    match = _NUMBER.fullmatch(text)
    return int(match[1]) if match and int(match[1]) <= _MAX_ID else None


def _read_entries(path: Path) -> Iterator[list[str]]:
    """Yield the fields of each line that has a name; no file, or no regular one, has no lines."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return
            is_new = True
            while line := file.readline(_MAX_LINE_BYTES):
                is_whole = is_new and (line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES)
                is_new = line.endswith(b"\n")
                fields = os.fsdecode(line.strip()).split(":")
                if is_whole and len(fields) > 2 and fields[0] and b"\0" not in line:
                    yield fields
    except OSError:
        return


def may_read(status: os.stat_result, user: User) -> bool:
    """Tell whether the kernel would let the user open the file; its owner always can."""
    if user.uid in (None, 0, status.st_uid):
        return True
    if status.st_gid == user.gid or status.st_gid in user.groups:
        return bool(status.st_mode & stat.S_IRGRP)
    return bool(status.st_mode & stat.S_IROTH)
