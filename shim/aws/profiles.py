"""The profile that the shared configuration files describe, read as botocore reads them.

A profile names programs to run, files to send and servers to send them to. A file of these that the
image's command could have written, at its last start perhaps, is ignored.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from configparser import Error, RawConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from shim.aws.errors import ProfileInvalid
from shim.files.exposure import find_exposure

MAX_FILE_BYTES = 1024 * 1024
# By the variable that names another one.
FILES = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
}

Section = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One profile; an option of a nested block is named "block.option".

    settings: from both files, those of the credentials file win; what the profile's services
    section holds is named "services.SERVICE.OPTION".
    credentials: from the credentials file alone.
    exposed, unreadable: sentences about files that are there and count as absent.
    """

    name: str
    settings: Mapping[str, str] = field(repr=False)
    credentials: Mapping[str, str] = field(repr=False)
    exposed: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def read_profile(
    environ: Mapping[str, str], exposure: Callable[[str], str] = find_exposure
) -> Profile:
    """Read the profile that the environment names; the default one may be missing.

    exposure(path): says why others could have written a file, "" when they could not.
    """
    named = environ.get("AWS_DEFAULT_PROFILE") or environ.get("AWS_PROFILE")
    name = named or "default"
    exposed: list[str] = []
    unreadable: list[str] = []
    found = []
    for variable, default in FILES.items():
        path = Path(_expand(environ.get(variable) or default, environ))
        try:
            reason = exposure(str(path)) if path.is_file() else ""
            exposed += [f"{path} is ignored: {reason}"] if reason else []
            found.append({} if reason else _read_sections(path))
        except OSError as error:
            unreadable.append(f"Unable to read {path}: {error.strerror}")
            found.append({})
    config, shared = found
    profiles = _sections_of(config, "profile")
    if "default" in config:
        profiles.setdefault("default", config["default"])
    if named and named not in profiles.keys() | shared.keys():
        reasons = "".join(f"; {reason}" for reason in (*exposed, *unreadable))
        raise ProfileInvalid(f"The config profile ({named}) could not be found{reasons}")
    settings = profiles.get(name, {}) | shared.get(name, {})
    if services := settings.get("services"):
        section = _sections_of(config, "services").get(services)
        if section is None:
            raise ProfileInvalid(
                f"The profile is configured to use the services section but the {services!r} "
                "services configuration does not exist."
            )
        settings |= {f"services.{option}": value for option, value in section.items()}
    return Profile(
        name=name,
        settings=settings,
        credentials=shared.get(name, {}),
        exposed=tuple(exposed),
        unreadable=tuple(unreadable),
    )


def _sections_of(config: Mapping[str, Section], kind: str) -> dict[str, Section]:
    """Pick the sections `[kind NAME]`, by name."""
    found = {}
    for heading, section in config.items():
        if heading.startswith(kind):
            try:
                words = shlex.split(heading)
            except ValueError:
                continue
            if len(words) == 2:
                found[words[1]] = section
    return found


def _read_sections(path: Path) -> dict[str, Section]:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ProfileInvalid(f"Unable to read {path}: larger than {MAX_FILE_BYTES} bytes")
    return _parse_sections(content, path)


def _parse_sections(content: bytes, path: Path) -> dict[str, Section]:
    parser = RawConfigParser()
    try:
        parser.read_string(content.decode())
        return {heading: _flatten(dict(parser[heading])) for heading in parser.sections()}
    except (Error, ValueError):
        # The parser's own sentence quotes the line, which may hold a key.
        raise ProfileInvalid(f"Unable to parse config file: {path}") from None


def _flatten(options: Mapping[str, str]) -> Section:
    """Name the options of a nested block, one level, `block.option`."""
    flat = {}
    for name, value in options.items():
        if not value.startswith("\n"):
            flat[name] = value
            continue
        for line in filter(None, map(str.strip, value.splitlines())):
            option, equals, nested = line.partition("=")
            if not equals:
                raise ValueError(f"no value: {name}")
            flat[f"{name}.{option.strip()}"] = nested.strip()
    return flat


def _expand(path: str, environ: Mapping[str, str]) -> str:
    path = Template(path).safe_substitute(environ)
    return environ.get("HOME", "/") + path[1:] if path.startswith("~/") else path
