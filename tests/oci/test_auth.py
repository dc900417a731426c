from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim.http.urls import parse_url
from shim.oci.auth import (
    Challenge,
    Login,
    build_token_requests,
    choose_challenge,
    is_local,
    parse_challenges,
    parse_token,
)
from shim.oci.errors import RegistryError
from shim.oci.logins import find_login, parse_login

REGISTRY = parse_url("https://registry.test")


CHALLENGES = {
    'Basic realm="my realm, with comma"': [("basic", {"realm": "my realm, with comma"})],
    'Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"': [
        ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"})
    ],
    'Negotiate, Basic realm="a \\"quoted\\" one", Bearer realm=https://b': [
        ("negotiate", {}),
        ("basic", {"realm": 'a "quoted" one'}),
        ("bearer", {"realm": "https://b"}),
    ],
    "": [],
}


@pytest.mark.parametrize("text", CHALLENGES)
def test_challenges_are_read(text: str) -> None:
    found = [(one.scheme, dict(one.parameters)) for one in parse_challenges(text)]
    assert CHALLENGES[text] == found


def test_the_first_that_can_be_answered_is_chosen() -> None:
    assert "basic" == choose_challenge('Negotiate, Basic realm="x"').scheme
    with pytest.raises(RegistryError, match="asks for negotiate"):
        choose_challenge("Negotiate")


def bearer(realm: str) -> Challenge:
    return Challenge(scheme="bearer", parameters={"realm": realm, "service": "s"})


def test_a_token_is_asked_for_with_the_login() -> None:
    login = Login(username="a b", password="p")
    (asked,) = build_token_requests(
        bearer("https://auth.test/t?x=1"), ["repository:n:pull"], login, registry=REGISTRY
    )
    assert (
        "https://auth.test/t?x=1&service=s&scope=repository%3An%3Apull&account=a%20b" == asked.url
    )
    assert {"authorization": login.basic} == asked.headers


REALMS = ["http://auth.test/t", "https://10.0.0.1/t", "https://localhost/t", "ftp://x", ""]


@pytest.mark.parametrize("realm", REALMS)
def test_a_login_goes_to_no_odd_place(realm: str) -> None:
    with pytest.raises(RegistryError):
        build_token_requests(bearer(realm), [], None, registry=REGISTRY)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token": 1}', b'{"token": "a\\nb"}', b"{}"])
def test_an_answer_without_a_token_is_refused(body: bytes) -> None:
    with pytest.raises(RegistryError, match="holds no token"):
        parse_token(body, now=0)


def test_a_token_is_renewed_before_it_ends() -> None:
    assert 108.0 == parse_token(b'{"access_token": "t", "expires_in": 10}', now=100).renew_after


def test_only_this_machine_is_local() -> None:
    local = ["localhost", "a.localhost", "127.8.8.8", "::1"]
    assert local == [*filter(is_local, [*local, "10.0.0.1", "example.test", "localhost.test"])]


def packed(text: str, *, pad: bool = True) -> dict[str, str]:
    found = b64encode(text.encode()).decode()
    return {"auth": found if pad else found.rstrip("=")}


def never(argv: list[str], stdin: bytes) -> bytes:
    raise AssertionError(argv)


def find(environ: dict[str, str], *, name: str = "r.test", helper: Any = never) -> Login | None:
    return find_login(name, "ns/repo", environ=environ, run_helper=helper)


def write(path: Path, **document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


# Where a file lies -> the variables that lead to it.
PLACES: dict[str, Callable[[Path], dict[str, str]]] = {
    "docker/config.json": lambda root: {"DOCKER_CONFIG": f"{root}/docker"},
    ".docker/config.json": lambda root: {"HOME": f"{root}"},
    "auth.json": lambda root: {"REGISTRY_AUTH_FILE": f"{root}/auth.json"},
    "run/containers/auth.json": lambda root: {"XDG_RUNTIME_DIR": f"{root}/run"},
    "xdg/containers/auth.json": lambda root: {"XDG_CONFIG_HOME": f"{root}/xdg"},
    ".config/containers/auth.json": lambda root: {"HOME": f"{root}"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_login_is_found_in_each_file(place: str, tmp_path: Path) -> None:
    write(tmp_path / place, auths={"r.test": packed("u:p:q")})
    assert Login(username="u", password="p:q") == find(PLACES[place](tmp_path))


ENTRIES: dict[str, tuple[dict[str, Any], Login | None]] = {
    "unpadded": ({"r.test": packed("u:pw1", pad=False)}, Login(username="u", password="pw1")),
    "ends in NUL": ({"r.test": packed("u:p\0")}, Login(username="u", password="p")),
    "a URL": ({"https://r.test/v1/": packed("u:p")}, Login(username="u", password="p")),
    "a namespace first": (
        {"r.test": packed("u:p"), "r.test/ns": packed("n:p"), "r.test/other": packed("o:p")},
        Login(username="n", password="p"),
    ),
    "an identity": ({"r.test": {"identitytoken": "t"}}, Login(identity_token="t")),
    "a token": ({"r.test": {"registrytoken": "t"}}, Login(registry_token="t")),
    "two members": (
        {"r.test": {"username": "u", "password": "p"}},
        Login(username="u", password="p"),
    ),
    "empty": ({"r.test": {}}, None),
    "another": ({"s.test": packed("u:p")}, None),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_are_read_as_docker_writes_them(entry: str) -> None:
    auths, login = ENTRIES[entry]
    assert login == find({"DOCKER_AUTH_CONFIG": json.dumps({"auths": auths})})


def test_the_hub_has_a_key_of_its_own() -> None:
    auths = {"https://index.docker.io/v1/": packed("u:p")}
    environ = {"DOCKER_AUTH_CONFIG": json.dumps({"auths": auths})}
    assert Login(username="u", password="p") == find(environ, name="docker.io")


def test_the_first_match_counts_not_the_first_file(tmp_path: Path) -> None:
    write(tmp_path / ".docker/config.json", auths={"s.test": packed("u:p")})
    write(tmp_path / ".config/containers/auth.json", auths={"r.test": packed("v:p")})
    assert Login(username="v", password="p") == find({"HOME": str(tmp_path)})


def test_a_helper_is_asked_for_its_registry() -> None:
    asked = []

    def helper(argv: list[str], stdin: bytes) -> bytes:
        asked.append((argv, stdin))
        return b'{"ServerURL":"r.test","Username":"<token>","Secret":"t"}'

    environ = {"DOCKER_AUTH_CONFIG": '{"credHelpers":{"r.test":"x"},"credsStore":"y"}'}
    assert Login(identity_token="t") == find(environ, helper=helper)
    assert [(["docker-credential-x", "get"], b"r.test")] == asked


def test_a_helper_that_knows_nobody_is_passed_over() -> None:
    def helper(argv: list[str], stdin: bytes) -> bytes:
        raise OSError("credentials not found in native keychain")

    environ = {"DOCKER_AUTH_CONFIG": '{"credsStore":"y"}'}
    assert None is find(environ, helper=helper)


@pytest.mark.parametrize("text", ["", "[]", '{"auths":{"r.test":{"auth":"%%%"}}}', "{" * 9999])
def test_a_damaged_file_is_named_and_not_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text(text)
    with pytest.raises(RegistryError, match=r"auth\.json"):
        find({"REGISTRY_AUTH_FILE": f"{tmp_path}/auth.json"})


@pytest.mark.parametrize("text", ["user", ":p", ""])
def test_a_login_without_its_colon_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        parse_login(text)
