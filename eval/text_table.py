"""Prints values of files by others as aligned text that cannot steer a terminal."""

import json
import re
from collections.abc import Sequence
from typing import Any

LONG_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b")


def shown(value: Any) -> str:
    """Write a JSON value: numbers with five digits, hashes cut to twelve."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, str):
        return LONG_HASH.sub(r"\1", printable(value))
    return json.dumps(value, default=str)


def printable(text: str) -> str:
    """Write a text, as a Python literal if it is empty or has characters that are not printable."""
    return text if text and text.isprintable() else ascii(text)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of equal length, names to the left and values to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *values in rows:
        cells = [name.ljust(widths[0])]
        cells += [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
