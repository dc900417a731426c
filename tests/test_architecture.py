"""The imports of the package point one way, and nothing outside the standard library is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shim

PACKAGE = Path(shim.__file__).parent

# One total order: a module may import what stands above it. The first word of a line is a room.
ROOMS = """
contract: errors durations fields uri tasks settings command
log: log relay
process: stopping libc privacy users executables scripts descendants killer ipc launch process
process: sockets namespaces
files: descriptors emptying outputs workspace locks archives exposure
http: errors urls attempts wire stream tls connection proxies trust transport loopback
aws: errors sigv4 profiles xml endpoints sources credentials
s3: errors checksums endpoints documents retries throttle crew buffers store operations pace
s3: download reader upload directory client transfer
oci: errors model gojson reference config mutate streams tar layer layout
oci: archive patcher auth logins registry ecr network
runner: user_command modes invoke_mode inputs uploads results task runtime
check: preflight
serve: protocol service
commands: job tasklist rehearsal invoke serve run check patch
"""


def order() -> Iterator[str]:
    yield "shim"
    seen = set()
    for line in ROOMS.split("\n")[1:-1]:
        room, names = line.split(": ")
        if room == "process" and room not in seen:
            yield "frozen"
        if room not in seen:
            yield room
        seen.add(room)
        yield from (f"{room}.{name}" for name in names.split())
    yield from ("cli", "__main__")


ORDER = [*order()]

# Leaves and values: no network, no processes, no threads.
VALUES = ORDER[: ORDER.index("log")]
EFFECTS = {"socket", "ssl", "http", "urllib.request", "subprocess", "threading"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "shim"
        found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of each module that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}".removeprefix("shim.")
                yield f"shim.{submodule}" if submodule in MODULES else str(node.module)


def test_the_order_names_every_module_once() -> None:
    assert sorted(set(ORDER)) == sorted(ORDER)
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_modules_named_before(name: str) -> None:
    before = ORDER[: ORDER.index(name)]
    own = [
        imported.removeprefix("shim.")
        for imported in imports(MODULES[name])
        if imported.split(".")[0] == "shim"
    ]
    assert [] == [imported for imported in own if imported not in before]


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_the_standard_library(name: str) -> None:
    foreign = {imported.split(".")[0] for imported in imports(MODULES[name])} - {"shim"}
    assert set() == foreign - sys.stdlib_module_names


@pytest.mark.parametrize("name", VALUES)
def test_values_have_no_effects(name: str) -> None:
    assert set() == EFFECTS & set(imports(MODULES[name]))


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("s3")])
def test_the_s3_client_could_be_lifted_out(name: str) -> None:
    own = [imported for imported in imports(MODULES[name]) if imported.split(".")[0] == "shim"]
    below = ("shim.s3", "shim.aws", "shim.http", "shim.files.exposure", "shim.contract.uri")
    assert [] == [imported for imported in own if not imported.startswith(below)]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("cli", "__main__")])
def test_only_the_command_line_reads_the_process(name: str) -> None:
    """The environment, the arguments and signal handlers belong to the edge."""
    tree = ast.parse(MODULES[name].read_text())
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    # process.py restores the default dispositions in the child that it forks.
    assert set() == used & {"os.environ", "os.getenv", "os.environb", "sys.argv", "sys.exit"}


# Lines of a room, with what they are for; to raise one is a decision.
BUDGETS = {
    "contract": 1200,  # every variable and member of a task, with its sentence
    "log": 430,
    "process": 2100,  # half of it ends what hostile commands leave behind
    "files": 1560,  # a third of it reads archives that others wrote
    "http": 1510,  # a third of it finds, makes and keeps connections
    "aws": 1200,
    "s3": 2820,  # half of it moves large and many objects
    "oci": 3170,  # references and documents, two kinds of files, registries and their credentials
    "runner": 1190,
    "check": 580,
    "serve": 680,
    "commands": 1280,  # a quarter of it patches images
}


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_within_its_lines(room: str) -> None:
    files = (PACKAGE / room).glob("*.py")
    assert BUDGETS[room] >= sum(len(path.read_text().splitlines()) for path in files)


def test_every_room_has_a_budget() -> None:
    assert list(BUDGETS) == list(
        dict.fromkeys(line.split(":")[0] for line in ROOMS.split("\n")[1:-1])
    )


def test_the_distribution_requires_nothing() -> None:
    assert "install_requires" not in (PACKAGE.parent / "setup.cfg").read_text().replace(
        "under install_requires", ""
    )


# What takes most of the time and memory of a start: needed by no first answer to /ping.
LATE = """
_hashlib asyncio concurrent ctypes hashlib hmac logging subprocess tarfile tempfile textwrap
traceback typing unittest urllib.request uuid xml zipfile
shim.check.preflight shim.files.archives shim.log.relay shim.process.launch shim.process.process
shim.runner.inputs shim.runner.invoke_mode shim.s3.client
""".split()


def imported_by(statement: str) -> set[str]:
    code = f"import sys; sys.path[:0] = [{str(PACKAGE.parent)!r}]; {statement}; print(*sys.modules)"
    # Without site, whose .pth files import what they like.
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, check=True)
    return set(done.stdout.decode().split())


def test_the_first_answer_waits_for_no_module_that_it_does_not_need() -> None:
    assert set() == imported_by("import shim.cli, shim.serve.protocol, shim.serve.service") & set(
        LATE
    )


def test_no_module_loads_openssl_before_its_configuration_is_ours() -> None:
    assert set() == imported_by("import shim.cli") & {"_hashlib", "_ssl", "hashlib", "ssl"}
