"""`python -m shim`: the command line from a checkout, or frozen."""

import signal
import sys

# Until there are handlers: main() lets them in. The launcher of the static binary blocks all.
signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGTERM, signal.SIGINT))

from shim.cli import main  # noqa: E402
from shim.frozen import remove_directories  # noqa: E402

try:
    code = main()
finally:
    remove_directories()
sys.exit(code)
