"""The HTTP edge, over real sockets: contract section 9 and what hostile clients may send."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.contract.errors import InvalidTasks, NotText, Problem, ShimError, TaskStopped
from shim.contract.tasks import parse_task
from shim.log.log import Log
from shim.process.sockets import Ends
from shim.serve.protocol import Busy, Forbidden, Limits, Server, Unhealthy
from tests.support import poll

Serve = Callable[..., "Service"]

RESULT = b'{"pk":"1"}'


class Application:
    """Do what it is told; an invocation goes on once the gate is open."""

    def __init__(self) -> None:
        self.healthy = True
        self.outcome: bytes | Exception = RESULT
        self.gate = threading.Event()
        self.gate.set()
        self.work: Callable[[threading.Event], object] = threading.Event.wait
        self.bodies: list[bytes] = []
        self.clients: list[Ends] = []
        self.is_forbidden = False
        self.finished = 0
        self.answers = 0

    def is_healthy(self) -> bool:
        return self.healthy

    def check_client(self, connection: Ends) -> None:
        self.clients.append(connection)
        if self.is_forbidden:
            raise Forbidden("Not you")

    def invoke(self, body: bytes, connection: Ends) -> bytes:
        assert connection in self.clients
        self.bodies.append(body)
        self.work(self.gate)
        self.finished += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def leave_if_unhealthy(self) -> None:
        self.answers += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    server: Server
    application: Application
    port: int
    log: Path

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, request: bytes) -> Response:
        """Send raw bytes on a connection of its own; return the first answer."""
        with self.connect() as connection:
            connection.sendall(request)
            return receive(connection, request)

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def detail(self) -> object:
        return json.loads(self.body)["detail"]


def receive(connection: socket.socket, request: bytes = b"GET") -> Response:
    response = http.client.HTTPResponse(connection, method=request.split(b" ")[0].decode("latin-1"))
    response.begin()
    fields = {name.lower(): value for name, value in response.getheaders()}
    return Response(response.status, fields, response.read())


def receive_all(connection: socket.socket) -> bytes:
    """Return everything up to the end of the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(**limits: float) -> Service:
            log = tmp_path / "log"
            fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            stack.callback(os.close, fd)
            application = Application()
            server = Server(
                ("127.0.0.1", 0),
                application=application,
                log=Log(stdout_fd=fd, stderr_fd=fd, level="DEBUG"),
                limits=Limits(**limits),  # type: ignore[arg-type]
            )
            thread = threading.Thread(target=server.serve_forever)
            thread.start()

            def stop() -> None:
                application.gate.set()
                server.shutdown()
                assert server.drain(10)
                server.server_close()
                thread.join()

            stack.callback(stop)
            port = int(server.server_address[1])
            return Service(server=server, application=application, port=port, log=log)

        yield start


@pytest.fixture
def service(serve: Serve) -> Service:
    return serve()


def post(body: bytes = b"{}", fields: bytes = b"", path: bytes = b"/invocations") -> bytes:
    length = str(len(body)).encode()
    return b"POST %s HTTP/1.1\r\nContent-Length: %s\r\n%s\r\n%s" % (path, length, fields, body)


def chunked(body: bytes, fields: bytes = b"") -> bytes:
    head = b"POST /invocations HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
    return head + fields + b"\r\n" + body


PING = b"GET /ping HTTP/1.1\r\n\r\n"
PROBLEM = Problem(
    loc=("inputs", 0, "bucket_name"), type="missing", message="Field required", input={"é": 1}
)

