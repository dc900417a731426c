from __future__ import annotations

import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest

from shim.contract.errors import UsageError
from shim.http.errors import CertificateError, RemoteError, TransportError
from shim.http.urls import parse_url
from shim.oci.archive import open_sink, open_source
from shim.oci.auth import Login
from shim.oci.config import PatchOptions
from shim.oci.errors import ImageUnsuitable, RegistryError
from shim.oci.model import Descriptor, Sink, Source
from shim.oci.patcher import Outcome, Target, patch, unpatch
from shim.oci.reference import parse_destination, parse_location, parse_reference
from shim.oci.registry import Registry
from shim.oci.streams import document_blob, pieces
from tests.oci.images import Made, layer, sha256, write_layout
from tests.oci.registries import (
    HTPASSWD,
    LOGIN,
    make_transport,
    needs_registry,
    open_registry,
    serving,
)
from tests.s3_servers import make_certificate

pytestmark = [
    needs_registry,
    pytest.mark.skipif(not shutil.which("skopeo"), reason="needs the Debian package skopeo"),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("open")) as host:
        yield host


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("htpasswd")
    (directory / "htpasswd").write_text(HTPASSWD)
    auth = f'auth:\n  htpasswd:\n    realm: "a realm, with comma"\n    path: {directory}/htpasswd\n'
    with serving(directory, http="  relativeurls: true\n", rest=auth) as host:
        yield host


def patched(source: Source, sink: Sink, binary: Path, **changed: object) -> Outcome:
    return patch(
        source,
        sink,
        platform=("linux", "amd64"),
        target=Target(**({"family": "docker", "workers": 3} | changed)),  # type: ignore[arg-type]
        binary=binary,
        mode=0o500,
        options=PatchOptions(),
        version="1.0",
    )


def push(layout: Path, name: str, *options: str) -> None:
    command = ["skopeo", "copy", "-q", "--dest-tls-verify=false", *options]
    done = subprocess.run([*command, f"oci:{layout}", f"docker://{name}"], capture_output=True)
    assert 0 == done.returncode, done.stderr


def inspect(name: str, *options: str) -> dict[str, object]:
    done = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", *options, f"docker://{name}"],
        capture_output=True,
        text=True,
    )
    assert 0 == done.returncode, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def make(tmp_path: Path) -> Path:
    content = tmp_path.name.encode() * 9999
    layers = [layer("a", content=content), layer("b")]
    return write_layout(tmp_path / "base", Made(layers=layers, zipped=True))


def test_an_image_of_a_registry_is_patched_in_it(
    registry: str, binary: Path, tmp_path: Path
) -> None:
    push(make(tmp_path), f"{registry}/one/base:1")
    outcome = patched(
        open_registry(f"{registry}/one/base:1"), open_registry(f"{registry}/one/base:p"), binary
    )
    digest = f"sha256:{sha256(outcome.image.manifest_bytes)}"
    assert f"{registry}/one/base@{digest}" == outcome.reference
    assert digest == inspect(f"{registry}/one/base:p")["Digest"]
    raw = inspect(f"{registry}/one/base:p", "--raw")
    assert "application/vnd.docker.distribution.manifest.v2+json" == raw["mediaType"]
    config = inspect(f"{registry}/one/base:p", "--config")["config"]
    assert isinstance(config, dict)
    assert ["/sagemaker-shim"] == config["Entrypoint"]
    assert {"exists", "written"} == outcome.sizes.keys()


def test_another_repository_of_a_registry_mounts_the_layers(
    registry: str, binary: Path, tmp_path: Path
) -> None:
    push(make(tmp_path), f"{registry}/two/base:1")
    source = open_registry(f"{registry}/two/base:1")
    outcome = patched(source, open_registry(f"{registry}/two/other:1"), binary)
    assert {"mounted", "written"} == outcome.sizes.keys()
    subprocess.run(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{registry}/two/other:1"]
        + [f"oci:{tmp_path}/copied:x"],
        check=True,
    )


