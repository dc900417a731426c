"""What only the static binary needs: undo what PyInstaller and staticx leave in the process.

A checkout, an installed package and the zipapp are not frozen: nothing happens in them.

Rule 1: the image's programs get the environment that the image was started with.
Rule 2: libcrypto is ours; the image's configuration of its own must not reach it.
Rule 3: once the user's code runs, nothing is read from the temporary directory: who tidies up /tmp
        takes nothing from us.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from functools import cache

_PACKAGING_PREFIXES = ("_PYI_", "_MEI", "STATICX_")
_BUNDLE = "cacert.pem"
_MODULES = "modules.txt"
# Where PyInstaller unpacks our libraries, and what it puts first in LD_LIBRARY_PATH.
_HOME = getattr(sys, "_MEIPASS", "")


def take_environment(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Return the environment that the image was started with; make environ, the process's, ours.

    To be called before anything loads OpenSSL.
    """
    started_with = _read_initial_environment()
    if not _HOME:
        image = dict(environ)
        if "LC_CTYPE" not in started_with:
            image.pop("LC_CTYPE", None)  # Python's own, under the C locale
        return image
    # PyInstaller has removed variables from environ.
    image = {
        name: value
        for name, value in started_with.items()
        if not name.startswith(_PACKAGING_PREFIXES)
    }
    restore_library_path(image, _HOME)
    environ["OPENSSL_CONF"] = os.devnull
    return image


def _read_initial_environment() -> dict[str, str]:
    """Return what the kernel knows that this process was started with."""
    variables: dict[str, str] = {}
    with open("/proc/self/environ", encoding="utf-8", errors="surrogateescape") as file:
        for entry in file.read().split("\0"):
            name, separator, value = entry.partition("=")
            if separator:
                variables.setdefault(name, value)  # of several with one name, the first counts
    return variables


def restore_library_path(image: dict[str, str], home: str) -> None:
    """Undo PyInstaller's `LD_LIBRARY_PATH={home}[:{image's}]`."""
    ours, separator, original = image.get("LD_LIBRARY_PATH", "").partition(":")
    if ours != home:
        return
    del image["LD_LIBRARY_PATH"]
    if separator:
        # Without the separator, the image has no LD_LIBRARY_PATH and a LD_LIBRARY_PATH_ORIG is its.
        image["LD_LIBRARY_PATH"] = image.pop("LD_LIBRARY_PATH_ORIG", original)


def follow_launcher(stop: Callable[[], None]) -> None:
    """Call stop when the process that the image was started as dies before this one.

    It passes on TERM and INT alone; what else ends it would leave a task to run on by itself.
    """
    if not _HOME:
        return
    # Between it and this process is the one that unpacked our libraries.
    with open(f"/proc/{os.getppid()}/stat", "rb") as file:
        launcher = int(file.read().rpartition(b")")[2].split()[1])  # proc(5): field 4
    if launcher == 1:
        return  # nobody outlives that one

    def watch() -> None:
        poller.poll()
        stop()

    with suppress(OSError):  # kernels before 5.3 have no descriptors of processes
        poller = select.poll()
        poller.register(os.pidfd_open(launcher), select.POLLIN)
        threading.Thread(target=watch, daemon=True).start()


@cache
def carried_bundle() -> str:
    """Return the path of the carried certificates, which stays valid; "" when nothing is frozen."""
    if not _HOME:
        return ""
    bundle = os.open(f"{_HOME}/{_BUNDLE}", os.O_RDONLY | os.O_CLOEXEC)
    return f"/proc/self/fd/{bundle}"


@cache
def settle() -> None:
    """Load all that is left to load from the temporary directory: rule 3."""
    if carried_bundle():
        with open(f"{_HOME}/{_MODULES}", encoding="ascii") as names:
            for name in names.read().split():
                with suppress(ImportError):  # one that needs what was left out
                    __import__(name)


def describe() -> str:
    """Name what this program is made of, for `--version`."""
    import ssl

    python = ".".join(map(str, sys.version_info[:3]))
    parts = [f"Python {python}", ssl.OPENSSL_VERSION]
    if carried_bundle():
        with open(carried_bundle(), encoding="ascii") as bundle:
            parts.append(f"certificates of {bundle.readline().strip()}")
    return ", ".join(parts)
