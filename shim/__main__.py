"""`python -m shim`: the command line from a checkout, or frozen."""

import sys

from shim.cli import main

sys.exit(main())
