"""`python -m shim`: the command line from a checkout, or frozen."""

import signal
import sys

# Until there are handlers: main() lets them in.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

from shim.cli import main  # noqa: E402

sys.exit(main())
