"""An S3 server in memory that is as strict as S3 where other test servers are not.

It verifies signatures with botocore, SHA-256, CRC32 and MD5 of bodies, part sizes, and the rules
that tie the checksums of a multipart upload together; it lists 1,000 keys a page at most. Faults
are scripted: each is a function of the exchange that has the next request to itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import socketserver
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/\d{8}/(?P<region>[^/]+)/(?P<service>[^/]+)"
    r"/aws4_request, SignedHeaders=(?P<headers>[^,]+), Signature=(?P<signature>[0-9a-f]{64})"
)
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@dataclass(frozen=True, kw_only=True)
class Object:
    """A stored object; parts is 0 unless it was uploaded in parts."""

    body: bytes
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: int = 0

    @property
    def etag(self) -> str:
        """As S3 makes it: the MD5, for parts with their number behind it."""
        suffix = f"-{self.parts}" if self.parts else ""
        return '"' + hashlib.md5(self.body).hexdigest() + suffix + '"'

    @property
    def crc32(self) -> str:
        """The checksum as a GET tells it."""
        value = encode_crc32(self.body)
        return f"{value}-{self.parts}" if self.parts else value


@dataclass
class MultipartUpload:
    """An upload that was begun and not yet completed."""

    bucket: str
    key: str
    has_checksums: bool
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request as it arrived; connection numbers the socket that it came over."""

    operation: str
    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    connection: int
    region: str


Fault = Callable[["Exchange"], None]


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str, message: str = "No", extra: str = "") -> None:
        super().__init__(status, code, message, extra)
        self.status, self.code, self.message, self.extra = status, code, message, extra


def encode_crc32(body: bytes) -> str:
    return base64.b64encode(struct.pack(">I", zlib.crc32(body))).decode()


class S3Double(socketserver.ThreadingTCPServer):
    """The server; use it as a context manager."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        credentials: Mapping[str, str],
        tls: ssl.SSLContext | None = None,
        region: str = "eu-central-1",
        skew_seconds: float = 0,
        smallest_part: int = 5 << 20,
    ) -> None:
        """credentials: secret keys by access key."""
        super().__init__(("127.0.0.1", 0), Exchange)
        self.credentials, self.tls, self.region = dict(credentials), tls, region
        self.clock_skew, self.smallest_part = timedelta(seconds=skew_seconds), smallest_part
        self.buckets: dict[str, dict[str, Object]] = {}
        self.uploads: dict[str, MultipartUpload] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.always: Fault = work  # where no fault is scripted
        self.page_size = 1000
        self.most_active = self.active = self.connections = self.begun = 0
        self.lock = threading.RLock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}"

    def operations(self) -> list[str]:
        """The operations asked for so far, in order."""
        return [seen.operation for seen in self.seen]

    def __enter__(self) -> S3Double:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: clients that break off are part of the tests."""