# request, what invoke() does, status, exact body or None, further fields. "peer" marks what FastAPI
# 0.165 on uvicorn 0.54 answered to the same bytes, with the routes of sagemaker-shim 0.8.3.
CONTRACT = [
    pytest.param(PING, RESULT, 200, b"", {}, id="ping-peer"),
    pytest.param(
        b"GET /execution-parameters HTTP/1.1\r\n\r\n",
        RESULT,
        200,
        b'{"MaxConcurrentTransforms":1,"BatchStrategy":"SINGLE_RECORD","MaxPayloadInMB":6}',
        {},
        id="execution-parameters-peer",
    ),
    pytest.param(post(), RESULT, 200, RESULT, {}, id="invocation"),
    pytest.param(
        post(fields=b"Content-Type: text/csv\r\nX-Unknown: 1\r\n"),
        RESULT,
        200,
        RESULT,
        {},
        id="any-content-type",
    ),
    pytest.param(
        post(),
        InvalidTasks([PROBLEM]),
        422,
        '{"detail":[{"type":"missing","loc":["body","inputs",0,"bucket_name"],'
        '"msg":"Field required","input":{"é":1}}]}'.encode(),
        {},
        id="invalid-task",
    ),
    pytest.param(
        b"POST /invocations HTTP/1.1\r\n\r\n",
        InvalidTasks([Problem(loc=(), type="missing", message="Field required")]),
        422,
        b'{"detail":[{"type":"missing","loc":["body"],"msg":"Field required","input":null}]}',
        {},
        id="no-body-peer",
    ),
    pytest.param(
        post(),
        InvalidTasks([Problem(loc=(), type="t", message="m", input="\ud800")]),
        422,
        b'{"detail":[{"type":"t","loc":["body"],"msg":"m","input":"\\ud800"}]}',
        {},
        id="invalid-task-lone-surrogate",
    ),
    pytest.param(
        post(b"\xff"),
        NotText([]),
        400,
        b'{"detail":"There was an error parsing the body"}',
        {},
        id="not-utf8",
    ),
    pytest.param(
        post(),
        Busy(),
        503,
        b'{"detail":"Another task is running"}',
        {"retry-after": "5"},
        id="busy",
    ),
    pytest.param(post(), Unhealthy(), 503, b"", {}, id="unhealthy"),
    pytest.param(
        post(),
        TaskStopped("The task was stopped before it finished"),
        503,
        b'{"detail":"The task was stopped before it finished"}',
        {},
        id="stopped",
    ),
    pytest.param(
        post(),
        ZeroDivisionError("secret"),
        500,
        b'{"detail":"An unexpected error occurred"}',
        {},
        id="unexpected",
    ),
    pytest.param(
        post(),
        TimeoutError("of S3"),
        500,
        b'{"detail":"An unexpected error occurred"}',
        {},
        id="time-out-of-another",
    ),
    *(
        pytest.param(
            b"GET " + target + b" HTTP/1.1\r\n\r\n",
            RESULT,
            404,
            b'{"detail":"Not Found"}',
            {},
            id=f"unknown-path-{name}",
        )
        for name, target in {
            "peer": b"/nope",
            "root-peer": b"/",
            "two-slashes-peer": b"//ping",
            "three-slashes": b"///ping",
            "trailing-slash": b"/ping/",  # the peer answers 307
            "star": b"*",
            "no-slash": b"ping",
            "other-authority-only": b"http://x",
        }.items()
    ),
    *(
        pytest.param(
            f"{method} {path} HTTP/1.1\r\n\r\n".encode(),
            RESULT,
            405,
            b"" if method == "HEAD" else b'{"detail":"Method Not Allowed"}',
            {"allow": allowed, "content-length": "31"},
            id=f"wrong-method-{method}-{path[1:]}-peer",
        )
        for method, path, allowed in [
            ("HEAD", "/ping", "GET"),
            ("POST", "/ping", "GET"),
            ("OPTIONS", "/ping", "GET"),
            ("FOO", "/ping", "GET"),
            ("GET", "/invocations", "POST"),
            ("DELETE", "/invocations", "POST"),
        ]
    ),
    pytest.param(
        b"HEAD /nope HTTP/1.1\r\n\r\n", RESULT, 404, b"", {"content-length": "22"}, id="head-peer"
    ),
    pytest.param(b"GET /ping?x=1 HTTP/1.1\r\n\r\n", RESULT, 200, b"", {}, id="query-peer"),
    pytest.param(
        b"GET http://host:1/ping?x HTTP/1.1\r\n\r\n", RESULT, 200, b"", {}, id="absolute-form"
    ),
]


