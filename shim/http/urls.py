"""Addresses of servers, as settings give them.

urllib.parse raises errors that quote what it was given, and splits at a character of the password.
What is not of the expected form is a ValueError without words here: whoever knows the setting's
name says what is wrong with it.
"""

from __future__ import annotations

import os
import re
from binascii import b2a_base64
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

PORTS = {"http": 80, "https": 443}

_LABEL = r"[a-z0-9_-]{1,63}"
_SERVER = re.compile(
    rf"(?P<host>\[[0-9a-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?)(?::(?P<port>[0-9]{{0,5}}))?",
    re.IGNORECASE | re.ASCII,
)
_URL = re.compile(r"(?P<scheme>https?)://(?P<server>[^/?#]*)(?P<target>.*)", re.IGNORECASE)
_PROXY = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?:(?P<login>.*)@)?(?P<server>[^/?#]*)(?:[/?#].*)?",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Url:
    """host: in lower case, IPv6 without brackets; target: path and query.

    authorization: a header field for a proxy, "" where no login is given.
    """

    scheme: str
    host: str
    port: int
    target: str = field(default="", repr=False)
    authorization: str = field(default="", repr=False)

    @property
    def netloc(self) -> str:
        """The Host header: with the port unless it is the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(text: str) -> Url:
    """Parse http://host[:port][/path][?query]; ValueError, also where there is a user before @."""
    match = _URL.fullmatch(text.partition("#")[0])
    if match is None or not match["target"].isprintable():
        raise ValueError
    scheme = match["scheme"].lower()
    host, port = _parse_server(match["server"], PORTS[scheme])
    return Url(scheme=scheme, host=host, port=port, target=match["target"])


def parse_proxy(text: str) -> Url:
    """Parse [scheme://][user[:password]@]host[:port].

    The login ends at the last "@", and may hold any other character; %XX is decoded.
    """
    match = _PROXY.fullmatch(text)
    scheme = ((match and match["scheme"]) or "http").lower()
    if match is None or scheme not in PORTS:
        raise ValueError
    host, port = _parse_server(match["server"], PORTS[scheme])
    authorization = ""
    if match["login"] is not None:
        user, _, password = match["login"].partition(":")
        login = unquote_to_bytes(os.fsencode(f"{user}:{password}"))
        authorization = f"Basic {b2a_base64(login, newline=False).decode()}"
    return Url(scheme=scheme, host=host, port=port, authorization=authorization)


def _parse_server(text: str, default_port: int) -> tuple[str, int]:
    match = _SERVER.fullmatch(text)
    if match is None or len(match["host"]) > 253:
        raise ValueError
    port = int(match["port"] or default_port)
    if not 1 <= port <= 65535:
        raise ValueError
    return match["host"].strip("[]").lower(), port
