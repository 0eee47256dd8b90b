"""Reads JSON and JSON Lines of other programs, and names the systems that they are of."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cache.files.atomic import check_ordinary
from cache.files.foreign import parse_json, reading_foreign_file
from workspace.errors import StageError


@dataclass(frozen=True)
class NamedFile:
    """A file, or a folder of files, with the texts of one system."""

    name: str
    path: Path


def named_files(arguments: Sequence[str]) -> list[NamedFile]:
    """Read arguments of the form FILE or NAME=FILE.

    Returns:
        Without a name, a file has its own without the suffix, or its path if two share that.
    """
    files = [_named_file(argument) for argument in arguments]
    counts = Counter(file.name for file in files)
    return [
        file if counts[file.name] == 1 else NamedFile(argument, file.path)
        for file, argument in zip(files, arguments, strict=True)
    ]


def _named_file(argument: str) -> NamedFile:
    name, equals, path = argument.partition("=")
    if equals and name and path and not Path(argument).exists():
        return NamedFile(name, Path(path))
    return NamedFile(Path(argument).stem, Path(argument))


def read_values(path: Path) -> Any:
    """Return the value of a JSON file, or the list of those of the lines of a JSON Lines file.

    A file is JSON Lines if it has several lines, the first of which is a whole object.

    Raises:
        StageError: There is no such file, or it is neither.
    """

    def refuse_file(why: str) -> StageError:
        return StageError(f"{path}: no usable JSON in UTF-8: {why}.")

    if not path.exists():
        raise StageError(f"{path}: no such file. Name a file of references and files of results.")
    check_ordinary(path, refuse_file)
    with reading_foreign_file(refuse_file, path):
        text = path.read_bytes().decode("utf-8-sig")
        # Not splitlines, which also cuts at characters that JSON allows in a text.
        lines = text.split("\n")
        first = lines[0].strip()
        if not (first.startswith("{") and first.endswith("}") and any(map(str.strip, lines[1:]))):
            return parse_json(text)
    values = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with reading_foreign_file(functools.partial(_line_error, path, number)):
                values.append(parse_json(line))
    return values


def _line_error(path: Path, number: int, why: str) -> StageError:
    return StageError(f"{path}: no usable JSON in UTF-8: line {number}: {why}.")


def check_text(path: Path, place: str, text: str) -> str:
    """Return a text that UTF-8 can hold.

    Raises:
        StageError: It holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(path, f"{place}: half a character (a lone surrogate)")
    return text


def refuse(path: Path, reason: str) -> NoReturn:
    """Refuse a file.

    Raises:
        StageError: Always.
    """
    raise StageError(f"{path}: {reason}.")
