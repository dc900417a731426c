"""What the image's author asked to run, and in which environment."""

from __future__ import annotations

from collections.abc import Mapping

from shim.contract.errors import UserSafeError

_SHELL = ("/bin/sh", "-c")

# Values of HOME that a container runtime sets for root when the image has none of its own.
_RUNTIME_HOMES = {"", "/", "/root"}


def resolve_argv(
    *, entrypoint: str | tuple[str, ...] | None, cmd: str | tuple[str, ...] | None
) -> tuple[str, ...]:
    """Join ENTRYPOINT and CMD as Docker does; text is a shell form, a tuple an exec form.

    Raises UserSafeError when the image has neither.
    """
    if isinstance(entrypoint, str):
        return (*_SHELL, entrypoint)
    argv = (*(entrypoint or ()), *((*_SHELL, cmd) if isinstance(cmd, str) else cmd or ()))
    if not argv:
        raise UserSafeError("The container defines neither an ENTRYPOINT nor a CMD instruction")
    return argv


def child_environment(environ: Mapping[str, str], *, home: str | None) -> dict[str, str]:
    """Return the environment of the user's process: the image's, without secrets.

    `home` replaces a HOME that the image did not set; None keeps it.
    """
    env = {
        name: value
        for name, value in environ.items()
        if not name.casefold().startswith("grand_challenge_")
    }
    own_home = env.get("HOME", "")
    if home is None:
        env["HOME"] = own_home or "/"
    elif own_home in _RUNTIME_HOMES:
        env["HOME"] = home
    return env
