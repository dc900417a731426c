from __future__ import annotations

from pathlib import Path

import pytest

from tests.oci.images import write_binary


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """What could be the binary, as far as its header goes."""
    return write_binary(tmp_path / "shim")
