"""The profile that the shared configuration files describe, read as botocore reads them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from shim.s3.errors import ProfileInvalid

MAX_FILE_BYTES = 1024 * 1024

Section = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One profile; an option of a nested block is named "block.option".

    settings: from both files, those of the credentials file win; what the profile's services
    section holds is named "services.SERVICE.OPTION".
    credentials: from the credentials file alone.
    """

    name: str
    settings: Mapping[str, str] = field(repr=False)
    credentials: Mapping[str, str] = field(repr=False)


def read_profile(environ: Mapping[str, str]) -> Profile:
    """Read the profile that the environment names; the default one may be missing."""
    named = environ.get("AWS_DEFAULT_PROFILE") or environ.get("AWS_PROFILE")
    name = named or "default"
    config = _read_sections(environ, "AWS_CONFIG_FILE", "~/.aws/config")
    shared = _read_sections(environ, "AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    profiles = _sections_of(config, "profile")
    if "default" in config:
        profiles.setdefault("default", config["default"])
    if named and named not in profiles.keys() | shared.keys():
        raise ProfileInvalid(f"The config profile ({named}) could not be found")
    settings = profiles.get(name, {}) | shared.get(name, {})
    if services := settings.get("services"):
        section = _sections_of(config, "services").get(services)
        if section is None:
            raise ProfileInvalid(
                f"The profile is configured to use the services section but the {services!r} "
                "services configuration does not exist."
            )
        settings |= {f"services.{option}": value for option, value in section.items()}
    return Profile(name=name, settings=settings, credentials=shared.get(name, {}))


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


def _read_sections(environ: Mapping[str, str], variable: str, default: str) -> dict[str, Section]:
    path = Path(_expand(environ.get(variable) or default, environ))
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileInvalid(f"Unable to read {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ProfileInvalid(f"Unable to read {path}: larger than {MAX_FILE_BYTES} bytes")
    return _parse_sections(content, path)


def _parse_sections(content: bytes, path: Path) -> dict[str, Section]:
    from configparser import Error, RawConfigParser  # noqa: PLC0415  few machines have such files

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
