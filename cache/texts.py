"""How error texts and commands spell values."""

from collections.abc import Iterable
from itertools import islice

MAX_LINE = 300
"""Characters of a text of unknown length that an error repeats."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def one_line(text: object) -> str:
    """Return a text with its white space reduced to single spaces, cut to `MAX_LINE`."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


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
