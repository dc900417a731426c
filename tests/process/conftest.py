"""What every test of processes starts from."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest


@pytest.fixture(autouse=True)
def no_orphans_of_other_tests() -> None:
    """Collect what tests before this one have left to their process, which adopts orphans.

    Where such a one is of our own session, the shim leaves it to whoever started it, for ever.
    """
    with suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass
