"""Where the tests find botocore's own test data, which its wheel leaves out."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent


def botocore_sdist() -> Path | None:
    """Return the source archive that `./build.sh test` installs, or BOTOCORE_SDIST names."""
    if named := os.environ.get("BOTOCORE_SDIST"):
        return Path(named)
    return max(PROJECT.glob(".venv/oracles/botocore-*.tar.gz"), default=None)


def read_botocore_json(name: str) -> Any:
    """Read a file below botocore's tests/, or skip the test that asks for it."""
    path = botocore_sdist()
    if path is None or not path.is_file():
        pytest.skip("botocore sdist not installed: ./build.sh test does it")
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(f"/tests/{name}"):
                content = archive.extractfile(member)
                assert content is not None
                return json.load(content)
    raise FileNotFoundError(f"{name} in {path}")
