"""What can go wrong between the caller and a bucket."""

from __future__ import annotations

from collections.abc import Mapping

from shim.http.errors import RemoteError


class S3ClientError(RemoteError):
    """Base of the errors of a store, be it S3 or a directory."""


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


class IntegrityError(S3ClientError):
    """What arrived or was read is not what was sent or announced."""


class ObjectChanged(S3ClientError):
    """The object was replaced during the download."""


class FileChanged(S3ClientError):
    """The file to upload was written to, or cut short, meanwhile: its writer's doing, not S3's."""

    def __init__(self, key: str) -> None:  # noqa: B042 - is neither copied nor pickled
        self.key = key
        super().__init__(f"The file for {key!r} changed while it was uploaded")
