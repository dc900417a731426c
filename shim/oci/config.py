"""What an image's configuration becomes when it is patched, and what it was before.

| state    | entry point | variables | label | when patched again                               |
|----------|-------------|-----------|-------|--------------------------------------------------|
| PLAIN    | another     |           | no    | a base                                           |
| OURS     | the shim    | there     | yes   | undone first, so that a newer layer replaces ours |
| UPSTREAM | the shim    | there     | no    | the same, from the variables alone               |
| DERIVED  | another     |           | yes   | a base, without what it has inherited            |
| BROKEN   | the shim    | missing   |       | refused: it would start itself without end       |
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shim.oci import gojson
from shim.oci.errors import ImageUnsuitable
from shim.oci.reference import is_digest

SHIM_PATH = "/sagemaker-shim"
_VARIABLE = "GRAND_CHALLENGE_COMPONENT_"
CMD_VARIABLE, ENTRYPOINT_VARIABLE, USER_VARIABLE = RECORDS = (
    f"{_VARIABLE}CMD_B64J", f"{_VARIABLE}ENTRYPOINT_B64J", f"{_VARIABLE}USER"
)  # fmt: skip
# A runtime takes the last of several, crane replaces the first: none of the base's may stay.
_RESERVED = "grand_challenge_"

_LABEL = "org.grand-challenge.sagemaker-shim."
VERSION_LABEL, LAYER_LABEL = f"{_LABEL}version", f"{_LABEL}layer"
# The image ID of the base; its member `config` as it was, "" where it had none.
BASE_LABEL, ORIGINAL_LABEL = f"{_LABEL}base", f"{_LABEL}original"
_CREATED_BY = "sagemaker-shim patch "

# e_machine of ELF by the name that Go has for it.
MACHINES = {"amd64": 62, "arm64": 183}

# image-spec config.md, moby's image.Image: Go takes these names in any case.
_OUTER = "architecture author config container created history os rootfs variant".split()
_INNER = (
    "Hostname Domainname User AttachStdin AttachStdout AttachStderr ExposedPorts Tty OpenStdin "
    "StdinOnce Env Cmd Healthcheck ArgsEscaped Image Volumes WorkingDir Entrypoint "
    "NetworkDisabled MacAddress OnBuild Labels StopSignal StopTimeout Shell"
).split()
_ROOTFS = ["type", "diff_ids"]


class State(Enum):
    PLAIN, OURS, UPSTREAM, DERIVED, BROKEN = "plain", "ours", "upstream", "derived", "broken"


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchOptions:
    """entrypoint, cmd: recorded in place of the image's; env, labels: set after all others."""

    user: str = "0"
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


def check_config(config: Mapping[str, Any], *, layers: int) -> None:
    """Raise ImageUnsuitable for what runtimes could read in another way than we do."""
    gojson.check_names(config, _OUTER, name="The configuration")
    inner, rootfs = config.get("config") or {}, config.get("rootfs")
    if not isinstance(inner, dict) or not isinstance(rootfs, dict):
        raise ImageUnsuitable("The configuration: expected objects for config and rootfs")
    gojson.check_names(inner, _INNER, name="The configuration")
    gojson.check_names(rootfs, _ROOTFS, name="The configuration")
    for name in ("Env", "Entrypoint", "Cmd"):
        if inner.get(name) is not None and not _is_list_of(inner[name], str):
            raise ImageUnsuitable(f"The configuration's {name}: expected a list of texts")
    labels = inner.get("Labels") or {}
    if not isinstance(labels, dict) or not _is_list_of([*labels.values()], str):
        raise ImageUnsuitable("The configuration's Labels: expected texts")
    if not isinstance(inner.get("User") or "", str):
        raise ImageUnsuitable("The configuration's User: expected a text")
    if not _is_list_of(config.get("history") or [], dict):
        raise ImageUnsuitable("The configuration's history: expected a list of objects")
    diff_ids = rootfs.get("diff_ids") or []
    if rootfs.get("type") != "layers" or not isinstance(diff_ids, list):
        raise ImageUnsuitable("The configuration's rootfs: expected the type `layers`")
    if not all(map(is_digest, diff_ids)):
        raise ImageUnsuitable("The configuration's diff_ids: expected digests")
    if len(diff_ids) != layers:
        raise ImageUnsuitable(f"The image has {layers} layers, but {len(diff_ids)} diff_ids")


