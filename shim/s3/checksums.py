"""Checksums of objects and of their parts, and whether they are sent and asked for."""

from __future__ import annotations

import binascii
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from shim.http.errors import SettingInvalid
from shim.s3.errors import IntegrityError

_POLYNOMIAL = 0xEDB88320

# By the name that botocore gives them: whether checksums go with every request that supports them.
CHECKSUM_MODES = {"when_supported": True, "when_required": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChecksumPolicy:
    """Whether requests carry checksums, and whether those of answers are asked for."""

    request_checksum: bool = True
    response_checksum: bool = True

    def allows(self, name: str) -> bool:
        """Tell whether a request may have this header field."""
        if name == "x-amz-checksum-mode":
            return self.response_checksum
        return self.request_checksum or not name.startswith("x-amz-checksum-")


def checksum_policy(environ: Mapping[str, str], profile: Mapping[str, str]) -> ChecksumPolicy:
    """Read the environment, then the profile's settings. Raises SettingInvalid."""

    def is_supported(option: str) -> bool:
        variable = f"AWS_{option.upper()}"
        text = environ.get(variable) or profile.get(option) or "when_supported"
        if text.lower() not in CHECKSUM_MODES:
            name = variable if environ.get(variable) else f"{option} of the profile"
            raise SettingInvalid(name, expected=" or ".join(CHECKSUM_MODES), found=text)
        return CHECKSUM_MODES[text.lower()]

    return ChecksumPolicy(
        request_checksum=is_supported("request_checksum_calculation"),
        response_checksum=is_supported("response_checksum_validation"),
    )


def encode_crc32(crc: int) -> str:
    """Return the value of an `x-amz-checksum-crc32` header."""
    return binascii.b2a_base64(crc.to_bytes(4, "big"), newline=False).decode()


def _multiply(a: int, b: int) -> int:
    """Multiply two bit-reflected polynomials modulo that of CRC32."""
    bit, product = 1 << 31, 0
    while True:
        if a & bit:
            product ^= b
            if not a & (bit - 1):
                return product
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1


@lru_cache(maxsize=64)
def _shift(length: int) -> int:
    """Return x^(8 * length): what appending that many zero bytes does to a CRC."""
    result, square = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result


def combine_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Return the CRC32 of joined parts, given each one's CRC32 and length in bytes."""
    total = 0
    for crc, length in parts:
        total = (_multiply(_shift(length), total) if total else 0) ^ crc
    return total


class Checksum:
    """The digest of a whole object that is read in order, against what its answer announced.

    Values with "-", and those of type COMPOSITE, are checksums of checksums of parts; they cannot
    be computed from the bytes.
    CRC32C and CRC64NVME are left alone: the standard library has neither.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.algorithm = self.expected = ""
        is_composite = headers.get("x-amz-checksum-type", "").upper() == "COMPOSITE"
        for algorithm in () if is_composite else ("crc32", "sha256", "sha1"):
            value = headers.get(f"x-amz-checksum-{algorithm}", "")
            if value and "-" not in value:
                self.algorithm, self.expected = algorithm, value
                break
        self._crc = 0
        self._hash = hashlib.new(self.algorithm) if self.algorithm[:3] == "sha" else None

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the object."""
        if self._hash:
            self._hash.update(data)
        elif self.algorithm:
            self._crc = zlib.crc32(data, self._crc)

    def value(self) -> str:
        """Return the digest of what was read, written as in the header."""
        if self._hash:
            return binascii.b2a_base64(self._hash.digest(), newline=False).decode()
        return encode_crc32(self._crc)

    def verify(self, uri: str, found: str | None = None) -> None:
        """Raise IntegrityError if what was read, or found elsewhere, was not announced."""
        if self.expected and (self.value() if found is None else found) != self.expected:
            raise IntegrityError(f"{uri} does not have the {self.algorithm} that was announced")
