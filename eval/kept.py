"""Keeps texts that were generated, until the evaluation they belong to is finished.

A model's texts in one way of asking are minutes to hours of work: an evaluation that was stopped
makes none of them again. They are found by all that decides them.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from typing import Any

from cache.files import WORK, canonical_json, write_json
from train.generate import Generation

FOLDER = WORK / "evaluate"


def kept(decides: dict[str, Any], make: Callable[[], list[Generation]]) -> list[Generation]:
    """Return texts that were made before, or make and keep them.

    Args:
        decides: All that decides the texts.
        make: Makes them.
    """
    path = FOLDER / f"{hashlib.sha256(canonical_json(decides)).hexdigest()[:16]}.json"
    if path.is_file():
        return [Generation(**one) for one in json.loads(path.read_bytes())]
    made = make()
    write_json(path, [dataclasses.asdict(one) for one in made])
    return made


def forget() -> None:
    """Delete all that is kept: the evaluation is finished."""
    shutil.rmtree(FOLDER, ignore_errors=True)
