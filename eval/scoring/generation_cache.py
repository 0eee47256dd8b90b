"""Keeps texts that were generated, until the evaluation they belong to is finished.

A model's texts in one way of asking are minutes to hours of work: an evaluation that was stopped
makes none of them again. They are found by all that decides them.
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


def cached(decides: dict[str, Any], make: Callable[[], list[Generation]]) -> list[Generation]:
    """Return texts that were made before, or make and keep them; damaged ones are made again.

    Args:
        decides: All that decides the texts; `prompts` has an entry for each.
        make: Makes them.

    Raises:
        OSError: The system cannot read or write the file.
    """
    path = FOLDER / f"{_hash(decides)[:16]}.json"
    if path.is_file():
        try:
            return _read(path, len(decides["prompts"]))
        except StageError as error:
            print(f"{error}; making the texts again", file=sys.stderr)
    made = make()
    texts = [dataclasses.asdict(one) for one in made]
    write_json(path, {"sha256": _hash(texts), "texts": texts})
    return made


def _read(path: Path, count: int) -> list[Generation]:
    with reading_foreign_file(lambda why: StageError(f"{path}: damaged ({why})"), path):
        content = json.loads(path.read_bytes())
        texts = content["texts"]
        if _hash(texts) != content["sha256"]:
            raise ValueError("it does not hold what was written")
        if len(texts) != count:
            raise ValueError(f"wanted {count} texts, found {len(texts)}")
        return [Generation(**one) for one in texts]


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def clear() -> None:
    """Delete all that is kept: the evaluation is finished."""
    shutil.rmtree(FOLDER, ignore_errors=True)
