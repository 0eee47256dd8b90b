"""Turns what libraries raise while they read or write files into errors of this project.

On a damaged or hostile file, parsers of HDF5, parquet, safetensors, YAML and tokenizers raise any
subclass of Exception, and Rust's panics, which are BaseExceptions. One place catches them all,
instead of a list of exceptions beside each parser. Failures of the system, such as a full disk,
arrive as the same exceptions and are told apart here.
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
"""Exceptions whose text explains itself; the text of others, such as KeyError, is only a name."""

SYSTEM_ERROR = re.compile(r"(?:\berrno = |\[errno |\(os error )([1-9]\d{0,2})\b", re.IGNORECASE)
"""Finds the system's error number in texts of HDF5, of Arrow, and of libraries in Rust."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""Errors of the system that are about the file itself. EINVAL answers an impossible offset, which a
damaged file can ask for."""


@contextlib.contextmanager
def reading_foreign_file(
    refuse: Callable[[str], PatchcacheError], path: Path | None = None
) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one `PatchcacheError`.

    A `PatchcacheError` and interrupts pass unchanged. A failure of the system (no permission, an
    input/output error) becomes an OSError: it says nothing about the content, so the file must not
    be called damaged. A missing file or a folder is refused.

    Args:
        refuse: Makes the error from a line that says what the library found wrong.
        path: Of the file; an OSError names it if the library names none.

    Raises:
        PatchcacheError: From `refuse`.
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
            raise _with_path(failure, path) from None
        raise refuse(describe(error)) from None


@contextlib.contextmanager
def writing_foreign_file(path: Path) -> Iterator[None]:
    """Turn a failure of the system in a library that writes a file into an OSError.

    Args:
        path: Of the file or folder, for the error text.

    Raises:
        OSError: The system could not write it.
    """
    try:
        yield
    except BaseException as error:
        failure = system_failure(error)
        if failure is None:
            raise
        raise _with_path(failure, path) from None


def _with_path(failure: OSError, path: Path | None) -> OSError:
    if failure.filename is None and path is not None:
        failure.filename = str(path)
    return failure


def system_failure(error: BaseException) -> OSError | None:
    """Return the failure of the system behind a library's exception, in the system's own words.

    An OSError with an `errno` is one; for files that they cannot parse, libraries raise OSErrors
    without it. Other exceptions have the system's error number in their text. None if there is
    neither.
    """
    if isinstance(error, OSError) and error.errno is not None:
        # Of a copy, `filename2` is the target, on the disk that is full.
        return OSError(error.errno, os.strerror(error.errno), error.filename2 or error.filename)
    found = SYSTEM_ERROR.search(str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def describe(error: BaseException) -> str:
    """Return a library's exception as one line, with its type unless the text explains itself."""
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
    return STRICT_JSON.decode(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
"""One decoder for all texts: to make it takes longer than to parse a short one."""
