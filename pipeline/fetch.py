"""Stage fetch: puts images and annotations where section `data` expects them.

Source `demo` renders the embedded world, `coco` downloads the files of section `fetch`, and `local`
takes the files of the user. Files are made below `.work/fetch` and published whole in `data/raw`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from cache.cli.interrupts import without_interrupts
from cache.errors import SettingsError
from cache.files.atomic import CHUNK_BYTES, link_or_copy, replacing, write_text
from cache.remote.urls import is_url
from pipeline.download import check_free_space, download, problem
from pipeline.images.zip_file import open_zip
from pipeline.input_paths import matches, named_paths
from pipeline.settings import Download, FetchSettings
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.paths import RAW, WORK
from workspace.settings import Params
from workspace.stage import run_stage

FETCH_WORK = WORK / "fetch"


def fetch(params: Params) -> None:
    """Run the stage.

    Raises:
        StageError: The demo cannot be rendered, a file cannot be downloaded, or a file of section
            `data` is missing in the end.
    """
    data = params.section("data", DataSettings)
    RAW.mkdir(parents=True, exist_ok=True)
    if data.source == "demo":
        render_demo(FETCH_WORK / "demo")
    elif data.source == "coco":
        fetch_files(params.section("fetch", FetchSettings).files)
    else:
        # DVC warns of an empty folder.
        write_text(RAW / "about.txt", "Nothing is fetched with data.source: local.\n")
    check_paths(data)


def render_demo(work: Path) -> None:
    """Render the demo's world in a process of its own, and publish its files.

    Raises:
        StageError: The process failed.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    # A process instead of an import keeps the pipeline independent of the demo.
    command = [sys.executable, "-m", "demo.world", str(work)]
    checkout = str(Path(__file__).resolve().parents[1])
    search_path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), checkout)))
    environment = os.environ | {"PYTHONPATH": search_path}
    with contextlib.ExitStack() as at_end:
        with without_interrupts():
            process = subprocess.Popen(command, env=environment)
            # Only an interrupt, which the process itself ignores, leaves it running.
            at_end.callback(process.wait)
            at_end.callback(process.kill)
        code = process.wait()
    if code in (1, SettingsError.exit_code):
        # The process printed its own error.
        sys.exit(code)
    if code != 0:
        raise StageError(
            f"data.source demo: {' '.join(command[1:])} ended with exit code {code}. Its own "
            f"message stands above."
        )
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        link_or_copy(file, RAW / file.relative_to(work))
    shutil.rmtree(work)


def fetch_files(items: tuple[Download, ...]) -> None:
    """Download and publish the files that are not published yet.

    Raises:
        StageError: The disk is too small, or as `download` raises it.
    """
    missing = tuple(item for item in items if not _is_published(item))
    check_free_space(missing, FETCH_WORK)
    for item in missing:
        file = download(item, FETCH_WORK)
        if item.unpack:
            unpack(file, item.unpack, Path(item.path))
        else:
            link_or_copy(file, Path(item.path))


def _is_published(item: Download) -> bool:
    path = Path(item.path)
    # Unpacked members have no published hash, so their zip is checked instead.
    return not item.unpack and path.is_file() and problem(path, item) is None


def unpack(archive: Path, members: tuple[str, ...], folder: Path) -> None:
    """Unpack members of a zip into a folder, without their own folders.

    Raises:
        StageError: A member is missing or damaged.
    """
    try:
        with open_zip(archive) as opened:
            for member in members:
                with (
                    replacing(folder / PurePosixPath(member).name) as temporary,
                    opened.open(member) as source,
                    temporary.open("wb") as target,
                ):
                    shutil.copyfileobj(source, target, CHUNK_BYTES)
    except KeyError as error:
        raise StageError(f"{archive}: {error.args[0]} Correct unpack in fetch.files.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise StageError(f"{archive}: {error}. Delete it and run again.") from None


def check_paths(data: DataSettings) -> None:
    """Refuse settings that name missing files; those behind URLs are not asked for.

    Raises:
        StageError: A file is missing; names the settings key and the path.
    """
    local = [(key, path) for key, path in named_paths(data) if not is_url(path)]
    for key, path in local:
        if not matches(path):
            raise StageError(
                f"{key}: {path} does not exist (data.source is {data.source}). {_remedy(path)}"
            )
    print(f"fetch: all {len(local)} files and folders of section data are there")


def _remedy(path: str) -> str:
    if RAW.resolve() in Path(path).resolve().parents:
        return (
            f"`dvc repro` empties {RAW} before this stage runs, so files of your own are lost "
            f"there: keep them outside of data/, and name that place."
        )
    return "Put it there, or name another path."


if __name__ == "__main__":
    run_stage(fetch, __doc__)
