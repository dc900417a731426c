"""The few XML documents of S3: a page of a listing, the parts of a multipart upload."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_plus

from shim.aws.xml import parse
from shim.http.errors import TransportError


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A part of a listing; token is empty on the last one."""

    objects: tuple[tuple[str, int], ...]
    token: str


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
