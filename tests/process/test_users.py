"""USER resolution, with Docker's rules and the existing interface's memberships."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.contract.errors import UserSafeError
from shim.process.users import User, find_user, may_read, resolve_user

NO_USER = "The user defined in the containers USER instruction does not exist"
NO_GROUP = "The group defined in the containers USER instruction does not exist"
INVALID = "Invalid argument for the containers USER instruction"
ALIAS = "The user defined in the containers USER instruction is root under another name"

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
# a comment: 1: 2

:x:1:1::/nameless:
broken
broken:x:not-a-number:1::/broken:
huge:x:4294967296:1::/huge:
alice:x:1000:1000:Alice:/home/alice:/bin/sh
alice:x:1:1:twice:/second:/bin/sh
_apt:x:42:65534::/nonexistent:/usr/sbin/nologin
1234:x:7:7:a number for a name:/seven:/bin/sh
short:x:8:8
carriage:x:9:9::/home/carriage:/bin/sh\r
toor:x:0:0::/root:/bin/sh
zeros:x:000:1000::/root:/bin/sh
root:x:11:11:not the first:/home/eleven:/bin/sh
0x0:x:12:0:an odd name:/home/odd:/bin/sh
\u0660:x:\u0660:0:a digit of another script:/home/digit:/bin/sh
last:x:10:10::/home/last:/bin/sh"""

