"""Which proxy stands before a host, by the environment.

They never apply to near addresses, whatever the environment says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from shim.http.errors import SettingInvalid
from shim.http.urls import Url, parse_proxy

PROXY_FORM = "http://host:port or https://host:port, with user:password@ before the host or not"
# An entry of no_proxy: [ADDRESS]:PORT or NAME:PORT, the port may be missing; or an IPv6 address.
_BYPASS = re.compile(
    r"(?:\[(?P<address>[^]]*)\]|(?P<name>[^:]*))(?::(?P<port>[0-9]+))?|(?P<bare>[^:]*:[^:]*:.*)"
)


class Proxies:
    """Which proxy stands before a host: urllib's rules, over a mapping.

    no_proxy lists names, which stand for all below them too, addresses and networks
    (10.0.0.0/8), each with a port or without, or "*".
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raise SettingInvalid for a variable that names no proxy."""
        names: dict[str, str] = {}
        for name in sorted(environ):  # upper case first: lower case wins, and unsets when empty
            if name.lower() in ("http_proxy", "https_proxy", "no_proxy"):
                names[name.lower().removesuffix("_proxy")] = name
        if "REQUEST_METHOD" in environ and "http_proxy" not in environ:
            names.pop("http", None)  # in a CGI program HTTP_PROXY is a header field of the client's
        self._bypassed = environ[names.pop("no")].replace(",", " ").split() if "no" in names else []
        self._proxies = {
            scheme: _parse(name, environ[name]) for scheme, name in names.items() if environ[name]
        }

    @property
    def need_tls(self) -> bool:
        """Whether one of them is talked to over TLS."""
        return any(proxy.scheme == "https" for proxy in self._proxies.values())

    def resolve(self, *, scheme: str, host: str, port: int) -> Url | None:
        """Return the proxy for a host, or None to go there directly.

        The proxy's own scheme says how to talk to it.
        """
        proxy = self._proxies.get(scheme)
        if proxy is None or _is_near(host):
            return None
        return None if any(_covers(entry, host, port) for entry in self._bypassed) else proxy


def _parse(name: str, text: str) -> Url:
    try:
        return parse_proxy(text)
    except ValueError:
        raise SettingInvalid(name, expected=PROXY_FORM, found=text) from None


def _covers(entry: str, host: str, port: int) -> bool:
    """Tell whether an entry of no_proxy speaks of a host."""
    match = _BYPASS.fullmatch(entry)
    if match is None or match["port"] not in (None, str(port)):
        return False
    name = match["address"] or match["name"] or match["bare"] or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = name.lower().removeprefix("*").strip(".")
        return entry == "*" or f".{host.rstrip('.')}".endswith(f".{name}")
    try:
        return entry == "*" or address in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False


def _is_near(host: str) -> bool:
    """Tell whether only this machine can reach what the host means to it."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_link_local or host.startswith("fd00:ec2::")
