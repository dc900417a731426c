"""HTTP/1.1 on the wire, the connections that are kept, proxies and certificates."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.files.exposure import ADVICE
from shim.http.connection import Connection, Request, Response, State
from shim.http.errors import CertificateError, SettingInvalid, TransportError
from shim.http.proxies import PROXY_FORM, Proxies
from shim.http.stream import SocketStream, unchecked
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.http.urls import Url
from shim.http.wire import parse_head
from shim.s3.client import S3Client, connect
from shim.s3.errors import ServiceError
from tests.fakes.proxy import running_proxy
from tests.fakes.s3_double import Exchange, Fault, Object, S3Double, drop, refuse
from tests.s3_clients import REGION, Stopped, build_harness, running_double, stopping
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, make_certificate
from tests.support import free_port


def build_request(
    url: str = "http://server:80/",
    *,
    method: str = "GET",
    body: bytes | Blocks | None = None,
    read_seconds: float = 10,
    check: Callable[[], None] = unchecked,
) -> Request:
    scheme, _, rest = url.partition("://")
    host, _, port = rest.partition("/")[0].partition(":")
    return Request(
        method=method,
        scheme=scheme,
        host=host,
        port=int(port),
        target="/bucket/key?secret=1",
        headers={"host": f"{host}:{port}"},
        body=body,
        read_seconds=read_seconds,
        check=check,
    )


@contextmanager
def answered(data: bytes, *, method: str = "GET", then_close: bool = True) -> Iterator[Response]:
    """Answer a request with these bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        if then_close:
            theirs.shutdown(socket.SHUT_WR)
        request = build_request(method=method)
        yield Connection(SocketStream(ours)).exchange(request, request.head())


BODIES = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
    "no body": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nA: b\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"ok",
        True,
    ),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
        b"3\r\nhel\r\n2;name=value\r\nlo\r\n0\r\nTrailer: x\r\n\r\n",
        b"hello",
        True,
    ),
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello", False),
    "asked to close": (
        b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nok",
        b"ok",
        False,
    ),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    "the same length twice": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"ok",
        True,
    ),
}


@pytest.mark.parametrize(("data", "body", "can_keep"), BODIES.values(), ids=BODIES)
def test_bodies_end_where_their_framing_says(data: bytes, body: bytes, can_keep: bool) -> None:
    with answered(data) as response:
        assert (body, can_keep) == (response.read(100), response.connection.state is State.IDLE)


def test_an_answer_to_head_has_no_body_whatever_its_length() -> None:
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: 230\r\n\r\n"
    with answered(head, method="HEAD", then_close=False) as response:
        assert (b"", True) == (response.read(0), response.connection.state is State.IDLE)
        assert "230" == response.headers["content-length"]


def test_a_body_read_in_pieces_is_the_same_body() -> None:
    body = bytes(range(256)) * 1024
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=theirs.sendall, args=(head + body,))
        sender.start()
        request = build_request()
        response = Connection(SocketStream(ours)).exchange(request, request.head())
        buffer, found = memoryview(bytearray(100_000)), b""
        while piece := response.receive(70_000, buffer):
            found += piece
        sender.join()
    assert body == found


BROKEN = {
    "short body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
    "short chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello",
    "no last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "chunk without a length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\nhello",
    "negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
    "chunk without its end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "another protocol": b"SSH-2.0-OpenSSH\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n",
    "length and chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    ),
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a folded field": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    "a blank before the colon": b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nA\r\n\r\n",
    "a bare line feed": b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n",
    "too long a trailer": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        + b"A: b\r\n" * 17_000
        + b"\r\n"
    ),
    "too long": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_or_doubtful_is_an_error(data: bytes) -> None:
    with pytest.raises(TransportError), answered(data) as response:
        response.read(100)


def test_fields_are_found_whatever_their_case() -> None:
    _, _, headers, _ = parse_head(
        b"HTTP/1.1 200 OK\r\nEtag:  a b \r\nCONTENT-range: x\r\nx: 1\r\nX: 2"
    )
    assert {"etag": "a b", "content-range": "x", "x": "1, 2"} == headers


def exchange_with_silence(request: Request) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Connection(SocketStream(ours)).exchange(request, request.head())


