"""Connections to servers, found or made for each request, behind urllib's OpenerDirector.

Rule 1: a connection is used again only after a complete exchange that left nothing unread.
Rule 2: nothing is followed or remembered: no redirects, cookies, authentication of urllib's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.request import BaseHandler, OpenerDirector

from shim.http.connection import CONNECT_SECONDS, Connection, Request, Response, State
from shim.http.errors import CertificateError, StaleConnection, TransportError
from shim.http.proxies import Proxies
from shim.http.stream import SLICE_SECONDS, SocketStream
from shim.http.tls import TlsStream
from shim.http.trust import Trust
from shim.http.urls import Url, parse_url

RESOLVED_SECONDS = 5.0  # S3 answers with a few of its many addresses, and changes them
KEEPALIVE_IDLE_SECONDS = 30  # gateways forget connections that are silent for 350 s
FETCH_LIMIT_BYTES = 1 << 20


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
        self.trust, self._max_idle = trust, max_connections
        self._resolve_proxy = cache(proxies.resolve)
        self._idle: dict[object, list[Connection]] = {}
        self._addresses: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self._lock = threading.Lock()
        self._opener = OpenerDirector()
        self._opener.add_handler(_KeepAliveHandler(self._exchange))

    def open(self, request: Request) -> Response:
        """Send a request and return its answer, whatever the status; close() it when done.

        TransportError: there was no answer.
        """
        return self._opener.open(request)  # type: ignore[no-any-return]

    def finish(self, response: Response) -> None:
        """Keep the answer's connection where it may serve again, close it otherwise."""
        connection = response.connection
        if connection.state is State.IDLE:
            with self._lock:
                if sum(map(len, self._idle.values())) < self._max_idle:
                    self._idle.setdefault(connection.route, []).append(connection)
                    return
        connection.close()

    def close(self) -> None:
        """Close the kept connections."""
        with self._lock:
            kept, self._idle = self._idle, {}
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
        response = self.ask(
            method,
            url,
            headers,
            body=body,
            connect_seconds=min(CONNECT_SECONDS, timeout_seconds),
            read_seconds=timeout_seconds,
            proxied=proxied,
        )
        try:
            content = response.read(FETCH_LIMIT_BYTES)
        finally:
            self.finish(response)
        return FetchResponse(status=response.status, headers=response.headers, body=content)

    def ask(self, method: str, url: str, headers: Mapping[str, str], **options: Any) -> Response:
        """Open a URL as open() does; a kept connection that is stale is passed over.

        options: those of Request, such as body and check. ValueError: what is no URL.
        """
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
            **options,
        )
        while True:
            with suppress(StaleConnection):  # the next kept connection, or a new one
                return self.open(request)

    def _exchange(self, request: Request) -> Response:
        scheme, host, port, is_proxied = request.route
        proxy = self._resolve_proxy(scheme=scheme, host=host, port=port) if is_proxied else None
        connection = self._reuse(request) or self._connect(request, proxy)
        try:
            head = request.head()
            if proxy and scheme == "http":
                prefix = f"http://{request.headers['host']}"
                head = request.head(prefix=prefix, authorization=proxy.authorization)
            return connection.exchange(request, head)
        except BaseException:
            connection.close()
            raise

    def _reuse(self, request: Request) -> Connection | None:
        while True:
            with self._lock:
                connections = self._idle.get(request.route)
                if not connections:
                    return None
                connection = connections.pop()
            if connection.is_idle():
                return connection
            connection.close()

    def _connect(self, request: Request, proxy: Url | None) -> Connection:
        deadline = time.monotonic() + request.connect_seconds
        where = (proxy.host, proxy.port) if proxy else (request.hostname, request.port)
        try:
            sock = self._dial(*where, deadline, request.check)
        except OSError as error:
            name = f"proxy {proxy.host}:{proxy.port}" if proxy else f"URL: {request.url}"
            reason = error.strerror or error
            raise TransportError(f"Could not connect to the endpoint {name} ({reason})") from error
        stream, tls = SocketStream(sock, request.check), None
        try:
            if proxy and proxy.scheme == "https":
                tls = self._secure(stream, proxy.host, request.connect_seconds)
            if request.type == "http":
                return Connection(stream, request.route, tls)
            if proxy:
                _open_tunnel(Connection(stream, None, tls), request, proxy)
            tls = self._secure(stream, request.hostname, request.connect_seconds, outer=tls)
            return Connection(stream, request.route, tls)
        except BaseException:
            sock.close()
            raise

    def _dial(
        self, host: str, port: int, deadline: float, check: Callable[[], None]
    ) -> socket.socket:
        """Connect to one of the addresses: each new connection starts with the next one."""
        key = (host, port)
        expires, addresses = self._addresses.get(key, (0.0, []))
        if time.monotonic() > expires:
            addresses = _look_up_in_time(host, port, deadline, check)
            expires = time.monotonic() + RESOLVED_SECONDS
        preferred = [address for address in addresses if address[0] == addresses[0][0]]
        others = addresses[len(preferred) :]
        addresses = [*preferred[1:], *preferred[:1], *others]
        self._addresses[key] = (expires, addresses)
        failure: OSError = OSError(f"{host} has no address")
        for index, address in enumerate(addresses):
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            try:
                return _connect_in_time(address, max(0.5, share), check)
            except OSError as error:
                failure = error
        raise failure

    def _secure(
        self, stream: SocketStream, host: str, seconds: float, *, outer: TlsStream | None = None
    ) -> TlsStream:
        """Shake hands with a host; outer: the stream to the proxy before it."""
        stream.limit(seconds, f"TLS with {host}")
        try:
            tls = TlsStream(outer or stream, self.trust.context(), host)
            tls.shake_hands()
        except TransportError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise CertificateError(
                f"The certificate of {host} is not trusted: {error.verify_message} "
                f"(checked against {self.trust.source})"
            ) from error
        except OSError as error:
            raise TransportError(f"TLS with {host} failed: {error}") from error
        stream.stop_limiting()
        return tls


