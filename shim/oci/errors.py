"""What can go wrong with an image, by the exit code that stands for it."""

from __future__ import annotations

from shim.contract.errors import ShimError
from shim.http.errors import RemoteError


class ImageUnsuitable(ShimError):
    """The image is there and readable, but cannot be patched, or not so: exit code 3."""


class RegistryError(RemoteError):
    """A registry, a token server or credentials said no, or nothing usable: exit code 4."""


class StorageError(ShimError):
    """A file or directory cannot be read or written, or is damaged: exit code 5."""