def test_a_silent_server_is_given_up() -> None:
    with pytest.raises(TransportError, match="silent for 1 s"):
        exchange_with_silence(build_request(read_seconds=1))


def test_a_server_that_takes_nothing_is_given_up() -> None:
    request = build_request(method="PUT", body=bytes(8 << 20), read_seconds=1)
    with pytest.raises(TransportError, match="silent for 1 s"):
        exchange_with_silence(request)


class Blocks:
    """A body of several blocks."""

    size = 2 << 20

    def blocks(self) -> Iterator[memoryview]:
        yield from [memoryview(bytes(1 << 20))] * 2


def test_success_before_the_whole_body_was_sent_is_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        request = build_request(method="PUT", body=Blocks())
        with pytest.raises(TransportError, match="before it had the whole body"):
            Connection(SocketStream(ours)).exchange(request, request.head())


def test_waiting_for_an_answer_can_be_cancelled() -> None:
    started = time.monotonic()
    with pytest.raises(Stopped):
        exchange_with_silence(build_request(read_seconds=60, check=stopping(lambda: True)))
    assert time.monotonic() - started < 5


@pytest.fixture
def double() -> Iterator[S3Double]:
    with running_double() as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        yield double


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def answer_early(*, is_read: bool) -> Fault:
    def fault(exchange: Exchange) -> None:
        exchange.is_body_read = True  # as far as the answer is concerned
        exchange.refuse(403, "AccessDenied", "early")
        if is_read:
            exchange.rfile.read(int(exchange.fields["content-length"]))
        exchange.close_connection = True

    return fault


@pytest.mark.parametrize("is_read", [False, True], ids=["closes", "goes on reading"])
@pytest.mark.parametrize("over", ["http", "tls"])
def test_an_early_answer_to_a_large_body_is_reported(
    over: str, is_read: bool, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(15 << 20))
    with running_double(tls=tls if over == "tls" else None) as double:
        environ = {"AWS_CA_BUNDLE": str(tmp_path / "certificate.pem")}
        harness = build_harness(double.url, environ=environ)
        double.faults = [answer_early(is_read=is_read)]
        with pytest.raises(ServiceError, match="AccessDenied.*early"):
            harness.upload(source)
        assert 1 == len(double.seen)
        harness.client.put("bucket", "other", b"")
        assert [1, 2] == [seen.connection for seen in double.seen]


def test_connections_are_kept_after_complete_answers_only(double: S3Double) -> None:
    client = build_harness(double.url).client
    client.get("bucket", "key", max_bytes=10)
    for missing in (
        lambda: client.get("bucket", "no", max_bytes=1),
        lambda: client.head("b", "no"),
    ):
        with pytest.raises(ServiceError):
            missing()
    client.put("bucket", "key", b"content")
    assert [1, 1, 1, 1] == [seen.connection for seen in double.seen]
    with pytest.raises(ServiceError):
        client.put("nobucket", "key", b"content")  # servers may lose step after refusing a body
    client.get("bucket", "key", max_bytes=10)
    assert [1, 2] == [seen.connection for seen in double.seen][-2:]


def test_connections_are_probed_while_idle_and_send_at_once(double: S3Double) -> None:
    transport = Transport(proxies=Proxies({}), trust=Trust({}), max_connections=1)
    sock = transport.open(build_request(f"{double.url}/")).connection._sock._sock
    options = {
        name: sock.getsockopt(level, getattr(socket, name))
        for level, name in (
            (socket.SOL_SOCKET, "SO_KEEPALIVE"),
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
            (socket.IPPROTO_TCP, "TCP_NODELAY"),
        )
    }
    assert {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 30, "TCP_NODELAY": 1} == options
    assert os.get_inheritable(sock.fileno()) is False


def send_more(exchange: Exchange) -> None:
    exchange.body()
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    exchange.send(200, b"content" + forged, length=7)


def test_a_connection_with_something_left_to_read_is_not_used_again(double: S3Double) -> None:
    client = build_harness(double.url).client
    double.faults = [send_more]
    for _ in range(2):
        assert b"content" == client.get("bucket", "key", max_bytes=10)
    assert [1, 2] == [seen.connection for seen in double.seen]


