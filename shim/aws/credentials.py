"""Whose keys sign the requests: found once, renewed before they expire.

The order is botocore's: environment, web identity, profile, container, instance metadata. The first
source that is configured is the one: when it fails, no later one is asked, as it would be another
identity. Instance metadata comes last because only asking tells whether it is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from shim.aws.errors import CredentialsFailed, NoCredentials
from shim.aws.profiles import Profile
from shim.aws.sigv4 import Credentials
from shim.aws.sources import Fetch, Sources
from shim.files.exposure import find_exposure
from shim.http.errors import RemoteError

# botocore credentials.py: _DEFAULT_ADVISORY_REFRESH_TIMEOUT, _DEFAULT_MANDATORY_REFRESH_TIMEOUT.
ADVISORY = timedelta(minutes=15)
MANDATORY = timedelta(minutes=10)
PAUSE_AFTER_FAILURE = timedelta(minutes=1)


class CredentialProvider:
    """Hands out credentials to any thread, and renews them."""

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Credentials | None]],
        *,
        region: str | None,
        now: Callable[[], datetime],
        log: Callable[[str, str], None],
        url: str = "",
        absent: Sequence[str] = (),
    ) -> None:
        """sources: by name, in the order in which they are asked; None means not configured.

        url: of the server that they ask; absent: sentences about files that count as absent.
        """
        self._sources, self._now, self._log = sources, now, log
        self.url, self._absent = url, absent
        self._region = region or "not set"
        self._lock = threading.Lock()
        self.description = "No credentials have been found yet"
        self._current: Credentials | None = None
        self._rejected: Credentials | None = None
        self._paused_until = datetime.min.replace(tzinfo=UTC)

    def get(self) -> Credentials:
        """Return valid credentials.

        Within 15 minutes of their end one thread renews them while others go on; within 10 minutes
        all wait for it. Raises NoCredentials, or CredentialsFailed when there are none that last.
        """
        current = self._current
        if current and not self._ends_within(ADVISORY, current):
            return current
        may_wait = current is None or self._ends_within(MANDATORY, current)
        if not self._lock.acquire(blocking=may_wait):
            assert current
            return current
        try:
            if self._current is None:
                self._current = self._find()
            elif self._ends_within(ADVISORY, self._current):
                self._renew(self._current)
            return self._current
        finally:
            self._lock.release()

    def refresh(self, rejected: Credentials) -> Credentials:
        """Return others than those the service called expired; the same if there are no others."""
        with self._lock:
            if self._current == rejected != self._rejected:
                self._rejected = rejected
                self._paused_until = self._now()
                self._renew(rejected)
            return self._current or rejected

    def _ends_within(self, period: timedelta, credentials: Credentials) -> bool:
        end = credentials.expiration
        return end is not None and end - self._now() < period

    def _find(self) -> Credentials:
        for name, load in self._sources.items():
            if found := load():
                self.description = f"Credentials come from {name}; region: {self._region}"
                self._log("INFO", self.description)
                self._sources = {name: load}
                return found
        self._sources = {}
        raise NoCredentials("; ".join(["Unable to locate credentials", *self._absent]))

    def _renew(self, current: Credentials) -> None:
        """Replace the credentials; while they are valid a failure is only logged."""
        expired = self._ends_within(timedelta(0), current)
        if self._now() < self._paused_until and not expired:
            return
        ((name, load),) = self._sources.items()
        try:
            fresh = load()
            if fresh is None:
                raise CredentialsFailed(f"There are no credentials any more in {name}")
            if self._ends_within(timedelta(0), fresh):
                raise CredentialsFailed(
                    "Credentials were refreshed, but the refreshed credentials are still expired."
                )
        except RemoteError as error:
            if expired:
                raise
            self._paused_until = self._now() + PAUSE_AFTER_FAILURE
            self._log("WARNING", f"Refreshing temporary credentials failed: {error}")
        else:
            self._current = fresh


def credential_provider(
    environ: Mapping[str, str],
    *,
    profile: Profile,
    region: str | None,
    fetch: Fetch,
    run_helper: Callable[[list[str], float], bytes],
    now: Callable[[], datetime],
    log: Callable[[str, str], None],
    sleep: Callable[[float], None] = time.sleep,
    exposure: Callable[[str], str] = find_exposure,
) -> CredentialProvider:
    """Build the provider; its source is decided, and not asked before the first get().

    region: for the log line only.
    run_helper(argv, timeout_seconds): returns standard output; OSError when the program fails.
    exposure(path): says why others could have written a file, "" when they could not.
    """
    source = Sources(
        environ=environ,
        profile=profile,
        fetch=fetch,
        run_helper=run_helper,
        now=now,
        sleep=sleep,
        exposure=exposure,
    ).choose()
    return CredentialProvider(
        {source.name: source.load},
        region=region,
        now=now,
        log=log,
        url=source.url,
        absent=(*profile.exposed, *profile.unreadable),
    )
