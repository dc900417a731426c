"""What can go wrong between the caller and a bucket."""

from __future__ import annotations

from collections.abc import Mapping


class S3ClientError(Exception):
    """Base of every error of this package; retries: how often the request was repeated."""

    retries = 0


class NoCredentials(S3ClientError):
    """No source of credentials is configured."""


class CredentialsFailed(S3ClientError):
    """A configured source of credentials did not give any."""


class ProfileInvalid(S3ClientError):
    """A shared configuration file cannot be read, or lacks the profile that is asked for."""


class EndpointUnresolved(S3ClientError, ValueError):
    """The configuration and the bucket do not lead to an endpoint."""


class ServiceError(S3ClientError):
    """An answer that says no; str() is one line that names the object and the request.

    code: the service's word for it, or the status where the answer had none.
    headers: of the answer, names in lower case.
    """

    def __init__(  # noqa: B042 - is neither copied nor pickled
        self,
        *,
        operation: str,
        bucket: str,
        key: str,
        status: int,
        code: str,
        message: str,
        headers: Mapping[str, str],
        region: str = "",
        request_id: str = "",
        host_id: str = "",
    ) -> None:
        self.operation, self.bucket, self.key = operation, bucket, key
        self.status, self.code, self.message = status, code, message
        self.headers, self.region = headers, region
        self.request_id = request_id or headers.get("x-amz-request-id", "")
        self.host_id = host_id or headers.get("x-amz-id-2", "")
        super().__init__(operation, bucket, key, status, code, message)

    def __str__(self) -> str:
        where = [f"s3://{self.bucket}/{self.key}"]
        where += [f"request id {self.request_id}"] if self.request_id else []
        where += [f"host id {self.host_id}"] if self.host_id else []
        code, operation, message = self.code, self.operation, self.message
        if operation == "GetObject" and self.status == 404:
            # The words that users know; a HEAD request could not have told the rest.
            where.insert(0, f"{code}: {message}")
            code, operation, message = "404", "HeadObject", "Not Found"
        retried = f" (reached max retries: {self.retries})" if self.retries else ""
        text = (
            f"An error occurred ({code}) when calling the {operation} operation{retried}: {message}"
        )
        return " ".join(f"{text} ({'; '.join(where)})".split())


class TransportError(S3ClientError):
    """No answer, or half of one: refused, reset, timed out, malformed."""


class StaleConnection(TransportError):
    """A kept connection was closed by the server before it could have seen the request."""


class CertificateError(TransportError):
    """The server's certificate is not trusted; asking again would not help."""


class IntegrityError(S3ClientError):
    """What arrived or was read is not what was sent or announced."""


class ObjectChanged(S3ClientError):
    """The object was replaced during the download."""


class FileChanged(S3ClientError):
    """The file to upload was written to, or cut short, meanwhile: its writer's doing, not S3's."""

    def __init__(self, key: str) -> None:  # noqa: B042 - is neither copied nor pickled
        self.key = key
        super().__init__(f"The file for {key!r} changed while it was uploaded")


class Cancelled(S3ClientError):
    """The caller asked to stop."""
