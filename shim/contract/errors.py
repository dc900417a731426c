"""What can go wrong, as one small tree: the edges turn each branch into a status."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

# What pydantic puts before the sentence of a validator.
VALUE_ERROR = "Value error, "
# Types of problems whose message needs no look at the input.
_SAYS_IT_ALL = {"json_invalid", "missing", "setting_invalid"}

# A document may have millions of them, and each is to be read by somebody.
MAX_PROBLEMS = 100

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class ShimError(Exception):
    """Base of everything that this package raises on purpose."""


class UsageError(ShimError):
    """The command line cannot be carried out."""


class UserSafeError(ShimError):
    """A failure whose text the author of the algorithm may read."""


class TaskStopped(ShimError):
    """A signal asked us to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong with a document from outside, in pydantic 2's words where it has some.

    `input` is the value found at `loc`; it must be serialisable as JSON and no secret.
    """

    loc: tuple[str | int, ...]
    type: str
    message: str
    input: object = None

    def __str__(self) -> str:
        steps = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.loc)
        path = "".join(steps).removeprefix(".")
        message = self.message.removeprefix(VALUE_ERROR)
        sentence = f"{path}: {message}" if path else message
        if self.type in _SAYS_IT_ALL:
            return sentence
        return f"{sentence}, found {_SHORT.repr(self.input)}"


class InvalidFields(ShimError):
    """A document from outside is not valid; its first MAX_PROBLEMS are listed, one a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(islice(problems, MAX_PROBLEMS))
        lines = [str(problem) for problem in self.problems]
        if len(lines) == MAX_PROBLEMS:
            lines.append(f"No more than {MAX_PROBLEMS} problems are listed")
        super().__init__("\n".join(lines))


class NotText(InvalidFields):
    """A JSON document is no Unicode text."""


class InvalidSettings(InvalidFields):
    """The environment variables are not valid."""


class InvalidTasks(InvalidFields):
    """The tasks definition is not valid."""
