"""Copies one file of texts behind an fsspec URL to this machine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cache.errors import PatchcacheError
from cache.remote.copies import RemoteFolder
from workspace.errors import StageError

MOST_BYTES = 2**40
"""Limit of a file whose server does not tell its size."""


@contextlib.contextmanager
def copy_of_url(url: str, key: str) -> Iterator[Path]:
    """Yield the path of a copy, which is deleted at the end of the block.

    Args:
        url: Of the file.
        key: The settings key that names it, for the error text.

    Raises:
        FileNotFoundError: The server has no such file.
        StageError: The server does not deliver the whole file.
    """
    folder, _, name = url.rpartition("/")
    try:
        remote = RemoteFolder(folder)
        num_bytes = remote.size(name)

        def check(_copy: Path, found_bytes: int, _sha256: str) -> None:
            if num_bytes not in (None, found_bytes):
                raise StageError(f"{url}: {found_bytes} bytes came, the server says {num_bytes}")

        copy = remote.copy(name, MOST_BYTES if num_bytes is None else num_bytes, check)
    except PatchcacheError as error:
        raise StageError(f"{key}: {error}") from None
    yield copy
