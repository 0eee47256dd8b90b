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

from cache.remote.urls import is_url
from pipeline.input_paths import named_paths
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.paths import INPUTS, RAW
from workspace.settings import Params
from workspace.stage import run_stage

FILES = INPUTS / "files"
"""Holds the links to files."""

ABOUT = "Links to inputs, by which DVC sees changes.\n"
"""A file of the folder of links, since DVC warns of an empty one."""

UNUSED = "unused\n"
"""A file in place of a link to a folder, since DVC warns of an empty one."""

MAX_NAME_BYTES = 200
"""Bytes of a file's name that its link keeps."""

MAX_FOLDERS = 8
"""Folders that `dvc.yaml` watches."""


def inputs(params: Params) -> None:
    """Run the stage.

    Raises:
        StageError: Other files lie among the links, which are made anew.
    """
    link_inputs(params.section("data", DataSettings))


def link_inputs(data: DataSettings) -> None:
    """Make the links of `data/inputs` anew, and print which inputs DVC cannot watch.

    Raises:
        StageError: An input or another file of the user lies in `data/inputs`.
    """
    for key, named in named_paths(data):
        if Path(named).resolve().is_relative_to(INPUTS.resolve()):
            raise StageError(
                f"{key}: {named} lies in {INPUTS}, which this stage makes anew. Move it."
            )
    _remove_links()
    FILES.mkdir(parents=True)
    (FILES / "about.txt").write_text(ABOUT)
    unwatched = [named for _, named in named_paths(data) if is_url(named)]
    folders: list[Path] = []
    for path in watched_paths(data):
        if path.is_file():
            number = len(list(FILES.iterdir()))
            # A name may be as long as the system allows, which the number would make longer.
            name = os.fsdecode(os.fsencode(path.name)[-MAX_NAME_BYTES:])
            (FILES / f"{number:03d}_{name}").symlink_to(path)
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
            link.write_text(UNUSED)
    if unwatched:
        print(
            f"inputs: DVC does not notice changes in {', '.join(unwatched)}: it watches neither "
            f"URLs, nor folders that hold this workspace, nor more than {MAX_FOLDERS} folders. "
            f"After a change there, run `dvc repro --force index`.",
            file=sys.stderr,
        )


def _remove_links() -> None:
    """Delete the links of the run before.

    Raises:
        StageError: `data/inputs` leads elsewhere, or holds what this stage did not make.
    """
    if not os.path.lexists(INPUTS):
        return
    if INPUTS.is_symlink() or not INPUTS.is_dir():
        raise StageError(f"{INPUTS}: no folder, in which this stage makes links. Move it away.")
    for path in INPUTS.iterdir():
        of_files = path.iterdir() if path == FILES and _is_folder(path) else [path]
        if foreign := next((each for each in of_files if not _is_own(each)), None):
            raise StageError(
                f"{foreign}: lies in {INPUTS}, which this stage makes anew, and is not of it. "
                f"Move it away."
            )
    shutil.rmtree(INPUTS)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_own(path: Path) -> bool:
    """Return whether this stage made a link or a file, which a kill may have cut short."""
    if path.is_symlink() or not path.is_file():
        return path.is_symlink()
    if path.stat().st_size > len(ABOUT):
        return False
    content = path.read_bytes()
    return any(text.encode().startswith(content) for text in (ABOUT, UNUSED))


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
