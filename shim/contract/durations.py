"""Durations as pydantic 2 reads and writes them.

Read:     90   PT1M30S   P1DT2H   P1.5W   00:01:30   00:01:30.5   1 day, 2:03:04   1d 02:03:04
Written:  PT1M30S   P1Y35DT1H1M1.5S   -PT5S   PT0S
"""

from __future__ import annotations

import re
from datetime import timedelta

_DAYS = {"Y": 365, "M": 30, "W": 7, "D": 1}
_SECONDS = {"H": 60 * 60, "M": 60, "S": 1}
_DAY_SECONDS = 24 * 60 * 60

_QUANTITY = re.compile(r"([0-9]+)([.,][0-9]*)?([A-Z])")
_DATE = re.compile(r"([0-9]+([.,][0-9]*)?[YMWD])*")
_TIME = re.compile(r"([0-9]+([.,][0-9]*)?[HMS])*")
_CLOCK = re.compile(
    r"((?P<days>[0-9]+) ?[dD](ays?|AYS?)?,? ?)?"
    # Five characters are the least: 1:20 could be hours or minutes.
    r"((?=.{5})(?P<hours>[0-9]{0,10}):(?P<minutes>[0-5][0-9])"
    r"(:(?P<seconds>[0-5][0-9])([.,](?P<fraction>[0-9]+))?)?)?"
)

_INVALID = "expected seconds as a number, PT1H30M, 01:30:00 or 1 day, 01:30:00"
_TOO_LARGE = "durations may not exceed 999,999,999 days"


def parse_duration(value: object) -> timedelta:
    """Parse a number of seconds or a text.

    Raises ValueError that says what is wrong, TypeError for any other type.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError("neither a number nor a text")
    try:
        return _parse_text(value) if isinstance(value, str) else _parse_seconds(value)
    except OverflowError:
        raise ValueError(_TOO_LARGE) from None


def format_duration(duration: timedelta) -> str:
    """Format as ISO 8601, with years of 365 days and without trailing zeros."""
    sign, duration = ("-", -duration) if duration < timedelta(0) else ("", duration)
    years, days = divmod(duration.days, 365)
    minutes, seconds = divmod(duration.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    date = (f"{years}Y" if years else "") + (f"{days}D" if days else "")
    time = (f"{hours}H" if hours else "") + (f"{minutes}M" if minutes else "")
    if seconds or duration.microseconds or not date + time:
        time += f"{seconds}.{duration.microseconds:06}".rstrip("0").rstrip(".") + "S"
    return f"{sign}P{date}T{time}" if time else f"{sign}P{date}"


def _parse_seconds(value: float) -> timedelta:
    if value != value:
        raise ValueError("NaN values not permitted")
    if abs(value) >= 1e9 * _DAY_SECONDS:
        raise ValueError(_TOO_LARGE)
    duration = _timedelta(days=0, seconds=abs(value))
    return -duration if value < 0 else duration


def _parse_text(text: str) -> timedelta:
    unsigned = text[1:] if text.startswith(("+", "-")) else text
    if unsigned.startswith("P"):
        duration = _parse_iso(unsigned[1:])
    else:
        duration = _parse_clock(unsigned)
    return -duration if text.startswith("-") else duration


def _parse_iso(text: str) -> timedelta:
    date, _, time = text.partition("T")
    quantities = _QUANTITY.findall(text.replace("T", ""))
    if not quantities or not _DATE.fullmatch(date) or not _TIME.fullmatch(time):
        raise ValueError(_INVALID)
    if any(fraction for _, fraction, _ in quantities[:-1]):
        raise ValueError("only the last quantity may have a fraction")
    days = sum(int(number) * _DAYS[unit] for number, _, unit in _QUANTITY.findall(date))
    seconds = sum(int(number) * _SECONDS[unit] for number, _, unit in _QUANTITY.findall(time))
    _, fraction, unit = quantities[-1]
    rest = float("0" + fraction.replace(",", ".")) * (_SECONDS if time else _DAYS)[unit]
    if not time:
        days, rest = days + int(rest), rest % 1 * _DAY_SECONDS
    if seconds + int(rest) >= 2**32:
        raise ValueError("a numeric value in the duration is too large")
    return timedelta(seconds=seconds) + _timedelta(days=days, seconds=rest)


def _parse_clock(text: str) -> timedelta:
    match = _CLOCK.fullmatch(text)
    if not match or not text:
        raise ValueError(_INVALID)
    days, hours, minutes, seconds = (
        int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds")
    )
    if hours > (23 if match["days"] else 2_400_000_000):
        raise ValueError("hour value is outside expected range")
    microseconds = int((match["fraction"] or "").ljust(6, "0")[:6])
    return timedelta(
        days=days, hours=hours, minutes=minutes, seconds=seconds, microseconds=microseconds
    )


def _timedelta(*, days: int, seconds: float) -> timedelta:
    """Round to microseconds, halves up, where timedelta itself would round halves to even."""
    microseconds = seconds % 1 * 1e6
    rounded = int(microseconds) + (microseconds % 1 >= 0.5)
    return timedelta(days=days, seconds=int(seconds), microseconds=rounded)