def test_a_second_run_uploads_nothing(registry: str, binary: Path, tmp_path: Path) -> None:
    push(make(tmp_path), f"{registry}/three/base:1")
    source, name = f"{registry}/three/base:1", f"{registry}/three/base:p"
    first = patched(open_registry(source), open_registry(name), binary)
    again = patched(open_registry(source), open_registry(name), binary)
    assert (first.reference, {}) == (again.reference, again.sizes)


def test_another_image_under_the_tag_wants_force(
    registry: str, binary: Path, tmp_path: Path
) -> None:
    push(make(tmp_path), f"{registry}/four/base:1")
    source, name = f"{registry}/four/base:1", f"{registry}/four/base:1"
    with pytest.raises(UsageError, match="--force"):
        patched(open_registry(source), open_registry(name), binary)
    patched(open_registry(source), open_registry(name), binary, force=True)


def test_from_a_layout_and_back(registry: str, binary: Path, tmp_path: Path) -> None:
    name = f"{registry}/five/base:p"
    with open_source(parse_location(str(make(tmp_path)))) as source:
        patched(source, open_registry(name), binary)
    sink = open_sink(parse_destination(f"oci:{tmp_path}/undone:x"))
    outcome = unpatch(
        open_registry(name), sink, platform=("linux", "amd64"), target=Target(family="oci")
    )
    assert outcome.is_identical


def test_who_logs_in_may_push(guarded: str, binary: Path, tmp_path: Path) -> None:
    push(make(tmp_path), f"{guarded}/base:1", "--dest-creds", "alice:pw")
    source = open_registry(f"{guarded}/base:1", login=LOGIN)
    outcome = patched(source, open_registry(f"{guarded}/new/base:1", login=LOGIN), binary)
    found = inspect(f"{guarded}/new/base:1", "--creds", "alice:pw")
    assert outcome.reference == f"{guarded}/new/base@{found['Digest']}"


@pytest.mark.parametrize("login", [None, Login(username="alice", password="secret")])
def test_who_may_not_is_told_so(guarded: str, login: Login | None) -> None:
    with pytest.raises(RegistryError, match="401: UNAUTHORIZED") as caught:
        open_registry(f"{guarded}/base:1", login=login).load("linux", "amd64")
    assert "secret" not in str(caught.value)


def test_an_image_that_is_missing_is_named(registry: str) -> None:
    with pytest.raises(RegistryError, match="/v2/no/such/manifests/1: 404: MANIFEST_UNKNOWN"):
        open_registry(f"{registry}/no/such:1").load("linux", "amd64")


# Behind a token server