@pytest.mark.parametrize(("request_", "outcome", "status", "body", "fields"), CONTRACT)
def test_contract(
    service: Service,
    request_: bytes,
    outcome: bytes | Exception,
    status: int,
    body: bytes,
    fields: dict[str, str],
) -> None:
    service.application.outcome = outcome

    response = service.ask(request_)

    expected = {"connection": "keep-alive", "content-length": str(len(body)), **fields}
    if expected["content-length"] != "0":
        expected["content-type"] = "application/json"
    assert (response.status, response.body) == (status, body)
    assert response.fields.pop("date").endswith(" GMT")
    assert response.fields == expected


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        pytest.param("x" * 200, "x" * 200, id="text"),
        pytest.param("é" * 201, "é" * 200, id="long-text"),
        pytest.param([1, {"a": None}], [1, {"a": None}], id="list"),
        pytest.param({"a": "x" * 1_000_000}, '{"a": "' + "x" * 193, id="text-in-an-object"),
        pytest.param([[]] * 2_000_000, "[" + "[], " * 49 + "[], "[:3], id="long-list"),
        pytest.param(int("9" * 4000), "9" * 200, id="long-number"),
        pytest.param(json.loads("[" * 200 + "]" * 200), "[" * 200, id="deep-list"),
    ],
)
def test_what_was_found_is_cut_to_200_characters(
    service: Service, found: object, shown: object
) -> None:
    service.application.outcome = InvalidTasks(
        [Problem(loc=(), type="t", message="m", input=found)]
    )
    response = service.ask(post())
    assert [{"type": "t", "loc": ["body"], "msg": "m", "input": shown}] == response.detail


@pytest.mark.parametrize(
    "request_",
    [post(b"x" * 100_000), chunked(b"5\r\n"), post(b"{}", b"Expect: 100-continue\r\n")],
    ids=["large", "unfinished", "expecting"],
)
def test_a_forbidden_client_is_refused_before_its_body(service: Service, request_: bytes) -> None:
    service.application.is_forbidden = True
    with service.connect() as connection:
        ends = Ends(client=connection.getsockname(), server=connection.getpeername())
        connection.sendall(request_)
        response = receive(connection)
    assert (403, "Not you", "close") == (
        response.status,
        response.detail,
        response.fields["connection"],
    )
    assert [ends] == service.application.clients
    assert [] == service.application.bodies
    assert 200 == service.ask(PING).status


