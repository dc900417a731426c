"""What a duration is, with pydantic 2 as the judge."""

from __future__ import annotations

import json
import random
import re
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shim.contract.durations import format_duration, parse_duration

PYDANTIC: TypeAdapter[timedelta] = TypeAdapter(timedelta)

DURATIONS = st.timedeltas() | st.timedeltas(timedelta(days=-2), timedelta(days=2))


class Texts(random.Random):
    """Texts in and around the accepted forms."""

    def number(self) -> str:
        return self.choice(
            [
                str(self.randrange(100)),
                f"{self.randrange(62):02}",
                str(self.randrange(10 ** self.randrange(1, 13))),
            ]
        )

    def fraction(self) -> str:
        return self.choice(["", "", ".", ",5", f".{self.randrange(10**9)}"])

    def quantities(self, units: str) -> str:
        return "".join(
            self.number() + self.choice(["", "", self.fraction()]) + self.choice(units)
            for _ in range(self.randrange(4))
        )

    def iso(self) -> str:
        time = self.choice(["", "T", "T" + self.quantities("HMS")])
        return "P" + self.quantities("YMWD") + time

    def clock(self) -> str:
        seconds = f":{self.number()}{self.fraction()}"
        return f"{self.number()}:{self.number()}{self.choice(['', seconds])}"

    def days(self) -> str:
        unit = self.choice(["d", " d", " day", " days", "Days", " DAYS", " daY", " dayz"])
        separator = self.choice(["", ",", " ", ", ", ",  "])
        return self.number() + unit + separator + self.choice(["", self.clock()])

    def text(self) -> str:
        text = self.choice(["", "", "+", "-"]) + self.choice([self.iso, self.clock, self.days])()
        if self.random() < 0.1:
            position = self.randrange(len(text))
            text = text[:position] + self.choice("PTSd: -\n\u0661\u017f") + text[position:]
        # Whatever follows the sixth digit of a second's fraction, pydantic ignores.
        return re.sub(r"(:[0-9]+[.,][0-9]{1,6})[0-9]*.*", r"\1", text, flags=re.DOTALL)


def by_pydantic(value: object) -> timedelta | None:
    try:
        return PYDANTIC.validate_json(json.dumps(value))
    except (ValidationError, OverflowError):
        return None


def by_us(value: object) -> timedelta | None:
    try:
        return parse_duration(value)
    except (ValueError, TypeError):
        return None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (90, timedelta(seconds=90)),
        (1.5, timedelta(seconds=1.5)),
        (0, timedelta(0)),
        (-1, timedelta(seconds=-1)),
        (0.0000005, timedelta(microseconds=1)),
        (86399999999999, timedelta(days=999999999, seconds=86399)),
        ("PT1H10M30S", timedelta(hours=1, minutes=10, seconds=30)),
        ("P1DT2H", timedelta(days=1, hours=2)),
        ("P1W", timedelta(days=7)),
        ("P1M", timedelta(days=30)),
        ("P1Y", timedelta(days=365)),
        ("P1.5D", timedelta(days=1, hours=12)),
        ("PT1,5S", timedelta(seconds=1.5)),
        ("-PT5S", timedelta(seconds=-5)),
        ("+PT5S", timedelta(seconds=5)),
        ("P1DT", timedelta(days=1)),
        ("PT1S1M", timedelta(seconds=61)),
        ("10:20", timedelta(hours=10, minutes=20)),
        ("10:20:30.5", timedelta(hours=10, minutes=20, seconds=30.5)),
        ("100:20:30", timedelta(hours=100, minutes=20, seconds=30)),
        ("1:20:30", timedelta(hours=1, minutes=20, seconds=30)),
        ("1 day, 2:03:04", timedelta(days=1, hours=2, minutes=3, seconds=4)),
        ("1d 02:03:04", timedelta(days=1, hours=2, minutes=3, seconds=4)),
        ("-1 day, 0:00:01", timedelta(days=-1, seconds=-1)),
        ("2 days", timedelta(days=2)),
    ],
)
def test_reads_every_form_of_the_contract(value: object, expected: timedelta) -> None:
    assert expected == parse_duration(value) == by_pydantic(value)


