"""Makes a store out of finished shards: links them into a folder, writes the index last.

Published files are replaced by rename, never written into, so that what a reader has mapped stays
as it is. A shard that it has not mapped yet may be gone.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .files.atomic import link_or_copy, sha256_of, write_bytes
from .plan import PlannedShard
from .shard import open_shard
from .spec import Spec
from .store_index import INDEX_FILE, PROBE_FILE, ShardFile, StoreIndex


def publish(
    root: Path,
    plan: list[PlannedShard],
    finished: Path,
    spec: Spec,
    hashes: Mapping[str, str],
    probe: Path | None = None,
) -> None:
    """Publish a store, and drop the files that it had before and has no more.

    Args:
        root: The store's folder.
        plan: Its shards, in order of image id.
        finished: The folder in which a valid file of each of them lies.
        spec: Of the features.
        hashes: The sha256 of each of these files, by name.
        probe: A file with the encoder's probe, which becomes a part of the store.
    """
    root.mkdir(parents=True, exist_ok=True)
    for shard in plan:
        link_or_copy(finished / shard.name, root / shard.name)
    if probe:
        link_or_copy(probe, root / PROBE_FILE)
    table = _describe(root, plan, spec, hashes, sha256_of(probe) if probe else None)
    write_bytes(root / "spec.json", spec.to_json())
    table.write(root / INDEX_FILE)
    names = {shard.name for shard in plan} | ({PROBE_FILE} if probe else set())
    for path in [*root.glob("*.h5"), *root.glob(PROBE_FILE), *root.glob(".*.partial")]:
        if path.name not in names:
            path.unlink()


def _describe(
    root: Path,
    plan: list[PlannedShard],
    spec: Spec,
    hashes: Mapping[str, str],
    probe_sha256: str | None,
) -> StoreIndex:
    """Read the published shards back and make the index of them."""
    shards = [open_shard(root / planned.name, spec) for planned in plan]
    files = [ShardFile(s.path.name, s.path.stat().st_size, hashes[s.path.name]) for s in shards]
    by_name = sorted(files, key=lambda file: file.name)
    numbers = {file.name: number for number, file in enumerate(by_name)}
    sizes = [len(shard.image_ids) for shard in shards]
    return StoreIndex(
        fingerprint=spec.fingerprint,
        shards=tuple(by_name),
        image_ids=np.concatenate([shard.image_ids for shard in shards]),
        shard_number=np.repeat([numbers[file.name] for file in files], sizes).astype(np.int32),
        row=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        row_xxh3=np.concatenate([shard.row_xxh3 for shard in shards]),
        source_xxh3=np.concatenate([planned.source_xxh3 for planned in plan]),
        probe_sha256=probe_sha256,
    )
