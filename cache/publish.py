"""Makes a store of finished shards: links them into a folder, and writes the index last.

Published files are replaced by rename, never written into, so that the mappings of readers stay
valid. A reader can miss a deleted shard that it has not mapped yet.
"""

from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np

from .files.atomic import link_or_copy, sha256_of, write_bytes
from .plan import PlannedShard
from .remote.location import Location
from .remote.origin import ORIGIN_FILE, origin_json
from .shard import open_shard
from .spec import SPEC_FILE, Spec
from .store_index import INDEX_FILE, PROBE_FILE, SHARD_NAME, ShardFile, StoreIndex


def publish(
    root: Path,
    plan: list[PlannedShard],
    finished: Path,
    spec: Spec,
    hashes: Mapping[str, str],
    probe: Path | None = None,
) -> None:
    """Publish a store, and delete files of its former content.

    Args:
        root: The store's folder.
        plan: Its shards, in order of image id.
        finished: Folder that holds a valid file of each shard.
        spec: Of the features.
        hashes: The sha256 of each shard file, by name.
        probe: File with the encoder's probe, which becomes a part of the store.
    """
    root.mkdir(parents=True, exist_ok=True)
    for shard in plan:
        link_or_copy(finished / shard.name, root / shard.name)
    if probe:
        link_or_copy(probe, root / PROBE_FILE)
    index = _make_index(root, plan, spec, hashes, sha256_of(probe) if probe else None)
    (root / ORIGIN_FILE).unlink(missing_ok=True)
    write_bytes(root / SPEC_FILE, spec.to_json())
    index.write(root / INDEX_FILE)
    _delete_others(root, {shard.name for shard in plan} | ({PROBE_FILE} if probe else set()))


def publish_copy(root: Path, source: Location, index: StoreIndex) -> None:
    """Publish the files of another store as they are, and delete files of the former content.

    Args:
        root: The store's folder.
        source: The other store, which has been checked.
        index: Its index.
    """
    probe = {} if index.probe_sha256 is None else {PROBE_FILE: index.probe_sha256}
    for file in index.shards:
        link_or_copy(source.shard_path(file), root / file.name)
    (root / ORIGIN_FILE).unlink(missing_ok=True)
    for name in (*probe, SPEC_FILE, INDEX_FILE):
        link_or_copy(source.path(name, sha256=probe.get(name)), root / name)
    _delete_others(root, {file.name for file in index.shards} | probe.keys())


def publish_origin(root: Path, source: Location, index: StoreIndex) -> None:
    """Publish a store whose shards stay where they are, and delete files of the former content.

    Args:
        root: The store's folder.
        source: The other store, at a URL; its spec and index have been checked.
        index: Its index.

    Raises:
        SettingsError: A URL of a kind that shards are not read from in this way.
    """
    origin = origin_json(source.root)
    probe = {} if index.probe_sha256 is None else {PROBE_FILE: index.probe_sha256}
    # The former index names shards that are not at the URL.
    (root / INDEX_FILE).unlink(missing_ok=True)
    write_bytes(root / ORIGIN_FILE, origin)
    for name in (*probe, SPEC_FILE, INDEX_FILE):
        link_or_copy(source.path(name, sha256=probe.get(name)), root / name)
    _delete_others(root, probe.keys())


def _delete_others(root: Path, names: Set[str]) -> None:
    """Delete the shards, the probe and the unfinished files of a folder that have other names.

    Files whose names no store has are somebody's own.
    """
    for path in [*root.glob("*.h5"), *root.glob(PROBE_FILE), *root.glob(".*.partial")]:
        name = path.name.removeprefix(".").removesuffix(".partial")
        is_of_store = SHARD_NAME.fullmatch(name) or name in (PROBE_FILE, SPEC_FILE, INDEX_FILE)
        if is_of_store and path.name not in names:
            path.unlink()


def _make_index(
    root: Path,
    plan: list[PlannedShard],
    spec: Spec,
    hashes: Mapping[str, str],
    probe_sha256: str | None,
) -> StoreIndex:
    """Read the published shards back and build their index."""
    shards = [open_shard(root / planned.name, spec) for planned in plan]
    files = [ShardFile(s.path.name, s.path.stat().st_size, hashes[s.path.name]) for s in shards]
    by_name = sorted(files, key=lambda file: file.name)
    numbers = {file.name: number for number, file in enumerate(by_name)}
    num_rows = [len(shard.image_ids) for shard in shards]
    return StoreIndex(
        fingerprint=spec.fingerprint,
        shards=tuple(by_name),
        image_ids=np.concatenate([shard.image_ids for shard in shards]),
        shard_number=np.repeat([numbers[file.name] for file in files], num_rows).astype(np.int32),
        row=np.concatenate([np.arange(count, dtype=np.int32) for count in num_rows]),
        row_xxh3=np.concatenate([shard.row_xxh3 for shard in shards]),
        source_xxh3=np.concatenate([planned.source_xxh3 for planned in plan]),
        probe_sha256=probe_sha256,
    )
