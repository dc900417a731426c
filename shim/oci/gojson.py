"""JSON as Go writes it: what Docker, BuildKit, umoci and crane hash, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from shim.contract.errors import InvalidFields
from shim.contract.fields import decode_json_within
from shim.oci.errors import ImageUnsuitable

# What containers/image allows manifests and configurations (internal/iolimits).
MAX_DOCUMENT_BYTES = 4 << 20
# A document of 4 MiB could else become a gigabyte of empty lists.
MAX_VALUES = 250_000

# encoding/json, HTMLEscape. None of them is found outside strings.
_ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}


def dumps(value: object) -> bytes:
    """Write a value as Go's encoding/json does, members in the order they have here."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(_ESCAPES).encode()


def loads(body: bytes, *, name: str) -> dict[str, Any]:
    """Read an object; name: what it is called in the sentence of ImageUnsuitable.

    Refused are also what readers take in different ways (a member twice) and what could not be
    written again (NaN, halves of surrogate pairs).
    """
    if not isinstance(value := loads_any(body, name=name), dict):
        raise ImageUnsuitable(f"{name}: expected a JSON object")
    return value


def loads_any(body: bytes, *, name: str) -> Any:
    """Read a document as loads() does, but one of any type."""
    if len(body) > MAX_DOCUMENT_BYTES:
        raise ImageUnsuitable(f"{name}: longer than {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        decode_json_within(body, max_values=MAX_VALUES)
        value = json.loads(body, object_pairs_hook=_build_object)
        dumps(value)
    except InvalidFields as error:
        raise ImageUnsuitable(f"{name}: {error}") from error
    except UnicodeEncodeError as error:
        raise ImageUnsuitable(f"{name}: half of a surrogate pair cannot be written") from error
    except ValueError as error:
        raise ImageUnsuitable(f"{name}: Invalid JSON: {error}") from error
    return value


def check_names(members: Iterable[str], known: Iterable[str], *, name: str) -> None:
    """Refuse other spellings of known members: Go takes them in any case, the last of several."""
    spellings = {known_name.casefold(): known_name for known_name in known}
    for member in members:
        if (meant := spellings.get(member.casefold(), member)) != member:
            raise ImageUnsuitable(f"{name} has a member {member!r}: not everybody reads {meant!r}")


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in members if names.count(name) > 1)
        raise ValueError(f"the member {twice[:100]!r} is there twice")
    return members
