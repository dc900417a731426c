"""Typed readers for untrusted JSON: each value is refused with pydantic's words and its path.

A parser takes a decoded value and returns what it means, or raises InvalidFields. Those for objects
and lists go through all members first, so that one exception lists every problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, islice
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # undocumented
from types import MappingProxyType

from shim.contract.durations import parse_duration
from shim.contract.errors import MAX_PROBLEMS, VALUE_ERROR, InvalidFields, NotText, Problem

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Any, TypeAlias, TypeVar

    Parser: TypeAlias = Callable[[object], Any]
    K = TypeVar("K", bound=str | int)
    T = TypeVar("T")

# pydantic's own limit. The parser of json recurses in C, and threads have small stacks.
MAX_NESTING = 200
# Searching a text of millions takes hours.
MAX_DURATION_CHARACTERS = 200
_TOO_DEEP = f"nested more than {MAX_NESTING} deep"
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^][{}"]++', re.DOTALL)
_DEEPER = {"[": 1, "{": 1, "]": -1, "}": -1, '"': 0}

_TRUE = {True, "1", "on", "t", "true", "y", "yes"}
_FALSE = {False, "0", "off", "f", "false", "n", "no"}


def refusal(
    value: object,
    message: str,
    *,
    type: str = "value_error",
    loc: tuple[str | int, ...] = (),
) -> InvalidFields:
    """Build the exception for one value; without a type, it is that of a validator."""
    message = f"{VALUE_ERROR}{message}" if type == "value_error" else message
    return InvalidFields([Problem(loc=loc, type=type, message=message, input=value)])


def decode_json(body: bytes) -> object:
    """Decode JSON as json.loads does, but without NaN and Infinity, nested at most 200 deep.

    Raises NotText, or InvalidFields with one problem of type `json_invalid`.
    """
    return _decode(body, _loads)


def decode_json_within(body: bytes, *, max_values: int) -> object:
    """Decode JSON as decode_json does, in bounded memory and without keeping other threads waiting.

    A value is counted before it is made. The parser of json holds the interpreter's lock for as
    long as it works; of this one, only strings and numbers are read in one go.

    Raises what decode_json raises.
    """
    return _decode(body, partial(_loads_within, max_values=max_values))


def _decode(body: bytes, loads: Callable[[str], object]) -> object:
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        message = f"Invalid JSON: not {name}, {error.reason} at byte {error.start}"
        raise NotText([Problem(loc=(), type="json_invalid", message=message)]) from error
    try:
        return loads(text)
    except ValueError as error:
        message = f"Invalid JSON: {error}"
        raise InvalidFields([Problem(loc=(), type="json_invalid", message=message)]) from error


def _loads(text: str) -> object:
    brackets = _NOT_BRACKETS.sub("", text)
    if max(accumulate(map(_DEEPER.__getitem__, brackets)), default=0) > MAX_NESTING:
        raise ValueError(_TOO_DEEP)
    return json.loads(text, parse_constant=_refuse_constant)


def _loads_within(text: str, *, max_values: int) -> object:
    decoder: Any = json.JSONDecoder(parse_constant=_refuse_constant)
    scan_scalar: Callable[[str, int], tuple[object, int]] = decoder.scan_once
    names: dict[str, str] = {}
    values = depth = 0

    def scan(text: str, index: int) -> tuple[object, int]:
        """Take the place of json's own parser, which calls the same two for what nests."""
        nonlocal values, depth
        values += 1
        if values > max_values:
            raise ValueError(f"more than {max_values:,} values")
        first = text[index : index + 1]
        if first not in ("[", "{"):
            return scan_scalar(text, index)
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(_TOO_DEEP)
        start = (text, index + 1)
        found: tuple[object, int] = (
            JSONArray(start, scan)
            if first == "["
            else JSONObject(start, True, scan, None, _build_dict, names)
        )
        depth -= 1
        return found

    decoder.scan_once = scan
    try:
        value: object = decoder.decode(text)
        return value
    finally:
        names.clear()  # scan refers to itself, and so would keep them for a while


def _build_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Not dict(pairs): half a million of them would keep the other threads waiting.
    return {name: value for name, value in pairs}  # noqa: C416


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def text(value: object) -> str:
    """Accept a string that can be written as UTF-8: JSON escapes can smuggle in lone surrogates."""
    if not isinstance(value, str):
        raise refusal(value, "Input should be a valid string", type="string_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        message = "Input should be a valid string, unable to parse raw data as a unicode string"
        raise refusal(value, message, type="string_unicode") from None
    return value


def boolean(value: object) -> bool:
    """Accept true, false, 0, 1 and pydantic's words for them, in any case."""
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, (str, int, float)):
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        if not isinstance(word, float) or word.is_integer():
            message = "Input should be a valid boolean, unable to interpret input"
            raise refusal(value, message, type="bool_parsing")
    raise refusal(value, "Input should be a valid boolean", type="bool_type")


def duration(value: object) -> timedelta:
    """Accept what parse_duration accepts."""
    try:
        if isinstance(value, str) and len(value) > MAX_DURATION_CHARACTERS:
            raise ValueError(f"no text of more than {MAX_DURATION_CHARACTERS} characters")
        return parse_duration(value)
    except (TypeError, ValueError) as error:
        raise refusal(
            value,
            f"Input should be a valid duration, {error}",
            type="time_delta_type" if isinstance(error, TypeError) else "time_delta_parsing",
        ) from None


def members(
    value: object,
    build: Callable[..., T],
    parsers: Mapping[str, Parser],
    *,
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> T:
    """Accept an object and build a value of its known members; the others are ignored."""
    if not isinstance(value, dict):
        raise refusal(value, "Input should be an object", type="model_type")
    known = {**defaults, **value}
    parsed, problems = _parse_each(
        (name, parser, known[name]) if name in known else (name, _refuse_missing, value)
        for name, parser in parsers.items()
    )
    if problems:
        raise InvalidFields(problems)
    return build(**parsed)


def items(
    value: object,
    parser: Callable[[object], T],
    *,
    check: Callable[[Mapping[int, T]], Iterable[InvalidFields]] = lambda parsed: (),
) -> tuple[T, ...]:
    """Accept a list; `check` sees the items that are valid by themselves, with their positions."""
    if not isinstance(value, list):
        raise refusal(value, "Input should be a valid array", type="list_type")
    parsed, problems = _parse_each((index, parser, item) for index, item in enumerate(value))
    for error in islice(check(parsed), MAX_PROBLEMS):
        problems.extend(error.problems)
    if problems:
        raise InvalidFields(problems)
    return tuple(parsed.values())


def _parse_each(
    parts: Iterable[tuple[K, Callable[[object], T], object]],
) -> tuple[dict[K, T], list[Problem]]:
    parsed: dict[K, T] = {}
    problems: list[Problem] = []
    for key, parser, value in parts:
        try:
            parsed[key] = parser(value)
        except InvalidFields as error:
            problems.extend(replace(found, loc=(key, *found.loc)) for found in error.problems)
            if len(problems) >= MAX_PROBLEMS:
                break
    return parsed, problems


def _refuse_missing(value: object) -> object:
    raise refusal(value, "Field required", type="missing")
