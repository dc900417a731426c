from __future__ import annotations

import pytest

from shim.contract.command import child_environment, resolve_argv
from shim.contract.errors import UserSafeError


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "expected"),
    [
        (None, ("a", "b"), ("a", "b")),
        (None, "a b", ("/bin/sh", "-c", "a b")),
        ("e 1", None, ("/bin/sh", "-c", "e 1")),
        ("e 1", ("a", "b"), ("/bin/sh", "-c", "e 1")),
        ("e 1", "a b", ("/bin/sh", "-c", "e 1")),
        (("e", "1"), None, ("e", "1")),
        (("e", "1"), ("a", "b"), ("e", "1", "a", "b")),
        (("e", "1"), "a b", ("e", "1", "/bin/sh", "-c", "a b")),
        ((), ("a",), ("a",)),
        (("e",), (), ("e",)),
        ((), "", ("/bin/sh", "-c", "")),
    ],
)
def test_entrypoint_and_cmd_are_joined_as_docker_joins_them(
    entrypoint: str | tuple[str, ...] | None,
    cmd: str | tuple[str, ...] | None,
    expected: tuple[str, ...],
) -> None:
    assert expected == resolve_argv(entrypoint=entrypoint, cmd=cmd)


@pytest.mark.parametrize("entrypoint", [None, ()])
@pytest.mark.parametrize("cmd", [None, ()])
def test_an_image_without_a_command_is_refused(
    entrypoint: tuple[str, ...] | None, cmd: tuple[str, ...] | None
) -> None:
    with pytest.raises(UserSafeError, match="neither an ENTRYPOINT nor a CMD"):
        resolve_argv(entrypoint=entrypoint, cmd=cmd)


def test_the_child_gets_no_secrets() -> None:
    environ = {
        "PATH": "/bin",
        "HOME": "/home/user",
        "LANG": "odd \udcff byte",
        "MY_GRAND_CHALLENGE_": "kept",
        "GRAND_CHALLENGE": "kept",
        "_PYTHON": "kept",
        "GRAND_CHALLENGE_COMPONENT_SIGNING_KEY_HEX": "00",
        "grand_challenge_Component_user": "x",
        "Grand_Challenge_": "x",
    }
    assert {
        "PATH": "/bin",
        "HOME": "/home/user",
        "LANG": "odd \udcff byte",
        "MY_GRAND_CHALLENGE_": "kept",
        "GRAND_CHALLENGE": "kept",
        "_PYTHON": "kept",
    } == child_environment(environ, home="/home/other")


@pytest.mark.parametrize(
    ("environ", "home", "expected"),
    [
        ({}, "/home/user", "/home/user"),
        ({"HOME": ""}, "/home/user", "/home/user"),
        ({"HOME": "/root"}, "/home/user", "/home/user"),
        ({"HOME": "/"}, "/home/user", "/home/user"),
        ({"HOME": "/opt/app"}, "/home/user", "/opt/app"),
        ({"HOME": "/root"}, "/", "/"),
        ({"HOME": "/root"}, None, "/root"),
        ({"HOME": "/opt/app"}, None, "/opt/app"),
        ({}, None, "/"),
        ({"HOME": ""}, None, "/"),
    ],
)
def test_home_is_the_images_own_else_the_users(
    environ: dict[str, str], home: str | None, expected: str
) -> None:
    assert expected == child_environment(environ, home=home)["HOME"]
