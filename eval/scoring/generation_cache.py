"""Caches generated texts on disk until the evaluation is finished.

The texts of a model under one condition take minutes to hours, so an evaluation that was stopped
continues without generating them again. The cache key holds all inputs of the generation.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.files.atomic import canonical_json, write_json
from cache.files.foreign import reading_foreign_file
from train.model.generate import Generation
from workspace.errors import StageError
from workspace.paths import WORK

FOLDER = WORK / "evaluate"


def cached(cache_key: dict[str, Any], make: Callable[[], list[Generation]]) -> list[Generation]:
    """Return cached texts; make and cache them if they are missing or damaged.

    Args:
        cache_key: All inputs of the generation, as JSON values; `questions` has one entry per text.
        make: Generates the texts.

    Raises:
        OSError: The system cannot read or write the file.
    """
    path = FOLDER / f"{_hash(cache_key)[:16]}.json"
    if path.is_file():
        try:
            return _read(path, len(cache_key["questions"]))
        except StageError as error:
            print(f"{error}; making the texts again", file=sys.stderr)
    generations = make()
    texts = [dataclasses.asdict(generation) for generation in generations]
    write_json(path, {"sha256": _hash(texts), "texts": texts})
    return generations


def _read(path: Path, count: int) -> list[Generation]:
    with reading_foreign_file(lambda why: StageError(f"{path}: damaged ({why})"), path):
        content = json.loads(path.read_bytes())
        texts = content["texts"]
        if _hash(texts) != content["sha256"]:
            raise ValueError("its texts do not match their sha256")
        if len(texts) != count:
            raise ValueError(f"wanted {count} texts, found {len(texts)}")
        return [Generation(**text) for text in texts]


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def clear() -> None:
    """Delete all cached texts."""
    shutil.rmtree(FOLDER, ignore_errors=True)
