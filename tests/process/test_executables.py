"""Commands that cannot be executed, tried for real: which sentence their author reads."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.contract.errors import UserSafeError
from shim.process.executables import explain_exec_error
from shim.process.users import User
from tests.processes import run
from tests.support import UNPRIVILEGED_UID, needs_root

OTHER_MACHINE = {"x86_64": (183, "aarch64")}.get(os.uname().machine, (62, "x86_64"))


def true_program() -> bytearray:
    return bytearray(Path("/bin/true").read_bytes())


def for_another_machine() -> bytes:
    program = true_program()
    struct.pack_into("<H", program, 18, OTHER_MACHINE[0])
    return bytes(program)


def for_another_library() -> bytes:
    program = bytes(true_program())
    start = program.index(b"/lib")  # PT_INTERP comes first
    end = program.index(b"\0", start)
    return program[:start] + b"/lib/ld-musl-other.so.1".ljust(end - start, b"\0") + program[end:]


CASES = [
    pytest.param(
        b"echo no first line\n",
        "The command {path!r} is not a program that Linux can execute; a script must name its "
        "interpreter in the first line, for example #!/bin/sh",
        id="no first line",
    ),
    pytest.param(b"", "The command {path!r} is an empty file", id="empty"),
    pytest.param(
        b"#!/bin/sh\r\necho x\r\n",
        "The first line of the command {path!r} ends in a carriage return; "
        "save the file with Unix line endings (LF, not CRLF)",
        id="carriage return",
    ),
    pytest.param(
        b"#!\n",
        "The first line of the command {path!r} does not name an interpreter after #!",
        id="no interpreter",
    ),
    pytest.param(
        b"#! /opt/none/python -u\n",
        "The interpreter '/opt/none/python', named in the first line of the command {path!r}, "
        "does not exist; install it or name another",
        id="missing interpreter",
    ),
    pytest.param(
        for_another_machine(),
        f"The command {{path!r}} was built for {OTHER_MACHINE[1]} machines, but this machine is "
        f"{os.uname().machine}; "
        "build the container image for this platform (docker build --platform)",
        id="wrong architecture",
    ),
    pytest.param(
        for_another_library(),
        "The command {path!r} needs '/lib/ld-musl-other.so.1', which does not exist: it was built "
        "for another C library (glibc or musl); build it in the image that it runs in",
        id="missing loader",
    ),
    pytest.param(
        b"\x7fELF\x02\x01\x01",
        "The command {path!r} is a damaged program: its ELF header is not complete",
        id="damaged",
    ),
]


def sentence(*argv: str, **options: object) -> str:
    with pytest.raises(UserSafeError) as caught:
        run(*argv, **options)
    return str(caught.value)


@pytest.fixture
def command(tmp_path: Path) -> Callable[[bytes], str]:
    def write(content: bytes, mode: int = 0o755) -> str:
        path = tmp_path / "command"
        path.write_bytes(content)
        path.chmod(mode)
        return str(path)

    return write


@pytest.mark.parametrize(("content", "expected"), CASES)
def test_file_that_cannot_be_executed_is_explained(
    command: Callable[[bytes], str], content: bytes, expected: str
) -> None:
    path = command(content)
    assert expected.format(path=path) == sentence(path)


@pytest.mark.parametrize(("content", "expected"), CASES)
def test_file_found_on_the_path_is_explained(
    command: Callable[[bytes], str], content: bytes, expected: str
) -> None:
    path = command(content)
    environment = {"PATH": f"/none:{os.path.dirname(path)}:/bin"}
    assert expected.format(path=path) == sentence("command", env=environment)


def test_script_is_explained_by_its_interpreter(tmp_path: Path) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_bytes(for_another_machine())
    interpreter.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(f"#!{interpreter}\n")
    script.chmod(0o755)
    assert f"The command {str(interpreter)!r} was built for" in sentence(str(script))


@pytest.mark.parametrize("name", ["none", "/none/x", "/bin/sh/x", "./none", "", "no\nne"])
def test_missing_command_has_the_sentence_that_platforms_know(name: str) -> None:
    assert (
        "The command defined by the containers ENTRYPOINT and CMD instructions does not exist"
        == sentence(name)
    )


def test_command_that_nobody_may_execute_has_the_sentence_that_platforms_know(
    command: Callable[[bytes, int], str],
) -> None:
    expected = (
        "The user defined in the containers USER instruction does not have permission to execute "
        "the command defined by the containers ENTRYPOINT and CMD instructions"
    )
    assert expected == sentence(command(b"#!/bin/sh\n", 0o644))


@needs_root
def test_command_that_only_root_may_execute_is_not_permitted(
    command: Callable[[bytes, int], str],
) -> None:
    user = User(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID)
    actual = sentence(command(b"#!/bin/sh\n", 0o700), user=user)
    assert actual.startswith("The user defined in the containers USER instruction does not have")


def note(*argv: str, **options: object) -> str:
    """Return what the author is told beside the sentence that platforms know."""
    with pytest.raises(UserSafeError) as caught:
        run(*argv, **options)
    (text,) = caught.value.__notes__
    return text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "The command 'none' is in none of the directories of PATH, '/bin:/usr/bin'"),
        ("/none/x", "The command '/none/x' does not exist"),
        (
            "./none",
            f"The command './none' does not exist in the working directory, {os.getcwd()!r}",
        ),
        ("no\nne", "The command 'no\\nne' is in none of the directories of PATH, '/bin:/usr/bin'"),
        ("", "The name of the command is empty"),
    ],
)
def test_missing_command_is_named_beside_its_sentence(name: str, expected: str) -> None:
    assert expected == note(name, env={"PATH": "/bin:/usr/bin"})


NOBODY = User(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID)


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@needs_root
@pytest.mark.parametrize(
    ("mode", "directory_mode", "user", "expected"),
    [
        (0o644, 0o755, User(), "The file {path!r} is not executable: chmod +x it"),
        (0o666, 0o755, NOBODY, "The file {path!r} is not executable: chmod +x it"),
        (0o700, 0o755, NOBODY, "The file {path!r} has mode 0700 and belongs to uid 0 and gid 0: "),
        (0o4750, 0o755, NOBODY, "The file {path!r} has mode 4750 and belongs to uid 0 and gid 0: "),
        (0o755, 0o700, NOBODY, "The user may not enter the directory {parent!r}, where {path!r}"),
    ],
)
def test_what_the_user_may_not_execute_is_named_beside_its_sentence(
    place: Path, mode: int, directory_mode: int, user: User, expected: str
) -> None:
    parent = place / "bin"
    parent.mkdir()
    path = parent / "tool"
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    parent.chmod(directory_mode)
    shown = expected.format(path=str(path), parent=str(parent))
    assert note(str(path), user=user).startswith(shown)


@needs_root
def test_an_interpreter_that_is_not_executable_is_named(place: Path) -> None:
    interpreter, script = place / "interpreter", place / "script"
    interpreter.write_bytes(Path("/bin/true").read_bytes())
    script.write_text(f"#!{interpreter} -x\n")
    script.chmod(0o755)
    expected = f"The file {str(interpreter)!r} is not executable: chmod +x it"
    assert note(str(script), user=NOBODY).startswith(expected)


def test_a_sentence_of_our_own_needs_no_note(tmp_path: Path) -> None:
    with pytest.raises(UserSafeError) as caught:
        run(str(tmp_path))
    assert [] == getattr(caught.value, "__notes__", [])


def test_directory_is_told(tmp_path: Path) -> None:
    expected = (
        f"The command {str(tmp_path)!r} is a directory; "
        "name a program in it in the ENTRYPOINT or CMD instruction"
    )
    assert expected == sentence(str(tmp_path))


def test_too_long_arguments_are_told() -> None:
    expected = (
        "The arguments and the environment of the command are longer than the operating system "
        "allows; pass long values in files"
    )
    assert expected == sentence("true", "x" * 200_000)


def test_missing_working_directory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    expected = (
        "The working directory of the container does not exist; "
        "set one that does in the WORKDIR instruction"
    )
    assert expected == sentence("./command")


@pytest.mark.parametrize(
    "head",
    [
        b"\x7fELF\x02\x01\x01" + b"\xff" * 60,
        b"\x7fELF\x01\x02\x01" + b"\xff" * 60,
        b"\x7fELF" + b"\0" * 60,
        b"#!" + b"/" * 5000,
    ],
)
def test_hostile_head_is_explained_too(command: Callable[[bytes], str], head: bytes) -> None:
    for number in (errno.ENOEXEC, errno.ENOENT):
        assert "command" in explain_exec_error(command(head), number)


def test_any_other_error_is_named() -> None:
    expected = "The command '/x' could not be started: Text file busy"
    assert expected == explain_exec_error("/x", errno.ETXTBSY)