def _is_list_of(value: object, type_: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, type_) for item in value)


def inner_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("config") or {}


def labels_of(config: Mapping[str, Any]) -> Mapping[str, str]:
    return inner_config(config).get("Labels") or {}


def diff_ids_of(config: Mapping[str, Any]) -> list[str]:
    return config["rootfs"].get("diff_ids") or []


def check_platform(config: Mapping[str, Any], *, machine: int) -> None:
    """Refuse an image that a binary for this e_machine cannot run in."""
    os_name, architecture = config.get("os"), config.get("architecture")
    if os_name != "linux" or MACHINES.get(str(architecture)) != machine:
        names = {number: name for name, number in MACHINES.items()}
        raise ImageUnsuitable(
            f"The image is for {os_name}/{architecture}, but the binary for "
            f"linux/{names.get(machine, f'machine {machine}')}"
        )


def detect(config: Mapping[str, Any]) -> State:
    """Say who has patched the image."""
    inner = inner_config(config)
    labelled = LAYER_LABEL in labels_of(config)
    entrypoint, cmd = inner.get("Entrypoint") or [], inner.get("Cmd") or []
    if [*entrypoint, *cmd][:1] != [SHIM_PATH]:
        return State.DERIVED if labelled else State.PLAIN
    recorded = _recorded(inner)
    if entrypoint != [SHIM_PATH] or not {CMD_VARIABLE, ENTRYPOINT_VARIABLE} <= recorded.keys():
        return State.BROKEN
    return State.OURS if labelled else State.UPSTREAM


def top_is_labelled(config: Mapping[str, Any]) -> bool:
    """Say whether the top layer is the one that was added with the labels."""
    return diff_ids_of(config)[-1:] == [labels_of(config).get(LAYER_LABEL)]


def _recorded(inner: Mapping[str, Any]) -> dict[str, str]:
    """Return our three variables, the last of each: that is what a runtime takes."""
    items = (item.partition("=") for item in inner.get("Env") or ())
    return {name: value for name, _, value in items if name in RECORDS}


def restore(config: Mapping[str, Any], *, drop_layer: bool) -> dict[str, Any]:
    """Return the configuration from before; drop_layer: the top layer goes with what names it.

    Raises ImageUnsuitable where nothing usable is recorded.
    """
    state, restored = detect(config), dict(config)
    if state is State.PLAIN:
        return restored
    if state is State.BROKEN:
        raise ImageUnsuitable(
            f"The image starts {SHIM_PATH}, but does not say what that should start"
        )
    original = labels_of(config).get(ORIGINAL_LABEL)
    if drop_layer and original is not None:
        restored.pop("config", None)
        if original:
            restored["config"] = gojson.loads_any(original.encode(), name=ORIGINAL_LABEL)
            restored = {name: restored[name] for name in config}
    else:
        restored["config"] = _undone(inner_config(config), state)
    if drop_layer:
        restored["rootfs"] = {**config["rootfs"], "diff_ids": diff_ids_of(config)[:-1]}
        history = config.get("history") or []
        if history and (state is State.UPSTREAM or _is_our_entry(history[-1])):
            restored["history"] = history[:-1]
    check_config(restored, layers=len(diff_ids_of(restored)))
    _check_user(inner_config(config), inner_config(restored), state)
    return restored


def _is_our_entry(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("created_by")).startswith(_CREATED_BY)