def test_no_more_connections_are_kept_than_allowed(double: S3Double) -> None:
    transport = Transport(proxies=Proxies({}), trust=Trust({}), max_connections=1)
    responses = [transport.open(build_request(f"{double.url}/")) for _ in range(3)]
    for response in responses:
        response.read(1000)
        transport.finish(response)
    for _ in range(2):
        response = transport.open(build_request(f"{double.url}/"))
        response.read(1000)
    assert [1, 2, 3, 1, 4] == [seen.connection for seen in double.seen]


@contextmanager
def listening(*hosts: str) -> Iterator[tuple[int, list[str]]]:
    """Accept connections to several loopback addresses on one port; list where they came in."""
    port, accepted, stops = free_port(), list[str](), list[socket.socket]()
    threads = []

    def serve(listener: socket.socket, host: str) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(host)
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    for host in hosts:
        listener = socket.create_server((host, port))
        stops.append(listener)
        threads.append(threading.Thread(target=serve, args=(listener, host)))
        threads[-1].start()
    try:
        yield port, accepted
    finally:
        for listener in stops:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in threads:
            thread.join()


def test_new_connections_take_the_next_address_and_pass_over_dead_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening("127.0.0.2", "127.0.0.3") as (port, accepted):
        hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]
        asked = []
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or found)
        transport = Transport(proxies=Proxies({}), trust=Trust({}), max_connections=1)
        for _ in range(6):
            transport.finish(transport.open(build_request(f"http://many.test:{port}/")))
        assert 1 == len(asked)
        assert {"127.0.0.2", "127.0.0.3"} == set(accepted)
        assert 6 == len(accepted)


def test_urllib_has_no_handler_but_ours(double: S3Double) -> None:
    transport = Transport(proxies=Proxies({}), trust=Trust({}), max_connections=1)
    transport.finish(transport.open(build_request(f"{double.url}/")))
    assert ["_KeepAliveHandler"] == [
        type(handler).__name__ for handler in transport._opener.handlers
    ]


# --- fetch ---


def fetch(transport: Transport, url: str, **options: object) -> tuple[int, bytes]:
    arguments = {"body": None, "timeout_seconds": 5.0, "proxied": False, **options}
    response = transport.fetch("GET", url, {"Accept": "x"}, **arguments)  # type: ignore[arg-type]
    return response.status, response.body


@pytest.fixture
def transport() -> Transport:
    return Transport(proxies=Proxies({}), trust=Trust({}), max_connections=4)


def test_fetch_returns_any_status_and_follows_nothing(
    double: S3Double, transport: Transport
) -> None:
    double.faults = [refuse(302, headers={"Location": double.url}), refuse(404), drop()]
    assert (302, b"") == fetch(transport, f"{double.url}/a/b?c=d")
    assert (404, b"") == fetch(transport, double.url)
    with pytest.raises(TransportError):
        fetch(Transport(proxies=Proxies({}), trust=Trust({}), max_connections=0), double.url)
    assert {"c": "d"} == double.seen[0].query
    assert 3 == len(double.seen)


def test_fetch_refuses_what_is_too_long(double: S3Double, transport: Transport) -> None:
    double.faults = [lambda exchange: exchange.send(200, bytes((1 << 20) + 1))]
    with pytest.raises(TransportError, match="longer"):
        fetch(transport, double.url)


def test_fetch_is_over_in_time(transport: Transport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TransportError, match="silent for 1 s"):
            fetch(transport, f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout_seconds=1.0)


# --- proxies ---

