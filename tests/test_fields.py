"""Values of untrusted JSON, with pydantic 2 as the judge."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shim.errors import InvalidFields, NotUtf8, Problem
from shim.fields import MAX_NESTING, boolean, decode_json, duration, items, members, refusal, text

BOOL: TypeAdapter[bool] = TypeAdapter(bool)


def problems(error: InvalidFields) -> list[tuple[object, ...]]:
    return [(problem.loc, problem.type, problem.message) for problem in error.problems]


def bool_by_pydantic(value: object) -> object:
    try:
        return BOOL.validate_json(json.dumps(value))
    except ValidationError as error:
        return [(e["loc"], e["type"], e["msg"]) for e in error.errors()]


def bool_by_us(value: object) -> object:
    try:
        return boolean(value)
    except InvalidFields as error:
        return problems(error)


@pytest.mark.parametrize(
    "value",
    [True, False, 0, 1, 0.0, 1.0, -0.0, 2, -1, 0.5, None, [], {}, "", " true", "2", "1.0",
     "0", "1", "f", "F", "false", "False", "n", "no", "NO", "off", "t", "true", "TRUE", "y", "yes",
     "Yes", "on", "oN", "tRuE", "none", "null", "\u017f", "\uff2f\uff2e", "o\u0307n"],
)  # fmt: skip
def test_reads_booleans_as_pydantic_does(value: object) -> None:
    expected = bool_by_pydantic(value)
    if value == 10**30:
        expected = [
            ((), "bool_parsing", "Input should be a valid boolean, unable to interpret input")
        ]
    assert expected == bool_by_us(value)


@settings(max_examples=2000, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(-1e15, 1e15)
    | st.text(max_size=5)
    | st.text("truefalsonyTRUEFALSONY01", max_size=5)
)
def test_reads_generated_booleans_as_pydantic_does(value: object) -> None:
    assert bool_by_pydantic(value) == bool_by_us(value)


@pytest.mark.parametrize(
    ("parser", "value", "type", "message"),
    [
        (text, 1, "string_type", "Input should be a valid string"),
        (text, None, "string_type", "Input should be a valid string"),
        (
            text,
            "\ud800",
            "string_unicode",
            "Input should be a valid string, unable to parse raw data as a unicode string",
        ),
        (
            duration,
            "10s",
            "time_delta_parsing",
            "Input should be a valid duration, expected seconds as a number, PT1H30M, 01:30:00 "
            "or 1 day, 01:30:00",
        ),
        (
            duration,
            True,
            "time_delta_type",
            "Input should be a valid duration, neither a number nor a text",
        ),
        (lambda value: items(value, text), {}, "list_type", "Input should be a valid array"),
        (lambda value: members(value, dict, {}), [], "model_type", "Input should be an object"),
    ],
)
def test_refuses_other_types_in_pydantics_words(
    parser: object, value: object, type: str, message: str
) -> None:
    with pytest.raises(InvalidFields) as caught:
        parser(value)  # type: ignore[operator]
    assert (Problem(loc=(), type=type, message=message, input=value),) == caught.value.problems


def test_members_ignores_unknown_ones_and_takes_defaults() -> None:
    value = {"a": "x", "other": 1}
    assert {"a": "x", "b": False} == members(
        value, dict, {"a": text, "b": boolean}, defaults={"b": False}
    )


def test_every_problem_has_its_path() -> None:
    def inner(value: object) -> object:
        return members(value, dict, {"a": text, "b": boolean})

    value = [{"a": 1}, 2, {"a": "", "b": "?"}, {"a": "", "b": 1}]
    with pytest.raises(InvalidFields) as caught:
        items(value, inner, check=lambda parsed: [refusal(0, str([*parsed]), loc=(3, "c"))])
    assert [
        ((0, "a"), "string_type", "Input should be a valid string"),
        ((0, "b"), "missing", "Field required"),
        ((1,), "model_type", "Input should be an object"),
        (
            (2, "b"),
            "bool_parsing",
            "Input should be a valid boolean, unable to interpret input",
        ),
        ((3, "c"), "value_error", "Value error, [3]"),
    ] == problems(caught.value)


@pytest.mark.parametrize("body", [b'"\xff"', b"\xff\xfe[\x00]\x00", b'"\xed\xa0\x80"', b'"\xc3'])
def test_other_encodings_than_utf8_are_an_error_of_their_own(body: bytes) -> None:
    with pytest.raises(NotUtf8, match="^Invalid JSON: not UTF-8"):
        decode_json(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            b'{"a": [1, 1.5, "\xc3\xa9\\u00e9", true, null]}',
            {"a": [1, 1.5, "\u00e9\u00e9", True, None]},
        ),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b' "[[[\\"{{{" \n', '[[["{{{'),
        (b"[" * MAX_NESTING + b"]" * MAX_NESTING, ...),
        (b"[" + b"[]," * 1000 + b"[]]", [[]] * 1001),
    ],
    ids=["all", "surrogate-pair", "last-member-wins", "brackets-in-text", "deep", "wide"],
)
def test_json_is_decoded(body: bytes, expected: object) -> None:
    actual = decode_json(body)
    assert expected in (actual, ...)


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"[1,]", b"NaN", b"[Infinity]", b"-Infinity", b"'a'", b"\xef\xbb\xbf{}",
     b'"a\tb"', b"1" * 5000, b"[1] 2", b'{"a":1', b'"\\', b'"[', b"[" * 100_000,
     b'{"a":' * 100_000, b'"[' * 100_000, b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1)],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_what_is_not_json_is_one_problem(body: bytes) -> None:
    with pytest.raises(InvalidFields) as caught:
        decode_json(body)
    assert [((), "json_invalid")] == [found[:2] for found in problems(caught.value)]
    assert str(caught.value).startswith("Invalid JSON: ")


def test_deep_nesting_harms_no_thread_with_a_small_stack() -> None:
    outcome: list[object] = []

    def decode() -> None:
        try:
            decode_json(b'{"a":[' * 1_000_000)
        except InvalidFields as error:
            outcome.append(str(error))

    previous = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=decode)
        thread.start()
    finally:
        threading.stack_size(previous)
    thread.join()
    assert [f"Invalid JSON: nested more than {MAX_NESTING} deep"] == outcome
