"""Who a user is for a registry: the files and helpers of Docker and podman.

The first that knows the repository or its registry counts:

    --creds  $DOCKER_AUTH_CONFIG  $REGISTRY_AUTH_FILE (then no other file)
    $DOCKER_CONFIG/config.json or ~/.docker/config.json
    $XDG_RUNTIME_DIR/containers/auth.json  $XDG_CONFIG_HOME or ~/.config, /containers/auth.json

Sources: docker/cli configfile, containers/image pkg/docker/config.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shim.oci.auth import Login
from shim.oci.errors import RegistryError
from shim.oci.reference import DOCKER_HUB

MAX_FILE_BYTES = 4 << 20
HELPER_SECONDS = 60.0
HUB_KEY = "https://index.docker.io/v1/"
_IDENTITY = "<token>"
_UNKNOWN = "credentials not found"

# run_helper(argv, stdin): what the program wrote; OSError, with its words, when it failed
RunHelper = Callable[[list[str], bytes], bytes]


def parse_login(text: str) -> Login:
    """Read USER:PASSWORD."""
    username, colon, password = text.partition(":")
    if not username or not colon:
        raise ValueError("expected USER:PASSWORD")
    return Login(username=username, password=password)


def find_login(
    domain: str, repository: str, *, environ: Mapping[str, str], run_helper: RunHelper
) -> Login | None:
    """Return what the files and helpers have for a repository, None where they have nothing.

    Raises RegistryError for a file or a helper that fails.
    """
    keys = list(_list_keys(domain, repository))
    for name, document in _read_documents(environ):
        login = _find_by_helper(document, domain, run_helper) or _find_in(document, keys, name)
        if login:
            return login
    return None


def _list_keys(domain: str, repository: str) -> Iterator[str]:
    """Yield how a file may call a repository, the most specific first."""
    parts = repository.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join([domain, *parts[:count]])
    yield domain
    yield f"https://{domain}"
    if domain == DOCKER_HUB:
        yield HUB_KEY
        yield "index.docker.io"


def _read_documents(environ: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if text := environ.get("DOCKER_AUTH_CONFIG"):
        yield "DOCKER_AUTH_CONFIG", _parse(text.encode(), "DOCKER_AUTH_CONFIG")
    for path in _list_files(environ):
        try:
            with path.open("rb") as file:
                body = file.read(MAX_FILE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from error
        yield str(path), _parse(body, str(path))


def _list_files(environ: Mapping[str, str]) -> Iterator[Path]:
    if only := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(only)
        return
    home = environ.get("HOME")
    if directory := environ.get("DOCKER_CONFIG") or (home and f"{home}/.docker"):
        yield Path(directory, "config.json")
    places = environ.get("XDG_RUNTIME_DIR"), environ.get("XDG_CONFIG_HOME")
    for place in (places[0], places[1] or (home and f"{home}/.config")):
        if place:
            yield Path(place, "containers/auth.json")


def _parse(body: bytes, name: str) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RegistryError(f"{name}: expected a JSON object with credentials")
    return document


def _find_by_helper(
    document: Mapping[str, Any], domain: str, run_helper: RunHelper
) -> Login | None:
    helpers = document.get("credHelpers")
    helper = helpers.get(domain) if isinstance(helpers, dict) else None
    helper = helper or document.get("credsStore")
    if not helper or not isinstance(helper, str) or "/" in helper:
        return None
    server = HUB_KEY if domain == DOCKER_HUB else domain
    program = f"docker-credential-{helper}"
    try:
        output = run_helper([program, "get"], server.encode())
    except OSError as error:
        if _UNKNOWN in str(error):
            return None
        raise RegistryError(f"The credential helper failed: {error}") from error
    answer = _parse(output, program)
    username, secret = str(answer.get("Username", "")), str(answer.get("Secret", ""))
    if username == _IDENTITY:
        return Login(identity_token=secret)
    return Login(username=username, password=secret) if secret else None


def _find_in(document: Mapping[str, Any], keys: list[str], name: str) -> Login | None:
    entries = document.get("auths")
    if not isinstance(entries, dict):
        return None
    # https://HOST, https://HOST/v1/ and HOST are one.
    named = {key.removesuffix("/").removesuffix("/v1"): key for key in entries}
    for key in keys:
        found = entries.get(named.get(key.removesuffix("/").removesuffix("/v1"), key))
        if isinstance(found, dict) and (login := _read_entry(found, f"{name}, {key}")):
            return login
    return None


def _read_entry(entry: Mapping[str, Any], name: str) -> Login | None:
    """Read an entry; an empty one only says that a helper has it."""
    username, password = entry.get("username") or "", entry.get("password") or ""
    if isinstance(packed := entry.get("auth"), str) and packed:
        try:
            pair = b64decode(packed + "=" * (-len(packed) % 4), validate=True).decode()
        except ValueError:
            raise RegistryError(f"{name}: its auth is no base64 of USER:PASSWORD") from None
        username, _, password = pair.rstrip("\0").partition(":")
    login = Login(
        username=str(username),
        password=str(password),
        identity_token=str(entry.get("identitytoken") or ""),
        registry_token=str(entry.get("registrytoken") or ""),
    )
    return login if login != Login() else None