@pytest.mark.parametrize(
    "value",
    ["1", "1.5", "-1", "", "P", "PT", "-PT", "10s", "1:20", "23:60", "10:20:60", "2:3:4", "PT1H1",
     "PT1.5H1M", "PTT1S", "P1H", "PT1D", "PT.5S", "P-1D", " PT1S", "PT1S\n", "pt1s", "1 day, 24:00",
     "P1000000000D", "PT4294967296S", "P" + "9" * 5000 + "D", "PT\u0661S", "1 day\u017f", "NaN",
     "1e3", "12:34:56Z", 86400000000000, 10**400, 1e300, float("inf"), float("nan"), True,
     "00000000000:00", None, [], {}],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_refuses_what_pydantic_refuses(value: object) -> None:
    assert by_us(value) is None
    assert by_pydantic(value) is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("10s", "expected seconds as a number, PT1H30M, 01:30:00 or 1 day, 01:30:00"),
        ("PT1.5H1M", "only the last quantity may have a fraction"),
        ("PT4294967296S", "a numeric value in the duration is too large"),
        ("P1000000000D", "durations may not exceed 999,999,999 days"),
        (1e999, "durations may not exceed 999,999,999 days"),
        (float("nan"), "NaN values not permitted"),
        ("1 day, 24:00", "hour value is outside expected range"),
    ],
)
def test_says_why_it_refuses(value: object, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(value)
    assert sentence == str(caught.value)


@pytest.mark.parametrize("value", [-86399999999999, "-P999999999DT1S"])
def test_refuses_negative_durations_on_which_pydantic_crashes(value: object) -> None:
    with pytest.raises(OverflowError):
        PYDANTIC.validate_python(value)
    assert by_us(value) is None


def test_refuses_text_after_a_long_fraction_which_pydantic_ignores() -> None:
    text = "10:20:30.1234567s"
    assert timedelta(seconds=37230, microseconds=123456) == by_pydantic(text)
    assert by_us(text) is None


@pytest.mark.parametrize("seed", range(5))
def test_reads_texts_as_pydantic_does(seed: int) -> None:
    texts = Texts(seed)
    for text in (texts.text() for _ in range(2000)):
        assert (text, by_pydantic(text)) == (text, by_us(text))


@settings(max_examples=2000, deadline=None)
@given(st.integers(-(10**15), 10**15) | st.floats() | st.floats(-100, 100))
def test_reads_numbers_as_pydantic_does(number: float) -> None:
    assert by_pydantic(number) == by_us(number)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (timedelta(0), "PT0S"),
        (timedelta(seconds=1.5), "PT1.5S"),
        (timedelta(seconds=61), "PT1M1S"),
        (timedelta(days=1, hours=1, minutes=1, seconds=1.5), "P1DT1H1M1.5S"),
        (timedelta(days=400), "P1Y35D"),
        (timedelta(seconds=-5), "-PT5S"),
        (timedelta(microseconds=1), "PT0.000001S"),
        (timedelta(seconds=3600), "PT1H"),
        (timedelta(seconds=3610), "PT1H10S"),
        (timedelta.max, "P2739726Y9DT23H59M59.999999S"),
        (timedelta.min, "-P2739726Y9D"),
    ],
)
def test_writes_the_forms_of_the_contract(duration: timedelta, expected: str) -> None:
    assert expected == format_duration(duration)


@settings(max_examples=2000, deadline=None)
@given(DURATIONS)
def test_writes_durations_as_pydantic_does(duration: timedelta) -> None:
    assert json.loads(PYDANTIC.dump_json(duration)) == format_duration(duration)


@settings(max_examples=2000, deadline=None)
@given(DURATIONS)
def test_reads_back_what_it_writes(duration: timedelta) -> None:
    assert duration == parse_duration(format_duration(duration))
