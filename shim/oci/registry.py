"""A registry as source and sink: distribution-spec.md, over the client that S3 has too.

Rule 1: the Authorization header goes to the registry's own origin, and nowhere else; where it sends
us is no place that it could not reach itself.
Rule 2: what is received counts only when size and digest are those that were asked for.
Rule 3: an upload that failed is begun anew, from HEAD on: its session is dead.
Rule 4: a location may hold a signature: it is never shown. An answer may hold what we sent: it is
shown without.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from shim.http.attempts import Attempts, Policy, delay_seconds
from shim.http.connection import Response
from shim.http.errors import CertificateError, TransportError
from shim.http.stream import pause
from shim.http.transport import Transport
from shim.http.urls import Url, parse_url
from shim.oci import auth, mutate
from shim.oci.auth import Login, Token
from shim.oci.errors import RegistryError
from shim.oci.gojson import MAX_DOCUMENT_BYTES
from shim.oci.model import Blob, Descriptor, Image
from shim.oci.reference import Reference
from shim.oci.streams import PieceReader, describe, read_document, verified_blob

MOST_ATTEMPTS = 4
MOST_REDIRECTS = 5
MOST_RESUMES = 20
ANSWER_LIMIT_BYTES = 64 << 10
CHUNK_BYTES = 4 << 20  # GHCR refuses larger ones
BLOCK_BYTES = 1 << 18
RETRIED = (408, 429, 499, 500, 502, 503, 504, 522)
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")  # of OpenSSL
REDIRECTS = (301, 302, 303, 307, 308)
KIND, POLICY = "failed", Policy(base_seconds=1.0, most_asked_seconds=60.0)  # all failures are alike
ACCEPT = ", ".join((*mutate.MANIFESTS, *mutate.INDEXES))

T = TypeVar("T")


class _Refused(RegistryError):
    """An answer that is no success; headers: its own."""

    def __init__(  # noqa: B042 - is neither copied nor pickled
        self, sentence: str, status: int, headers: Mapping[str, str]
    ) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A success, whose body is to be read; url: of the request that it answers."""

    response: Response
    url: str

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers


@dataclass(frozen=True, slots=True)
class _Upload:
    """The body of a request that is read from a blob."""

    blob: Blob
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self) -> Iterator[memoryview]:
        left, stream = self.size, self.blob.open(self.start)
        try:
            while left and (piece := stream.read(min(left, BLOCK_BYTES))):
                left -= len(piece)
                yield memoryview(piece)
            if not left and self.start == 0 and self.stop == self.blob.descriptor.size_bytes:
                stream.read(1)  # lets the reader compare the digest
        finally:
            stream.close()
        if left:
            raise RegistryError("A layer ended before its announced length")


