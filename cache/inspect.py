"""Command: says what is in a store, on one screen.

python -m cache.inspect data/features
"""

import dataclasses

from .cli.command import command_parser, run_guarded
from .store import FeatureStore
from .texts import first_few, human_size


def inspect(root: str) -> None:
    """Print spec, counts and sizes of a store, and which of its shards are not there.

    Args:
        root: Folder or fsspec URL.

    Raises:
        PatchcacheError: Not a store.
    """
    store = FeatureStore(root, partial=True)
    image_ids = store.image_ids
    here = store.num_shards - len(store.missing_shards)
    print(f"{root}: {len(store)} images in {here} shards, {human_size(store.num_bytes)}")
    if store.missing_shards:
        names = first_few(store.missing_shards, 3)
        print(f"not here     {len(store.missing_shards)} of {store.num_shards} shards: {names}")
    if len(store):
        print(f"image ids    {image_ids[0]} to {image_ids[-1]}")
    print(f"features     float16 [{store.spec.patches}, {store.spec.width}] an image")
    print(f"fingerprint  {store.fingerprint}")
    for name, value in dataclasses.asdict(store.spec).items():
        # As Python spells it: a text of another's can hold what steers a terminal.
        print(f"  {name:<20} {value!r}")


def main() -> None:
    """Read the command line and inspect."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    arguments = parser.parse_args()
    run_guarded(lambda: inspect(arguments.root))


if __name__ == "__main__":
    main()