def encode_part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class TokenServer(BaseHTTPRequestHandler):
    """Give everybody what they may have: alice all, others what is read."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fields = parse_qs(self.path.partition("?")[2])
        login = self.headers.get("authorization", "")
        self.answer(fields.get("scope", []), fields, is_alice=login == LOGIN.basic)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        fields = parse_qs(body)
        is_alice = fields["refresh_token"] == ["identity"]
        self.answer(fields["scope"][0].split(), fields, is_alice=is_alice)

    def answer(self, scopes: list[str], fields: dict[str, list[str]], *, is_alice: bool) -> None:
        self.server.asked.append((self.command, scopes))
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            granted = [one for one in actions.split(",") if is_alice or one == "pull"]
            access.append({"type": kind, "name": name, "actions": granted})
        now = int(time.time())
        claims = {"iss": "tests", "sub": "", "aud": fields["service"][0], "exp": now + 60}
        claims |= {"nbf": now - 60, "iat": now, "jti": "1", "access": access}
        der = ssl.PEM_cert_to_DER_cert(self.server.certificate.read_text())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        signed = b".".join(encode_part(json.dumps(part).encode()) for part in (header, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", self.server.key]
        signature = subprocess.run(command, input=signed, capture_output=True, check=True).stdout
        token = (signed + b"." + encode_part(signature)).decode()
        body = json.dumps({"token": token, "expires_in": 60}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """Yield the registry and the token server, whose `asked` are (method, scopes)."""
    directory = tmp_path_factory.mktemp("token")
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenServer) as running:
        server: Any = running
        server.asked = []
        server.certificate, server.key = make_certificate(directory, key_form=["rsa:2048"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        auth = (
            f"auth:\n  token:\n    realm: http://127.0.0.1:{server.server_port}/token\n"
            f"    service: tests\n    issuer: tests\n"
            f"    rootcertbundle: {server.certificate}\n"
        )
        with serving(directory / "registry", rest=auth) as host:
            yield host, server
        server.shutdown()


@pytest.mark.parametrize(
    ("login", "method"), [(LOGIN, "GET"), (Login(identity_token="identity"), "POST")]
)
def test_tokens_are_fetched_for_what_is_done(
    tokens: tuple[str, Any], login: Login, method: str, binary: Path, tmp_path: Path
) -> None:
    host, server = tokens
    server.asked.clear()
    with open_source(parse_location(str(make(tmp_path)))) as source:
        patched(source, open_registry(f"{host}/t/base:{method}", login=login), binary)
    assert (method, ["repository:t/base:pull,push"]) in server.asked
    assert len(server.asked) <= 2
    # Anonymously it is there to be read, and to be mounted by who may write.
    open_registry(f"{host}/t/base:{method}").load("linux", "amd64")
    source_ = open_registry(f"{host}/t/base:{method}", login=login)
    outcome = patched(source_, open_registry(f"{host}/t/{method.lower()}:1", login=login), binary)
    assert "mounted" in outcome.sizes


def test_who_may_only_read_is_told_so(
    tokens: tuple[str, Any], binary: Path, tmp_path: Path
) -> None:
    with open_source(parse_location(str(make(tmp_path)))) as source:
        with pytest.raises(RegistryError, match="401: UNAUTHORIZED"):
            patched(source, open_registry(f"{tokens[0]}/t/denied:1"), binary)


# Behind TLS


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = make_certificate(directory)
    tls = f"  tls:\n    certificate: {certificate}\n    key: {key}\n"
    with serving(directory, http=tls) as host:
        yield host, certificate


def test_an_authority_of_ones_own_is_trusted(
    secure: tuple[str, Path], binary: Path, tmp_path: Path
) -> None:
    host, certificate = secure
    with open_source(parse_location(str(make(tmp_path)))) as source:
        sink = open_registry(f"{host}/tls:1", SSL_CERT_FILE=str(certificate))
        outcome = patched(source, sink, binary)
    assert outcome.reference


def test_a_certificate_that_is_not_trusted_is_no_reason_for_http(secure: tuple[str, Path]) -> None:
    with pytest.raises(CertificateError):
        open_registry(f"{secure[0]}/tls:1").load("linux", "amd64")


# What answers wrongly


class Answers(BaseHTTPRequestHandler):
    """Answer as the test says: by (method, path without /v2/a/), in turn."""

    server: Any
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/v2/a/")
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        planned = self.server.plan.get((self.command, path), [(404, {}, b"")])
        status, fields, body = planned.pop(0) if len(planned) > 1 else planned[0]
        is_early = fields.get("connection") == "close"
        self.rfile.read(1000 if is_early else int(self.headers.get("content-length") or 0))
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        length = fields.get("content-length", str(len(body)))
        for name, value in {**fields, "content-length": length}.items():
            self.send_header(name, value.replace("PORT", str(self.server.server_port)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if int(length) > len(body):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        found: Any = running
        found.plan, found.asked = {}, []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def reach(server: Any) -> Registry:
    reference = parse_reference(f"127.0.0.1:{server.server_port}/a:1")
    return Registry(reference, transport=make_transport(), login=LOGIN, sleep=lambda _: None)


CONTENT = bytes(range(256)) * 4000
DESCRIPTOR = Descriptor(media_type="x", digest=f"sha256:{sha256(CONTENT)}", size_bytes=len(CONTENT))
BLOB_PATH = f"blobs/{DESCRIPTOR.digest}"


def download(server: Any) -> bytes:
    return b"".join(pieces(reach(server).blob(DESCRIPTOR).open(0)))


def test_a_download_that_breaks_off_goes_on_where_it_was(server: Any) -> None:
    whole = {"content-length": str(len(CONTENT))}
    rest = {"content-length": str(len(CONTENT) - 300_000)}
    server.plan["GET", BLOB_PATH] = [
        (200, whole, CONTENT[:300_000]),
        (206, rest, CONTENT[300_000:]),
    ]
    assert CONTENT == download(server)
    assert ["bytes=300000-"] == [f["range"] for _, _, f in server.asked if "range" in f]


def test_a_server_without_ranges_is_read_again(server: Any) -> None:
    whole = {"content-length": str(len(CONTENT))}
    server.plan["GET", BLOB_PATH] = [(200, whole, CONTENT[:300_000]), (200, {}, CONTENT)]
    assert CONTENT == download(server)


@pytest.mark.parametrize("body", [CONTENT[:-1], CONTENT + b"x", CONTENT[::-1]])
def test_a_wrong_blob_is_refused(server: Any, body: bytes) -> None:
    server.plan["GET", BLOB_PATH] = [(200, {}, body)]
    with pytest.raises(RegistryError, match="expected|is not that of"):
        download(server)


def test_a_redirect_gets_no_login(server: Any) -> None:
    ask = {"www-authenticate": 'Basic realm="x"'}
    server.plan["GET", BLOB_PATH] = [
        (401, ask, b""),
        (307, {"location": "http://localhost:PORT/elsewhere?signature=secret"}, b""),
    ]
    server.plan["GET", "/elsewhere"] = [(200, {}, CONTENT)]
    assert CONTENT == download(server)
    logins = [("Authorization" in f or "authorization" in f) for _, _, f in server.asked]
    assert [False, True, False] == logins


@pytest.mark.parametrize(
    "location", ["https://10.0.0.1/x", "https://169.254.169.254/", "http://r.test/"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_registry_of_the_internet_sends_us_to_no_inner_door(
    method: str, location: str, monkeypatch: pytest.MonkeyPatch, server: Any
) -> None:
    """Nor does it have us send anything in the clear."""
    reached = reach(server)
    monkeypatch.setattr(reached, "_base", parse_url("https://registry.test"))
    answer = reached._transport.ask
    here = f"http://127.0.0.1:{server.server_port}"
    asked = []

    def ask(method: str, url: str, *rest: Any, **options: Any) -> Any:
        asked.append(url)
        return answer(method, url.replace("https://registry.test", here), *rest, **options)

    monkeypatch.setattr(reached._transport, "ask", ask)
    server.plan["GET", BLOB_PATH] = [(307, {"location": location}, b"")]
    server.plan["POST", "blobs/uploads/"] = [(202, {"location": location}, b"")]
    with pytest.raises(RegistryError, match="private address|plain HTTP"):
        if method == "GET":
            reached.blob(DESCRIPTOR).open(0).read(1)
        else:
            reached.place(document_blob(CONTENT, "x"))
    assert {"registry.test"} == {parse_url(url).host for url in asked}


def test_storage_is_not_asked_whether_it_has_a_blob(server: Any) -> None:
    """What it signs is good for GET alone."""
    server.plan["HEAD", BLOB_PATH] = [(307, {"location": "/elsewhere"}, b"")]
    with reach(server) as sink:
        assert "exists" == sink.place(document_blob(CONTENT, "x"))
    assert [("HEAD", f"/v2/a/{BLOB_PATH}")] == [asked[:2] for asked in server.asked]


def test_what_is_of_the_repository_is_not_asked_for(server: Any) -> None:
    blob = reach(server).blob(DESCRIPTOR)
    with reach(server) as sink:
        assert "exists" == sink.place(blob)
    assert [] == [path for _, path, _ in server.asked if "blobs" in path]


def test_redirects_that_never_end_are_given_up(server: Any) -> None:
    server.plan["GET", BLOB_PATH] = [(302, {"location": "/v2/a/" + BLOB_PATH}, b"")]
    with pytest.raises(RegistryError, match="in circles"):
        download(server)


def test_what_is_said_holds_no_signature(server: Any) -> None:
    server.plan["GET", BLOB_PATH] = [(302, {"location": "/v2/x?signature=secret"}, b"")]
    with pytest.raises(RegistryError) as caught:
        download(server)
    assert "secret" not in str(caught.value)


def test_what_is_said_holds_nothing_that_was_sent(server: Any) -> None:
    packed = LOGIN.basic.removeprefix("Basic ")
    echo = {"errors": [{"code": "DENIED", "message": f"not {packed}, not 'pw', not TOKEN"}]}
    server.plan["GET", "manifests/1"] = [
        (401, {"www-authenticate": 'Bearer realm="http://127.0.0.1:PORT/token"'}, b""),
        (403, {}, json.dumps(echo).encode()),
    ]
    server.plan["GET", "/token"] = [(200, {}, b'{"token": "TOKEN"}')]
    with pytest.raises(RegistryError) as caught:
        reach(server).load("linux", "amd64")
    assert "403: DENIED: not ***, not '***', not ***" in str(caught.value)


def test_what_answers_no_tls_with_silence_is_not_asked_without(tmp_path: Path) -> None:
    """Only a refusal or an answer in the clear says that nobody speaks TLS there."""
    asked = []

    def hang_up() -> None:
        with listener, suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    asked.append(client.recv(3))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(TransportError):
            open_registry(f"127.0.0.1:{port}/a:1").load("linux", "amd64")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert {b"\x16\x03\x01"} == set(asked)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_registry_is_asked_again(server: Any, status: int) -> None:
    server.plan["GET", BLOB_PATH] = [(status, {"retry-after": "1"}, b"no"), (200, {}, CONTENT)]
    assert CONTENT == download(server)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("45", 45.0), ("3600", 60.0), ("%s GMT", 30.0), ("%s -0000", 1.0), ("tomorrow", 1.0)],
)
def test_a_busy_registry_gets_the_time_it_asks_for(server: Any, asked: str, seconds: float) -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S", time.gmtime(time.time() + 30))
    fields = {"retry-after": asked.replace("%s", soon)}
    server.plan["GET", "manifests/1"] = [(429, fields, b""), (404, {}, b"")]
    waited: list[float] = []
    reference = parse_reference(f"127.0.0.1:{server.server_port}/a:1")
    registry = Registry(reference, transport=make_transport(), sleep=waited.append)
    with pytest.raises(RegistryError, match="404"):
        registry.load("linux", "amd64")
    assert seconds - 2 < sum(waited) <= seconds


def test_an_upload_that_fails_is_begun_anew(server: Any) -> None:
    server.plan["POST", "blobs/uploads/"] = [(202, {"location": "/v2/a/upload?state=1"}, b"")]
    server.plan["PUT", "upload"] = [(500, {}, b""), (201, {}, b"")]
    blob = document_blob(CONTENT, "x")
    with reach(server) as sink:
        assert "written" == sink.place(blob)
    posts = [path for method, path, _ in server.asked if method == "POST"]
    assert 2 == len(posts)
    (_, put, _), *_ = [one for one in server.asked if one[0] == "PUT"]
    assert f"/v2/a/upload?state=1&digest={DESCRIPTOR.digest}" == put


EARLY = {"connection": "close"}


@pytest.mark.parametrize(
    "failure",
    [
        (0, EARLY, b""),
        (401, EARLY | {"www-authenticate": 'Basic realm="x"'}, b""),
        (503, EARLY, b""),
        (404, EARLY, b'{"errors":[{"code":"BLOB_UPLOAD_INVALID"}]}'),
    ],
    ids=["cut", "401", "503", "gone"],
)
def test_an_upload_that_is_broken_off_is_begun_anew_or_named(server: Any, failure: Any) -> None:
    """The registry answers, or hangs up, while the body is still being sent."""
    server.plan["POST", "blobs/uploads/"] = [(202, {"location": "/v2/a/upload"}, b"")]
    server.plan["PUT", "upload"] = [failure, (201, {}, b"")]
    body = CONTENT * 20
    with reach(server) as sink:
        if failure[0] == 404:
            with pytest.raises(RegistryError, match="BLOB_UPLOAD_INVALID"):
                sink.place(document_blob(body, "x"))
        else:
            assert "written" == sink.place(document_blob(body, "x"))


@pytest.mark.parametrize("status", [202, 401, 405])
def test_a_mount_that_is_refused_becomes_an_upload(server: Any, status: int) -> None:
    server.plan["GET", BLOB_PATH] = [(200, {}, CONTENT)]
    server.plan["POST", "blobs/uploads/"] = [
        (status, {"location": "/v2/a/upload", "www-authenticate": 'Basic realm="x"'}, b""),
        (202, {"location": "/v2/a/upload"}, b""),
    ]
    server.plan["PUT", "upload"] = [(201, {}, b"")]
    host = f"127.0.0.1:{server.server_port}"
    blob = replace(reach(server).blob(DESCRIPTOR), origin=(host, "other"))
    with reach(server) as sink:
        assert "written" == sink.place(blob)
    posts = [path for method, path, _ in server.asked if method == "POST"]
    assert f"/v2/a/blobs/uploads/?mount={DESCRIPTOR.digest}&from=other" == posts[0]
    if status == 202:  # it is a session already
        assert 1 == len(posts)


def test_an_upload_elsewhere_gets_no_login(server: Any) -> None:
    location = {"location": "http://localhost:PORT/up?signature=secret"}
    server.plan["POST", "blobs/uploads/"] = [
        (401, {"www-authenticate": 'Basic realm="x"'}, b""),
        (202, location, b""),
    ]
    server.plan["PUT", "/up"] = [(201, {}, b"")]
    with reach(server) as sink:
        assert "written" == sink.place(document_blob(CONTENT, "x"))
    assert ["PUT"] == [m for m, path, f in server.asked if path.startswith("/up")]
    logins = {m: "authorization" in {*map(str.lower, f)} for m, _, f in server.asked}
    assert (True, False) == (logins["POST"], logins["PUT"])


def test_the_location_of_a_proxy_that_takes_off_the_tls_is_put_right(server: Any) -> None:
    reached = reach(server)
    reached._base = parse_url("https://registry.test")
    answer = SimpleNamespace(
        url="https://registry.test/v2/a/", headers={"location": "http://registry.test/v2/u?x=1"}
    )
    assert "https://registry.test/v2/u?x=1" == reached._location(answer)  # type: ignore[arg-type]


def test_a_registry_that_never_has_time_is_given_up_soon(server: Any) -> None:
    server.plan["POST", "blobs/uploads/"] = [(503, {}, b"")]
    with reach(server) as sink, pytest.raises(RegistryError, match="503"):
        sink.place(document_blob(CONTENT, "x"))
    assert 4 == len([path for method, path, _ in server.asked if method == "POST"])


def test_a_registry_that_takes_no_whole_layer_gets_parts(server: Any) -> None:
    server.plan["POST", "blobs/uploads/"] = [(202, {"location": "/v2/a/upload"}, b"")]
    server.plan["PUT", "upload"] = [(413, {}, b""), (201, {}, b"")]
    server.plan["PATCH", "upload"] = [(202, {"location": "/v2/a/upload"}, b"")]
    body = CONTENT * 9
    with reach(server) as sink:
        assert "written" == sink.place(document_blob(body, "x"))
    ranges = [f["content-range"] for _, _, f in server.asked if "content-range" in f]
    step = 4 << 20
    assert [f"0-{step - 1}", f"{step}-{2 * step - 1}", f"{2 * step}-{len(body) - 1}"] == ranges


MANIFEST = Made(zipped=True).manifest(docker=True)


@pytest.mark.parametrize(
    ("status", "fields", "body", "said"),
    [
        (200, {"docker-content-digest": f"sha256:{'0' * 64}"}, MANIFEST, "is not that of"),
        (200, {}, b"<html>", "manifest"),
        (200, {"content-type": "application/vnd.docker.distribution.manifest.v1+json"},
         b'{"schemaVersion":1}', "schema 1"),
        (200, {}, b" " * (5 << 20), "longer than"),
        (404, {}, b"<html>", "404: Not Found"),
        (403, {}, b'{"errors":[{"code":"DENIED","message":"no"}]}', "403: DENIED: no"),
    ],
)  # fmt: skip
def test_manifests_that_are_none_are_refused(
    server: Any, status: int, fields: dict[str, str], body: bytes, said: str
) -> None:
    server.plan["GET", "manifests/1"] = [(status, fields, body)]
    with pytest.raises((RemoteError, ImageUnsuitable), match=said):
        reach(server).load("linux", "amd64")
