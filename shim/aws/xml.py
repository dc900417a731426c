"""XML documents of AWS, read with expat and without document types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers import expat

from shim.http.errors import TransportError

# Keys may hold characters that XML 1.0 has no way to write; servers write them all the same,
# as they are or by their number.
_NOT_XML = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f]|\xef\xbf[\xbe\xbf]"
    rb"|&#(?:[0-8]|1[124-9]|2\d|3[01]|6553[45]|[xX]0*(?:[0-8bBcCeEfF]|1[\da-fA-F]|[fF]{3}[eEfF]));"
)


@dataclass(slots=True)
class Element:
    """A node; names without their namespace."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, name: str) -> str:
        """Return the text of the first child of that name, "" without one."""
        return next((child.text for child in self.children if child.name == name), "")


def parse(document: bytes) -> Element:
    """Parse a document; TransportError when it is not well-formed or brings its own grammar."""
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    stack = [Element("")]

    def start(name: str, _: dict[str, str]) -> None:
        element = Element(name.rpartition(" ")[2])
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        stack[-1].text += data

    def refuse(*_: object) -> None:
        raise TransportError("The answer's XML has a document type, which no service sends")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        # Complete sends blanks to stay alive; XML allows none before its declaration.
        parser.Parse(_NOT_XML.sub(b"?", document.lstrip()), True)
    except expat.ExpatError as error:
        raise TransportError(f"The answer is not well-formed XML: {error}") from error
    return stack[0].children[0]
