"""`python -m shim`: the command line from a checkout, an archive, or frozen.

To import this module is to run it and never to come back. Older Pythons must be able to read it.
"""

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

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write("sagemaker-shim: needs Python 3.11 or newer, found " + found + "\n")
    sys.exit(2)

import signal  # noqa: E402

# Until somebody waits for them: see take_signals. The launcher of the static binary does so too.
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

# Names, arguments and variables are UTF-8 in whatever locale; only a new interpreter reads them so.
if sys.getfilesystemencoding() != "utf-8" and sys.executable:
    with open("/proc/self/cmdline", "rb") as file:
        arguments = file.read().split(b"\0")[1:-1]
    # The first -X of a name counts.
    os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8"] + arguments)

from shim.cli import leave, main  # noqa: E402
from shim.frozen import remove_directories  # noqa: E402

code = main()
remove_directories()
leave(code)
