"""The uploads of one task: each output file becomes an object below the task's prefix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from shim.contract.tasks import InferenceIO, InferenceTask
from shim.files.outputs import Outputs
from shim.log.log import Log
from shim.s3.transfer import Upload

# As many parts as an object may have, of the largest that there are:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_OBJECT_BYTES = 10_000 * (5 << 30)


class Uploads:
    """Iterated over once; uploaded: by relative path, what was handed out and not refused."""

    def __init__(self, task: InferenceTask, outputs: Outputs, *, log: Log) -> None:
        self._task, self._outputs, self._log = task, outputs, log
        self.uploaded: dict[str, InferenceIO] = {}

    def __iter__(self) -> Iterator[Upload]:
        bucket, prefix = self._task.output_bucket_name, self._task.output_prefix
        for file in self._outputs.walk():
            path = file.relative_path
            try:
                fd = file.open()
            except FileNotFoundError as error:  # a server of the user's may still be at work
                self._outputs.skip(path, error)
                continue
            size = os.fstat(fd).st_size
            if size > MAX_OBJECT_BYTES:
                self._outputs.skip(path, f"it has {size} bytes, more than S3 can hold")
                os.close(fd)
                continue
            self._log.debug(f"Uploading {path!r} to {bucket}")
            self.uploaded[path] = InferenceIO(
                relative_path=path, bucket_name=bucket, bucket_key=prefix + path
            )
            yield Upload(
                bucket=bucket,
                key=prefix + path,
                open=partial(int, fd),
                refuse=partial(self._refuse, path),
            )

    def _refuse(self, path: str, reason: object) -> None:
        del self.uploaded[path]
        self._outputs.skip(path, reason)