def test_a_client_is_checked_for_each_request_of_its_connection(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(post() + PING + post())
        connection.shutdown(socket.SHUT_WR)
        assert [200] * 3 == statuses(receive_all(connection))
    assert 2 == len(service.application.clients)


def test_unhealthy_ping_is_503_and_empty(service: Service) -> None:
    service.application.healthy = False
    response = service.ask(PING)
    assert (response.status, response.body) == (503, b"")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\n\n", 400, id="tls-hello"),
        pytest.param(b"GET /ping\r\n\r\n", 400, id="http-0.9"),
        pytest.param(b"GET /ping HTTP/0.9\r\n\r\n", 400, id="http-0.9-named"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\n", 505, id="http-2"),
        pytest.param(b"GET /ping HTTP/x\r\n\r\n", 400, id="version"),
        pytest.param(b"GET /pi ng HTTP/1.1\r\n\r\n", 400, id="space-in-target"),
        pytest.param(b"GET /\x00 HTTP/1.1\r\n\r\n", 400, id="nul-in-target"),
        pytest.param(b"GET /ping HTTP/1.1\r\nA : b\r\n\r\n", 400, id="space-before-colon"),
        pytest.param(b"GET /ping HTTP/1.1\r\nno colon\r\n\r\n", 400, id="no-colon"),
        pytest.param(b"GET /ping HTTP/1.1\r\n: b\r\n\r\n", 400, id="no-name"),
        pytest.param(b"GET /ping HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400, id="folded"),
        pytest.param(b"GET /ping HTTP/1.1\r\nA: b\rC: d\r\n\r\n", 400, id="bare-cr"),
        pytest.param(b"GET /ping HTTP/1.1\r\nA: \x00\r\n\r\n", 400, id="nul-in-field"),
        pytest.param(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, id="long-target"),
        pytest.param(b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000, 431, id="long-field"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431, id="many-fields"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, 431, id="endless-fields"),
        pytest.param(post(fields=b"Content-Length: 3\r\n"), 400, id="lengths-differ"),
        pytest.param(post(fields=b"Transfer-Encoding: chunked\r\n"), 400, id="length-and-chunks"),
        *(
            pytest.param(
                b"POST /invocations HTTP/1.1\r\nContent-Length: " + length + b"\r\n\r\n",
                400,
                id=f"length-{length.decode('latin-1')[:9]}",
            )
            for length in (b"-1", b"+1", b"x", b"1_0", b"0x1", b"", b"1.0", b"\xb2", b"9" * 5000)
        ),
        pytest.param(
            b"POST /invocations HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
            id="gzip",
        ),
        pytest.param(
            b"POST /invocations HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n", 501, id="coding"
        ),
        pytest.param(
            b"POST /invocations HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            id="chunks-in-http-1.0",
        ),
        pytest.param(chunked(b"x\r\n"), 400, id="chunk-size-no-number"),
        pytest.param(chunked(b"-1\r\n"), 400, id="chunk-size-negative"),
        pytest.param(chunked(b"0x1\r\na\r\n"), 400, id="chunk-size-prefixed"),
        pytest.param(chunked(b"1\na\r\n"), 400, id="chunk-size-bare-lf"),
        pytest.param(chunked(b"123456789\r\n"), 413, id="chunk-size-long"),
        pytest.param(chunked(b"1;" + b"x" * 300 + b"\r\n"), 400, id="chunk-extension-long"),
        pytest.param(chunked(b"1\r\nab\r\n"), 400, id="chunk-longer-than-size"),
        pytest.param(chunked(b"600001\r\n"), 413, id="chunk-too-large"),
        pytest.param(chunked(b"0\r\nno colon\r\n\r\n"), 400, id="trailer-malformed"),
        pytest.param(chunked(b"0\r\n" + b"A: b\r\n" * 20_000), 431, id="trailers-endless"),
        pytest.param(post(fields=b"Expect: a-cake\r\n"), 417, id="expect-other"),
        pytest.param(
            b"POST /invocations HTTP/1.1\r\nContent-Length: 6291457\r\n\r\n", 413, id="too-large"
        ),
        pytest.param(post(path=b"/nope"), 404, id="unknown-path-with-body"),
    ],
)
def test_refused_request_ends_its_connection(
    service: Service, request_: bytes, status: int
) -> None:
    with service.connect() as connection:
        connection.sendall(request_)
        response = receive(connection)
        assert (response.status, response.fields["connection"]) == (status, "close")
        assert isinstance(response.detail, str)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert service.application.bodies == []
    assert service.ask(PING).status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /invocations HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}",
        b"POST /invocations HTTP/1.1\r\nContent-Le",
        chunked(b"2\r\n{"),
        chunked(b"2\r\n{}\r\n"),
        chunked(b"2\r\n{}\r\n0\r\n"),
    ],
    ids=["body", "head", "chunk", "no-last-chunk", "no-end-of-trailers"],
)
def test_truncated_request_is_not_acted_upon(service: Service, request_: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(receive_all(connection)) == [400]
    assert service.application.bodies == []


@pytest.mark.parametrize(
    ("request_", "body"),
    [
        pytest.param(chunked(b"2\r\n{}\r\n0\r\n\r\n"), b"{}", id="one-chunk"),
        pytest.param(chunked(b"1\r\n{\r\n01 \t;a=b\r\n}\r\n0;x\r\n\r\n"), b"{}", id="extensions"),
        pytest.param(chunked(b"2\r\n{}\r\n0\r\nA: b\r\nC:\r\n\r\n"), b"{}", id="trailers"),
        pytest.param(chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), b"0123456789", id="hex"),
        pytest.param(chunked(b"0\r\n\r\n"), b"", id="no-chunk"),
        pytest.param(
            chunked(b"".join(b"1\r\n%c\r\n" % i for i in range(256)) + b"0\r\n\r\n"),
            bytes(range(256)),
            id="many-chunks",
        ),
        pytest.param(post(b"{}", b"Content-Length: 2\r\n"), b"{}", id="same-length-twice"),
        pytest.param(post(b"{}", b"Content-Length: 2, 2\r\n"), b"{}", id="same-length-in-a-list"),
        pytest.param(
            post(b"x" * 6 * 1024 * 1024), b"x" * 6 * 1024 * 1024, id="as-large-as-allowed"
        ),
        pytest.param(b"\r\n\r\n" + post(), b"{}", id="empty-lines-first"),
        pytest.param(post().replace(b"\r\n", b"\n"), b"{}", id="bare-lf"),
        pytest.param(b"POST /invocations HTTP/1.0\r\n\r\n", b"", id="http-1.0-without-body"),
    ],
)
def test_body_is_received_exactly(service: Service, request_: bytes, body: bytes) -> None:
    assert service.ask(request_).status == 200
    assert service.application.bodies == [body]


