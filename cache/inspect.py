"""Command: shows what is in a store, on one screen."""

from .cli.command import command_parser, run_guarded
from .store import FeatureStore
from .texts import first_few, human_size


def inspect(root: str) -> None:
    """Print spec, counts and sizes of a store, and the names of its missing shards.

    Args:
        root: Folder or fsspec URL.

    Raises:
        PatchcacheError: Not a store.
    """
    store = FeatureStore(root, partial=True)
    missing = store.missing_shards
    here = store.num_shards - len(missing)
    print(f"{root}: {len(store)} images in {here} shards, {human_size(store.num_bytes)}")
    if missing:
        names = first_few(missing, 3)
        print(f"not here     {len(missing)} of {store.num_shards} shards: {names}")
    if len(store):
        print(f"image ids    {store.image_ids[0]} to {store.image_ids[-1]}")
    print(f"features     float16 [{store.spec.patches}, {store.spec.width}] an image")
    print(f"fingerprint  {store.fingerprint}")
    for name, value in store.spec.fields().items():
        # As `repr` spells it: a text from another machine can hold codes that steer a terminal.
        print(f"  {name:<20} {value!r}")


def main() -> None:
    """Read the command line and inspect."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    arguments = parser.parse_args()
    run_guarded(lambda: inspect(arguments.root))


if __name__ == "__main__":
    main()
