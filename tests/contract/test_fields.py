"""Values of untrusted JSON, with pydantic 2 as the judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shim.contract.errors import MAX_PROBLEMS, InvalidFields, NotText, Problem
from shim.contract.fields import (
    MAX_NESTING,
    boolean,
    decode_json,
    decode_json_within,
    duration,
    items,
    members,
    refusal,
    text,
)

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


decode_within = partial(decode_json_within, max_values=5000)
DECODERS = pytest.mark.parametrize("decode", [decode_json, decode_within], ids=["all", "within"])
Decode = Callable[[bytes], object]


@DECODERS
@pytest.mark.parametrize(
    ("body", "encoding"),
    [(b'"\xff"', "UTF-8"), (b'"\xc3', "UTF-8"), (b"\xff\xfe[\x00]", "UTF-16"),
     (b"\0[\0]\0", "UTF-16-BE"), (b"\xff\xfe\0\0[\0", "UTF-32"), (b"\xef\xbb\xbf\xff", "UTF-8")],
)  # fmt: skip
def test_what_is_no_text_is_an_error_of_its_own(decode: Decode, body: bytes, encoding: str) -> None:
    with pytest.raises(UnicodeDecodeError):
        json.loads(body)
    with pytest.raises(NotText, match=f"^Invalid JSON: not {encoding}, "):
        decode(body)


@DECODERS
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
@pytest.mark.parametrize("value", [{"a": ["\u00e9", "\U0001f600"]}, [], 7, "\ud800"])
def test_every_encoding_that_json_knows_is_read(
    decode: Decode, value: object, encoding: str
) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert value == decode(text.encode(encoding, "surrogatepass"))


@DECODERS
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
def test_json_is_decoded(decode: Decode, body: bytes, expected: object) -> None:
    actual = decode(body)
    assert expected in (actual, ...)


@DECODERS
@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"[1,]", b"NaN", b"[Infinity]", b"-Infinity", b"'a'", b"\xef\xbb\xbf{]",
     b'"a\tb"', b"1" * 5000, b"[1] 2", b'{"a":1', b'"\\', b'"[', b"[" * 100_000,
     b'{"a":' * 100_000, b'"[' * 100_000, b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1)],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_what_is_not_json_is_one_problem(decode: Decode, body: bytes) -> None:
    with pytest.raises(InvalidFields) as caught:
        decode(body)
    assert [((), "json_invalid")] == [found[:2] for found in problems(caught.value)]
    assert str(caught.value).startswith("Invalid JSON: ")


@DECODERS
def test_deep_nesting_harms_no_thread_with_a_small_stack(decode: Decode) -> None:
    outcome: list[object] = []

    def try_to_decode() -> None:
        try:
            decode(b'{"a":[' * (MAX_NESTING // 2) + b"]}" * (MAX_NESTING // 2))
            decode(b'{"a":[' * 1_000_000)
        except InvalidFields as error:
            outcome.append(str(error))

    previous = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=try_to_decode)
        thread.start()
    finally:
        threading.stack_size(previous)
    thread.join()
    assert [f"Invalid JSON: nested more than {MAX_NESTING} deep"] == outcome


NOT_JSON = st.lists(
    st.sampled_from(["[", "]", "{", "}", '"', ",", ":", "\\", " ", "a", "1", "-", ".5", "e9",
                     "true", "null", "NaN", '"a"', '"a":', "\n", "\t", '"\\u00e9"', "\u00e9"]),
    max_size=12,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False,
       allow_infinity=False) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
           st.text(), inner), max_leaves=20).map(json.dumps) | NOT_JSON)  # fmt: skip
def test_both_decoders_read_alike(text: str) -> None:
    outcomes: list[object] = []
    for decode in (decode_json, decode_within):
        try:
            outcomes.append(decode(text.encode()))
        except InvalidFields as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "body",
    [b"[" + b"0," * 5000 + b"0]", b"[" + b"[]," * 5000 + b"0]",
     b"{" + b",".join(b'"%d":0' % i for i in range(5000)) + b"}",
     b'{"a":' + b"[" + b"{}," * 5000 + b"0]}", b"[" + b'{"a":0},' * 2500 + b"0]"],
    ids=["numbers", "lists", "members", "objects", "objects with members"],
)  # fmt: skip
def test_values_are_counted_before_they_are_made(body: bytes) -> None:
    assert decode_json(body)
    with pytest.raises(InvalidFields, match="^Invalid JSON: more than 5,000 values$"):
        decode_within(body)


def test_what_is_text_counts_as_one_value() -> None:
    text = '[{",' * 5000 + '\\"'
    assert [text] == decode_within(json.dumps([text]).encode())


def test_no_more_problems_are_looked_for_than_are_listed() -> None:
    looked_at = []

    def parse(value: object) -> object:
        looked_at.append(value)
        raise refusal(value, "No")

    with pytest.raises(InvalidFields) as caught:
        items(list(range(10_000)), lambda value: members(value, dict, {"a": parse}))
    assert MAX_PROBLEMS == len(caught.value.problems)
    with pytest.raises(InvalidFields) as caught:
        items([{"a": [1]}] * 10_000, lambda value: members(value, dict, {"a": parse}))
    assert (MAX_PROBLEMS, MAX_PROBLEMS) == (len(caught.value.problems), len(looked_at))
    with pytest.raises(InvalidFields) as caught:
        items([0] * 10_000, int, check=lambda parsed: (refusal(0, "No") for _ in parsed))
    assert MAX_PROBLEMS == len(caught.value.problems)


@pytest.mark.parametrize("value", ["1" * 6_000_000, "P" + "1" * 6_000_000, "PT" + "1S" * 3_000_000])
def test_a_duration_of_millions_of_characters_is_refused_at_once(value: str) -> None:
    with pytest.raises(InvalidFields, match="^Input should be a valid duration, no text of more"):
        duration(value)
