from __future__ import annotations

import pytest

from shim.command import child_environment, resolve_argv
from shim.errors import UserSafeError

OURS = "/tmp/staticx-AbCdEf"


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


def test_the_child_gets_no_secrets_and_nothing_of_the_packaging() -> None:
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
        "_PYI_ARCHIVE_FILE": "x",
        "_PYI_PARENT_PROCESS_LEVEL": "1",
        "_MEIPASS2": "x",
        "STATICX_BUNDLE_DIR": OURS,
        "STATICX_PROG_PATH": "/sagemaker-shim",
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
    ("environ", "expected"),
    [
        ({"LD_LIBRARY_PATH": f"{OURS}/lib"}, {}),
        ({"LD_LIBRARY_PATH": OURS}, {}),
        (
            {"LD_LIBRARY_PATH": f"{OURS}/lib:/cuda:/b", "LD_LIBRARY_PATH_ORIG": "/cuda:/b"},
            {"LD_LIBRARY_PATH": "/cuda:/b"},
        ),
        ({"LD_LIBRARY_PATH": f"{OURS}/lib:/cuda"}, {"LD_LIBRARY_PATH": "/cuda"}),
        (
            {"LD_LIBRARY_PATH": f"{OURS}/lib:", "LD_LIBRARY_PATH_ORIG": ""},
            {"LD_LIBRARY_PATH": ""},
        ),
        (
            {"LD_LIBRARY_PATH": f"{OURS}/lib", "LD_LIBRARY_PATH_ORIG": "/stale"},
            {"LD_LIBRARY_PATH_ORIG": "/stale"},
        ),
        (
            {"LD_LIBRARY_PATH": "/cuda", "LD_LIBRARY_PATH_ORIG": "/stale"},
            {"LD_LIBRARY_PATH": "/cuda", "LD_LIBRARY_PATH_ORIG": "/stale"},
        ),
        ({"LD_LIBRARY_PATH": f"{OURS}-not/lib"}, {"LD_LIBRARY_PATH": f"{OURS}-not/lib"}),
        ({"LD_LIBRARY_PATH_ORIG": "/stale"}, {"LD_LIBRARY_PATH_ORIG": "/stale"}),
    ],
    ids=[
        "added",
        "added-without-lib",
        "prepended",
        "prepended-original-lost",
        "prepended-to-empty",
        "added-stale-original",
        "not-frozen-stale-original",
        "similar-name",
        "none",
    ],
)
@pytest.mark.parametrize("variable", ["STATICX_BUNDLE_DIR", "_PYI_APPLICATION_HOME_DIR"])
def test_the_library_path_is_the_images(
    variable: str, environ: dict[str, str], expected: dict[str, str]
) -> None:
    environ = {"HOME": "/h", variable: OURS, **environ}
    assert {"HOME": "/h", **expected} == child_environment(environ, home=None)


def test_the_library_path_of_a_shim_that_is_not_frozen_is_left_alone() -> None:
    environ = {"HOME": "/h", "LD_LIBRARY_PATH": "/cuda", "LD_LIBRARY_PATH_ORIG": "/other"}
    assert environ == child_environment(environ, home=None)


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
