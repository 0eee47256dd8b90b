"""Command: checks a store byte for byte, and deletes damaged files when asked to.

Prints one line for each problem. The exit code is 0 if there is none, and 1 if there is one,
repaired or not, as with `fsck`.
"""

from pathlib import Path

from tqdm import tqdm

from .audit import VerifyReport, audit
from .cli.command import command_parser, run_guarded
from .dvc_objects import drop_damaged_objects
from .errors import CorruptShardError, SettingsError
from .remote.destination import Destination
from .remote.location import Location
from .spec import SPEC_FILE
from .store_index import INDEX_FILE
from .texts import without_passwords


def verify(root: str, deep: bool, repair: bool) -> None:
    """Check a store and print what is wrong with it.

    Args:
        root: Folder or fsspec URL of the store.
        deep: Also re-hash every file and row.
        repair: Delete damaged files, so that the extract stage makes exactly those again.

    Raises:
        SettingsError: The shards to repair are at a URL that cannot be written, or that a folder
            names.
        CorruptShardError: There are problems.
    """
    location = Location(root)
    if repair and location.origin:
        raise SettingsError(
            f"{root}: its shards are at {location.origin}. Repair the store there, then run the "
            f"extract stage."
        )
    target = Destination(root) if repair and location.is_remote else Path(root)
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = audit(location, deep=deep, progress=progress)
    for problem in report.problems:
        print(without_passwords(problem))
    if not report.ok:
        deleted = delete_damaged(target, report) if repair else []
        counts = f"{root}: problems: {len(report.problems)}, files deleted: {len(deleted)}"
        raise CorruptShardError(f"{counts}{_advice(location, report, repair)}")
    what = "all bytes are those that were written" if deep else "sizes and structure are right"
    place = without_passwords(root)
    print(f"{place}: {report.num_images} images in {report.num_shards} shards, {what}")


def _advice(location: Location, report: VerifyReport, repair: bool) -> str:
    if report.unreadable:
        # These files may be sound, so they are not deleted.
        return (
            f", not readable: {len(report.unreadable)}, the first: {report.unreadable[0]}. "
            f"Check the disk or the file system, then verify again."
        )
    if not report.bad_files:
        # A server that does not deliver, or another version of the format.
        return ". No file is known to be damaged; each problem says what to do."
    if location.origin:
        return f". {location.remedy}"
    if location.is_remote:
        # Spec and index are replaced by a push.
        shards = set() if repair else set(report.bad_files) - {SPEC_FILE, INDEX_FILE}
        delete = "Delete damaged files there, by --repair if it can be written. " if shards else ""
        return f". {delete}Push the store there again."
    if repair:
        return ". Run the extract stage."
    # A missing folder, or one that holds no store, has nothing to delete.
    is_any = any((Path(location.address) / name).exists() for name in report.bad_files)
    return ". --repair deletes damaged files." if is_any else "."


def delete_damaged(folder: Path | Destination, report: VerifyReport) -> list[str]:
    """Delete the damaged files of a store, and return the names of those that existed.

    Behind a URL, spec and index stay: they are replaced when the store is pushed there again.
    """
    if isinstance(folder, Destination):
        listed = folder.list().keys() - {SPEC_FILE, INDEX_FILE}
        deleted = [name for name in report.bad_files if name in listed]
        for name in deleted:
            folder.delete(name)
        return deleted
    deleted = [name for name in report.bad_files if (folder / name).exists()]
    for name in deleted:
        (folder / name).unlink()
    # DVC's copy can be the same file on the disk, and would be restored in its place.
    drop_damaged_objects(folder, report.bad_files)
    return deleted


def main() -> None:
    """Read the command line and verify."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    parser.add_argument("--shallow", action="store_true", help="sizes and structure only")
    parser.add_argument("--repair", action="store_true", help="delete damaged files")
    arguments = parser.parse_args()
    run_guarded(lambda: verify(arguments.root, not arguments.shallow, arguments.repair))


if __name__ == "__main__":
    main()
