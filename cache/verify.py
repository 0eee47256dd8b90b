"""Command: checks a store, byte for byte, and drops what is bad when asked to.

    python -m cache.verify data/features [--shallow] [--repair]

Prints one line a problem. Exit code 0 when there is none, 1 otherwise.
"""

import argparse
from pathlib import Path

from cache.command import run_guarded
from cache.errors import CorruptShardError
from cache.store import FeatureStore


def verify(folder: Path, deep: bool, repair: bool) -> None:
    """Check a store and say what is wrong with it.

    Args:
        folder: The store.
        deep: Also re-hash every file and row.
        repair: Delete the bad shards, so that the extract stage makes exactly those again.

    Raises:
        CacheError: There are problems.
    """
    store = FeatureStore(folder, check_sizes=False)
    report = store.verify(deep)
    for problem in report.problems:
        print(problem)
    if repair:
        for name in report.bad_shards:
            (folder / name).unlink(missing_ok=True)
    if not report.ok:
        remedy = "were deleted" if repair else "can be deleted with --repair"
        raise CorruptShardError(
            f"{folder}: {len(report.bad_shards)} shards are bad and {remedy}. "
            f"Run the extract stage to make them again."
        )
    print(f"{folder}: {len(store)} images in {store.num_shards} shards, all as they were written")


def main() -> None:
    """Read the command line and verify."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shallow", action="store_true", help="sizes and structure only")
    parser.add_argument("--repair", action="store_true", help="delete the shards that are bad")
    arguments = parser.parse_args()
    run_guarded(lambda: verify(arguments.folder, not arguments.shallow, arguments.repair))


if __name__ == "__main__":
    main()
