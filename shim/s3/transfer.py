"""Many files at once, between a store and the disk.

Rule 1: no more requests are under way than the concurrency, files and parts counted together.
Rule 2: the lists are read as threads become free; they may be endless.
Rule 3: the first error stops what is under way, and is raised when nothing is under way any more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from shim.s3.crew import Crew
from shim.s3.errors import ServiceError
from shim.s3.store import Store

T = TypeVar("T")

# Of S3, Ceph and MinIO: nothing is wrong but the key.
KEY_REFUSED = ("InvalidObjectName", "InvalidURI", "KeyTooLongError", "XMinioInvalidObjectName")


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """An object, what opens the directory of the file that it becomes, and the file's name there.

    The directory is opened when the transfer begins, and its descriptor closed when it ends.
    then(check): what is done with the file, which has arrived, in the thread that has it;
    check() raises what ends it.
    """

    bucket: str
    key: str
    open: Callable[[], int]
    name: str
    then: Callable[[Callable[[], None]], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An object, and what opens the file that it is made of: a descriptor, which is then closed."""

    bucket: str
    key: str
    open: Callable[[], int]
    refuse: Callable[[ServiceError], None] | None = None  # takes the answer that bars the key


class Transfers:
    """Downloads and uploads of a store."""

    def __init__(self, store: Store, *, concurrency: int, check: Callable[[], None]) -> None:
        """concurrency: the number of threads; they live as long as one call."""
        self._store, self._concurrency, self._check = store, concurrency, check

    def download_all(self, downloads: Iterable[Download]) -> None:
        """Download every object; raise the first error."""

        def download(item: Download, crew: Crew) -> None:
            directory = item.open()
            try:
                self._store.download(item.bucket, item.key, directory, item.name, crew=crew)
            finally:
                os.close(directory)
            if item.then:
                item.then(crew.check)

        self._for_each(downloads, download)

    def upload_all(self, uploads: Iterable[Upload]) -> None:
        """Upload every file; raise the first error."""

        def upload(item: Upload, crew: Crew) -> None:
            fd = item.open()
            try:
                size = os.fstat(fd).st_size
                self._store.upload(item.bucket, item.key, fd, size=size, crew=crew)
            except ServiceError as error:
                if error.code not in KEY_REFUSED or item.refuse is None:
                    raise
                item.refuse(error)
            finally:
                os.close(fd)

        self._for_each(uploads, upload)

    def _for_each(self, items: Iterable[T], transfer: Callable[[T, Crew], None]) -> None:
        iterator, lock = iter(items), threading.Lock()
        crew = Crew(concurrency=self._concurrency, check=self._check)

        def step() -> bool:
            crew.check()
            with lock:
                item = next(iterator, None)
            if item is not None:
                transfer(item, crew)
            return item is not None

        crew.run(step)
