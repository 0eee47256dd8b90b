"""How error texts, commands and cards spell values."""

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

MAX_LINE = 300
"""Characters of a text of unknown length that an error repeats."""

LOGIN = re.compile(r"(?<=://)([^/\s:]*):[^/\s]*@")
"""User and password in a URL."""

MARKUP = re.compile(r"[!#$&*:<>@\[-`{|}~]|(?<=[wW])\.")
"""Characters that start markup, links or formulas within a line of Markdown."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def one_line(text: object) -> str:
    """Return a text with its white space reduced to single spaces, cut to `MAX_LINE`."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


def without_passwords(text: str) -> str:
    """Return a text with `***` in place of each password in a URL."""
    return LOGIN.sub(r"\1:***@", text)


def first_few(values: Iterable[object], most: int = 5) -> str:
    """Return at most so many values, separated by commas: "3, 5, 8, ..."."""
    shown = [str(value) for value in islice(values, most + 1)]
    return ", ".join([*shown[:most], *["..."] * (len(shown) > most)])


def human_size(num_bytes: int) -> str:
    """Return a size in the largest unit of which there is at least one: "1.5 GiB", "12 bytes"."""
    exponent = min(max(0, num_bytes.bit_length() - 1) // 10, len(UNITS) - 1)
    if not exponent:
        return f"{num_bytes} bytes"
    return f"{num_bytes / 2 ** (10 * exponent):.1f} {UNITS[exponent]}"


def printable(text: object) -> str:
    """Return a text as one line of characters that can be printed.

    A text of another machine can hold line breaks of Unicode, codes that steer a terminal, marks
    that turn the reading direction, and halves of characters.
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def markdown_text(text: object) -> str:
    """Return a text as Markdown that shows it literally, within a line or the cell of a table."""
    escaped = MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))
    # Some readers cut a table at its bars before they look at backslashes.
    return escaped.replace("\\|", "&#124;")


def yaml_entry(key: str, value: Any) -> str:
    """Return a line of YAML that gives a key its value, of texts that `printable` returned.

    The value is written as JSON, which is YAML as well.
    """
    return f"{key}: {json.dumps(value, ensure_ascii=False)}"
