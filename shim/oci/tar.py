"""Tar headers: USTAR written; USTAR, GNU and pax read, every length bounded."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shim.oci.errors import StorageError

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
FILE, LINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
_EXTENSIONS = _PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"

MAX_MEMBERS = 20_000
MAX_NAME_BYTES = 1024
_MAX_EXTENSION_BYTES = 1 << 16
_OCTAL_SIZE_LIMIT = 8 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One entry; name, link: normalised, relative to the root; offset: of its content."""

    name: str
    kind: bytes
    size_bytes: int
    offset: int
    link: str = ""


def padding(size_bytes: int) -> bytes:
    """Return what follows the content up to the next header."""
    return bytes(-size_bytes % BLOCK_BYTES)


def build_header(
    name: str, *, size_bytes: int = 0, mode: int = 0o644, kind: bytes = FILE
) -> bytes:  # fmt: skip
    """Build the header of an entry of root's, of 1970.

    name[100] mode[8] uid[8] gid[8] size[12] mtime[12] checksum[8] kind[1] link[100]
    "ustar\\0" "00" user[32] group[32] major[8] minor[8] prefix[155] and 12 zeros
    """
    if len(name) > 100:
        raise StorageError(f"{name!r:.200} is too long for a member of an archive")
    size = b"%011o\0" % size_bytes
    if size_bytes >= _OCTAL_SIZE_LIMIT:  # GNU's base 256: bit 7 of the first byte says so
        size = b"\x80" + size_bytes.to_bytes(11, "big")
    before = name.encode().ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + size
    before += b"00000000000\0"
    after = (kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2).ljust(356, b"\0")
    checksum = sum(before) + 8 * ord(" ") + sum(after)
    return before + b"%06o\0 " % checksum + after


def read_members(read_at: Callable[[int, int], bytes]) -> Iterator[Member]:
    """Yield the entries; read_at(offset, size): is asked for ascending offsets.

    Raises StorageError for what is no tar, or is cut off in a header.
    """
    offset = count = 0
    extended: dict[str, str] = {}
    while (header := read_at(offset, BLOCK_BYTES)) and header.count(0) < BLOCK_BYTES:
        if count >= MAX_MEMBERS:
            raise StorageError(f"The archive has more than {MAX_MEMBERS:,} members")
        member = _parse_header(header, offset + BLOCK_BYTES, extended)
        if member.kind in (_PAX, _GNU_NAME, _GNU_LINK):
            if member.size_bytes > _MAX_EXTENSION_BYTES:
                raise StorageError(f"A header of the archive has {member.size_bytes:,} bytes")
            extended |= _parse_extension(member.kind, read_at(member.offset, member.size_bytes))
        else:
            if member.kind != _PAX_GLOBAL:
                yield member
            extended = {}
        count += 1
        offset = member.offset + member.size_bytes + len(padding(member.size_bytes))


def _parse_header(header: bytes, offset: int, extended: dict[str, str]) -> Member:
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        if len(header) < BLOCK_BYTES or checksum != sum(header[:148]) + 8 * ord(" ") + sum(
            header[156:]
        ):
            raise ValueError
        kind = header[156:157].replace(b"\0", FILE).replace(b"7", FILE)
        size_bytes = _number(header[124:136])
        if kind not in _EXTENSIONS:
            size_bytes = int(extended.get("size", size_bytes))
        name, link = (_text(header[:100]), _text(header[157:257]))
        if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
            name = f"{prefix}/{name}"
        if size_bytes < 0:
            raise ValueError
    except ValueError as error:
        raise StorageError("The archive is no tar, or is damaged: a header is wrong") from error
    name, link = extended.get("path", name), extended.get("linkpath", link)
    if max(len(name), len(link)) > MAX_NAME_BYTES:
        raise StorageError(f"A name in the archive has more than {MAX_NAME_BYTES} characters")
    if kind in (LINK, SYMLINK, DIRECTORY):
        size_bytes = 0
    if kind == SYMLINK and not link.startswith("/"):
        link = posixpath.join(posixpath.dirname(name), link)
    return Member(
        name=normal_name(name),
        kind=kind,
        size_bytes=size_bytes,
        offset=offset,
        link=normal_name(link),
    )


def normal_name(name: str) -> str:
    """Return a name as a path below the root: neither "./" nor ".." can lead out of it."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _parse_extension(kind: bytes, body: bytes) -> dict[str, str]:
    if kind != _PAX:
        return {"path" if kind == _GNU_NAME else "linkpath": _text(body)}
    records: dict[str, str] = {}
    while body.strip(b"\0"):
        length, _, rest = body.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(body):
            raise StorageError("The archive is damaged: a pax header is wrong")
        name, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(name)] = _text(value)
        body = body[int(length) :]
    return records
