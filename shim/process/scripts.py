"""Find in a command what the kernel never sees: the script that a good interpreter would be given.

#!/usr/bin/env NAME        what env looks for, in a script that is itself executable
python3 [options] SCRIPT   what an interpreter opens; also behind env, exec and `sh -c`
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from shutil import which

from shim.process.users import User, may_read

_HEAD_BYTES = 4096
_SHELL = re.compile(r"(ba|da|a|z|k|mk)?sh")
# Options after which there is no script, and those that take the next word, by interpreter.
_OPTIONS = (
    (_SHELL, re.compile(r"-\w*[cs]\w*"), re.compile(r"[-+]\w*[oO]|--(rcfile|init-file)")),
    (
        re.compile(r"(python|pypy)[\d.]*"),
        re.compile(r"-[bBdEhiIOPqsSuvVx]*[cm].*"),
        re.compile("-[WX]"),
    ),
    (re.compile(r"perl|ruby|Rscript"), re.compile(r"-\w*[eE].*"), re.compile("-[Ir]")),
)
# What a shell runs as it is written.
_PLAIN = re.compile(r"[\w\s./:=@%+,'\"-]+")
_ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)


def find_fault(argv: Sequence[str], *, path: str, user: User) -> str:
    """Say why a command, which the kernel would execute, would end at once; "" if nothing is seen.

    - path: PATH, as the command gets it
    """
    words = _strip(argv, path)
    if not words:
        return ""
    program = which(words[0], path=path)
    if program is None:
        return f"{words[0]!r} is not found in PATH ({path})" if len(words) < len(argv) else ""
    script = _find_script(words)
    if script is None:
        return _find_fault_of_env(program, path)
    name = os.path.basename(words[0])
    if "/" not in script and not os.path.exists(script) and _SHELL.fullmatch(name):
        script = which(script, path=path) or script
    return _find_fault_of_script(name, script, user)


def _strip(argv: Sequence[str], path: str) -> list[str]:
    """Leave out what only starts another command: env, exec, variables, a shell for one command."""
    words, is_shell = list(argv), False
    while words:
        name = os.path.basename(words[0])
        if _ASSIGNMENT.fullmatch(words[0]) or name == "exec":
            del words[0]
        elif name == "env" and len(words) > 1 and not words[1].startswith("-"):
            del words[0]
        elif _SHELL.fullmatch(name) and words[1:2] == ["-c"] and _PLAIN.fullmatch(words[2]):
            try:
                words = shlex.split(words[2])
            except ValueError:
                return []
            is_shell = True
        else:
            break
    # The shell may know the command itself.
    return [] if is_shell and words and which(words[0], path=path) is None else words


def _find_script(words: Sequence[str]) -> str | None:
    """Return the file that an interpreter is told to run."""
    name = os.path.basename(words[0])
    rest = iter(words[1:])
    for interpreter, inline, valued in _OPTIONS:
        if interpreter.fullmatch(name):
            for word in rest:
                if word == "-" or inline.fullmatch(word):
                    return None
                if valued.fullmatch(word):
                    next(rest, None)
                elif word == "--":
                    return next(rest, None)
                elif not word.startswith(("-", "+")):
                    return word
    return None


def _find_fault_of_script(name: str, script: str, user: User) -> str:
    what = f"{name} is given {script!r}"
    try:
        status = os.stat(script)
    except (FileNotFoundError, NotADirectoryError):
        where = "" if os.path.isabs(script) else f" in {os.getcwd()}"
        return f"{what}, which does not exist{where}: copy it into the image, or correct its path"
    if not may_read(status, user):
        return f"{what}, which uid {user.uid} may not read: let everybody read it (chmod a+r)"
    if _SHELL.fullmatch(name) and b"\r\n" in _read_head(script):
        return (
            f"{what}, whose lines end in a carriage return that {name} takes for a part of them; "
            "save the file with Unix line endings (LF, not CRLF)"
        )
    return ""


def _find_fault_of_env(program: str, path: str) -> str:
    """Look for what `#!/usr/bin/env NAME` names: the kernel passes the rest of the line as one."""
    head = _read_head(program).decode(errors="surrogateescape")
    line = head.removeprefix("#!").partition("\n")[0].strip(" \t")
    interpreter, _, rest = line.partition(" ")
    if not head.startswith("#!") or os.path.basename(interpreter) != "env" or not rest:
        return ""
    what = f"The first line of {program!r}"
    if rest.endswith("\r"):
        return f"{what} ends in a carriage return; save the file with Unix line endings (LF)"
    option, _, text = rest.strip(" \t").partition(" ")
    name = rest.strip(" \t")
    if option in ("-S", "--split-string"):
        name = next((word for word in text.split() if not _ASSIGNMENT.fullmatch(word)), "")
    elif " " in name and not name.startswith("-"):
        return f"{what} names {name!r}, which env takes for one name; begin it with env -S"
    if name.startswith("-") or which(name, path=path):
        return ""
    return f"{what} names {name!r}, which is not found in PATH ({path}): install it"


def _read_head(path: str) -> bytes:
    """Return the beginning of a regular file."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)
