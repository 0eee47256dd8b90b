"""Command: frees shards in the work directory that no published store needs.

    python -m workspace.gc [STORE ...] [--delete]

Lists what it would free, and deletes only with --delete. Old shards make it cheap to return to
another encoder or other images; without them, the images are encoded again.
"""

from collections.abc import Sequence
from pathlib import Path

from cache.cli.command import command_parser, run_guarded
from cache.remote.location import Location
from cache.store_index import INDEX_FILE, StoreIndex
from cache.texts import human_size
from workspace.locks import folder_lock
from workspace.paths import FEATURES, SHARDS


def collect(stores: Sequence[str], delete: bool) -> None:
    """List, and delete, the files of the work directory that no store needs.

    Args:
        stores: Folders or fsspec URLs of the stores to keep, at least one.
        delete: Whether to delete the files.

    Raises:
        PatchcacheError: A store cannot be read, or an extraction is running.
    """
    if not SHARDS.is_dir():
        print(f"{SHARDS}: no such folder, so there is nothing to free")
        return
    with folder_lock(SHARDS):
        # Read under the lock: no extraction may publish in between.
        needed = set().union(*(needed_names(store) for store in stores)) | {".lock"}
        unneeded = [path for path in sorted(SHARDS.iterdir()) if path.stem not in needed]
        sizes = {path: path.stat() for path in unneeded if path.is_file()}
        for path, found in sizes.items():
            print(f"{path}  {human_size(found.st_size)}")
            if delete:
                path.unlink()
    shards = sum(path.suffix == ".h5" for path in sizes)
    num_bytes = sum(found.st_size for found in sizes.values())
    linked = sum(found.st_size for found in sizes.values() if found.st_nlink > 1)
    print(
        f"{SHARDS}: {shards} shards and {human_size(num_bytes)} "
        + ("freed" if delete else "can be freed with --delete")
        + (f", but for {human_size(linked)} that DVC or a store has too" if linked else "")
    )


def needed_names(store: str) -> set[str]:
    """Return the names, without suffix, of a store's files in the work directory."""
    location = Location(store)
    spec = location.read_spec()
    index = StoreIndex.read(location.path(INDEX_FILE), spec)
    return {Path(file.name).stem for file in index.shards} | {f"probe-{spec.fingerprint[:16]}"}


def main() -> None:
    """Read the command line and collect."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "stores",
        nargs="*",
        default=[str(FEATURES)],
        metavar="STORE",
        help=f"folders or fsspec URLs of the stores to keep (default: {FEATURES})",
    )
    parser.add_argument("--delete", action="store_true", help="delete the files")
    arguments = parser.parse_args()
    run_guarded(lambda: collect(arguments.stores, arguments.delete))


if __name__ == "__main__":
    main()
