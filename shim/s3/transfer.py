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
from pathlib import Path

from shim.s3.crew import Crew
from shim.s3.errors import Cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from shim.s3.store import Store

    T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """An object, and the file that it becomes; the file's directory exists."""

    bucket: str
    key: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An object, and what opens the file that it is made of: a descriptor, which is then closed."""

    bucket: str
    key: str
    open: Callable[[], int]


class Transfers:
    """Downloads and uploads of a store."""

    def __init__(self, store: Store, *, concurrency: int, cancelled: Callable[[], bool]) -> None:
        """concurrency: the number of threads; they live as long as one call."""
        self._store, self._concurrency, self._cancelled = store, concurrency, cancelled

    def download_all(self, downloads: Iterable[Download]) -> None:
        """Download every object; raise the first error."""

        def download(item: Download, crew: Crew) -> None:
            self._store.download(item.bucket, item.key, item.path, crew=crew)

        self._for_each(downloads, download)

    def upload_all(self, uploads: Iterable[Upload]) -> None:
        """Upload every file; raise the first error."""

        def upload(item: Upload, crew: Crew) -> None:
            fd = item.open()
            try:
                size = os.fstat(fd).st_size
                self._store.upload(item.bucket, item.key, fd, size=size, crew=crew)
            finally:
                os.close(fd)

        self._for_each(uploads, upload)

    def _for_each(self, items: Iterable[T], transfer: Callable[[T, Crew], None]) -> None:
        iterator, lock = iter(items), threading.Lock()
        crew = Crew(concurrency=self._concurrency, cancelled=self._cancelled)

        def step() -> bool:
            if crew.cancelled():
                raise Cancelled
            with lock:
                item = next(iterator, None)
            if item is not None:
                transfer(item, crew)
            return item is not None

        crew.run(step)
