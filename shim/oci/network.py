"""Registries as their user reaches them: connections, authorities and logins."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from shim.files.exposure import never_exposed
from shim.http.proxies import Proxies
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.oci import ecr
from shim.oci.auth import Login
from shim.oci.logins import HELPER_SECONDS, find_login
from shim.oci.reference import Reference
from shim.oci.registry import Registry

MAX_CONNECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Network:
    """What registries are reached with, once one is named.

    creds: for every registry, in place of what files, helpers and AWS have.
    carried_bundle: certificates of authorities for systems that have none.
    log(level, sentence): is told where AWS credentials come from.
    """

    environ: Mapping[str, str]
    creds: Login | None
    is_insecure: bool
    check: Callable[[], None]
    carried_bundle: str
    log: Callable[[str, str], None]

    def open(self, name: Reference) -> Registry:
        """Return a registry's repository as who its user is there."""
        return Registry(
            name,
            transport=self._transport,
            login=self.creds or self._find_login(name),
            insecure=self.is_insecure,
            check=self.check,
        )

    @cached_property
    def _transport(self) -> Transport:
        """The connections and authorities that SOURCE and DEST share."""
        trust = Trust(self.environ, carried_bundle=self.carried_bundle, exposure=never_exposed)
        proxies = Proxies(self.environ)
        return Transport(proxies=proxies, trust=trust, max_connections=MAX_CONNECTIONS)

    def _find_login(self, name: Reference) -> Login | None:
        login = find_login(
            name.domain,
            name.repository,
            environ=self.environ,
            run_helper=lambda argv, stdin: self._run(argv, HELPER_SECONDS, stdin),
        )
        if login or not ecr.find_region(name.domain)[0]:
            return login
        return ecr.get_login(
            name.domain,
            environ=self.environ,
            transport=self._transport,
            run_helper=self._run,
            log=self.log,
        )

    def _run(self, argv: list[str], timeout_seconds: float, stdin: bytes = b"") -> bytes:
        """Run a program that prints credentials; OSError where it fails."""
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                env=dict(self.environ),
                capture_output=True,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{argv[0]} did not end in {timeout_seconds:g} s") from error
        if done.returncode:  # the reason is on stdout, where else the secret is
            reason = (done.stdout + done.stderr)[:300].decode(errors="replace").strip()
            raise OSError(f"{argv[0]} ended with status {done.returncode}: {reason}")
        return done.stdout
