"""What can go wrong between us and a service on the network."""

from __future__ import annotations


class RemoteError(Exception):
    """Base of every error of the rooms that talk to others.

    retries: how often the request was repeated.
    """

    retries = 0


class SettingInvalid(RemoteError, ValueError):
    """A variable of the environment, or an option of the profile, cannot be right.

    Of the text that was found only its length is shown: it may be a secret, or hold one.
    """

    def __init__(  # noqa: B042 - is neither copied nor pickled
        self, name: str, *, expected: str, found: str
    ) -> None:
        plural = "s" * (len(found) != 1)
        super().__init__(
            f"{name}: expected {expected}, found a text of {len(found)} character{plural}"
        )


class TransportError(RemoteError, ConnectionError):
    """No answer, or half of one: refused, reset, timed out, malformed."""


class StaleConnection(TransportError):
    """A kept connection was closed by the server before it could have seen the request."""


class CertificateError(TransportError):
    """The server's certificate is not trusted; asking again would not help."""
