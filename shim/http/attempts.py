"""The arithmetic of attempts: whether another one may follow, and after how long.

Which failures there are, and what each of them calls for, every service says in a table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

LONGEST_DELAY_SECONDS = 20.0
LOUD_ATTEMPT = 3  # the first whose failure is a warning: two are everyday life
LOUD_SECONDS = 10.0  # after which every failure is


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What follows a kind of failure.

    base_seconds: the longest delay before the first retry, which doubles with each.
    limit: how often it may happen; None where it uses up one of the attempts.
    most_asked_seconds: the longest delay that the server may ask for.
    """

    base_seconds: float = 0.0
    limit: int | None = None
    most_asked_seconds: float = LONGEST_DELAY_SECONDS


class Attempts:
    """What has failed of one exchange, and how much more of it may."""

    def __init__(
        self, policies: Mapping[Any, Policy], *, most: int, begun: float = 0.0, resumes: int = 0
    ) -> None:
        """policies: by the kinds that a service tells apart.

        begun: by the monotonic clock; resumes: how often a body may break off and make way.
        """
        self._policies, self._most, self._begun, self._resumes = policies, most, begun, resumes
        self.kinds: list[object] = []
        self.failed = self._resumed = 0

    def add(self, kind: object, *, is_further: bool = False) -> bool:
        """Count a failure; return whether another attempt may follow.

        is_further: bytes of the body had arrived since the last one, so that all attempts are left.
        """
        # Three ledgers. A kind with a limit of its own (a stale connection, a wrong clock) is held
        # to that one alone. A body that broke off after it brought something new starts the count
        # again, so that a long download over a bad line gets to its end, but only `resumes` times,
        # so that a server which sends a byte each time does not keep us for ever. All else uses up
        # one of `most`.
        limit = self._policies[kind].limit
        self.kinds.append(kind)
        if is_further and self._resumed < self._resumes:
            self.failed, self._resumed = 0, self._resumed + 1
        elif limit is None:
            self.failed += 1
        return self.failed < self._most if limit is None else self.kinds.count(kind) <= limit

    @property
    def retries(self) -> int:
        """How often the request was repeated, after its last attempt."""
        is_counted = self._policies[self.kinds[-1]].limit is None
        return self.failed - 1 if is_counted else self.failed

    def is_loud(self, now: float) -> bool:
        """Tell whether others should hear of the last one."""
        counted = [kind for kind in self.kinds if self._policies[kind].limit is None]
        return len(counted) >= LOUD_ATTEMPT or now - self._begun >= LOUD_SECONDS

    def describe(self) -> str:
        """Say which one it was, of how many."""
        if self.failed:
            return f"attempt {self.failed} of {self._most} failed"
        return f"broke off, {self._resumed} of {self._resumes} times"


def delay_seconds(
    policy: Policy, *, retry: int, headers: Mapping[str, str], random: float
) -> float:
    """Return how long to wait before retry number 1, 2, ...; random: of 0 to 1."""
    longest: float = policy.base_seconds * 2 ** (retry - 1)
    delay = random * min(longest, LONGEST_DELAY_SECONDS)
    return max(delay, min(_asked_seconds(headers), policy.most_asked_seconds))


def _asked_seconds(headers: Mapping[str, str]) -> float:
    """Return what the server asks for; a date is taken as the time from its own one on."""
    for name, unit in (("x-amz-retry-after", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if value.isascii() and value.isdecimal():
            return int(value) * unit
    with suppress(ValueError, TypeError):  # also of a date without its zone
        until, now = (parsedate_to_datetime(headers.get(n, "")) for n in ("retry-after", "date"))
        return (until - now).total_seconds()
    return 0.0
