"""The boundary at which a library of others reads a file of others.

Parsers of HDF5, parquet, safetensors, YAML, tokenizers and adapters raise whatever they like on a
damaged or hostile file: any subclass of Exception, and Rust's panics, which are BaseExceptions. So
all of it is caught in one place, instead of a list of exceptions beside each parser.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from cache.errors import CacheError

MAX_DETAIL = 300
"""Characters of a library's own words that an error of ours repeats."""

HDF5_ERRNO = re.compile(r"\berrno = (\d+)")

SELF_EXPLAINING = (OSError, ValueError, RuntimeError)
"""Exceptions whose text says what is wrong; the text of others, like KeyError, is only a name."""


@contextlib.contextmanager
def reading_foreign_file(refuse: Callable[[str], CacheError]) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one error of ours.

    Errors of ours, interrupts, and failures of the system pass as they are. An OSError with an
    `errno` is such a failure (no permission, an input/output error): it says nothing about what is
    in the file, so nobody may call the file damaged. Libraries raise OSErrors without `errno` for
    files that they cannot parse, and EINVAL is what the system says of a place that no file has,
    which a damaged file can name.

    Args:
        refuse: Makes the error out of one line that says what the library found wrong.

    Raises:
        CacheError: What `refuse` returned.
        OSError: The system could not read the file.
    """
    try:
        yield
    except (CacheError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise refuse(describe(error)) from None


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Let a failure of the system name the file, and be an OSError.

    Reads of Python and of Arrow name no file; HDF5 says only in its text what the system said.

    Raises:
        OSError: The system could not read the file.
    """
    try:
        yield
    except CacheError:
        raise
    except Exception as error:
        in_text = HDF5_ERRNO.search(str(error))
        number = error.errno if isinstance(error, OSError) else None
        number = number or (int(in_text[1]) if in_text else None)
        # The second is what the system says of a place that no file has: that is damage.
        if not number or number == errno.EINVAL:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def describe(error: BaseException) -> str:
    """Return an exception of a library as one line, with its type where the text needs it."""
    text = one_line(error)
    if isinstance(error, SELF_EXPLAINING) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(text: object) -> str:
    """Return a text with its white space reduced to single spaces, cut to `MAX_DETAIL`."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_DETAIL else f"{line[:MAX_DETAIL]}..."