def test_connection_is_kept_for_many_requests(service: Service) -> None:
    client = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    got = []
    for method, path, body in [
        ("GET", "/ping", None),
        ("POST", "/invocations", b"{}"),
        ("GET", "/nope", None),
        ("GET", "/ping", b"ignored"),
        ("POST", "/invocations", iter([b"{", b"}"])),
    ]:
        client.request(method, path, body)
        used = client.sock
        response = client.getresponse()
        response.read()
        got.append((response.status, client.sock is used))
    client.close()
    assert got == [(200, True), (200, True), (404, True), (200, True), (200, True)]
    assert service.application.bodies == [b"{}", b"{}"]


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(
            PING + post() + b"HEAD /ping HTTP/1.1\r\n\r\n" + PING.replace(b"p", b"q")
        )
        connection.shutdown(socket.SHUT_WR)
        assert statuses(receive_all(connection)) == [200, 200, 405, 404]


@pytest.mark.parametrize(
    ("version", "field", "kept"),
    [
        ("1.1", "", True),
        ("1.1", "Connection: close\r\n", False),
        ("1.0", "", False),
        ("1.0", "Connection: keep-alive\r\n", True),
    ],
)
def test_connection_is_kept_as_asked(
    service: Service, version: str, field: str, kept: bool
) -> None:
    request = f"GET /ping HTTP/{version}\r\n{field}\r\n".encode()
    with service.connect() as connection:
        connection.sendall(request + request)
        connection.shutdown(socket.SHUT_WR)
        received = receive_all(connection)
    assert statuses(received) == [200] * (2 if kept else 1)
    assert (b"Connection: keep-alive" in received) == kept


