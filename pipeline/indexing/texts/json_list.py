"""Reads the entries of a long JSON list one after another.

LLaVA-1.5's mixture is one list of a gigabyte: as a whole, its text and its values would take many
times the memory of the records that are made of them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cache.files.foreign import STRICT_JSON
from pipeline.indexing.records import AnnotationFile, Entry, positions

CHUNK = 1 << 20
"""Characters that are read at once; more for an entry that is longer."""

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


def list_entries(file: AnnotationFile, path: Path) -> Iterator[Entry]:
    """Yield the entries of a JSON file that holds a list, and their positions.

    Args:
        file: The file, for error texts.
        path: Where it is on this machine.

    Raises:
        StageError: The file is not JSON.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            yield from positions(_values(_Scanner(text)), f"{file.name}: ")
    except (ValueError, RecursionError):
        # Parsed as a whole, the file gives an error with the place in all of it.
        file.json_of(path)
        raise


def _values(scanner: "_Scanner") -> Iterator[Any]:
    scanner.skip("[")
    if scanner.next_sign() != "]":
        yield scanner.value()
        while scanner.next_sign() == ",":
            scanner.skip(",")
            yield scanner.value()
    scanner.skip("]")
    if scanner.next_sign():
        raise ValueError("text after the list")


class _Scanner:
    """A position in a JSON text of which a part is in memory."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._part = ""
        self._position = 0

    def next_sign(self) -> str:
        """Return the next character that is no white space, empty at the end."""
        while True:
            if found := _WHITE_SPACE.match(self._part, self._position):
                self._position = found.end()
            if self._position < len(self._part):
                return self._part[self._position]
            if not self._read_more():
                return ""

    def skip(self, sign: str) -> None:
        """Go behind the next character, which must be `sign`."""
        if self.next_sign() != sign:
            raise ValueError(f"no {sign}")
        self._position += 1

    def value(self) -> Any:
        """Return the next value.

        Raises:
            ValueError: The text from here on is no value.
        """
        self.next_sign()
        while True:
            try:
                value, end = STRICT_JSON.raw_decode(self._part, self._position)
            except (ValueError, RecursionError):
                if not self._read_more():
                    raise
                continue
            # A number can go on in the part that is not read yet; a list ends with a bracket.
            if end < len(self._part):
                self._position = end
                return value
            if not self._read_more():
                raise ValueError("no end of the list")

    def _read_more(self) -> bool:
        rest = self._part[self._position :]
        # Twice the length of an entry that is not complete, so that the time stays linear.
        more = self._text.read(max(CHUNK, len(rest)))
        self._part, self._position = rest + more, 0
        return bool(more)