class Registry:
    """One repository of a registry, as one user sees it."""

    def __init__(
        self,
        reference: Reference,
        *,
        transport: Transport,
        login: Login | None = None,
        insecure: bool = False,
        check: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._reference, self._transport, self._login = reference, transport, login
        self._insecure, self._check, self._sleep = insecure, check, sleep
        self._base: Url | None = None
        self._challenge: auth.Challenge | None = None
        self._scopes = {f"repository:{reference.repository}:pull": None}
        self._tokens: dict[tuple[str, ...], Token] = {}
        self._secrets = login.secrets if login else set[str]()
        self._lock = threading.Lock()

    # What is read

    def load(self, os_name: str, architecture: str) -> Image:
        """Get the manifest and the configuration of the image for a platform."""
        body, hint = self._manifest(self._reference.identifier)
        resolved = mutate.resolve_manifest(
            body,
            hint,
            lambda child: self._manifest(child.digest)[0],
            os_name=os_name,
            architecture=architecture,
        )
        names = (str(self._reference),) if self._reference.tag else ()
        return mutate.load_image(resolved, self._document, names=names)

    def blob(self, descriptor: Descriptor) -> Blob:
        """Return a blob that is downloaded when it is opened."""
        return verified_blob(
            descriptor,
            lambda offset: PieceReader(self._pieces(descriptor, offset)),
            name=self._reference.name,
            origin=self._origin,
            error=RegistryError,
        )

    @property
    def _origin(self) -> tuple[str, str]:
        return self._reference.registry, self._reference.repository

    def _manifest(self, identifier: str) -> tuple[bytes, str]:
        answer = self._ask_again("GET", f"manifests/{identifier}", {"accept": ACCEPT})
        body = self._read(answer.response, MAX_DOCUMENT_BYTES)
        digests = {identifier, answer.headers.get("docker-content-digest", "")}
        for expected in digests:
            if expected.startswith("sha256:") and describe([body], "").digest != expected:
                raise RegistryError(f"{self._reference}: the manifest is not that of {expected}")
        return body, answer.headers.get("content-type", "").partition(";")[0].strip()

    def _document(self, descriptor: Descriptor) -> bytes:
        return read_document(self.blob(descriptor).open(0), name=descriptor.digest)

    def _pieces(self, descriptor: Descriptor, offset: int) -> Iterator[bytes]:
        """Yield a blob from the offset on, taken up again where it breaks off."""
        breaks = 0
        while offset < descriptor.size_bytes:
            ranges = {"range": f"bytes={offset}-"} if offset else {}
            response = self._ask_again("GET", f"blobs/{descriptor.digest}", ranges).response
            try:
                skipped = 0 if response.status == 206 else offset
                while piece := bytes(response.receive(BLOCK_BYTES)):
                    self._check()
                    kept, skipped = piece[skipped:], max(0, skipped - len(piece))
                    offset += len(kept)
                    if kept:
                        yield kept
                return
            except TransportError:
                breaks += 1
                if breaks > MOST_RESUMES:
                    raise
            finally:
                self._transport.finish(response)

    # What is written

    def __enter__(self) -> Self:
        self._scopes = {f"repository:{self._reference.repository}:pull,push": None}
        return self

    def __exit__(self, *failure: object) -> None:
        """Blobs that no manifest names are the registry's to collect."""

    def current_digest(self) -> str | None:
        """Return the digest that the tag has."""
        headers = {"accept": ACCEPT}
        try:
            answer = self._ask_again("HEAD", f"manifests/{self._reference.identifier}", headers)
        except _Refused as refused:
            if refused.status in (404, 401, 403):
                return None
            raise
        self._read(answer.response, ANSWER_LIMIT_BYTES)
        return answer.headers.get("docker-content-digest")

    def place(self, blob: Blob) -> str:
        """Upload a blob, unless it is there or can be mounted."""
        return self._repeat(lambda: self._place(blob))

    def _place(self, blob: Blob) -> str:
        if blob.origin == self._origin:
            return "exists"
        try:
            self._exchange("HEAD", f"blobs/{blob.descriptor.digest}")
            return "exists"
        except _Refused as refused:
            if refused.status in RETRIED:
                raise
        location = self._begin(blob)
        if location is None:
            return "mounted"
        digest, size = blob.descriptor.digest, blob.descriptor.size_bytes
        try:
            url = auth.add_query(location, f"digest={digest}")
            self._exchange("PUT", url, body=_Upload(blob, 0, size))
        except _Refused as refused:
            if refused.status not in (405, 411, 413, 415, 416):
                raise
            self._put_chunks(blob)
        return "written"

    def _begin(self, blob: Blob) -> str | None:
        """Begin an upload; None where the blob was mounted from another repository."""
        registry, repository = blob.origin or ("", "")
        if registry == self._reference.registry:
            self._scopes[f"repository:{repository}:pull"] = None
            query = f"?mount={blob.descriptor.digest}&from={quote(repository)}"
            with suppress(_Refused):
                answer = self._exchange("POST", f"blobs/uploads/{query}", body=b"")
                return None if answer.response.status == 201 else self._location(answer)
        return self._location(self._exchange("POST", "blobs/uploads/", body=b""))

    def _put_chunks(self, blob: Blob) -> None:
        """Upload in parts, the last of which comes with the digest."""
        answer = self._exchange("POST", "blobs/uploads/", body=b"")
        least = answer.headers.get("oci-chunk-min-length", "")
        step = max(CHUNK_BYTES, int(least) if least.isdecimal() else 0)
        size, start = blob.descriptor.size_bytes, 0
        while start + step < size:
            answer = self._put_chunk("PATCH", self._location(answer), blob, start, start + step)
            start += step
        url = auth.add_query(self._location(answer), f"digest={blob.descriptor.digest}")
        self._put_chunk("PUT", url, blob, start, size)

    def _put_chunk(self, method: str, url: str, blob: Blob, start: int, stop: int) -> _Answer:
        fields = {"content-range": f"{start}-{stop - 1}"}
        return self._exchange(method, url, fields, _Upload(blob, start, stop))

    def _location(self, answer: _Answer) -> str:
        """Return where an upload goes on: absolute, relative, or elsewhere."""
        base = self._find_base()
        url = urljoin(answer.url, answer.headers.get("location", ""))
        if base.scheme == "https" and url.startswith(f"http://{base.netloc}/"):
            url = f"https{url[4:]}"  # of a proxy that takes the TLS off
        auth.check_place("The location for an upload", url, base)
        return url

    def reference(self, digest: str) -> str:
        return self._reference.with_digest(digest)

    def commit(self, image: Image) -> None:
        """Put the manifest under the tag."""
        digest = describe([image.manifest_bytes], image.media_type).digest
        answer = self._repeat(
            lambda: self._exchange(
                "PUT",
                f"manifests/{self._reference.identifier}",
                {"content-type": image.media_type},
                image.manifest_bytes,
            )
        )
        told = answer.headers.get("docker-content-digest", digest)
        if told != digest:
            raise RegistryError(f"{self._reference}: the registry made {told} of the manifest")

    # One round trip

    def _find_base(self) -> Url:
        """Return where the registry answers: by HTTPS, or by HTTP where that is allowed."""
        with self._lock:
            if self._base is None:
                self._base = self._ping()
            return self._base

    def _ping(self) -> Url:
        server = self._reference.registry
        try:
            secure = parse_url(f"https://{server}")
        except ValueError:
            raise RegistryError(f"{server} is no address of a registry") from None
        try:
            self._read(self._open("GET", f"https://{server}/v2/", {}, None), ANSWER_LIMIT_BYTES)
            return secure
        except TransportError as error:
            is_allowed = self._insecure or auth.is_local(secure.host)
            if not is_allowed or not _is_plain(error):
                raise
        return parse_url(f"http://{server}")

    def _ask_again(self, method: str, path: str, headers: Mapping[str, str]) -> _Answer:
        """Ask what may be asked as often as it takes."""
        return self._repeat(lambda: self._ask(method, path, headers, None))

    def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] = {},  # noqa: B006
        body: bytes | _Upload | None = None,
    ) -> _Answer:
        """Ask as _ask() does, for an answer of which only the header fields matter."""
        answer = self._ask(method, path, headers, body)
        self._read(answer.response, ANSWER_LIMIT_BYTES)
        return answer

    def _repeat(self, attempt: Callable[[], T]) -> T:
        """Make attempts until one succeeds or fails for good; raise the error of the last one."""
        self._find_base()
        attempts = Attempts({KIND: POLICY}, most=MOST_ATTEMPTS)
        while True:
            try:
                return attempt()
            except (_Refused, TransportError) as error:
                status = error.status if isinstance(error, _Refused) else RETRIED[0]
                is_final = isinstance(error, CertificateError) or status not in RETRIED
                if is_final or not attempts.add(KIND):
                    raise
                headers = error.headers if isinstance(error, _Refused) else {}
            random = int.from_bytes(os.urandom(2), "big") / 2**16
            seconds = delay_seconds(POLICY, retry=attempts.failed, headers=headers, random=random)
            pause(seconds, self._check, self._sleep)

    def _ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | _Upload | None
    ) -> _Answer:
        """Ask for a path of the repository or a URL. Raises _Refused for what is no success.

        One challenge of each server is answered; redirects of what is only read are followed.
        """
        own, tokens = self._find_base(), dict[Url, str]()
        root = f"{own.scheme}://{own.netloc}/v2/{self._reference.repository}/"
        url = path if path.startswith(("http:", "https:")) else root + path
        is_answered = False
        for _ in range(MOST_REDIRECTS + 2):
            origin = replace(auth.check_place("The server", url, own), target="")
            login = self._authorization() if origin == own else tokens.get(origin, "")
            fields = {**headers, "authorization": login} if login else headers
            response = self._open(method, url, fields, body)
            status = response.status
            # Who knows where a blob is to be had has it; storage may be asked by GET alone.
            is_found = method == "HEAD" and path.startswith("blobs/") and status in REDIRECTS
            if status < 300 or is_found:
                return _Answer(response=response, url=url)
            refused = self._refusal(method, url, response)
            if status in REDIRECTS and method in ("GET", "HEAD"):
                url = urljoin(url, refused.headers.get("location", ""))
            elif status == 401 and origin == own and not is_answered:
                is_answered = True
                self._take_challenge(refused)
            elif status == 401 and origin != own and origin not in tokens:
                challenge = auth.choose_challenge(refused.headers.get("www-authenticate", ""))
                scopes = [challenge.parameters.get("scope", "")]
                token = self._fetch_token(challenge, scopes, None, registry=parse_url(url))
                tokens[origin] = f"Bearer {token.value}"
            else:
                raise refused
        raise RegistryError(f"{self._reference}: the registry sends us round in circles")

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | _Upload | None
    ) -> Response:
        fields = {"user-agent": auth.CLIENT, **headers}
        return self._transport.ask(method, url, fields, body=body, check=self._check)

    def _read(self, response: Response, limit_bytes: int) -> bytes:
        try:
            return response.read(limit_bytes)
        finally:
            self._transport.finish(response)

    def _refusal(self, method: str, url: str, response: Response) -> _Refused:
        """Read an error: its codes and messages, and of the URL what can be no secret."""
        body = b""
        with suppress(TransportError):
            body = self._read(response, ANSWER_LIMIT_BYTES)
        parts = urlsplit(url)
        path = parts.path if parts.path.startswith("/v2/") and not parts.query else ""
        said = "; ".join(_read_errors(body)) or response.reason
        sentence = f"{method} {parts.hostname}{path}: {response.status}: {said}"
        for secret in self._secrets:
            sentence = sentence.replace(secret, "***")
        return _Refused(sentence, response.status, response.headers)

    def _take_challenge(self, refused: _Refused) -> None:
        with self._lock:
            self._challenge = auth.choose_challenge(refused.headers.get("www-authenticate", ""))
            for scope in self._challenge.parameters.get("scope", "").split():
                if not any(_covers(ours, scope) for ours in self._scopes):
                    self._scopes[scope] = None
            self._tokens.clear()

    def _authorization(self) -> str:
        """Return the header field for the registry, "" before it has asked for one."""
        with self._lock:
            challenge, scopes, login = self._challenge, tuple(self._scopes), self._login
            if login and login.registry_token:
                return f"Bearer {login.registry_token}"
            if challenge is None:
                return ""
            if challenge.scheme == "basic":
                return login.basic if login else ""
            token = self._tokens.get(scopes)
            if token is None or time.monotonic() > token.renew_after:
                assert self._base is not None
                token = self._fetch_token(challenge, scopes, login, registry=self._base)
                self._tokens[scopes] = token
            return f"Bearer {token.value}"

    def _fetch_token(
        self,
        challenge: auth.Challenge,
        scopes: Sequence[str],
        login: Login | None,
        *,
        registry: Url,
    ) -> Token:
        refused: _Refused | None = None
        for asked in auth.build_token_requests(challenge, scopes, login, registry=registry):
            method = "GET" if asked.form is None else "POST"
            response = self._open(method, asked.url, asked.headers, asked.form)
            if response.status == 200:
                body = self._read(response, auth.TOKEN_LIMIT_BYTES)
                token = auth.parse_token(body, now=time.monotonic())
                self._secrets.add(token.value)
                return token
            refused = self._refusal(method, asked.url, response)
            if refused.status not in (404, 405):
                break
        assert refused is not None
        raise refused


def _is_plain(error: TransportError) -> bool:
    """Say whether nobody there speaks TLS."""
    cause = error.__cause__
    return isinstance(cause, ConnectionRefusedError) or getattr(cause, "reason", "") in NOT_TLS


def _covers(ours: str, scope: str) -> bool:
    """Say whether who has our scope may do what the other one is for."""
    (name, _, actions), (other, _, wanted) = ours.rpartition(":"), scope.rpartition(":")
    return name == other and set(wanted.split(",")) <= set(actions.split(","))


def _read_errors(body: bytes) -> list[str]:
    """Return what distribution-spec.md has for errors, as far as it is that."""
    try:
        errors = json.loads(body)["errors"][:3]
        found = [f"{error['code']}: {error.get('message', '')}" for error in errors]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return [text[:300] for text in found if text.isprintable()]
