"""The authorities that certificates of servers are checked against."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping

from shim.files.exposure import find_exposure
from shim.http.errors import CertificateError

# Where distributions keep their bundle; the first that exists is read.
IMAGE_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Trust:
    """The authorities that certificates are checked against, read once.

    A bundle that the image's command could have written is none: it is left out, with a sentence in
    `exposed`.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        profile_bundle: str = "",
        carried_bundle: str = "",
        exposure: Callable[[str], str] = find_exposure,
    ) -> None:
        """Choose the bundles.

        The first of AWS_CA_BUNDLE, the profile's ca_bundle, REQUESTS_CA_BUNDLE, SSL_CERT_FILE that
        is not empty is the only one. Otherwise it is the system's store, the image's bundle, and
        carried_bundle: that of the frozen binary, for images that have none.
        """
        self.exposed: list[str] = []
        self._exposure = exposure
        named = (
            environ.get("AWS_CA_BUNDLE"),
            profile_bundle,
            environ.get("REQUESTS_CA_BUNDLE"),
            environ.get("SSL_CERT_FILE"),
        )
        chosen = list(filter(self._is_protected, filter(None, named)))[:1]
        found = filter(self._is_protected, filter(os.path.isfile, IMAGE_BUNDLES))
        self._is_chosen = bool(chosen)
        self._bundles = chosen or [*list(found)[:1], *filter(None, [carried_bundle])]
        self._directories = environ.get("SSL_CERT_DIR", "")
        self._loaded: ssl.SSLContext | CertificateError | None = None
        self._lock = threading.Lock()

    @property
    def source(self) -> str:
        """Where the authorities come from, for messages."""
        return ", ".join(self._bundles) or "no CA bundle: neither the system nor the image has one"

    def context(self) -> ssl.SSLContext:
        """Return the one context of this process; what the first call cannot read, none can."""
        with self._lock:
            if self._loaded is None:
                try:
                    self._loaded = self._load()
                except CertificateError as error:
                    self._loaded = error
            if isinstance(self._loaded, CertificateError):
                raise self._loaded
            return self._loaded

    def _is_protected(self, path: str) -> bool:
        try:
            reason = self._exposure(path)
        except OSError:
            return True  # reading it will say why not
        if reason:
            self.exposed.append(f"{path} is ignored: {reason}")
        return not reason

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for path in (*(() if self._is_chosen else self._list_system_store()), *self._bundles):
            where = "capath" if os.path.isdir(path) else "cafile"
            try:
                context.load_verify_locations(**{where: path})
            except OSError as error:
                raise CertificateError(f"Could not read the CA bundle {path}: {error}") from error
        return context

    def _list_system_store(self) -> list[str]:
        """Name what OpenSSL's set_default_verify_paths loads: it takes no look at who owns it."""
        system = ssl.get_default_verify_paths()
        directories = (self._directories or system.openssl_capath).split(":")
        paths = [*filter(os.path.isfile, [system.openssl_cafile])]
        paths += filter(os.path.isdir, directories)
        return list(filter(self._is_protected, paths))