class _KeepAliveHandler(BaseHandler):
    """The only handler of the opener."""

    def __init__(self, exchange: Callable[[Request], Response]) -> None:
        self.http_open = self.https_open = exchange


def _open_tunnel(connection: Connection, request: Request, proxy: Url) -> None:
    target = f"{request.hostname}:{request.port}"
    connect = Request(
        method="CONNECT",
        scheme="http",
        host=proxy.host,
        port=proxy.port,
        target=target,
        headers={"host": target},
        read_seconds=request.connect_seconds,
        check=request.check,
    )
    head = connect.head(authorization=proxy.authorization)
    response = connection.exchange(connect, head)
    if response.status != 200:
        raise TransportError(
            f"The proxy {proxy.host}:{proxy.port} refused a connection to {target}: "
            f"{response.status} {response.reason}"
        )


def _look_up(host: str, port: int) -> list[Any]:
    """Return the addresses of a host; this machine has its name also where no file says so."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if host != "localhost":
            raise
        return socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)


def _look_up_in_time(host: str, port: int, deadline: float, check: Callable[[], None]) -> list[Any]:
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
        _wait_on(deadline, check)
        thread.join(SLICE_SECONDS)
    if failures:
        raise failures[0]
    return found


def _connect_in_time(found: Any, seconds: float, check: Callable[[], None]) -> socket.socket:
    """Connect to what was looked up, unless the time is over or the caller cancels before."""
    deadline, poll = time.monotonic() + seconds, select.poll()
    family, kind, protocol, _, address = found
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        error = sock.connect_ex(address)
        poll.register(sock, select.POLLOUT)
        while error == errno.EINPROGRESS:
            _wait_on(deadline, check)
            if poll.poll(SLICE_SECONDS * 1000):
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        return sock
    except BaseException:
        sock.close()
        raise


def _wait_on(deadline: float, check: Callable[[], None]) -> None:
    """Say whether a wait may go on, by raising what ends it."""
    check()
    if time.monotonic() > deadline:
        raise TimeoutError("timed out")
