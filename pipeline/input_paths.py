"""The paths of the inputs that section `data` names."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from workspace.data_settings import DataSettings


def named_paths(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield the settings key and the path of every input."""
    for split, source in data.splits.items():
        for place in source.image_paths:
            yield f"data.{split}.images", place.path
        for path in source.caption_paths:
            yield f"data.{split}.captions", path
    for path in data.instruct_paths:
        yield "data.instruct", path


def matches(path: str) -> list[Path]:
    """Return the local file or folder of a path, or the files of a pattern, sorted."""
    if os.path.lexists(path):
        return [Path(path)]
    return [Path(name) for name in sorted(glob.glob(path))]  # noqa: PTH207
