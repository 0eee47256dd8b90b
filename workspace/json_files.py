"""Reads small JSON files, and gives nested values dotted names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file

MAX_JSON_BYTES = 20_000_000


def read_json(path: Path, refuse: Callable[[str], PatchcacheError]) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        PatchcacheError: The error that `refuse` returned.
        OSError: The system could not read the file.
    """
    if not path.is_file():
        raise refuse("no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise refuse(f"wanted at most {MAX_JSON_BYTES} bytes, found {path.stat().st_size}")
    with reading_foreign_file(refuse, path):
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise refuse(f"wanted a JSON object, found {type(values).__name__}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give every leaf of nested dictionaries and lists a dotted name.

    Returns:
        Names like `lora.r` and `files.0.url`, in order. Empty dictionaries and lists are leaves.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value)) or value
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
