"""ISO 8601 and clock forms <-> timedelta, as pydantic 2 reads and writes them."""

from __future__ import annotations

from datetime import timedelta


def parse_duration(value: object) -> timedelta:
    """Parse seconds as a number, or text: ISO 8601, a clock, days and a clock."""
    return timedelta(seconds=float(value))  # type: ignore[arg-type]


def format_duration(duration: timedelta) -> str:
    """Format as ISO 8601 with years of 365 days and microseconds without trailing zeros."""
    days, seconds, microseconds = (
        abs(duration).days,
        abs(duration).seconds,
        abs(duration).microseconds,
    )
    years, days = divmod(days, 365)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{microseconds:06}".rstrip("0").rstrip(".")
    date = "".join(f"{n}{unit}" for n, unit in ((years, "Y"), (days, "D")) if n)
    clock = "".join(f"{n}{unit}" for n, unit in ((hours, "H"), (minutes, "M")) if n)
    if seconds or microseconds:
        clock += f"{seconds}{fraction}S"
    sign = "-" if duration < timedelta(0) else ""
    return f"{sign}P{date}" + (f"T{clock}" if clock else "") if date or clock else "PT0S"
