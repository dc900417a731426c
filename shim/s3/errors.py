"""What can go wrong between the caller and a bucket."""

from __future__ import annotations


class S3ClientError(Exception):
    """Base of every error of this package."""


class NoCredentials(S3ClientError):
    """No source of credentials is configured."""


class CredentialsFailed(S3ClientError):
    """A configured source of credentials did not give any."""


class EndpointUnresolved(S3ClientError, ValueError):
    """The configuration and the bucket do not lead to an endpoint."""
