"""`python -m shim`: the command line from a checkout, or frozen."""

import os
import sys


def is_working_directory(entry: str) -> bool:
    """Say whether a place to look for modules in is where the process was started."""
    try:
        return os.path.samestat(os.stat(entry or "."), os.stat("."))
    except OSError:
        return False


# `-m` looks there first, and the user may write there. Nothing so far was to be found in it but
# this package, whose modules are found by its own path.
sys.path[:] = [entry for entry in sys.path if not is_working_directory(entry)]

import signal  # noqa: E402

# Until there are handlers: main() lets them in. The launcher of the static binary blocks all.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
signal.pthread_sigmask(signal.SIG_SETMASK, STOP_SIGNALS)

from shim.cli import main  # noqa: E402
from shim.frozen import remove_directories  # noqa: E402

try:
    code = main()
finally:
    remove_directories()
sys.exit(code)
