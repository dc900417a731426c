"""Names of images as users of crane, Docker and skopeo write them.

[HOST[:PORT]/]NAME[:TAG][@DIGEST]       distribution/reference, regexp.go and normalize.go
docker://REFERENCE                      containers-transports(5), as all that follow
oci:DIRECTORY[:NAME]  oci-archive:FILE[:NAME]  docker-archive:FILE[:REFERENCE]
/...  ./...  ../...  *.tar  *.tar.gz  *.tgz     a file or directory, known by its content
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shim.contract.errors import UsageError

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME_CHARACTERS = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_FORM = "[HOST[:PORT]/]NAME[:TAG][@DIGEST]"

REGISTRY, LAYOUT, LAYOUT_ARCHIVE, DOCKER_ARCHIVE, PATH = (
    "docker", "oci", "oci-archive", "docker-archive", "path"
)  # fmt: skip
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PATH_PREFIXES = ("/", "./", "../")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """An image in a registry; with tag and digest, the digest is what is read."""

    domain: str
    repository: str
    tag: str | None
    digest: str | None = None

    @property
    def registry(self) -> str:
        """The host to talk to, with its port where one is named."""
        return "registry-1.docker.io" if self.domain == DOCKER_HUB else self.domain

    @property
    def identifier(self) -> str:
        """What stands after /manifests/."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.repository}"

    @property
    def familiar(self) -> str:
        """The form of `docker images` and RepoTags."""
        short = str(self).removeprefix(f"{DOCKER_HUB}/")
        return short.removeprefix("library/") if short != str(self) else short

    def with_digest(self, digest: str) -> str:
        """Return the name of exactly this image, as crane prints it."""
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where an image is: reference for kind "docker", else path and the name in there."""

    kind: str
    path: str = ""
    name: str | None = None
    reference: Reference | None = None


def is_digest(text: object) -> bool:
    """Say whether a text is a digest of an algorithm that we can check."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def parse_reference(text: str) -> Reference:
    """Read a reference as distribution/reference normalises it. Raises UsageError."""
    name, at, digest = text.partition("@")
    # The part before "@" may be a password that was put in front of a host.
    shown = repr(text.rpartition("@")[2][:300])
    if at and not is_digest(digest):
        raise UsageError(f"{shown} is no digest: expected sha256: and 64 lower-case hex digits")
    tag = None
    if ":" in name.rpartition("/")[2]:
        name, _, tag = name.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise UsageError(f"{shown}: expected a tag of 1 to 128 letters, digits, '_', '.', '-'")
    domain, slash, path = name.partition("/")
    if not slash or not (set(".:") & set(domain) or domain == "localhost" or _has_upper(domain)):
        domain, path = DOCKER_HUB, name
    if domain == "index.docker.io":
        domain = DOCKER_HUB
    if domain == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    if _IMAGE_ID.fullmatch(text):
        raise UsageError(f"{shown} is an image ID, expected a name: {_FORM}")
    if not _DOMAIN.fullmatch(domain) or not _PATH.fullmatch(path):
        lower = ", the name in lower case" * _has_upper(path)
        raise UsageError(f"{shown} is no image reference: expected {_FORM}{lower}")
    if len(domain) + 1 + len(path) > MAX_NAME_CHARACTERS:
        raise UsageError(f"{shown}: a name has at most {MAX_NAME_CHARACTERS} characters")
    if not at:
        tag = tag or DEFAULT_TAG
    return Reference(domain=domain, repository=path, tag=tag, digest=digest or None)


def _has_upper(text: str) -> bool:
    return text.lower() != text


def parse_location(text: str) -> Location:
    """Read what SOURCE may be. Raises UsageError."""
    kind, colon, rest = text.partition(":")
    if text.startswith("docker://"):
        return _registry(text.removeprefix("docker://"))
    if not colon or kind not in (LAYOUT, LAYOUT_ARCHIVE, DOCKER_ARCHIVE):
        is_path = text in (".", "..") or text.startswith(_PATH_PREFIXES)
        if is_path or text.endswith(ARCHIVE_SUFFIXES):
            return Location(kind=PATH, path=text)
        return _registry(text)
    path, _, name = rest.partition(":")
    if not path:
        raise UsageError(f"{text!r}: expected a path after {kind}:")
    if name and kind == DOCKER_ARCHIVE:
        name = str(parse_reference(name))
    return Location(kind=kind, path=path, name=name or None)


def parse_destination(text: str) -> Location:
    """Read what DEST may be: a digest cannot be asked for."""
    location = parse_location(text)
    if (location.reference and location.reference.digest) or "@" in (location.name or ""):
        raise UsageError("The digest of DEST follows from its content: name a tag")
    return location


def _registry(text: str) -> Location:
    return Location(kind=REGISTRY, reference=parse_reference(text))
