"""Command: checks a store, byte for byte, and drops what is bad when asked to.

    python -m cache.verify data/features [--shallow] [--repair]

Prints one line a problem. Exit code 0 when there is none; 1 when there was one, repaired or not,
as `fsck` does.
"""

from pathlib import Path

from tqdm import tqdm

from .audit import VerifyReport, audit
from .cli.command import command_parser, run_guarded
from .dvc_objects import drop_damaged_objects
from .errors import CorruptShardError, SettingsError
from .remote.location import Location
from .spec import MAX_JSON_BYTES, Spec
from .store_index import INDEX_FILE, StoreIndex


def verify(root: str, deep: bool, repair: bool) -> None:
    """Check a store and say what is wrong with it.

    Args:
        root: Folder or fsspec URL of the store.
        deep: Also re-hash every file and row.
        repair: Delete what is bad, so that the extract stage makes exactly that again.

    Raises:
        SettingsError: A store behind a URL cannot be repaired.
        PatchcacheError: There are problems.
    """
    location = Location(root)
    if repair and location.is_remote:
        raise SettingsError(f"{root}: is not on this machine. Repair it where it is, or push it.")
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = audit(location, deep=deep, progress=progress)
    for problem in report.problems:
        print(problem)
    if not report.ok:
        dropped = drop(Path(root), report) if repair else []
        counts = f"{root}: problems: {len(report.problems)}, files deleted: {len(dropped)}"
        raise CorruptShardError(f"{counts}{_what_to_do(location, report, repair)}")
    table = StoreIndex.read(
        location.path(INDEX_FILE), Spec.read(location.path("spec.json", MAX_JSON_BYTES))
    )
    what = "all bytes are those that were written" if deep else "sizes and structure are right"
    print(f"{root}: {len(table.image_ids)} images in {len(table.shards)} shards, {what}")


def _what_to_do(location: Location, report: VerifyReport, repair: bool) -> str:
    if report.unreadable:
        # Whether they are damaged nobody knows, so they stay.
        return (
            f", not readable: {len(report.unreadable)}, the first: {report.unreadable[0]}. "
            f"Look after the disk or the file system, then verify again."
        )
    if not report.bad_files:
        # A server that does not deliver, or another version of the format.
        return ". No file is known to be damaged; each problem says what to do."
    if location.is_remote:
        return ". Repair the store where it is, or push it there again."
    return ". Run the extract stage." if repair else ". --repair deletes what is bad."


def drop(folder: Path, report: VerifyReport) -> list[str]:
    """Delete the bad files of a store, and return the names of those that were there."""
    dropped = [name for name in report.bad_files if (folder / name).exists()]
    for name in dropped:
        (folder / name).unlink()
    # DVC's copy can be the same file on the disk, and would be put back in its place.
    drop_damaged_objects(folder, report.bad_files)
    return dropped


def main() -> None:
    """Read the command line and verify."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    parser.add_argument("--shallow", action="store_true", help="sizes and structure only")
    parser.add_argument("--repair", action="store_true", help="delete what is bad")
    arguments = parser.parse_args()
    run_guarded(lambda: verify(arguments.root, not arguments.shallow, arguments.repair))


if __name__ == "__main__":
    main()
