"""The inputs that section `data` names, and links to them that DVC watches.

DVC's `deps` can hold neither lists nor nothing, and of a folder of links DVC follows those to files
alone. So `data/inputs/files/` holds a link to each file, and `data/inputs/folder_1` and so on are
links to folders, or empty files.
"""

import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cache.remote.location import is_url
from workspace.data_settings import DataSettings
from workspace.paths import INPUTS, RAW

MAX_NAME_BYTES = 200
"""Bytes of a file's name that its link keeps."""

MAX_FOLDERS = 8
"""Folders that `dvc.yaml` watches."""


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


def link_inputs(data: DataSettings) -> None:
    """Make the links of `data/inputs` anew, and print which inputs DVC cannot watch."""
    shutil.rmtree(INPUTS, ignore_errors=True)
    (INPUTS / "files").mkdir(parents=True)
    unwatched = [path for _, path in named_paths(data) if is_url(path)]
    folders: list[Path] = []
    for path in watched_paths(data):
        if path.is_file():
            number = len(list((INPUTS / "files").iterdir()))
            # A name may be as long as the system allows, which the number would make longer.
            name = os.fsdecode(os.fsencode(path.name)[-MAX_NAME_BYTES:])
            (INPUTS / "files" / f"{number:03d}_{name}").symlink_to(path)
        elif not path.is_dir():
            # DVC would wait for a pipe for ever; the index stage refuses it.
            continue
        elif INPUTS.resolve().is_relative_to(path.resolve()) or len(folders) == MAX_FOLDERS:
            unwatched.append(str(path))
        else:
            folders.append(path)
    for number in range(MAX_FOLDERS):
        link = INPUTS / f"folder_{number + 1}"
        if number < len(folders):
            link.symlink_to(folders[number])
        else:
            link.touch()
    if unwatched:
        print(
            f"fetch: DVC does not notice changes in {', '.join(unwatched)}: it watches neither "
            f"URLs, nor folders that hold this workspace, nor more than {MAX_FOLDERS} folders. "
            f"After a change there, run `dvc repro --force index`.",
            file=sys.stderr,
        )


def watched_paths(data: DataSettings) -> list[Path]:
    """Return the absolute paths of the local inputs outside of `data/raw`, each once.

    A pattern stands for its folder, in which files can appear. The files of yes-no questions lie
    beside captions, so these count too.
    """
    raw = RAW.resolve()
    found: dict[Path, None] = {}
    for key, path in named_paths(data):
        if is_url(path):
            continue
        # Not resolved: a link may lead elsewhere later.
        given = Path(os.path.abspath(path))  # noqa: PTH100
        while glob.has_magic(str(given)) and not os.path.lexists(given):
            given = given.parent
        beside = question_files(given) if key.endswith("captions") else []
        for each in (given, *beside):
            if not each.resolve().is_relative_to(raw):
                found[each] = None
    return list(found)


def question_files(captions: Path) -> list[Path]:
    """Return the files beside captions of which the index stage makes yes-no questions."""
    instances = captions.with_name(captions.name.replace("captions", "instances"))
    official = sorted(captions.parent.glob("coco_pope_*.json"))
    return [path for path in [instances, *official] if path != captions and path.is_file()]