PROXY = "http://proxy.test:3128"
ROUTES = {
    "none": ({}, "s3.amazonaws.com", None),
    "lower case": ({"http_proxy": PROXY}, "s3.amazonaws.com", "proxy.test"),
    "upper case": ({"HTTP_PROXY": PROXY}, "s3.amazonaws.com", "proxy.test"),
    "lower case wins": ({"http_proxy": "other:1", "HTTP_PROXY": PROXY}, "a.com", "other"),
    "lower case unsets": ({"http_proxy": "", "HTTP_PROXY": PROXY}, "a.com", None),
    "in a CGI program": ({"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, "a.com", None),
    "of the other scheme": ({"https_proxy": PROXY}, "a.com", None),
    "without a scheme": ({"http_proxy": "proxy.test:3128"}, "a.com", "proxy.test"),
    "no_proxy, a suffix": (
        {"http_proxy": PROXY, "no_proxy": "amazonaws.com"},
        "bucket.s3.eu-central-1.amazonaws.com",
        None,
    ),
    "no_proxy, no label": (
        {"http_proxy": PROXY, "no_proxy": "amazonaws.com"},
        "xamazonaws.com",
        "proxy.test",
    ),
    "no_proxy, not China": (
        {"http_proxy": PROXY, "no_proxy": "amazonaws.com"},
        "s3.cn-north-1.amazonaws.com.cn",
        "proxy.test",
    ),
    "no_proxy, with port": ({"http_proxy": PROXY, "NO_PROXY": "x, a.com:80"}, "a.com", None),
    "no_proxy, all": ({"http_proxy": PROXY, "no_proxy": "*"}, "a.com", None),
    "this machine": ({"http_proxy": PROXY}, "localhost", None),
    "loopback": ({"http_proxy": PROXY}, "127.0.0.1", None),
    "loopback IPv6": ({"http_proxy": PROXY}, "::1", None),
    "container credentials": ({"http_proxy": PROXY}, "169.254.170.2", None),
    "instance metadata IPv6": ({"http_proxy": PROXY}, "fd00:ec2::254", None),
    "another address": ({"http_proxy": PROXY}, "10.0.0.1", "proxy.test"),
}


@pytest.mark.parametrize(("environ", "host", "expected"), ROUTES.values(), ids=ROUTES)
def test_proxies_stand_where_the_environment_puts_them(
    environ: Mapping[str, str], host: str, expected: str | None
) -> None:
    proxy = Proxies(environ).resolve(scheme="http", host=host, port=80)
    assert expected == (proxy.host if proxy else None)


def test_a_login_for_the_proxy_is_decoded_and_hidden() -> None:
    environ = {"https_proxy": "http://us%40er:p%3Aw@proxy.test"}
    proxy = Proxies(environ).resolve(scheme="https", host="a.com", port=443)
    login = base64.b64encode(b"us@er:p:w").decode()
    expected = Url(scheme="http", host="proxy.test", port=80, authorization=f"Basic {login}")
    assert expected == proxy
    assert login not in repr(proxy)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "password",
    [
        "s3cr#et",
        "s3/cret",
        "s3[cret",
        "s3]cret",
        "s3@cret",
        "s3?cret",
        "s3:cret",
        "://",
        "%23",
        "\udcff",
    ],
)
def test_a_password_may_hold_any_character(password: str, scheme: str) -> None:
    environ = {"https_proxy": f"{scheme}://user:{password}@proxy.test:3128"}
    proxy = Proxies(environ).resolve(scheme="https", host="a.com", port=443)
    login = b"user:" + os.fsencode(password.replace("%23", "#"))
    assert proxy == Url(
        host="proxy.test",
        port=3128,
        authorization=f"Basic {base64.b64encode(login).decode()}",
        scheme=scheme,
    )


@pytest.mark.parametrize(
    "url",
    [
        "socks5://user:SECRET@proxy.test:1",
        "http://",
        "http://user:SECRET@",
        "http://user:SECRET@proxy.test:port",
        "http://user:SECRET@proxy.test:0",
        "http://user:SECRET@proxy.test:65536",
        f"http://user:SECRET@proxy.test:{'9' * 5000}",
        "http://proxy.test:SECRET",
        "http://[::1",
        "http://user:SECRET@[::1",
        "http://a..b:9",
        f"http://user:SECRET@{'a' * 64}.test",
        "http://pro xy:9",
        "http://user:SECRET@pr\xf6xy.test",
        "http://\udcff",
    ],
)
@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY"])
def test_what_is_no_proxy_is_refused_by_the_name_of_its_variable(name: str, url: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        Proxies({name: url})
    expected = f"{name}: expected {PROXY_FORM}, found a text of {len(url)} characters"
    assert expected == str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


BYPASSED = {
    "a network": ("10.0.0.0/8", "10.1.2.3", True),
    "not in the network": ("10.0.0.0/8", "11.1.2.3", False),
    "an address of the network names it": ("10.1.1.1/8", "10.9.9.9", True),
    "an IPv6 network": ("fd00::/8", "fd12::1", True),
    "not in the IPv6 network": ("fd00::/8", "fe12::1", False),
    "an IPv6 network, an IPv4 host": ("::/0", "10.1.2.3", False),
    "an address": ("10.0.0.1", "10.0.0.1", True),
    "another address": ("10.0.0.1", "10.0.0.11", False),
    "an IPv6 address": ("2001:db8:0:0:0:0:0:1", "2001:db8::1", True),
    "in brackets, with port": ("[2001:db8::1]:80", "2001:db8::1", True),
    "in brackets, another port": ("[2001:db8::1]:81", "2001:db8::1", False),
    "an address with port": ("10.0.0.1:80", "10.0.0.1", True),
    "an address, another port": ("10.0.0.1:81", "10.0.0.1", False),
    "the end of an address": ("0.0.1", "10.0.0.1", False),
    "a name like an address": ("10.0.0.0/8", "10.0.0.1.example", False),
    "a leading dot": (".example.com", "s3.example.com", True),
    "a leading dot, the name itself": (".example.com", "example.com", True),
    "a leading star": ("*.example.com", "s3.example.com", True),
    "in capitals": ("EXAMPLE.com", "s3.example.com", True),
    "with a dot at the end": ("example.com", "s3.example.com.", True),
    "a name with another port": ("example.com:81", "s3.example.com", False),
    "one of several": ("a.com, 10.0.0.0/8 b.com", "b.com", True),
    "all, beside others": ("a.com,*", "b.com", True),
    "nonsense": ("[,],::,:,/,1/1,.,%", "b.com", False),
    "nonsense, an address": ("[,],::,:,/,1/1,.,%", "10.0.0.1", False),
}


@pytest.mark.parametrize(("no_proxy", "host", "expected"), BYPASSED.values(), ids=BYPASSED)
def test_no_proxy_lists_names_addresses_and_networks(
    no_proxy: str, host: str, expected: bool
) -> None:
    proxies = Proxies({"http_proxy": PROXY, "no_proxy": no_proxy})
    assert expected is (proxies.resolve(scheme="http", host=host, port=80) is None)


@pytest.mark.parametrize("over", ["", "http://", "https://"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_requests_go_through_the_proxy(
    scheme: str, over: str, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    body = bytes(range(256)) * 4096
    with running_double(tls=tls if scheme == "https" else None) as double:
        port = double.server_address[1]
        double.buckets["bucket"]["key"] = Object(body=body)
        with running_proxy(port, tls=tls if over == "https://" else None) as (proxy_port, heads):
            environ = {
                f"{scheme}_proxy": f"{over}user:word@127.0.0.1:{proxy_port}",
                "AWS_CA_BUNDLE": str(tmp_path / "certificate.pem"),
            }
            harness = build_harness(f"{scheme}://s3.example.test:{port}", environ=environ)
            client = harness.client
            assert body == client.get("bucket", "key", max_bytes=len(body))
            if scheme == "https":  # of http, the proxy of this test rewrites one request only
                client.put("bucket", "other", body)
                assert body == client.get("bucket", "other", max_bytes=len(body))
            client.close()
        expected = {
            "http": f"GET http://s3.example.test:{port}/bucket/key HTTP/1.1".encode(),
            "https": f"CONNECT s3.example.test:{port} HTTP/1.1".encode(),
        }
        (head,) = heads
        assert expected[scheme] == head.split(b"\r\n")[0]
        assert b"proxy-authorization: Basic dXNlcjp3b3Jk" in head
        assert "proxy-authorization" not in (double.seen[0].headers if scheme == "https" else {})


def test_a_proxy_whose_certificate_is_not_trusted_sees_no_login(
    tls: ssl.SSLContext, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    with running_proxy(1, tls=tls) as (port, heads):
        environ = {
            "https_proxy": f"https://user:SECRET@127.0.0.1:{port}",
            "AWS_CA_BUNDLE": str(other),
        }
        harness = build_harness("https://s3.example.test:443", environ=environ)
        with pytest.raises(CertificateError, match="The certificate of 127.0.0.1 is not trusted"):
            harness.client.get("bucket", "key", max_bytes=10)
    assert [] == heads


def test_a_proxy_that_refuses_is_named(tls: ssl.SSLContext) -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with running_double(tls=tls) as double:
        with running_proxy(double.server_address[1], refusal=refusal) as (port, _):
            environ = {"https_proxy": f"http://user:SECRET@127.0.0.1:{port}"}
            harness = build_harness("https://s3.example.test:443", environ=environ, attempts=1)
            with pytest.raises(TransportError) as caught:
                harness.client.get("bucket", "key", max_bytes=10)
    expected = f"The proxy 127.0.0.1:{port} refused a connection to s3.example.test:443: 407"
    assert str(caught.value).startswith(expected)
    assert "SECRET" not in "".join(harness.lines)


# --- certificates ---

BUNDLES = {
    "AWS_CA_BUNDLE": ({"AWS_CA_BUNDLE": "a", "REQUESTS_CA_BUNDLE": "r"}, "p", "a"),
    "the profile's": ({"REQUESTS_CA_BUNDLE": "r", "SSL_CERT_FILE": "s"}, "p", "p"),
    "REQUESTS_CA_BUNDLE": ({"REQUESTS_CA_BUNDLE": "r", "SSL_CERT_FILE": "s"}, "", "r"),
    "SSL_CERT_FILE": ({"AWS_CA_BUNDLE": "", "SSL_CERT_FILE": "s"}, "", "s"),
}


@pytest.mark.parametrize(("environ", "profile", "expected"), BUNDLES.values(), ids=BUNDLES)
def test_the_first_bundle_that_is_named_is_the_only_one(
    environ: Mapping[str, str], profile: str, expected: str
) -> None:
    trust = Trust(environ, profile_bundle=profile, carried_bundle="carried")
    assert expected == trust.source


def test_the_carried_bundle_stands_beside_that_of_the_system() -> None:
    assert Trust({}, carried_bundle="carried").source.endswith("carried")


def test_a_bundle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pem", Path(__file__)):
        with pytest.raises(CertificateError, match=str(path)):
            Trust({"AWS_CA_BUNDLE": str(path)}).context()


@pytest.mark.parametrize("how", ["AWS_CA_BUNDLE", "carried"])
def test_a_server_of_a_known_authority_is_trusted(
    tls: ssl.SSLContext, tmp_path: Path, how: str
) -> None:
    bundle = str(tmp_path / "certificate.pem")
    trust = Trust({how: bundle}, carried_bundle=bundle if how == "carried" else "")
    with running_double(tls=tls) as double:
        transport = Transport(proxies=Proxies({}), trust=trust, max_connections=1)
        assert 403 == fetch(transport, f"{double.url}/bucket/key")[0]


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("how", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "profile"])
def test_a_bundle_that_others_could_have_written_is_ignored(
    tmp_path: Path, how: str, kind: str
) -> None:
    bundle = tmp_path / "bundle"
    if kind == "directory":
        bundle.mkdir()
    else:
        make_certificate(tmp_path)[0].rename(bundle)
    bundle.chmod(0o777)
    environ, profile = ({}, str(bundle)) if how == "profile" else ({how: str(bundle)}, "")
    trust = Trust(environ, profile_bundle=profile)
    assert [f"{bundle} is ignored: {bundle} is writable for others than root: {ADVICE}"] == (
        trust.exposed
    )
    assert str(bundle) not in trust.source
    assert 0 == sum("localhost" in str(one) for one in trust.context().get_ca_certs())


def test_the_next_bundle_stands_in_for_one_that_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "exposed").touch()
    (tmp_path / "exposed").chmod(0o666)
    certificate, _ = make_certificate(tmp_path)
    named = {"AWS_CA_BUNDLE": f"{tmp_path}/exposed", "SSL_CERT_FILE": str(certificate)}
    assert str(certificate) == Trust(named).source


@pytest.mark.parametrize("variable", ["SSL_CERT_DIR", "SSL_CERT_FILE"])
def test_openssl_itself_does_not_read_what_we_ignore(
    tmp_path: Path, variable: str, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    hashed = ["openssl", "x509", "-noout", "-hash", "-in", str(certificate)]
    name = subprocess.run(hashed, capture_output=True, text=True, check=True).stdout.strip()
    store = tmp_path / "store"
    store.mkdir()
    (store / f"{name}.0").write_bytes(certificate.read_bytes())
    path = store if variable == "SSL_CERT_DIR" else store / f"{name}.0"
    monkeypatch.setenv(variable, str(path))
    with running_double(tls=tls) as double:
        url = f"{double.url}/bucket/key"

        def status() -> int:
            trust = Trust({variable: str(path)})
            return fetch(Transport(proxies=Proxies({}), trust=trust, max_connections=1), url)[0]

        assert 403 == status()
        path.chmod(0o777)
        with pytest.raises(CertificateError):
            status()


@pytest.mark.parametrize("change", ["replaced", "removed", "damaged"])
def test_authorities_are_those_of_the_moment_of_connecting(
    change: str, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    bundle = tmp_path / "certificate.pem"
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    with running_double(tls=tls) as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        store = connect(
            {
                "AWS_ENDPOINT_URL": double.url,
                "AWS_CA_BUNDLE": str(bundle),
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": REGION,
            },
            concurrency=1,
            max_connections=1,
            log=lambda level, message: None,
            run_helper=lambda argv, seconds: b"",
        )
        if change == "replaced":
            bundle.write_bytes(other.read_bytes())
        elif change == "damaged":
            bundle.write_text("nothing")
        else:
            bundle.unlink()
        assert b"content" == store.get("bucket", "key", max_bytes=10)
        store.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"AWS_ENDPOINT_URL_S3": "https://h"}, True),
        ({"AWS_ENDPOINT_URL_S3": "HTTPS://h"}, True),
        ({"AWS_ENDPOINT_URL_S3": "http://h"}, False),
        ({"AWS_ENDPOINT_URL_S3": "http://h", "https_proxy": "http://p:1"}, False),
        ({"AWS_ENDPOINT_URL_S3": "http://h", "http_proxy": "https://p:1"}, True),
        ({"AWS_ENDPOINT_URL_S3": "http://h", "AWS_WEB_IDENTITY_TOKEN_FILE": "t"}, True),
        ({"AWS_ENDPOINT_URL": "http://h", "AWS_WEB_IDENTITY_TOKEN_FILE": "t"}, False),
        ({"AWS_ENDPOINT_URL": "http://h", "AWS_CONTAINER_CREDENTIALS_FULL_URI": "https://h"}, True),
        ({"AWS_ENDPOINT_URL": "http://h", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/"}, False),
        (
            {"AWS_ENDPOINT_URL": "http://h", "AWS_EC2_METADATA_SERVICE_ENDPOINT": "https://h"},
            True,
        ),
    ],
)
def test_authorities_are_read_at_once_where_tls_may_be_used(
    environ: dict[str, str], expected: bool
) -> None:
    store = connect(
        {"HOME": "/none", **environ},
        concurrency=1,
        max_connections=1,
        log=lambda level, message: None,
        run_helper=lambda argv, seconds: b"",
    )
    assert isinstance(store, S3Client)
    assert expected is isinstance(store.trust._loaded, ssl.SSLContext)


def test_a_server_of_an_unknown_authority_is_refused_at_once(
    tls: ssl.SSLContext, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    with running_double(tls=tls) as double:
        harness = build_harness(double.url, environ={"AWS_CA_BUNDLE": str(other)})
        with pytest.raises(CertificateError) as caught:
            harness.client.get("bucket", "key", max_bytes=10)
    assert f"(checked against {other})" in str(caught.value)
    assert [] == harness.sleeps


def test_a_certificate_for_another_name_is_refused(
    tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"AWS_CA_BUNDLE": str(tmp_path / "certificate.pem")}
    with running_double(tls=tls) as double:
        address = double.server_address
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
        harness = build_harness(f"https://other.test:{address[1]}", environ=environ)
        with pytest.raises(CertificateError, match="certificate of other.test is not trusted"):
            harness.client.get("bucket", "key", max_bytes=10)
    assert [] == harness.sleeps


def test_tls_that_breaks_off_is_repeated() -> None:
    with listening("127.0.0.1") as (port, accepted):
        harness = build_harness(f"https://127.0.0.1:{port}", attempts=3)
        with pytest.raises(TransportError, match="TLS with 127.0.0.1 failed"):
            harness.client.get("bucket", "key", max_bytes=10)
    assert 3 == len(accepted)