def test_100_is_sent_before_the_body_is_read(service: Service) -> None:
    request = post(b"{}", b"Expect: 100-Continue\r\n")
    with service.connect() as connection:
        connection.sendall(request[:-2])
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(request[-2:])
        assert receive(connection).status == 200
    assert service.application.bodies == [b"{}"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /invocations HTTP/1.1\r\nContent-Length: 6291457\r\n", 413),
        (b"POST /nope HTTP/1.1\r\nContent-Length: 2\r\n", 404),
        (b"GET /invocations HTTP/1.1\r\nContent-Length: 2\r\n", 405),
        (b"GET /ping HTTP/1.1\r\n", 200),
    ],
    ids=["too-large", "unknown-path", "wrong-method", "no-body"],
)
def test_no_100_when_the_body_will_not_be_read(service: Service, head: bytes, status: int) -> None:
    assert service.ask(head + b"Expect: 100-continue\r\n\r\n").status == status


def test_http_1_0_gets_no_100(service: Service) -> None:
    request = post(b"{}", b"Expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert service.ask(request).status == 200


def test_client_that_sends_too_much_can_read_the_413(service: Service) -> None:
    client = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    client.request("POST", "/invocations", bytes(20 * 1024 * 1024))
    assert client.getresponse().status == 413
    client.close()


@pytest.mark.parametrize(
    ("limit", "start", "status"),
    [
        ("idle_seconds", b"", None),
        ("head_seconds", b"GET /ping HTTP/1.1\r\n", 408),
        ("body_seconds", b"POST /invocations HTTP/1.1\r\nContent-Length: 9000\r\n\r\n", 408),
        ("body_seconds", chunked(b"9000\r\n"), 408),
        ("idle_seconds", PING, 200),
    ],
    ids=["idle", "head", "body", "chunk", "idle-after-an-answer"],
)
def test_slow_client_is_timed_out(
    serve: Serve, limit: str, start: bytes, status: int | None
) -> None:
    service = serve(linger_seconds=0.1, **{limit: 0.1})
    with service.connect() as connection:
        connection.sendall(start)
        began = time.monotonic()
        received = receive_all(connection)
    assert statuses(received) == ([status] if status else [])
    assert time.monotonic() - began < 5


def test_time_limit_is_a_total_for_a_client_that_trickles(serve: Serve) -> None:
    service = serve(head_seconds=0.3, linger_seconds=0.1)
    received = b""
    with service.connect() as connection:
        connection.settimeout(0.02)
        connection.sendall(b"GET /ping HTTP/1.1\r\nA: ")
        deadline = time.monotonic() + 5
        while not received and time.monotonic() < deadline:
            connection.sendall(b"a")
            try:
                received = connection.recv(1000)
            except TimeoutError:
                pass
    assert statuses(received) == [408]


def compute(gate: threading.Event) -> None:
    while not gate.is_set():
        pass


@pytest.mark.parametrize("work", [threading.Event.wait, compute], ids=["waits", "computes"])
def test_pings_are_prompt_while_an_invocation(
    service: Service, work: Callable[[threading.Event], object]
) -> None:
    service.application.gate.clear()
    service.application.work = work

    def ping(_: int) -> float:
        began = time.monotonic()
        assert service.ask(PING).status == 200
        return time.monotonic() - began

    with service.connect() as invoking, ThreadPoolExecutor(200) as pool:
        invoking.sendall(post())
        poll(lambda: service.application.bodies)
        alone = sorted(map(ping, range(20)))
        together = sorted(pool.map(ping, range(200)))
        service.application.gate.set()
        assert receive(invoking).status == 200
    for name, took in (("one by one", alone), ("200 at once", together)):
        print(f"{name}: median {took[len(took) // 2] * 1000:.1f} ms, p100 {took[-1] * 1000:.1f} ms")
    # The contract's 100 ms; 200 at once, beside whatever else this machine does, may take longer.
    assert alone[len(alone) * 9 // 10] < 0.1
    assert max(alone + together) < 5


def test_threads_take_short_turns_only_while_serving(serve: Serve) -> None:
    usual = sys.getswitchinterval()
    service = serve()
    poll(lambda: sys.getswitchinterval() < usual)
    service.server.shutdown()
    assert sys.getswitchinterval() == usual


def test_deeply_nested_body_does_not_exhaust_the_small_stack(service: Service) -> None:
    service.application.work = lambda _: parse_task(b"[" * 100_000)
    assert service.ask(post()).status == 422


def test_silent_clients_give_their_places_to_new_ones(serve: Serve) -> None:
    service = serve(connections=4, hurry_seconds=0.5)
    service.application.gate.clear()
    with ExitStack() as stack:
        invoking = stack.enter_context(service.connect())
        invoking.sendall(post())
        poll(lambda: service.application.bodies)
        silent = [stack.enter_context(service.connect()) for _ in range(20)]
        assert [service.ask(PING).status for _ in range(10)] == [200] * 10
        assert silent[0].recv(1) == b""
        service.application.gate.set()
        assert receive(invoking).status == 200


def test_accepting_thread_answers_when_all_threads_are_taken(serve: Serve) -> None:
    service = serve(connections=1, hurry_seconds=0.5)
    service.application.gate.clear()
    with service.connect() as invoking:
        invoking.sendall(post())
        poll(lambda: service.application.bodies)
        assert service.ask(PING).fields["connection"] == "close"
        response = service.ask(post())
        assert (response.status, response.detail) == (503, "Another task is running")
        assert service.application.bodies == [b"{}"]
        service.application.gate.set()
        assert receive(invoking).status == 200


def test_accepting_thread_has_no_patience(serve: Serve) -> None:
    service = serve(connections=1, hurry_seconds=0.05)
    service.application.gate.clear()
    with service.connect() as invoking:
        invoking.sendall(post())
        poll(lambda: service.application.bodies)
        with service.connect() as silent:
            began = time.monotonic()
            assert receive_all(silent) == b""
            assert time.monotonic() - began < 5


def test_accepting_thread_answers_when_no_thread_can_start(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(hurry_seconds=0.5)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert [service.ask(request).status for request in (PING, post(), PING)] == [200, 503, 200]
    monkeypatch.undo()
    assert service.ask(post()).status == 200


def test_client_that_goes_away_changes_nothing(service: Service) -> None:
    service.application.gate.clear()
    connection = service.connect()
    connection.sendall(post())
    poll(lambda: service.application.bodies)
    # A reset, so that writing the answer fails.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    service.application.gate.set()

    poll(lambda: service.application.answers)

    assert service.application.finished == 1
    assert service.ask(PING).status == 200


def test_client_that_does_not_read_is_given_up(serve: Serve) -> None:
    service = serve(answer_seconds=0.1)
    service.application.outcome = bytes(32 * 1024 * 1024)
    with service.connect() as connection:
        connection.sendall(post())
        poll(lambda: service.application.answers)


def test_application_is_told_once_it_is_answered(service: Service) -> None:
    for outcome in (RESULT, Busy(), ValueError()):
        service.application.outcome = outcome
        service.ask(post())
    poll(lambda: service.application.answers == 3)


def test_streams_get_nothing_but_json_lines(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    service.application.outcome = ValueError("details")
    for request in (PING, post(), b"\xff\n\n", b"GET /\x1b[31m HTTP/1.1\r\n\r\n"):
        service.ask(request)

    def break_down() -> bool:
        raise RuntimeError("broken down")

    service.application.is_healthy = break_down  # type: ignore[method-assign]
    with service.connect() as connection:
        connection.sendall(PING)
        assert receive_all(connection) == b""
    poll(lambda: "broken down" in service.log.read_text())

    lines = service.log_lines()
    errors = [line["log"] for line in lines if line["level"] == "ERROR"]
    assert '"GET /ping HTTP/1.1" 200 -' in [line["log"] for line in lines]
    assert "ValueError: details" in errors
    assert "RuntimeError: broken down" in errors
    assert {line["internal"] for line in lines} == {True}
    assert capfd.readouterr() == ("", "")


def test_an_error_is_told_once(service: Service) -> None:
    class Told(ShimError):
        """Who raised it has logged it."""

    for outcome in (ValueError("details"), Told("told already")):
        service.application.outcome = outcome
        service.ask(post())
    poll(lambda: service.application.answers == 2)
    errors = [line["log"] for line in service.log_lines() if line["level"] == "ERROR"]
    assert 1 == sum("ValueError: details" in text for text in errors)
    assert 1 == sum("An invocation failed" in text for text in errors)
    assert not [text for text in errors if "told already" in text]


def refuse_and_count(connection: socket.socket, *, pause_seconds: float) -> int:
    """Send a body that is refused, until nobody takes it any more; return how much was taken."""
    connection.sendall(b"POST /invocations HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n")
    taken = 0
    with suppress(ConnectionError):
        while taken < 1 << 30:
            taken += connection.send(bytes(1 << 16))
            time.sleep(pause_seconds)
    return taken


def test_lingering_takes_no_more_than_its_bytes(serve: Serve) -> None:
    service = serve(linger_seconds=60, linger_bytes=4 << 20)
    with service.connect() as connection:
        taken = refuse_and_count(connection, pause_seconds=0)
    assert 4 << 20 <= taken < 100 << 20  # what waits in sockets is taken too


def test_lingering_takes_no_longer_than_its_seconds(serve: Serve) -> None:
    service = serve(linger_seconds=0.5, linger_bytes=1 << 40)
    began = time.monotonic()
    with service.connect() as connection:
        refuse_and_count(connection, pause_seconds=0.02)
    assert 0.4 < time.monotonic() - began < 10


def test_shutdown_is_prompt_and_drain_waits_for_the_answer(serve: Serve) -> None:
    service = serve(idle_seconds=60)
    service.application.gate.clear()
    with service.connect() as idle, service.connect() as invoking:
        idle.sendall(PING)
        assert receive(idle).status == 200
        invoking.sendall(post())
        poll(lambda: service.application.bodies)

        began = time.monotonic()
        service.server.shutdown()
        assert time.monotonic() - began < 0.4
        with pytest.raises(ConnectionRefusedError):
            service.connect()
        assert not service.server.drain(0.05)
        service.application.gate.set()
        assert service.server.drain(10)
        assert receive(invoking).status == 200


def test_closed_connections_are_forgotten(service: Service) -> None:
    for _ in range(3):
        service.ask(PING)
        service.connect().close()
    poll(lambda: service.server._open == 0)
    assert service.server._awaited == {}


_WORDS = st.sampled_from(
    [
        b"GET", b"POST", b"HEAD", b" ", b"/ping", b"/invocations", b"//", b"?", b"HTTP/1.1",
        b"HTTP/1.0", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"Content-Length: ", b"3", b"-1",
        b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: close", b":",
        b"0\r\n\r\n", b"\x00", b"\xff", b"{}", post(), PING, chunked(b""),
    ]
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(garbage=st.one_of(st.binary(max_size=200), st.lists(_WORDS, max_size=15).map(b"".join)))
def test_garbage_is_survived(service: Service, garbage: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        received = receive_all(connection)
    assert received == b"" or received.startswith(b"HTTP/1.1 ")
    assert service.ask(PING).status == 200
    assert [line for line in service.log_lines() if line["level"] == "ERROR"] == []


def test_an_answer_to_head_ends_with_its_head(serve: Serve) -> None:
    service = serve()
    with service.connect() as connection:
        connection.sendall(b"HEAD /none HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = receive_all(connection)
    assert received.startswith(b"HTTP/1.1 404 ") and received.endswith(b"\r\n\r\n")
    assert b"Content-Length: 0" not in received


def test_a_chunk_that_is_longer_than_its_size_is_refused(serve: Serve) -> None:
    service = serve()
    head = b"POST /invocations HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = service.ask(head + b"2\r\n{}XX0\r\n\r\n")
    assert (400, "A chunk is longer than its size") == (response.status, response.detail)
    assert [] == service.application.bodies