def _undone(inner: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Return the inner configuration without our variables and labels."""
    undone = {**inner, "Env": _without_reserved(inner)}
    labels = {k: v for k, v in (inner.get("Labels") or {}).items() if not k.startswith(_LABEL)}
    undone["Labels"] = labels
    if state is not State.DERIVED:
        recorded = _recorded(inner)
        undone["Entrypoint"] = _decode(recorded[ENTRYPOINT_VARIABLE])
        undone["Cmd"] = _decode(recorded[CMD_VARIABLE])
        undone["User"] = recorded.get(USER_VARIABLE, "")
    ours = ("User", "Env", "Entrypoint", "Cmd", "Labels")
    return {name: value for name, value in undone.items() if value or name not in ours}


def _decode(text: str) -> object:
    try:
        body = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageUnsuitable("What the image should start is not recorded in base64") from error
    argv = gojson.loads_any(body, name="The recorded command")
    if argv is not None and not _is_list_of(argv, str):
        raise ImageUnsuitable("The recorded command: expected null or a list of texts")
    return argv


def _is_root(user: str) -> bool:
    name = user.partition(":")[0]
    return name == "root" or not name.strip("+-0_ ")  # Go reads +0 as a number, too


def _check_user(patched: Mapping[str, Any], base: Mapping[str, Any], state: State) -> None:
    """An image that only says it is patched must not become root's: others looked at its User."""
    user, recorded = patched.get("User") or "", base.get("User") or ""
    if state is not State.DERIVED and not _is_root(user) and _is_root(recorded):
        raise ImageUnsuitable(
            f"The image is patched, it says, for the user {recorded!r}; but it runs as {user!r}"
        )


def _without_reserved(inner: Mapping[str, Any]) -> list[str]:
    return [item for item in inner.get("Env") or () if not item.casefold().startswith(_RESERVED)]


def patch_config(
    config: Mapping[str, Any],
    options: PatchOptions,
    *,
    diff_id: str,
    base_id: str,
    version: str,
) -> dict[str, Any]:
    """Return the configuration with the shim in front; config: what restore() returned."""
    inner = inner_config(config)
    entrypoint = inner.get("Entrypoint") if options.entrypoint is None else options.entrypoint
    cmd = inner.get("Cmd") if options.cmd is None else options.cmd
    if not entrypoint and not cmd:
        raise ImageUnsuitable("The image has neither ENTRYPOINT nor CMD: say what it should start")
    ours = {
        CMD_VARIABLE: _encode(cmd),
        ENTRYPOINT_VARIABLE: _encode(entrypoint),
        USER_VARIABLE: inner.get("User") or "",
    } | dict(options.env)
    env = [item for item in _without_reserved(inner) if item.partition("=")[0] not in ours]
    original = gojson.dumps(config["config"]).decode() if "config" in config else ""
    labels = {
        **(inner.get("Labels") or {}),
        VERSION_LABEL: version,
        LAYER_LABEL: diff_id,
        BASE_LABEL: base_id,
        ORIGINAL_LABEL: original,
    } | dict(options.labels)
    new = {
        **inner,
        "User": options.user,
        "Env": [*env, *(f"{name}={value}" for name, value in ours.items())],
        "Entrypoint": [SHIM_PATH],
        "Labels": dict(sorted(labels.items())),
    }
    new.pop("Cmd", None)
    diff_ids = [*diff_ids_of(config), diff_id]
    patched = {**config, "config": new, "rootfs": {**config["rootfs"], "diff_ids": diff_ids}}
    if _history_is_consistent(config):
        created = {"created": config["created"]} if config.get("created") else {}
        entry = {**created, "created_by": f"{_CREATED_BY}{version}", "comment": f"adds {SHIM_PATH}"}
        patched["history"] = [*config["history"], entry]
    return patched


def _encode(argv: object) -> str:
    return base64.b64encode(json.dumps(argv).encode()).decode()


def _history_is_consistent(config: Mapping[str, Any]) -> bool:
    """Say whether each layer has its entry: else ours would be shown for another layer."""
    entries = config.get("history") or []
    layers = sum(not entry.get("empty_layer") for entry in entries)
    return bool(entries) and layers == len(diff_ids_of(config))


def write_config(config: Mapping[str, Any], *, like: bytes) -> bytes:
    """Return the bytes of a configuration, with the final newline that umoci gives it."""
    return gojson.dumps(config) + b"\n" * like.endswith(b"\n")


def cautions(config: Mapping[str, Any]) -> list[str]:
    """Return sentences about what in a base may surprise its author once it is patched."""
    inner = inner_config(config)
    found = []
    if any(item.startswith("TMPDIR=") for item in inner.get("Env") or ()):
        found.append("The image sets TMPDIR: the directory must be there when the shim starts")
    if inner.get("Healthcheck"):
        found.append("The image's HEALTHCHECK now runs as the user of the shim")
    return found
