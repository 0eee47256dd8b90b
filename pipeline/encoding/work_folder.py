"""What was finished in the work directory: files that stand beside the sha256 of their bytes.

A name says what must be in a file, and the hash beside it that this is still so. Hashes of rows
alone would not do: a shard damaged in its padding would be published under a new hash.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import PatchcacheError
from cache.files.atomic import path_in_errors, sha256_of, write_bytes, write_text
from cache.plan import PlannedShard
from cache.spec import Spec
from cache.store_index import INDEX_FILE, PROBE_FILE, StoreIndex
from pipeline.encoding.recover import recover
from workspace.paths import SHARDS, WORK

PULLED = WORK / "pulled"
"""Where files from DVC wait until they are checked."""


def hash_file(path: Path) -> Path:
    """Return where the sha256 of a finished file is kept."""
    return path.with_suffix(".sha256")


def probe_file(spec: Spec) -> Path:
    """Return where the probe of an encoder is kept."""
    return SHARDS / f"probe-{spec.fingerprint[:16]}.safetensors"


def finish(path: Path, pieces: Sequence[bytes | memoryview], digest: str) -> None:
    """Write a finished file, whole or not at all, and its hash.

    Args:
        path: Of the file.
        pieces: Its content, one behind the other.
        digest: Their sha256, taken before they are written: whatever becomes of them on the disk,
            a file with other bytes is never taken for finished.
    """
    # The hash first, so that a finished file without it is never there.
    write_text(hash_file(path), digest)
    write_bytes(path, *pieces)


def checked_hash(path: Path) -> str | None:
    """Return the sha256 of a finished file; None if it is not there, or damaged, which is said."""
    if not path.exists() or not hash_file(path).exists():
        return None
    digest = sha256_of(path)
    with path_in_errors(hash_file(path)):
        # As bytes: what is damaged need not be text.
        stated = hash_file(path).read_bytes()
    if digest.encode() == stated:
        return digest
    print(f"extract: making {path} again: its bytes are not those that were written", flush=True)
    return None


def checked_hashes(plan: list[PlannedShard]) -> dict[str, str]:
    """Return the sha256 of each planned shard that is finished and whole, by file name."""
    # Side by side: hashing leaves the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda shard: checked_hash(SHARDS / shard.name), plan)
        return {shard.name: digest for shard, digest in zip(plan, found, strict=True) if digest}


def recover_finished(names: Collection[str], spec: Spec) -> None:
    """Take over shards, and the probe, of the store that DVC has, if it is of this encoder."""
    # A run that was killed leaves whole shards here, and an index that may be of another store.
    for name in (INDEX_FILE, PROBE_FILE):
        (PULLED / name).unlink(missing_ok=True)
    recover({*names, INDEX_FILE, PROBE_FILE}, PULLED)
    # Without an index, or with one of another encoder, nothing can be said about the shards.
    with contextlib.suppress(PatchcacheError):
        _take_over(names, StoreIndex.read(PULLED / INDEX_FILE, spec), spec)
    shutil.rmtree(PULLED, ignore_errors=True)


def _take_over(names: Collection[str], table: StoreIndex, spec: Spec) -> None:
    """Finish what was pulled and is what an index says.

    Nothing of a store with another probe than the one here: its encoder was not quite this one.
    """
    kept = checked_hash(probe_file(spec))
    if kept is not None and kept != table.probe_sha256:
        return
    places = {name: SHARDS / name for name in names} | {PROBE_FILE: probe_file(spec)}
    hashes = {file.name: file.sha256 for file in table.shards} | {PROBE_FILE: table.probe_sha256}
    for name, place in places.items():
        pulled = PULLED / name
        digest = hashes.get(name)
        if digest and pulled.exists() and sha256_of(pulled) == digest:
            write_text(hash_file(place), digest)
            os.replace(pulled, place)
