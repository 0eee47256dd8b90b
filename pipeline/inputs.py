"""Stage inputs: links to the inputs that section `data` names, by which DVC sees their changes.

DVC's `deps` can hold neither lists nor nothing, and of a folder of links DVC follows those to files
alone. So `data/inputs/files/` holds a link to each file, and `data/inputs/folder_1` and so on are
links to folders, or files without meaning.
"""

import glob
import os
import shutil
import sys
from pathlib import Path

from cache.remote.location import is_url
from pipeline.input_paths import named_paths
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.paths import INPUTS, RAW
from workspace.settings import Params
from workspace.stage import run_stage

MAX_NAME_BYTES = 200
"""Bytes of a file's name that its link keeps."""

MAX_FOLDERS = 8
"""Folders that `dvc.yaml` watches."""


def inputs(params: Params) -> None:
    """Run the stage.

    Raises:
        StageError: An input lies among the links, which are made anew.
    """
    link_inputs(params.section("data", DataSettings))


def link_inputs(data: DataSettings) -> None:
    """Make the links of `data/inputs` anew, and print which inputs DVC cannot watch.

    Raises:
        StageError: An input lies in `data/inputs`.
    """
    for key, named in named_paths(data):
        if Path(named).resolve().is_relative_to(INPUTS.resolve()):
            raise StageError(
                f"{key}: {named} lies in {INPUTS}, which this stage makes anew. Move it."
            )
    shutil.rmtree(INPUTS, ignore_errors=True)
    (INPUTS / "files").mkdir(parents=True)
    # DVC warns of an empty folder or file.
    (INPUTS / "files" / "about.txt").write_text("Links to inputs, by which DVC sees changes.\n")
    unwatched = [named for _, named in named_paths(data) if is_url(named)]
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
            link.write_text("unused\n")
    if unwatched:
        print(
            f"inputs: DVC does not notice changes in {', '.join(unwatched)}: it watches neither "
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


if __name__ == "__main__":
    run_stage(inputs, __doc__)