class Exchange(BaseHTTPRequestHandler):
    """One connection, one request after the other."""

    protocol_version = "HTTP/1.1"
    server: S3Double
    wbufsize = 0
    disable_nagle_algorithm = True

    def setup(self) -> None:
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()
        with self.server.lock:
            self.server.connections += 1
            self.number = self.server.connections

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _respond(self) -> None:
        server = self.server
        self.target = self.requestline.split(" ")[1]
        path, _, query = self.target.partition("?")
        _, bucket, *key = path.split("/", 2)
        self.bucket, self.key = unquote(bucket), unquote("".join(key))
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.fields = {name.lower(): value for name, value in self.headers.items()}
        self.operation = self._operation()
        self.is_body_read = False
        match = _AUTHORIZATION.fullmatch(self.fields.get("authorization", ""))
        with server.lock:
            server.seen.append(
                Seen(
                    operation=self.operation,
                    method=self.command,
                    bucket=self.bucket,
                    key=self.key,
                    query=self.query,
                    headers=dict(self.fields),
                    connection=self.number,
                    region=match["region"] if match else "",
                )
            )
            fault = server.faults.pop(0) if server.faults else server.always
            server.active += 1
            server.most_active = max(server.active, server.most_active)
        try:
            fault(self)
        finally:
            with server.lock:
                server.active -= 1

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _respond

    def _operation(self) -> str:
        if self.command == "POST":
            return "CreateMultipartUpload" if "uploads" in self.query else "CompleteMultipartUpload"
        return {
            "GET": "GetObject" if self.key else "ListObjectsV2",
            "HEAD": "HeadObject" if self.key else "HeadBucket",
            "PUT": "UploadPart" if "partNumber" in self.query else "PutObject",
            "DELETE": "AbortMultipartUpload" if "uploadId" in self.query else "DeleteObject",
        }[self.command]

    def body(self) -> bytes:
        """Read the request's body, once."""
        assert not self.is_body_read
        self.is_body_read = True
        return self.rfile.read(int(self.fields.get("content-length", 0)))

    def answer(self) -> None:
        """Do what was asked for, or say why not."""
        try:
            body = self.body()
            self._verify(body)
            getattr(self, f"_{self.operation}")(body)
        except Refusal as refusal:
            self.refuse(refusal.status, refusal.code, refusal.message, extra=refusal.extra)

    def refuse(
        self,
        status: int,
        code: str = "",
        message: str = "No",
        *,
        headers: Mapping[str, str] | None = None,
        extra: str = "",
    ) -> None:
        """Send an error answer; without a code it has no body."""
        if not self.is_body_read:
            self.body()
        document = (
            f"<Error><Code>{code}</Code><Message>{message}</Message>{extra}"
            "<RequestId>REQUEST1</RequestId><HostId>HOST1</HostId></Error>"
            if code
            else ""
        )
        self.send(status, document.encode(), headers)

    def send(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Send an answer; length: what Content-Length says instead of the truth."""
        now = datetime.now(UTC) + self.server.clock_skew
        fields = {
            "Date": format_datetime(now, usegmt=True),
            "Content-Length": str(len(body) if length is None else length),
            **(headers or {}),
        }
        head = [f"HTTP/1.1 {status} {self.responses.get(status, ('Other',))[0]}"]
        head += [f"{name}: {value}" for name, value in fields.items()]
        data = "\r\n".join([*head, "", ""]).encode("latin-1")
        self.wfile.write(data if self.command == "HEAD" else data + body)

    def drop(self, *, reset: bool = False) -> None:
        """End the connection without another word."""
        if reset:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
        else:
            self.request.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _verify(self, body: bytes) -> None:
        """Refuse what S3 would refuse before it looks at the operation."""
        match = _AUTHORIZATION.fullmatch(self.fields.get("authorization", ""))
        if not match:
            raise Refusal(403, "AccessDenied")
        secret = self.server.credentials.get(match["key"])
        if secret is None:
            raise Refusal(403, "InvalidAccessKeyId")
        signed = match["headers"].split(";")
        unsigned = [n for n in self.fields if n.startswith("x-amz-") and n not in signed]
        if unsigned or "host" not in signed:
            raise Refusal(403, "AccessDenied", f"There were headers not signed: {unsigned}")
        if match["region"] != self.server.region:
            raise Refusal(
                400,
                "AuthorizationHeaderMalformed",
                "The region is wrong",
                extra=f"<Region>{self.server.region}</Region>",
            )
        amz_date = self.fields["x-amz-date"]
        sent_at = datetime.strptime(amz_date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(sent_at - datetime.now(UTC) - self.server.clock_skew) > timedelta(minutes=15):
            raise Refusal(403, "RequestTimeTooSkewed")
        request = AWSRequest(
            method=self.command,
            url=f"{self.server.url}{self.target}",
            headers={name: self.fields[name] for name in signed},
        )
        request.context["timestamp"] = amz_date
        auth = S3SigV4Auth(Credentials(match["key"], secret), match["service"], match["region"])
        text = auth.string_to_sign(request, auth.canonical_request(request))
        if auth.signature(text, request) != match["signature"]:
            raise Refusal(403, "SignatureDoesNotMatch")
        self._verify_body(body)

    def _verify_body(self, body: bytes) -> None:
        payload_hash = self.fields["x-amz-content-sha256"]
        is_free = payload_hash == "UNSIGNED-PAYLOAD" and self.server.tls
        if not is_free and payload_hash != hashlib.sha256(body).hexdigest():
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        checks = {
            "x-amz-checksum-crc32": encode_crc32(body),
            "content-md5": base64.b64encode(hashlib.md5(body).digest()).decode(),
        }
        for name, value in checks.items():
            if self.fields.get(name, value) != value:
                raise Refusal(400, "BadDigest")
        if "transfer-encoding" in self.fields or self.fields.get("accept-encoding") != "identity":
            raise Refusal(501, "NotImplemented")

    def _objects(self) -> dict[str, Object]:
        if self.bucket not in self.server.buckets:
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist")
        return self.server.buckets[self.bucket]

    def _object(self) -> Object:
        try:
            return self._objects()[self.key]
        except KeyError:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.") from None

    def _describe(self, found: Object) -> dict[str, str]:
        headers = {"ETag": found.etag, "Accept-Ranges": "bytes", "x-amz-request-id": "REQUEST1"}
        return headers | {f"x-amz-meta-{name}": value for name, value in found.metadata.items()}

    def _HeadBucket(self, _: bytes) -> None:
        self._objects()
        self.send(200, b"", {"x-amz-bucket-region": self.server.region})

    def _DeleteObject(self, _: bytes) -> None:
        self._objects().pop(self.key, None)
        self.send(204)

    def _HeadObject(self, _: bytes) -> None:
        try:
            found = self._object()
        except Refusal as refusal:
            self.send(refusal.status, length=243)
        else:
            self.send(200, b"", self._describe(found), length=len(found.body))

    def _GetObject(self, _: bytes) -> None:
        found = self._object()
        headers = self._describe(found)
        if self.fields.get("if-match", found.etag) != found.etag:
            raise Refusal(412, "PreconditionFailed")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.fields.get("range", ""))
        if not wanted:
            if self.fields.get("x-amz-checksum-mode") == "ENABLED":
                headers["x-amz-checksum-crc32"] = found.crc32
            self.send(200, found.body, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(found.body) - 1)
        if first > last:
            raise Refusal(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(found.body)}"
        self.send(206, found.body[first : last + 1], headers)

    def _PutObject(self, body: bytes) -> None:
        prefix = "x-amz-meta-"
        metadata = {n[len(prefix) :]: v for n, v in self.fields.items() if n.startswith(prefix)}
        stored = self._objects()[self.key] = Object(body=body, metadata=metadata)
        self.send(200, b"", {"ETag": stored.etag})

    def _CreateMultipartUpload(self, _: bytes) -> None:
        self._objects()
        algorithm = self.fields.get("x-amz-checksum-algorithm", "")
        with self.server.lock:
            self.server.begun += 1
            upload_id = f"upload/+={self.server.begun}"
            self.server.uploads[upload_id] = MultipartUpload(
                bucket=self.bucket, key=self.key, has_checksums=algorithm == "CRC32"
            )
        self._send_xml(
            "<InitiateMultipartUploadResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
        )

    def _upload(self) -> MultipartUpload:
        upload = self.server.uploads.get(self.query["uploadId"])
        if upload is None or (upload.bucket, upload.key) != (self.bucket, self.key):
            raise Refusal(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload

    def _UploadPart(self, body: bytes) -> None:
        upload = self._upload()
        if ("x-amz-checksum-crc32" in self.fields) != upload.has_checksums:
            raise Refusal(400, "InvalidRequest", "Checksum Type mismatch occurred")
        upload.parts[int(self.query["partNumber"])] = body
        headers = {"ETag": Object(body=body).etag}
        if upload.has_checksums:
            headers["x-amz-checksum-crc32"] = encode_crc32(body)
        self.send(200, b"", headers)

    def _CompleteMultipartUpload(self, body: bytes) -> None:
        upload = self._upload()
        listed = []
        for part in ElementTree.fromstring(body).iter(f"{_NAMESPACE}Part"):
            number = int(part.findtext(f"{_NAMESPACE}PartNumber", ""))
            data = upload.parts.get(number)
            if data is None or part.findtext(f"{_NAMESPACE}ETag") != Object(body=data).etag:
                raise Refusal(400, "InvalidPart")
            expected = encode_crc32(data) if upload.has_checksums else None
            if part.findtext(f"{_NAMESPACE}ChecksumCRC32") != expected:
                raise Refusal(400, "InvalidRequest", "The checksum of each part must be included")
            listed.append((number, data))
        if listed != sorted(listed) or len(listed) > 10_000:
            raise Refusal(400, "InvalidPartOrder")
        if any(len(data) < self.server.smallest_part for _, data in listed[:-1]):
            raise Refusal(400, "EntityTooSmall")
        whole = b"".join(data for _, data in listed)
        if int(self.fields.get("x-amz-mp-object-size", len(whole))) != len(whole):
            raise Refusal(400, "InvalidRequest", "The object's size is another")
        del self.server.uploads[self.query["uploadId"]]
        self._objects()[self.key] = Object(body=whole, parts=len(listed))
        self._send_xml("<CompleteMultipartUploadResult/>", before="\n\n ")

    def _AbortMultipartUpload(self, _: bytes) -> None:
        self._upload()
        del self.server.uploads[self.query["uploadId"]]
        self.send(204)

    def _ListObjectsV2(self, _: bytes) -> None:
        if self.query.get("list-type") != "2":
            raise Refusal(501, "NotImplemented")
        is_encoded = self.query.get("encoding-type") == "url"
        after = base64.b64decode(self.query.get("continuation-token", "")).decode()
        prefix = self.query.get("prefix", "")
        keys = sorted(
            (key for key in self._objects() if key.startswith(prefix) and key > after),
            key=str.encode,
        )
        page = keys[: min(1000, self.server.page_size, int(self.query.get("max-keys", 1000)))]
        lines = ["<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"]
        lines += ["<EncodingType>url</EncodingType>"] if is_encoded else []
        lines.append(f"<IsTruncated>{str(page != keys).lower()}</IsTruncated>")
        for key in page:
            name = quote(key).replace("%20", "+") if is_encoded else escape(key)
            size = len(self._objects()[key].body)
            lines.append(f"<Contents><Key>{name}</Key><Size>{size}</Size></Contents>")
        if page != keys:
            token = base64.b64encode(page[-1].encode()).decode()
            lines.append(f"<NextContinuationToken>{token}</NextContinuationToken>")
        self._send_xml("".join([*lines, "</ListBucketResult>"]))

    def _send_xml(self, document: str, *, before: str = "") -> None:
        self.send(200, f'{before}<?xml version="1.0" encoding="UTF-8"?>\n{document}'.encode())


def refuse(status: int, code: str = "", **options: object) -> Fault:
    """Answer with an error."""
    return lambda exchange: exchange.refuse(status, code, **options)  # type: ignore[arg-type]


def drop(*, reset: bool = False) -> Fault:
    """End the connection instead of an answer, after the request was read."""

    def fault(exchange: Exchange) -> None:
        exchange.body()
        exchange.drop(reset=reset)

    return fault


def work(exchange: Exchange) -> None:
    """Do nothing special."""
    exchange.answer()


def lose_answer(exchange: Exchange) -> None:
    """Do what was asked for, and end the connection instead of saying so."""
    real = exchange.wfile
    exchange.wfile = _Nowhere()  # type: ignore[assignment]
    exchange.answer()
    exchange.wfile = real
    exchange.drop()


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def truncate(after: int) -> Fault:
    """Answer, but end the connection after so many bytes of the body."""

    def fault(exchange: Exchange) -> None:
        send = exchange.send

        def send_less(
            status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
        ) -> None:
            send(status, body[:after], headers, length=len(body))
            exchange.drop()

        exchange.send = send_less  # type: ignore[method-assign, assignment]
        exchange.answer()

    return fault


def ignore(*names: str) -> Fault:
    """Answer as if header fields had not been sent."""

    def fault(exchange: Exchange) -> None:
        body = exchange.body()
        exchange._verify(body)
        for name in names:
            exchange.fields.pop(name, None)
        getattr(exchange, f"_{exchange.operation}")(body)

    return fault


def send_chunked(*, after: int | None = None, chunk_bytes: int = 1000) -> Fault:
    """Answer without a length, in chunks; after: end the connection after so many bytes."""

    def fault(exchange: Exchange) -> None:
        def send(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
            fields = {"Transfer-Encoding": "chunked", **(headers or {})}
            head = [f"HTTP/1.1 {status} Sent"] + [f"{n}: {v}" for n, v in fields.items()]
            exchange.wfile.write("\r\n".join([*head, "", ""]).encode())
            sent = body if after is None else body[:after]
            for start in range(0, len(sent), chunk_bytes):
                piece = sent[start : start + chunk_bytes]
                exchange.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if after is None:
                exchange.wfile.write(b"0\r\nA-Trailer: x\r\n\r\n")
            else:
                exchange.drop()

        exchange.send = send  # type: ignore[method-assign, assignment]
        try:
            exchange.answer()
        finally:
            del exchange.send

    return fault


def answer_with(change: Callable[[int, bytes, dict[str, str]], tuple[int, bytes]]) -> Fault:
    """Answer, but let a function change status, body and header fields before."""

    def fault(exchange: Exchange) -> None:
        send = exchange.send

        def send_changed(
            status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
        ) -> None:
            fields = dict(headers or {})
            status, body = change(status, body, fields)
            send(status, body, fields)

        exchange.send = send_changed  # type: ignore[method-assign, assignment]
        try:
            exchange.answer()
        finally:
            del exchange.send

    return fault
