"""Connections to servers, found or made for each request, behind urllib's OpenerDirector.

Rule 1: a connection is used again only after a complete exchange that left nothing unread.
Rule 2: nothing is followed or remembered: no redirects, cookies, authentication of urllib's.
Rule 3: proxies come from the mapping that is handed in, and never apply to near addresses.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import threading
import time
from binascii import b2a_base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shim.files.exposure import find_exposure
from shim.http.connection import CONNECT_SECONDS, Connection, Request, Response
from shim.http.errors import (
    Cancelled,
    CertificateError,
    SettingInvalid,
    StaleConnection,
    TransportError,
)
from shim.http.stream import Wire
from shim.http.urls import parse_proxy, parse_url

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any
    from urllib.request import OpenerDirector

    from shim.http.tls import TlsStream

RESOLVED_SECONDS = 5.0  # S3 answers with a few of its many addresses, and changes them
KEEPALIVE_IDLE_SECONDS = 30  # gateways forget connections that are silent for 350 s
FETCH_LIMIT_BYTES = 1 << 20
SLICE_SECONDS = 0.25
PROXY_FORM = "http://host:port or https://host:port, with user:password@ before the host or not"
# An entry of no_proxy: [ADDRESS]:PORT or NAME:PORT, the port may be missing; or an IPv6 address.
_BYPASS = re.compile(
    r"(?:\[(?P<address>[^]]*)\]|(?P<name>[^:]*))(?::(?P<port>[0-9]+))?|(?P<bare>[^:]*:[^:]*:.*)"
)

# Where distributions keep their bundle; the first that exists is read.
IMAGE_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Trust:
    """The authorities that certificates are checked against, read once.

    A bundle that the image's command could have written is none: it is left out, with a sentence in
    `exposed`.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        profile_bundle: str = "",
        carried_bundle: str = "",
        exposure: Callable[[str], str] = find_exposure,
    ) -> None:
        """Choose the bundles.

        The first of AWS_CA_BUNDLE, the profile's ca_bundle, REQUESTS_CA_BUNDLE, SSL_CERT_FILE that
        is not empty is the only one. Otherwise it is the system's store, the image's bundle, and
        carried_bundle: that of the frozen binary, for images that have none.
        """
        self.exposed: list[str] = []
        self._exposure = exposure
        named = (
            environ.get("AWS_CA_BUNDLE"),
            profile_bundle,
            environ.get("REQUESTS_CA_BUNDLE"),
            environ.get("SSL_CERT_FILE"),
        )
        chosen = list(filter(self._is_protected, filter(None, named)))[:1]
        found = filter(self._is_protected, filter(os.path.isfile, IMAGE_BUNDLES))
        self._is_chosen = bool(chosen)
        self._bundles = chosen or [*list(found)[:1], *filter(None, [carried_bundle])]
        self._directories = environ.get("SSL_CERT_DIR", "")
        self._context: ssl.SSLContext | None = None
        self._failure: CertificateError | None = None
        self._lock = threading.Lock()

    @property
    def source(self) -> str:
        """Where the authorities come from, for messages."""
        return ", ".join(self._bundles) or "no CA bundle: neither the system nor the image has one"

    def context(self) -> ssl.SSLContext:
        """Return the one context of this process; what the first call cannot read, none can."""
        with self._lock:
            if self._context is None and self._failure is None:
                try:
                    self._context = self._load()
                except CertificateError as error:
                    self._failure = error
            if self._context is None:
                assert self._failure is not None
                raise self._failure
            return self._context

    def _is_protected(self, path: str) -> bool:
        try:
            reason = self._exposure(path)
        except OSError:
            return True  # reading it will say why not
        if reason:
            self.exposed.append(f"{path} is ignored: {reason}")
        return not reason

    def _load(self) -> ssl.SSLContext:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for path in (*(() if self._is_chosen else self._list_system_store()), *self._bundles):
            where = "capath" if os.path.isdir(path) else "cafile"
            try:
                context.load_verify_locations(**{where: path})
            except OSError as error:
                raise CertificateError(f"Could not read the CA bundle {path}: {error}") from error
        return context

    def _list_system_store(self) -> list[str]:
        """Name what OpenSSL's set_default_verify_paths loads: it takes no look at who owns it."""
        import ssl

        system = ssl.get_default_verify_paths()
        directories = (self._directories or system.openssl_capath).split(":")
        paths = [*filter(os.path.isfile, [system.openssl_cafile])]
        paths += filter(os.path.isdir, directories)
        return list(filter(self._is_protected, paths))


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """Where to connect to instead of the request's own host; scheme: how to talk to the proxy."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)
    scheme: str = "http"


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
            scheme: _build_proxy(name, environ[name])
            for scheme, name in names.items()
            if environ[name]
        }

    @property
    def need_tls(self) -> bool:
        """Whether one of them is talked to over TLS."""
        return any(proxy.scheme == "https" for proxy in self._proxies.values())

    def resolve(self, *, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy for a host, or None to go there directly."""
        proxy = self._proxies.get(scheme)
        if proxy is None or _is_near(host):
            return None
        return None if any(_covers(entry, host, port) for entry in self._bypassed) else proxy