GROUP = """\
root:x:0:
alice:x:1000:
broken:x:
docker:x:999:alice,bob
audio:x:29:bob,alice,_apt
4321:x:5:
again:x:999:alice
nomembers:x:6
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "passwd").write_bytes(PASSWD.encode())
    (tmp_path / "group").write_bytes(GROUP.encode())
    return {"passwd": tmp_path / "passwd", "group": tmp_path / "group"}


ALICE = User(uid=1000, gid=1000, groups=(1000, 29, 999), home="/home/alice", name="alice")


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", User()),
        ("root", User(uid=0, gid=0, groups=(0,), home="/root", name="root")),
        ("0", User(uid=0, gid=0, groups=(0,), home="/root", name="root")),
        ("000:audio", User(uid=0, gid=29, groups=(29, 0), home="/root", name="root")),
        (
            "alice:root",
            User(uid=1000, gid=0, groups=(0, 29, 999, 1000), home="/home/alice", name="alice"),
        ),
        ("alice", ALICE),
        ("alice:", ALICE),
        ("1000", ALICE),
        ("0001000", ALICE),
        (
            "alice:audio",
            User(uid=1000, gid=29, groups=(29, 999, 1000), home="/home/alice", name="alice"),
        ),
        (
            "1000:77",
            User(uid=1000, gid=77, groups=(77, 29, 999, 1000), home="/home/alice", name="alice"),
        ),
        (
            "_apt",
            User(uid=42, gid=65534, groups=(65534, 29), home="/nonexistent", name="_apt"),
        ),
        ("1234", User(uid=1234, gid=0, groups=(0,), home="/")),
        ("1234:4321", User(uid=1234, gid=4321, groups=(4321,), home="/")),
        ("4294967294", User(uid=4294967294, gid=0, groups=(0,), home="/")),
        (":audio", User(gid=29, groups=(29,))),
        (":5", User(gid=5, groups=(5,))),
        ("short", User(uid=8, gid=8, groups=(8,), home="/", name="short")),
        ("carriage", User(uid=9, gid=9, groups=(9,), home="/home/carriage", name="carriage")),
        ("last", User(uid=10, gid=10, groups=(10,), home="/home/last", name="last")),
        ("last:nomembers", User(uid=10, gid=6, groups=(6, 10), home="/home/last", name="last")),
    ],
)
def test_resolves_users(files: dict[str, Path], user: str, expected: User) -> None:
    assert expected == find_user(user, **files)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("toor", ALIAS),
        ("toor:alice", ALIAS),
        ("toor:1000", ALIAS),
        ("zeros", ALIAS),
        ("0x0x", INVALID),
        ("nobody-here", NO_USER),
        ("broken", NO_USER),
        ("huge", NO_USER),
        ("Alice", NO_USER),
        ("alice:nothing", NO_GROUP),
        ("alice:broken", NO_GROUP),
        (":nothing", NO_GROUP),
        (":", INVALID),
        ("alice:audio:docker", INVALID),
        ("-1", INVALID),
        ("alice:-1", INVALID),
        ("+1000", INVALID),
        (" alice", INVALID),
        ("a b", INVALID),
        ("\u0661", INVALID),
        ("4294967295", INVALID),
        ("alice:4294967295", INVALID),
        ("9" * 5000, INVALID),
    ],
    ids=lambda text: text[:30],
)
def test_refuses_users_in_the_words_of_the_interface(
    files: dict[str, Path], user: str, message: str
) -> None:
    with pytest.raises(UserSafeError) as caught:
        find_user(user, **files)
    assert message == str(caught.value)


def test_root_is_who_has_the_name_first(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    path.write_text("root:x:5:5::/five:\nroot:x:0:0::/root:\n")
    assert 5 == find_user("root", passwd=path, group=path).uid


def test_what_the_user_writes_later_changes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "passwd"
    path.write_text("app:x:1001:0::/app:\n")
    monkeypatch.setattr("shim.process.users.PASSWD", path)
    resolve_user.cache_clear()
    try:
        before = resolve_user("app")
        path.write_text("app:x:7:0::/app:\n")
        assert before == resolve_user("app")
    finally:
        resolve_user.cache_clear()


def test_files_may_be_missing(tmp_path: Path) -> None:
    files = {"passwd": tmp_path / "passwd", "group": tmp_path / "group"}
    assert User(uid=5, gid=6, groups=(6,), home="/") == find_user("5:6", **files)
    with pytest.raises(UserSafeError, match=NO_USER):
        find_user("root", **files)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "dangling", "loop"])
def test_special_files_count_as_missing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "passwd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": "passwd"}[kind])
    resolved: list[User] = []
    thread = threading.Thread(
        target=lambda: resolved.append(find_user("5", passwd=path, group=path)), daemon=True
    )
    thread.start()
    thread.join(10)
    assert [User(uid=5, gid=0, groups=(0,), home="/")] == resolved


def test_links_are_followed(files: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(files["passwd"])
    assert ALICE == find_user("alice", passwd=link, group=files["group"])


def test_lines_without_end_are_skipped_in_bounded_memory(tmp_path: Path) -> None:
    import resource
    import subprocess
    import sys

    path = tmp_path / "passwd"
    with path.open("wb") as file:
        file.truncate(300 * 1024**2)
        file.seek(300 * 1024**2)
        file.write(b":x:1:1::/tail:\nalice:x:1000:1000::/home/alice:\n")
    code = (
        "import sys; from pathlib import Path; from shim.process.users import find_user;"
        "print(find_user('alice', passwd=Path(sys.argv[1]), group=Path('/none')).uid)"
    )
    limit = 200 * 1024**2
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[1].parent,
    )
    assert b"1000\n" == done.stdout


def test_a_line_as_long_as_the_limit_is_skipped_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    for length in range(1024 * 1024 - 2, 1024 * 1024 + 3):
        line = b"a:x:1:1:" + b"x" * (length - 9) + b"\n"
        path.write_bytes(line + b"b:x:2:2::/b:\n")
        assert "/b" == find_user("b", passwd=path, group=path).home


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    path.write_bytes(b"\xff\xfe:x:5:5::/odd:\nalice:x:6:6::/home/\xff:\n")
    assert os.fsdecode(b"/home/\xff") == find_user("alice", passwd=path, group=path).home


NAMES = st.sampled_from(["root", "alice", "bob", "_apt", "12", "7"])
IDS = st.sampled_from([0, 7, 12, 1000, 1001])
ENTRIES = st.lists(st.tuples(NAMES, IDS, IDS), max_size=5)
GROUPS = st.lists(st.tuples(NAMES, IDS, st.lists(NAMES, max_size=3)), max_size=5)
PARTS = NAMES | IDS.map(str)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(entries=ENTRIES, group_entries=GROUPS, user=PARTS, group=st.just("") | PARTS)
def test_agrees_with_the_rules_stated_over_parsed_files(
    tmp_path: Path,
    entries: list[tuple[str, int, int]],
    group_entries: list[tuple[str, int, list[str]]],
    user: str,
    group: str,
) -> None:
    passwd_path, group_path = tmp_path / "passwd", tmp_path / "group"
    passwd_path.write_text("".join(f"{n}:x:{u}:{g}::/home/{n}:\n" for n, u, g in entries))
    group_path.write_text("".join(f"{n}:x:{g}:{','.join(m)}\n" for n, g, m in group_entries))

    def expected() -> User | str:
        found = [entry for entry in entries if user in (str(entry[1]), entry[0])]
        found = [entry for entry in found if str(entry[1]) == user or not user.isdigit()]
        if not found and not user.isdigit():
            return NO_USER
        name, uid, own_gid = found[0] if found else (None, int(user), 0)
        if uid == 0 and user not in ("0", "root"):
            return ALIAS
        gids = [g for n, g, _ in group_entries if n == group and not group.isdigit()]
        if group and not gids and not group.isdigit():
            return NO_GROUP
        gid = gids[0] if gids else int(group or own_gid)
        memberships = {g for _, g, members in group_entries if name in members}
        others = memberships.union([own_gid] if name else []) - {gid}
        home = f"/home/{name}" if name else "/"
        return User(uid=uid, gid=gid, groups=(gid, *sorted(others)), home=home, name=name)

    def actual() -> User | str:
        try:
            return find_user(f"{user}:{group}", passwd=passwd_path, group=group_path)
        except UserSafeError as error:
            return str(error)

    assert expected() == actual()


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "user", "expected"),
    [
        (0o000, 0, 0, User(), True),
        (0o000, 1, 1, User(uid=0), True),
        (0o000, 5, 5, User(uid=5, gid=5), True),
        (0o044, 5, 5, User(uid=6, gid=6), True),
        (0o040, 5, 5, User(uid=6, gid=6), False),
        (0o040, 5, 7, User(uid=6, gid=7), True),
        (0o040, 5, 8, User(uid=6, gid=7, groups=(7, 8)), True),
        (0o004, 5, 8, User(uid=6, gid=7, groups=(7, 8)), False),
        (0o400, 5, 5, User(uid=6, gid=6), False),
    ],
)
def test_may_read_is_what_the_kernel_says(
    mode: int, uid: int, gid: int, user: User, expected: bool
) -> None:
    status = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))
    assert expected == may_read(status, user)
