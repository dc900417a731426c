"""A strict double of the endpoint from which ECS and EKS containers get their credentials."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client sent; the names of the header fields in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


Answer = tuple[int, bytes]


class RecordingServer:
    """An HTTP server on 127.0.0.1 that keeps what it was asked."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.requests: list[Request] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                request = Request(method=self.command, path=self.path, headers=headers, body=body)
                requests.append(request)
                status, content = answer(request)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> RecordingServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass(kw_only=True)
class ContainerCredentials:
    """Answers one path, to those who know the token; failures are handed out first."""

    path: str = "/v1/credentials"
    token: str | None = None
    failures: list[Answer] = field(default_factory=list)
    expiration: datetime = field(default_factory=lambda: datetime.now(UTC) + timedelta(hours=6))
    handed_out: int = 0

    def __call__(self, request: Request) -> Answer:
        if self.failures:
            return self.failures.pop(0)
        if request.method != "GET" or request.path != self.path:
            return 404, b'{"code": "NotFound", "message": "no such credentials"}'
        if request.headers.get("accept") != "application/json" or request.body:
            return 400, b'{"code": "InvalidRequest", "message": "not what an SDK sends"}'
        if request.headers.get("authorization") != self.token:
            return 401, b'{"code": "AccessDenied", "message": "another token"}'
        self.handed_out += 1
        return 200, json.dumps(
            {
                "RoleArn": "arn:aws:iam::123456789012:role/task",
                "AccessKeyId": f"CONTAINER{self.handed_out}",
                "SecretAccessKey": "hidden-container-secret",
                "Token": "hidden-container-token/+=",
                "Expiration": self.expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        ).encode()