def _build_proxy(name: str, text: str) -> Proxy:
    try:
        url = parse_proxy(text)
    except ValueError:
        raise SettingInvalid(name, expected=PROXY_FORM, found=text) from None
    login = b"" if url.login is None else b2a_base64(url.login, newline=False)
    return Proxy(
        host=url.host,
        port=url.port,
        authorization=f"Basic {login.decode()}" if login else "",
        scheme=url.scheme,
    )


def _covers(entry: str, host: str, port: int) -> bool:
    """Tell whether an entry of no_proxy speaks of a host."""
    import ipaddress

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


def _look_up(host: str, port: int) -> list[Any]:
    """Return the addresses of a host; this machine has its name also where no file says so."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if host != "localhost":
            raise
        return socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)


def _look_up_in_time(
    host: str, port: int, deadline: float, cancelled: Callable[[], bool]
) -> list[Any]:
    """Return the addresses; another thread asks, for nothing ends the question once it is put."""
    if ":" in host or host.replace(".", "").isdecimal():
        return _look_up(host, port)
    found: list[Any] = []
    failures: list[OSError] = []

    def ask() -> None:
        try:
            found.extend(_look_up(host, port))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=ask, name="look-up", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads
        ask()
    while thread.is_alive():
        _check(deadline, cancelled)
        thread.join(SLICE_SECONDS)
    if failures:
        raise failures[0]
    return found


def _connect_in_time(
    sock: socket.socket, address: Any, seconds: float, cancelled: Callable[[], bool]
) -> None:
    """Connect, unless the time is over or the caller cancels before."""
    deadline, poll = time.monotonic() + seconds, select.poll()
    sock.setblocking(False)
    error = sock.connect_ex(address)
    poll.register(sock, select.POLLOUT)
    while error == errno.EINPROGRESS:
        _check(deadline, cancelled)
        if poll.poll(SLICE_SECONDS * 1000):
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def _check(deadline: float, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled
    if time.monotonic() > deadline:
        raise TimeoutError("timed out")


def _is_near(host: str) -> bool:
    """Tell whether only this machine can reach what the host means to it."""
    import ipaddress

    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_link_local or host.startswith("fd00:ec2::")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchResponse:
    """A whole answer; the names of its header fields in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Transport:
    """The connections of this process."""

    def __init__(self, *, proxies: Proxies, trust: Trust, max_connections: int) -> None:
        """max_connections: how many are kept for another use, at most."""
        self._proxies, self.trust, self._max_idle = proxies, trust, max_connections
        self._idle: dict[object, list[Connection]] = {}
        self._idle_count = 0
        self._proxy_of: dict[tuple[str, str, int], Proxy | None] = {}
        self._addresses: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self._lock = threading.Lock()
        self._opener: OpenerDirector | None = None

    def open(self, request: Request) -> Response:
        """Send a request and return its answer, whatever the status; close() it when done.

        TransportError: there was no answer.
        """
        if self._opener is None:
            self._opener = _build_opener(self._exchange)
        return self._opener.open(request)  # type: ignore[arg-type, no-any-return]

    def finish(self, response: Response) -> None:
        """Keep the answer's connection where it may serve again, close it otherwise."""
        connection = response.connection
        if response.can_keep:
            with self._lock:
                if self._idle_count < self._max_idle:
                    self._idle.setdefault(connection.route, []).append(connection)
                    self._idle_count += 1
                    return
        connection.close()

    def close(self) -> None:
        """Close the kept connections."""
        with self._lock:
            kept, self._idle, self._idle_count = self._idle, {}, 0
        for connections in kept.values():
            for connection in connections:
                connection.close()

    def fetch(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        proxied: bool,
    ) -> FetchResponse:
        """Make one small request, without retries; TransportError without a whole answer."""
        parts = parse_url(url)
        target = parts.target if parts.target.startswith("/") else f"/{parts.target}"
        fields = {name.lower(): value for name, value in headers.items()}
        request = Request(
            method=method,
            scheme=parts.scheme,
            host=parts.host,
            port=parts.port,
            target=target,
            headers={"host": parts.netloc} | fields,
            body=body,
            connect_seconds=min(CONNECT_SECONDS, timeout_seconds),
            read_seconds=timeout_seconds,
            proxied=proxied,
        )
        while True:
            try:
                response = self.open(request)
                break
            except StaleConnection:
                continue  # the next kept connection, or a new one
        try:
            content = response.read(FETCH_LIMIT_BYTES)
        finally:
            self.finish(response)
        return FetchResponse(status=response.status, headers=response.headers, body=content)

    def _exchange(self, request: Request) -> Response:
        proxy = self._proxy(request) if request.proxied else None
        connection = self._reuse(request) or self._connect(request, proxy)
        try:
            head = request.head()
            if proxy and request.type == "http":
                head = _via_proxy(head, f"http://{request.headers['host']}", proxy)
            return connection.exchange(request, head)
        except BaseException:
            connection.close()
            raise

    def _proxy(self, request: Request) -> Proxy | None:
        origin = (request.type, request.host, request.port)
        if origin not in self._proxy_of:
            self._proxy_of[origin] = self._proxies.resolve(
                scheme=request.type, host=request.host, port=request.port
            )
        return self._proxy_of[origin]

    def _reuse(self, request: Request) -> Connection | None:
        while True:
            with self._lock:
                connections = self._idle.get(request.route)
                if not connections:
                    return None
                connection = connections.pop()
                self._idle_count -= 1
            if connection.is_idle():
                return connection
            connection.close()

    def _connect(self, request: Request, proxy: Proxy | None) -> Connection:
        deadline = time.monotonic() + request.connect_seconds
        where = f"proxy {proxy.host}:{proxy.port}" if proxy else f"URL: {request.full_url}"
        try:
            sock = self._dial(proxy or request, deadline, request.cancelled)
        except OSError as error:
            reason = error.strerror or error
            raise TransportError(f"Could not connect to the endpoint {where} ({reason})") from error
        wire, tls = Wire(sock, request.cancelled), None
        try:
            if proxy and proxy.scheme == "https":
                tls = self._secure(wire, proxy.host, request.connect_seconds)
            if request.type == "http":
                return Connection(wire, request.route, tls)
            if proxy:
                _open_tunnel(Connection(wire, None, tls), request, proxy)
            tls = self._secure(wire, request.host, request.connect_seconds, outer=tls)
            return Connection(wire, request.route, tls)
        except BaseException:
            sock.close()
            raise

    def _dial(
        self, target: Request | Proxy, deadline: float, cancelled: Callable[[], bool]
    ) -> socket.socket:
        """Connect to one of the addresses: each new connection starts with the next one."""
        key = (target.host, target.port)
        expires, addresses = self._addresses.get(key, (0.0, []))
        if time.monotonic() > expires:
            addresses = _look_up_in_time(*key, deadline, cancelled)
            expires = time.monotonic() + RESOLVED_SECONDS
        preferred = [address for address in addresses if address[0] == addresses[0][0]]
        others = addresses[len(preferred) :]
        addresses = [*preferred[1:], *preferred[:1], *others]
        self._addresses[key] = (expires, addresses)
        failure: OSError = OSError(f"{target.host} has no address")
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                share = (deadline - time.monotonic()) / (len(addresses) - index)
                _connect_in_time(sock, address, max(0.5, share), cancelled)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
                return sock
            except OSError as error:
                sock.close()
                failure = error
            except Cancelled:
                sock.close()
                raise
        raise failure

    def _secure(
        self, wire: Wire, host: str, seconds: float, *, outer: TlsStream | None = None
    ) -> TlsStream:
        """Shake hands with a host; outer: the stream to the proxy before it."""
        import ssl

        from shim.http.tls import TlsStream  # noqa: F811

        wire.limit(seconds, f"TLS with {host}")
        try:
            stream = TlsStream(outer or wire, self.trust.context(), host)
        except ssl.SSLCertVerificationError as error:
            raise CertificateError(
                f"The certificate of {host} is not trusted: {error.verify_message} "
                f"(checked against {self.trust.source})"
            ) from error
        except OSError as error:
            raise TransportError(f"TLS with {host} failed: {error}") from error
        wire.stop_limiting()
        return stream


