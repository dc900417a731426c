"""What can go wrong before a request is signed."""

from __future__ import annotations

from shim.http.errors import RemoteError


class NoCredentials(RemoteError):
    """No source of credentials is configured."""


class CredentialsFailed(RemoteError):
    """A configured source of credentials did not give any."""


class ProfileInvalid(RemoteError):
    """A shared configuration file cannot be read, or lacks the profile that is asked for."""
