"""Build the forms of the shim that are one file: the static binary, and the zipapp.

    python .ci/freeze.py binary | zipapp    make it, unless it is there for these sources

The interpreter that runs this is the one that is frozen, by PyInstaller (shim.spec) and staticx,
whose bootloader launcher.c replaces.
A build depends on nothing but the sources, the interpreter, the system's libraries and the versions
in setup.cfg: neither on time, nor on the directory or the user.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import io
import logging
import marshal
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = "sagemaker-shim"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "shim/__init__.py").read_text())[1]
NAMES = {
    "binary": f"{PROGRAM}-{VERSION}-Linux-{platform.machine()}",
    "zipapp": f"{PROGRAM}-{VERSION}.pyz",
}
CHECKSUMS = "checksums.txt"
# Of the zipapp's modules, those that run before all others.
FIRST = ("__main__", "shim/__init__", "shim/__main__")
TOOLS = {
    "patchelf": "patchelf",
    "objdump": "binutils",
    "strip": "binutils",
    "ldd": "libc-bin",
    "gcc": "gcc",
    "musl-gcc": "musl-tools",
}
# What glibc's loader reads, and names of the same length in a directory where nobody makes files.
LOADER_FILES = {
    b"\0/etc/ld.so.preload\0": b"\0/proc/self/preload\0",
    b"\0/etc/ld.so.cache\0": b"\0/proc/self/cache\0",
}


def require_tools() -> None:
    """Leave with one sentence unless all is there that a build needs."""
    missing = {package for tool, package in TOOLS.items() if not shutil.which(tool)}
    if "gcc" not in missing and not find_zlib():
        missing.add("zlib1g-dev")
    try:
        if "libc-bin" not in missing:  # PyInstaller asks ldd as it is imported
            from PyInstaller.depend.bindepend import get_python_library_path

            get_python_library_path()
    except Exception:
        missing.add("libpython{}.{}".format(*sys.version_info))
    if missing:
        sys.exit(
            f"freeze.py: {sys.executable} cannot be frozen here without {', '.join(sorted(missing))} "
            "(names of Debian packages; libpython is a Python built with --enable-shared)"
        )


def make_binary() -> bytes:
    require_tools()
    with tempfile.TemporaryDirectory(prefix="shim-freeze-") as directory:
        build = Path(directory)
        output = build / "output"
        run_staticx(run_pyinstaller(build), compile_launcher(build), output)
        return output.read_bytes()


def run_pyinstaller(build: Path) -> Path:
    """Make what shim.spec describes: an executable, and `lib` beside it."""
    command = [sys.executable, "-m", "PyInstaller", "--clean", "--noconfirm", "--log-level=WARN"]
    command += [f"--distpath={build}", f"--workpath={build / 'work'}", ROOT / ".ci/shim.spec"]
    variables = {
        "SHIM_BUILD": str(build),
        "PYINSTALLER_CONFIG_DIR": str(build / "cache"),
        "PYINSTALLER_ZLIB_COMPRESSION_LEVEL": "9",
        "PYTHONNODEBUGRANGES": "1",  # columns, for pointing into sources that are not there
    }
    subprocess.run(command, cwd=build, env={**os.environ, **variables}, check=True)
    return (build / "work/shim" / PROGRAM).rename(build / PROGRAM)


def compile_launcher(build: Path) -> Path:
    """Make the program that stands in the place of staticx's bootloader."""
    launcher = build / "launcher"
    command = ["musl-gcc", "-static", "-Os", "-Wall", "-Werror", "-ffile-prefix-map=/=."]
    command += ["-idirafter", "/usr/include", ROOT / ".ci/launcher.c", find_zlib(), "-o", launcher]
    subprocess.run(command, cwd=build, check=True)
    return launcher


