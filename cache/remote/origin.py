"""`origin.json` of a store's folder: the URL that the shards are read from, in place of the folder.

Spec, index and probe are in the folder; hashes in the local index pin the bytes at the URL. The
file can be anybody's, as every file of a store: it names a server that hands out files, and nothing
else. A store that is itself read from a URL has none, whatever lies there.
"""

from pathlib import Path

from ..errors import IncompleteStoreError, SettingsError
from ..files.atomic import canonical_json, path_in_errors
from ..files.foreign import parse_json
from ..spec import MAX_JSON_BYTES
from ..texts import one_line
from .urls import SERVERS

ORIGIN_FILE = "origin.json"


def origin_json(url: str) -> bytes:
    """Return the content of the file.

    Raises:
        SettingsError: A URL of a kind that shards are not read from in this way.
    """
    if not _is_origin(url):
        raise SettingsError(
            f"{url}: shards are read directly from {_kinds()} alone. Copy them to one of these, "
            f"or set encoder.stream: false."
        )
    return canonical_json({"url": url})


def read_origin(folder: Path) -> str | None:
    """Return the URL that the shards of a folder are read from; None if they are in the folder.

    Raises:
        IncompleteStoreError: The file names no such URL.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    with path_in_errors(path), path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES)
    url = origin_in(data)
    if url is None:
        raise IncompleteStoreError(
            f"{path}: wanted one URL of {_kinds()}, found {one_line(ascii(data))}. Run the "
            f"extract stage, or delete it if the shards are here."
        )
    return url


def origin_in(data: bytes) -> str | None:
    """Return the URL in the content of the file; None if it is not of this project."""
    try:
        values = parse_json(data.decode())
    except (ValueError, RecursionError):
        return None
    url = values.get("url") if isinstance(values, dict) and len(values) == 1 else None
    return url if isinstance(url, str) and _is_origin(url) else None


def _is_origin(url: str) -> bool:
    scheme, separator, rest = url.partition("://")
    return scheme in SERVERS and bool(separator and rest) and "::" not in url and url.isprintable()


def _kinds() -> str:
    return ", ".join(f"{scheme}://" for scheme in SERVERS)