def _via_proxy(head: bytes, prefix: str, proxy: Proxy) -> bytes:
    """Turn a request's head into the absolute form that a proxy wants."""
    line, _, rest = head.partition(b"\r\n")
    method, _, target = line.partition(b" ")
    login = f"proxy-authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    return b"%b %b%b\r\n%b%b" % (method, prefix.encode(), target, login.encode(), rest)


def _open_tunnel(connection: Connection, request: Request, proxy: Proxy) -> None:
    target = f"{request.host}:{request.port}"
    headers = {"host": target}
    if proxy.authorization:
        headers["proxy-authorization"] = proxy.authorization
    connect = Request(
        method="CONNECT",
        scheme="http",
        host=proxy.host,
        port=proxy.port,
        target=target,
        headers=headers,
        read_seconds=request.connect_seconds,
        cancelled=request.cancelled,
    )
    response = connection.exchange(connect, connect.head())
    if response.status != 200:
        raise TransportError(
            f"The proxy {proxy.host}:{proxy.port} refused a connection to {target}: "
            f"{response.status} {response.reason}"
        )


def _build_opener(exchange: Callable[[Request], Response]) -> OpenerDirector:
    """Build an opener that holds our handler and none of urllib's."""
    from urllib.request import BaseHandler, OpenerDirector

    class KeepAliveHandler(BaseHandler):
        def http_open(self, request: Any) -> Response:
            return exchange(request)

        https_open = http_open

    opener = OpenerDirector()
    opener.add_handler(KeepAliveHandler())
    return opener
