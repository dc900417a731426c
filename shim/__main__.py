"""`python -m shim`: the command line from a checkout, or frozen."""

import os
import sys

# `-m` looks where the process was started first, and the user may write there. Nothing so far was
# to be found in it but this package, whose modules are found by its own path.
if os.path.isdir("."):
    here = os.stat(".")
    sys.path[:] = [
        entry
        for entry in sys.path
        if not (os.path.isdir(entry or ".") and os.path.samestat(os.stat(entry or "."), here))
    ]

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
