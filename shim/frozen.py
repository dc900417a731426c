"""What only the static binary needs; .ci/launcher.c makes what is undone here.

A checkout, an installed package and the zipapp are not frozen: nothing happens in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache

_IMAGE_PREFIX = "SHIM_IMAGE_"
_LAUNCHER_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "OPENSSL_CONF")
_BUNDLE = "cacert.pem"


@cache
def settle() -> str:
    """Load what the launcher unpacked, remove it, return the path of the carried certificates.

    To be called before anything else; "" when this is not the static binary.

    From then on nobody who can write to the temporary directory has a part in what we load: all
    modules come from the binary itself, and the certificates from an open file.
    """
    # From the command line, which the launcher writes: an image could set a variable.
    directory = sys._xoptions.get("unpacked")
    if not isinstance(directory, str):
        return ""
    names = os.listdir(directory)
    for name in names:
        module, separator, _ = name.partition(".cpython-")
        if separator:
            __import__(module)
    bundle = os.open(f"{directory}/{_BUNDLE}", os.O_RDONLY | os.O_CLOEXEC)
    for name in names:
        os.unlink(f"{directory}/{name}")
    os.rmdir(directory)
    # First the zip, by a descriptor. That of the directory stays open for ever as well: the dynamic
    # loader knows it by its number.
    del sys.path[1:]
    return f"/proc/self/fd/{bundle}"


def image_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that the image was started with."""
    if not settle():
        return dict(environ)
    return {
        name.removeprefix(_IMAGE_PREFIX): value
        for name, value in environ.items()
        if name not in _LAUNCHER_VARIABLES
    }


def describe() -> str:
    """Name what this program is made of, for `--version`."""
    import ssl

    python = ".".join(map(str, sys.version_info[:3]))
    parts = [f"Python {python}", ssl.OPENSSL_VERSION]
    if settle():
        with open(settle(), encoding="ascii") as bundle:
            parts.append(f"certificates of {bundle.readline().strip()}")
    return ", ".join(parts)
