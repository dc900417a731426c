"""The few XML documents of S3, read with expat and without document types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from shim.s3.errors import TransportError

# Keys may hold characters that XML 1.0 has no way to write; servers write them all the same,
# as they are or by their number.
_NOT_XML = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f]|\xef\xbf[\xbe\xbf]"
    rb"|&#(?:[0-8]|1[124-9]|2\d|3[01]|6553[45]|[xX]0*(?:[0-8bBcCeEfF]|1[\da-fA-F]|[fF]{3}[eEfF]));"
)


@dataclass(slots=True)
class Element:
    """A node; names without their namespace."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, name: str) -> str:
        """Return the text of the first child of that name, "" without one."""
        return next((child.text for child in self.children if child.name == name), "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A part of a listing; token is empty on the last one."""

    objects: tuple[tuple[str, int], ...]
    token: str


def parse(document: bytes) -> Element:
    """Parse a document; TransportError when it is not well-formed or brings its own grammar."""
    from xml.parsers import expat  # the first request, of the set-up, brings none

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    stack = [Element("")]

    def start(name: str, _: dict[str, str]) -> None:
        element = Element(name.rpartition(" ")[2])
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        stack[-1].text += data

    def refuse(*_: object) -> None:
        raise TransportError("The answer's XML has a document type, which S3 never sends")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        # Complete sends blanks to stay alive; XML allows none before its declaration.
        parser.Parse(_NOT_XML.sub(b"?", document.lstrip()), True)
    except expat.ExpatError as error:
        raise TransportError(f"The answer is not well-formed XML: {error}") from error
    return stack[0].children[0]


def parse_page(document: bytes) -> Page:
    """Parse an answer to ListObjectsV2."""
    root = parse(document)
    if root.name != "ListBucketResult":
        raise TransportError(f"The answer is not a listing but <{root.name}>")
    is_encoded = root.find("EncodingType") == "url"
    objects = []
    for child in root.children:
        if child.name == "Contents":
            key, size = child.find("Key"), child.find("Size")
            objects.append((unquote_plus(key) if is_encoded else key, int(size or 0)))
    is_last = root.find("IsTruncated") != "true"
    token = "" if is_last else root.find("NextContinuationToken")
    if not is_last and not token:
        raise TransportError("The listing is truncated but names no continuation")
    return Page(objects=tuple(objects), token=token)


def build_complete(parts: list[tuple[int, str, str]]) -> bytes:
    """Write the list of parts (number, ETag, CRC32 or "") of a multipart upload."""
    lines = ['<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">']
    for number, etag, crc32 in parts:
        checksum = f"<ChecksumCRC32>{crc32}</ChecksumCRC32>" if crc32 else ""
        etag = etag.replace("&", "&amp;").replace("<", "&lt;")
        lines.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag>{checksum}</Part>")
    return "".join([*lines, "</CompleteMultipartUpload>"]).encode()
