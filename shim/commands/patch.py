"""`patch`, `unpatch`, `verify`: put this program into an image, take it out, look whether it is in.

What is asked for goes to stdout, everything else to stderr. It is imported for these verbs alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shim import __version__
from shim.contract.errors import UsageError
from shim.frozen import carried_bundle, find_program
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.oci import archive, config, mutate, patcher, reference, streams
from shim.oci.auth import Login
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.layer import read_machine
from shim.oci.logins import parse_login
from shim.oci.model import Blob, Descriptor, Image, Readable, Sink, Source
from shim.oci.network import Network
from shim.process.stopping import Stop

# The first that fits.
EXIT_CODES = {ImageUnsuitable: 3, RemoteError: 4, StorageError: 5, OSError: 5}
WORKERS = 4  # how many layers travel side by side
BAR_CHARACTERS = 40
NAMES = (
    "[docker://]HOST/NAME[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG], "
    "docker-archive:FILE[:NAME], or a path"
)


def add_options(verb: str, command: argparse.ArgumentParser) -> None:
    """Add what a verb takes."""
    if verb == "verify":
        command.add_argument("image", metavar="IMAGE", help=NAMES)
    else:
        command.add_argument("source", metavar="SOURCE", help=NAMES)
        command.add_argument("dest", metavar="DEST", help=NAMES)
    command.add_argument("--insecure", action="store_true", help="registries without TLS too")
    command.add_argument("--creds", type=_login, metavar="USER:PASSWORD", help="for registries")
    command.add_argument("--platform", type=_platform, metavar="OS/ARCH", help="default: ours")
    if verb != "unpatch":
        command.add_argument("--binary", type=Path, metavar="FILE", help="default: this program")
        command.add_argument("--mode", type=_mode, default=0o500, help="of the binary; 0500")
    if verb == "patch":
        command.add_argument("--user", default="0", help="as whom the shim starts; 0")
        command.add_argument(
            "--entrypoint", type=_argv, metavar="JSON", help="recorded as the image's own"
        )
        command.add_argument("--cmd", type=_argv, metavar="JSON", help="the same for CMD")
        for name, what in (("--env", "variable"), ("--label", "label")):
            command.add_argument(
                name, type=_pair, action="append", default=[], metavar="K=V", help=f"a {what} more"
            )
    if verb != "verify":
        command.add_argument(
            "--dry-run", action="store_true", help="write nothing, print what would be"
        )
        command.add_argument(
            "--format", choices=("auto", "docker", "oci"), default="auto", help="of the manifest"
        )
        command.add_argument("--force", action="store_true", help="replace another image in DEST")
        command.add_argument("--json", action="store_true", help="print a document")
    command.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result")
    # Nobody's job: its lines are for people, wherever they go.
    command.set_defaults(run=run, log_format="text")


def run(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Do what the verb says; 1 where `verify` says no, else a code of EXIT_CODES."""
    log = Log(style="text")
    run_verb = _verify if arguments.command == "verify" else _rewrite
    try:
        network = Network(
            environ=environ,
            creds=arguments.creds,
            is_insecure=arguments.insecure,
            check=stop.check,
            carried_bundle=carried_bundle(),
            log=lambda level, message: None if level == "DEBUG" else _write(log, message),
        )
        return run_verb(arguments, network, log)
    except (*EXIT_CODES,) as error:
        _write(log, str(error))
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _verify(arguments: argparse.Namespace, network: Network, log: Log) -> int:
    binary, bar = _find_binary(arguments), _Bar(quiet=arguments.quiet)
    location = reference.parse_location(arguments.image)
    with _open_source(location, network) as source:
        found = patcher.verify(
            _Watched(source, network.check, bar),
            platform=arguments.platform or _platform_of(binary),
            binary=binary,
            mode=arguments.mode,
            docker_only=location.reference is not None,
        )
    bar.end()
    for reason in found:
        _write(log, reason)
    if not found and not arguments.quiet:
        _write(log, "The image is patched with this binary")
    return int(bool(found))


def _rewrite(arguments: argparse.Namespace, network: Network, log: Log) -> int:
    """Patch or unpatch."""
    bar = _Bar(quiet=arguments.quiet)
    location = reference.parse_location(arguments.source)
    destination = reference.parse_destination(arguments.dest)
    is_remote = destination.reference is not None
    if arguments.format == "docker" and not is_remote:
        raise UsageError("--format docker: only registries take it; archives always have both")
    sink: Sink = (
        network.open(destination.reference)
        if destination.reference
        else archive.open_sink(destination)
    )
    is_archive = isinstance(sink, archive.ArchiveSink)
    target = patcher.Target(
        family="docker" if is_remote and arguments.format != "oci" else "oci",
        plain=is_archive,
        complete=is_archive,
        force=arguments.force,
        dry_run=arguments.dry_run,
        workers=WORKERS if is_remote else 1,
    )
    with _open_source(location, network) as opened:
        source = _Watched(opened, network.check, bar)
        if arguments.command == "unpatch":
            platform = arguments.platform or _platform_of(Path(sys.executable))
            outcome = patcher.unpatch(source, sink, platform=platform, target=target)
        else:
            binary = _find_binary(arguments)
            outcome = patcher.patch(
                source,
                sink,
                platform=arguments.platform or _platform_of(binary),
                target=target,
                binary=binary,
                mode=arguments.mode,
                options=config.PatchOptions(
                    user=arguments.user,
                    entrypoint=arguments.entrypoint,
                    cmd=arguments.cmd,
                    env=tuple(arguments.env),
                    labels=tuple(arguments.label),
                ),
                version=__version__,
            )
    bar.end()
    if not arguments.quiet:
        _remark(outcome, arguments.command, log)
    if arguments.json or arguments.dry_run:
        document = _describe(outcome, is_complete=arguments.dry_run)
        print(json.dumps(document, indent=2, ensure_ascii=not arguments.dry_run))
    else:
        print(outcome.reference)
    return 0


