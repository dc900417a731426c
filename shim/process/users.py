"""The image's USER instruction -> ids, as Docker reads /etc/passwd and /etc/group: without NSS."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from shim.contract.errors import UserSafeError
from shim.contract.settings import Settings

PASSWD = Path("/etc/passwd")
GROUP = Path("/etc/group")

_NO_USER = "The user defined in the containers USER instruction does not exist"
_NO_GROUP = "The group defined in the containers USER instruction does not exist"
_INVALID = "Invalid argument for the containers USER instruction"
_ALIAS = "The user defined in the containers USER instruction is root under another name"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*\$?")
_NUMBER = re.compile(r"0*([0-9]{1,10})")
# (uid_t) -1 means "leave it as it is" to the kernel.
_MAX_ID = 2**32 - 2
_FIELDS = 7
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


@cache
def resolve_user(user: str) -> User:
    """Return what find_user does of the image's own files, and the same for ever.

    Some images let their user write these files: what it writes names nobody for later tasks.
    """
    return find_user(user, passwd=PASSWD, group=GROUP)


def is_ourselves(user: str) -> bool:
    """Tell whether a command of the image's USER runs under our own uid; False for nobody."""
    with suppress(UserSafeError):
        return resolve_user(user).uid in (None, os.geteuid())
    return False


def find_user(user: str, *, passwd: Path, group: Path) -> User:
    """Resolve `user`, `user:group` or `:group`; each is a name or a number, known or not.

    The groups are the primary one, then the memberships in order, also with an explicit group.
    Raises UserSafeError when a name does not exist, is root's under another name, or the argument
    is not of this form.
    """
    if not user:
        return User()
    user_name, _, group_name = user.partition(":")
    if not user_name and not group_name:
        raise UserSafeError(_INVALID)
    found = _find_user(user_name, passwd) if user_name else User()
    explicit_gid, memberships = _find_groups(group_name, member=found.name, group=group)
    gid = found.gid if explicit_gid is None else explicit_gid
    assert gid is not None  # one of the two parts said it
    if found.name is not None and found.gid is not None:
        memberships.add(found.gid)
    return replace(found, gid=gid, groups=(gid, *sorted(memberships - {gid})))


def image_user(settings: Settings) -> User:
    """Resolve the image's USER, with the groups that its processes get."""
    found = resolve_user(settings.user)
    return found if settings.set_extra_groups else replace(found, groups=())


def _find_user(wanted: str, passwd: Path) -> User:
    """Return the first user of that name or id; an unknown id is root's group's, as in Docker."""
    wanted_uid = _parse_wanted_id(wanted)
    for name, _, uid_text, gid_text, _, home, *_ in _read_entries(passwd):
        uid, gid = _parse_id(uid_text), _parse_id(gid_text)
        if uid is None or gid is None:
            continue
        if name == wanted if wanted_uid is None else uid == wanted_uid:
            if uid == 0 and wanted_uid is None and name != "root":
                raise UserSafeError(_ALIAS)
            return User(uid=uid, gid=gid, home=home or "/", name=name)
    if wanted_uid is None:
        raise UserSafeError(_NO_USER if _NAME.fullmatch(wanted) else _INVALID)
    return User(uid=wanted_uid, gid=0, home="/")


def _find_groups(wanted: str, *, member: str | None, group: Path) -> tuple[int | None, set[int]]:
    """Return the id of the wanted group, None when none is, and those the member belongs to."""
    wanted_gid = _parse_wanted_id(wanted)
    memberships = set()
    for name, _, gid_text, members, *_ in _read_entries(group):
        gid = _parse_id(gid_text)
        if gid is None:
            continue
        if name == wanted and wanted_gid is None:
            wanted_gid = gid
        if member in members.split(","):
            memberships.add(gid)
    if wanted and wanted_gid is None:
        raise UserSafeError(_NO_GROUP if _NAME.fullmatch(wanted) else _INVALID)
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
    """Yield the fields of each line that has a name, with empty ones for those that it lacks.

    A file that is missing, unreadable or special has no lines; one without end is no line.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return
            is_start = True
            while line := file.readline(_MAX_LINE_BYTES):
                is_end = line.endswith(b"\n")
                if is_start and (is_end or len(line) < _MAX_LINE_BYTES) and b"\0" not in line:
                    fields = os.fsdecode(line.strip()).split(":")
                    if fields[0]:
                        yield fields + [""] * _FIELDS
                is_start = is_end
    except OSError:
        return


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, a FIFO would wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK)


def may_read(status: os.stat_result, user: User) -> bool:
    """Tell whether the kernel would let the user open the file; its owner always can."""
    return user.uid == status.st_uid or _permits(status, user, 0o4)


def may_make_files(status: os.stat_result, user: User) -> bool:
    """Tell whether the kernel would let the user make files in the directory."""
    return _permits(status, user, 0o3)


def _permits(status: os.stat_result, user: User, wanted: int) -> bool:
    if user.uid in (None, 0):
        return True
    shift = 0
    if status.st_uid == user.uid:
        shift = 6
    elif status.st_gid == user.gid or status.st_gid in user.groups:
        shift = 3
    return status.st_mode >> shift & wanted == wanted
