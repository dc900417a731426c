"""How a registry wants to be asked: challenges, tokens, and whom credentials may reach.

Sources: RFC 9110, 11; distribution's spec/auth/token.md and oauth.md. Pure: text in, values out.
"""

from __future__ import annotations

import ipaddress
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from shim.http.urls import Url, parse_url
from shim.oci.errors import RegistryError

DEFAULT_TOKEN_SECONDS = 60
TOKEN_LIMIT_BYTES = 64 << 10
CLIENT = "sagemaker-shim"
_PARAMETER = re.compile(r'\s*([A-Za-z0-9_.-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|$)')
_SCHEME = re.compile(r"\s*,*\s*([A-Za-z][A-Za-z0-9-]*)(?=\s|,|$)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Login:
    """What stands for a user; identity_token, registry_token: in place of a password."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        pair = f"{self.username}:{self.password}"
        return f"Basic {b64encode(pair.encode()).decode()}"

    @property
    def secrets(self) -> set[str]:
        """What no message may hold, whoever wrote it."""
        packed = self.basic.partition(" ")[2]
        return {self.password, self.identity_token, self.registry_token, packed} - {""}


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenge:
    """scheme: in lower case, as the names of the parameters are."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """renew_after: by the monotonic clock, at 80 % of its life."""

    value: str = field(repr=False)
    renew_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRequest:
    """What the token server is asked; form: of a POST, None for a GET."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    form: bytes | None = field(default=None, repr=False)


def parse_challenges(text: str) -> list[Challenge]:
    """Read WWW-Authenticate: several challenges, whose quoted texts may hold commas."""
    found, position = [], 0
    while match := _SCHEME.match(text, position):
        position, parameters = match.end(), dict[str, str]()
        while pair := _PARAMETER.match(text, position):
            quoted = re.sub(r"\\(.)", r"\1", pair[2]) if pair[2] is not None else pair[3]
            parameters.setdefault(pair[1].lower(), quoted)
            position = pair.end()
        found.append(Challenge(scheme=match[1].lower(), parameters=parameters))
    return found


def choose_challenge(text: str) -> Challenge:
    """Return the first challenge that can be answered."""
    challenges = parse_challenges(text)
    for challenge in challenges:
        if challenge.scheme in ("basic", "bearer"):
            return challenge
    named = ", ".join(challenge.scheme for challenge in challenges) or "nothing"
    raise RegistryError(f"The registry asks for {named}; expected basic or bearer authentication")


def build_token_requests(
    challenge: Challenge, scopes: Sequence[str], login: Login | None, *, registry: Url
) -> list[TokenRequest]:
    """Build what the token server is asked, the next where it does not know the one before."""
    realm = challenge.parameters.get("realm", "")
    check_place("The token server", realm, registry)
    service = challenge.parameters.get("service", "")
    named = {"service": service} if service else {}
    requests = []
    if login and login.identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": login.identity_token, **named}
        form |= {"client_id": CLIENT, "scope": " ".join(scopes)}
        headers = {"content-type": "application/x-www-form-urlencoded"}
        form_body = urlencode(form).encode()
        requests.append(TokenRequest(url=realm, headers=headers, form=form_body))
    query = urlencode([*named.items(), *(("scope", scope) for scope in scopes)], quote_via=quote)
    if login and login.username:
        query += f"&account={quote(login.username, safe='')}"
    headers = {"authorization": login.basic} if login and login.username else {}
    requests.append(TokenRequest(url=add_query(realm, query), headers=headers))
    return requests


def add_query(url: str, query: str) -> str:
    """Return a URL with more of a query; what it has stays as it is, for it may be signed."""
    return f"{url}{'&' if '?' in url else '?'}{query}"


def check_place(what: str, text: str, registry: Url) -> Url:
    """Read a URL that a registry sends us to.

    It may not have us send anything in the clear, nor knock on doors that it cannot reach itself.
    """
    try:
        url = parse_url(text)
    except ValueError:
        raise RegistryError(f"{what} that {registry.netloc} names is no URL") from None
    if url.scheme == "http" and registry.scheme == "https":
        raise RegistryError(f"{what} {url.netloc} is not asked over plain HTTP")
    if url.host != registry.host and is_private(url.host) and not is_private(registry.host):
        raise RegistryError(f"{what} {url.netloc} has a private address")
    return url


def is_private(host: str) -> bool:
    """Say whether a host is an address that is not of the internet, or a name of this machine."""
    address = _find_address(host)
    return address is not None and not address.is_global


def is_local(host: str) -> bool:
    """Say whether a registry may be spoken to over plain HTTP without being told so."""
    address = _find_address(host)
    return address is not None and address.is_loopback


def _find_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is, by a name of this machine too; None for other names."""
    is_ours = host == "localhost" or host.endswith(".localhost")
    with suppress(ValueError):
        return ipaddress.ip_address("127.0.0.1" if is_ours else host)
    return None


def parse_token(body: bytes, *, now: float) -> Token:
    """Read the token server's answer."""
    try:
        answer = json.loads(body)
        value = answer.get("token") or answer.get("access_token")
        seconds = float(answer.get("expires_in") or DEFAULT_TOKEN_SECONDS)
    except (ValueError, AttributeError, TypeError, RecursionError):
        value, seconds = None, 0.0
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise RegistryError("The token server's answer holds no token")
    return Token(value=value, renew_after=now + max(seconds, 1.0) * 0.8)