def _open_source(location: reference.Location, network: Network) -> AbstractContextManager[Source]:
    if location.reference:
        return nullcontext(network.open(location.reference))
    return archive.open_source(location)


def _find_binary(arguments: argparse.Namespace) -> Path:
    path = arguments.binary or find_program()
    if not path:
        raise UsageError("This program is no binary: name one with --binary")
    return Path(path)


def _platform_of(binary: Path) -> tuple[str, str]:
    machine = read_machine(binary)
    names = [name for name, number in config.MACHINES.items() if number == machine]
    return "linux", names[0] if names else f"machine {machine}"


def _remark(outcome: patcher.Outcome, verb: str, log: Log) -> None:
    """Say what is worth knowing beside the result."""
    if verb == "patch":
        for caution in config.cautions(outcome.base):
            _write(log, caution)
    elif outcome.is_identical:
        _write(log, "The configuration is what it was before, byte for byte")
    else:
        _write(log, "The configuration means what it meant before; its bytes may be others")
    for done, size_bytes in sorted(outcome.sizes.items()):
        _write(log, f"{done}: {size_bytes:,} bytes")


def _write(log: Log, sentence: str) -> None:
    """Write a line for people: not by sys.stderr, for one that is closed changes no exit code."""
    log.write("stderr", f"sagemaker-shim: {sentence}\n".encode(errors="backslashreplace"))


def _describe(outcome: patcher.Outcome, *, is_complete: bool) -> dict[str, Any]:
    """Build the document of --json; is_complete: with the manifest and the configuration."""
    base, layer = config.inner_config(outcome.base), outcome.layer
    described = {
        "reference": outcome.reference,
        "version": __version__,
        "source": _identify(outcome.source),
        "destination": _identify(outcome.image),
        "layer": layer and {"digest": layer.blob.descriptor.digest, "diff_id": layer.diff_id},
        "original": {name: base.get(name) for name in ("User", "Entrypoint", "Cmd")},
        "bytes": outcome.sizes,
    }
    complete = {"manifest": outcome.image.manifest, "config": outcome.image.config}
    return described | complete if is_complete else described


def _identify(image: Image) -> dict[str, str]:
    manifest = streams.describe([image.manifest_bytes], "").digest
    return {"digest": manifest, "image_id": mutate.config_of(image.manifest).digest}


def _platform(text: str) -> tuple[str, str]:
    os_name, slash, architecture = text.partition("/")
    if not os_name or not architecture or "/" in architecture:
        raise argparse.ArgumentTypeError(f"expected OS/ARCH, such as linux/amd64, found {text!r}")
    return os_name, architecture


def _mode(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or set(text) & {"8", "9"}:
        raise argparse.ArgumentTypeError(f"expected an octal mode such as 0500, found {text!r}")
    mode = int(text, 8)
    if mode & ~0o777 or not mode & 0o400:
        raise argparse.ArgumentTypeError(f"expected 0400 to 0777, found {text!r}")
    return mode


def _argv(text: str) -> tuple[str, ...]:
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise argparse.ArgumentTypeError(f"expected JSON, a list of strings, found {text!r}")
    return tuple(words)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        # What follows may be a secret that was given without its name.
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {len(text)} characters")
    return name, value


def _login(text: str) -> Login:
    try:
        return parse_login(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Bar:
    """How much has been read, on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._is_shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self.total_bytes = self._bytes = self._filled = 0

    def add(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        filled = min(BAR_CHARACTERS, BAR_CHARACTERS * self._bytes // max(self.total_bytes, 1))
        if self._is_shown and filled > self._filled:
            self._filled = filled
            print(f"\r[{'#' * filled:{BAR_CHARACTERS}}]", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._filled:
            print(file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A source that is watched by those who wait, and stops when it is asked to."""

    _source: Source
    _check: Callable[[], None]
    _bar: _Bar

    def load(self, os_name: str, architecture: str) -> Image:
        image = self._source.load(os_name, architecture)
        layers = mutate.layers_of(image.manifest)
        self._bar.total_bytes = sum(layer.size_bytes for layer in layers)
        return image

    def blob(self, descriptor: Descriptor) -> Blob:
        blob = self._source.blob(descriptor)
        return replace(
            blob, open=lambda offset: _WatchedReader(blob.open(offset), self._check, self._bar)
        )


@dataclass(frozen=True, slots=True)
class _WatchedReader:
    _stream: Readable
    _check: Callable[[], None]
    _bar: _Bar

    def read(self, size: int, /) -> bytes:
        self._check()
        data = self._stream.read(size)
        self._bar.add(len(data))
        return data

    def close(self) -> None:
        self._stream.close()
