"""The boundary at which a library of others reads a file of others, or writes one of ours.

Parsers of HDF5, parquet, safetensors, YAML, tokenizers and adapters raise whatever they like on a
damaged or hostile file: any subclass of Exception, and Rust's panics, which are BaseExceptions. So
all of it is caught in one place, instead of a list of exceptions beside each parser. A failure of
the system, like a full disk, reaches Python through the same exceptions and is told from the rest.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import PatchcacheError
from ..texts import one_line

SELF_EXPLAINING = (OSError, ValueError, RuntimeError)
"""Exceptions whose text says what is wrong; the text of others, like KeyError, is only a name."""

SYSTEM_ERROR = re.compile(r"(?:\berrno = |\[errno |\(os error )([1-9]\d{0,2})\b", re.IGNORECASE)
"""Number of the system's error in the words of HDF5, of Arrow, and of libraries in Rust."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""Errors of the system that say what is there in place of a file. EINVAL is its answer to an offset
that no file has, which a damaged file can name."""


@contextlib.contextmanager
def reading_foreign_file(
    refuse: Callable[[str], PatchcacheError], path: Path | None = None
) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one error of ours.

    Errors of ours and interrupts pass as they are. A failure of the system (no permission, an
    input/output error) becomes an OSError: it says nothing about what is in the file, so nobody
    may call the file damaged. What is no file at all is refused.

    Args:
        refuse: Makes the error out of one line that says what the library found wrong.
        path: What is read; an OSError names it where the library names nothing.

    Raises:
        PatchcacheError: What `refuse` returned.
        OSError: The system could not read the file.
    """
    try:
        yield
    except (PatchcacheError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        failure = system_failure(error)
        if failure and failure.errno in NO_FILE:
            raise refuse(describe(failure)) from None
        if failure:
            raise _naming(failure, path) from None
        raise refuse(describe(error)) from None


@contextlib.contextmanager
def writing_foreign_file(path: Path) -> Iterator[None]:
    """Let a library write a file or a folder: a failure of the system becomes an OSError.

    Args:
        path: The file or folder, which the error names.

    Raises:
        OSError: The system could not write it.
    """
    try:
        yield
    except BaseException as error:
        failure = system_failure(error)
        if failure is None:
            raise
        raise _naming(failure, path) from None


def _naming(failure: OSError, path: Path | None) -> OSError:
    if failure.filename is None and path is not None:
        failure.filename = str(path)
    return failure


def system_failure(error: BaseException) -> OSError | None:
    """Return the failure of the system behind an exception of a library; None if it is another.

    An OSError with an `errno` is such a failure; libraries raise OSErrors without it for files that
    they cannot parse. Others hold the system's number only in their text. What is returned has the
    system's own words.
    """
    if isinstance(error, OSError) and error.errno is not None:
        # Of a copy, the second is the target, where the disk is full.
        return OSError(error.errno, os.strerror(error.errno), error.filename2 or error.filename)
    found = SYSTEM_ERROR.search(str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def describe(error: BaseException) -> str:
    """Return an exception of a library as one line, with its type where the text needs it."""
    text = one_line(error)
    if isinstance(error, SELF_EXPLAINING) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN and Infinity, which only Python accepts, are refused.

    Raises:
        ValueError: Not JSON.
        RecursionError: Nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