def find_zlib() -> str:
    """Return the path of the static library, which may be written for glibc; "" without one."""
    command = ["gcc", "-print-file-name=libz.a"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found if os.path.isabs(found) else ""


def run_staticx(program: Path, launcher: Path, output: Path) -> None:
    """Pack an executable and `lib` with the system's libraries that they need; print what is in it.

    In the archive, each file is its length (8 bytes) and what zlib makes of it.
    """
    from staticx.api import StaticxGenerator, get_shobj_deps
    from staticx.elf import is_dynamic_elf

    class Generator(StaticxGenerator):
        def _get_bootloader(self) -> None:
            self.tmpoutput = str(launcher)

    logging.disable(logging.INFO)
    staged = program.with_name("lib")
    paths = sorted(staged.rglob("*"))
    with Generator(prog=str(program), strip=True, compress=False) as generator:
        archive = generator.sxar.tar
        sizes = {}

        def add(member: tarfile.TarInfo, file: io.BufferedIOBase | None = None) -> None:
            member.mtime = member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755
            if file:
                data = divert_loader(member.name, file.read())
                packed = len(data).to_bytes(8, "little") + deflate(data)
                sizes[member.name] = (len(data), len(packed))
                file, member.size = io.BytesIO(packed), len(packed)
            tarfile.TarFile.addfile(archive, member, file)

        archive.addfile = add
        for path in [staged, *paths]:
            archive.add(path, path.relative_to(staged.parent), recursive=False)
        names = {path.name for path in paths}
        for path in paths:
            if path.is_file() and is_dynamic_elf(str(path)):
                for library in get_shobj_deps(str(path), libpath=[str(staged)]):
                    if os.path.basename(library) not in names:
                        generator.add_library(library, exist_ok=True)
        generator.generate(output=str(output))
    packed = sum(packed for _, packed in sizes.values())
    sizes["launcher"] = (output.stat().st_size - packed,) * 2
    print_sizes(sizes)


def deflate(data: bytes) -> bytes:
    """Compress data, unless that only costs time: what zlib stores is unpacked by copying it."""
    packed = zlib.compress(data, 9)
    return packed if len(packed) < 0.9 * len(data) else zlib.compress(data, 0)


def divert_loader(name: str, data: bytes) -> bytes:
    """Have the dynamic loader that is carried read no configuration of the image's.

    LD_PRELOAD and its like it does not see: launcher.c keeps the environment from it.
    """
    if not name.startswith("ld-linux"):
        return data
    for path, nowhere in LOADER_FILES.items():
        if data.count(path) != 1:
            sys.exit(f"freeze.py: {name} names {path} {data.count(path)} times, expected once")
        data = data.replace(path, nowhere)
    return data


def print_sizes(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Print what the file consists of: the bytes of each part, and those it has in the file."""
    sizes = {**sizes, "all": tuple(map(sum, zip(*sizes.values(), strict=True)))}
    print(f"{'unpacked':>12}{'in the file':>12}")
    for name, (full, packed) in sorted(sizes.items(), key=lambda row: -row[1][1]):
        print(f"{full:12,}{packed:12,}  {name}")


def make_zipapp() -> bytes:
    """Return the package with its bytecode for this version; others run it from source."""
    members = {"__main__.py": b"import shim.__main__\n"}
    for path in sorted((ROOT / "shim").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        members |= {name: path.read_bytes(), f"{name}c": compile_module(path, name)}
    buffer = io.BytesIO(b"#!/usr/bin/env python3\n")
    buffer.seek(0, os.SEEK_END)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)  # of 1980
            member.external_attr = 0o644 << 16
            # zlib is looked for along sys.path, which these are there to clean first.
            method = zipfile.ZIP_STORED if name.startswith(FIRST) else zipfile.ZIP_DEFLATED
            archive.writestr(member, data, method, 9)
    return buffer.getvalue()


def compile_module(path: Path, name: str) -> bytes:
    """Return the .pyc of a source that is never compared with it (PEP 552: hash-based, unchecked)."""
    source = path.read_bytes()
    # A traceback looks for no file of such a name: what lies there would be the user's.
    code = compile(source, f"<{name}>", "exec", dont_inherit=True)
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
    # Marshalled twice: the counts of references to a fresh code object leave their marks.
    copy = marshal.loads(marshal.dumps(code))
    return header + importlib.util.source_hash(source) + marshal.dumps(copy)


def make_tarball(name: str, data: bytes) -> bytes:
    """Return a .tar.gz with one executable, the same whenever it is made."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0) as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            member = tarfile.TarInfo(name)  # of 1970, root's
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def install(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all: others may be running its last version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.chmod(mode)
    new.replace(path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_checksums(dist: Path) -> None:
    """List the files in dist as `sha256sum --check` reads it."""
    paths = sorted(dist.glob(f"{PROGRAM}-*"))
    rows = [f"{digest(path.read_bytes())}  {path.name}\n" for path in paths]
    install(dist / CHECKSUMS, "".join(rows).encode())


def digest_sources() -> str:
    """Return a hash of all that a build is made from, the system's libraries left aside."""
    paths = [*(ROOT / "shim").rglob("*.py"), *(ROOT / ".ci").iterdir(), ROOT / "setup.cfg"]
    parts = [f"{path.relative_to(ROOT)} {digest(path.read_bytes())}" for path in sorted(paths)]
    return digest("\n".join([sys.version, *parts]).encode())


def build(form: str, dist: Path) -> None:
    """Make a form in dist, unless it is there for these sources."""
    path = dist / NAMES[form]
    stamp = dist / f".{path.name}.made-from"
    if not path.exists() or not stamp.exists() or stamp.read_text() != digest_sources():
        data = make_binary() if form == "binary" else make_zipapp()
        install(path, data, 0o755)
        if form == "binary":
            install(dist / f"{path.name}.tar.gz", make_tarball(path.name, data))
        write_checksums(dist)
        install(stamp, digest_sources().encode())
    print(path)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets gets into bytecode
        environ = {**os.environ, "PYTHONHASHSEED": "0"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environ)
    os.umask(0o022)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=NAMES)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the directory for it")
    arguments = parser.parse_args()
    build(arguments.form, arguments.dist.absolute())
