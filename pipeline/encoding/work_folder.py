"""Finished shards and probes in the work directory, each beside the sha256 of its bytes.

A file's name says what it must contain, and the hash beside it that its bytes are intact. The
hashes of the rows would not do: a shard damaged in its padding would be published under a new hash.
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
"""Files from DVC, until they are checked."""


def hash_path(path: Path) -> Path:
    """Return where the sha256 of a finished file is stored."""
    return path.with_suffix(".sha256")


def probe_path(spec: Spec) -> Path:
    """Return where the probe of an encoder is stored."""
    return SHARDS / f"probe-{spec.fingerprint[:16]}.safetensors"


def write_with_hash(path: Path, pieces: Sequence[bytes | memoryview], digest: str) -> None:
    """Write a file whole or not at all, with its hash beside it.

    Args:
        path: Where the file appears.
        pieces: Its content, in order.
        digest: The sha256 of `pieces`, computed before they are written, so that a file that
            reaches the disk with other bytes never counts as finished.
    """
    # The hash first: a finished file never lacks it.
    write_text(hash_path(path), digest)
    write_bytes(path, *pieces)


def delete_unfinished(folder: Path) -> None:
    """Delete the temporary files of killed writers; the caller holds the lock of the folder."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def verified_hash(path: Path) -> str | None:
    """Return the sha256 of a finished file; None if it is missing, or damaged, which is printed."""
    if not path.exists() or not hash_path(path).exists():
        return None
    digest = sha256_of(path)
    with path_in_errors(hash_path(path)):
        # Bytes, because a damaged file need not be text.
        expected = hash_path(path).read_bytes()
    if digest.encode() == expected:
        return digest
    print(f"extract: making {path} again: its bytes are not those that were written", flush=True)
    return None


def verified_hashes(plan: list[PlannedShard]) -> dict[str, str]:
    """Return the sha256 of each planned shard that is finished and intact, by file name."""
    # Threads, because hashing releases the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = threads.map(lambda shard: verified_hash(SHARDS / shard.name), plan)
        return {shard.name: digest for shard, digest in zip(plan, digests, strict=True) if digest}


def recover_shards(names: Collection[str], spec: Spec) -> None:
    """Recover shards, and the probe, of DVC's store if the same encoder made it."""
    # A killed run leaves files here; its shards are whole, its index may be of another store.
    for name in (INDEX_FILE, PROBE_FILE):
        (PULLED / name).unlink(missing_ok=True)
    recover({*names, INDEX_FILE, PROBE_FILE}, PULLED)
    # The shards cannot be checked without an index of this encoder.
    with contextlib.suppress(PatchcacheError):
        _accept_recovered(names, StoreIndex.read(PULLED / INDEX_FILE, spec), spec)
    shutil.rmtree(PULLED, ignore_errors=True)


def _accept_recovered(names: Collection[str], index: StoreIndex, spec: Spec) -> None:
    """Move recovered files whose sha256 is that of the index to the finished ones.

    A store with another probe than the one here is left out: its encoder was slightly different.
    """
    probe_sha256 = verified_hash(probe_path(spec))
    if probe_sha256 is not None and probe_sha256 != index.probe_sha256:
        return
    targets = {name: SHARDS / name for name in names} | {PROBE_FILE: probe_path(spec)}
    hashes = {file.name: file.sha256 for file in index.shards} | {PROBE_FILE: index.probe_sha256}
    for name, target in targets.items():
        pulled = PULLED / name
        digest = hashes.get(name)
        if digest and pulled.exists() and sha256_of(pulled) == digest:
            write_text(hash_path(target), digest)
            os.replace(pulled, target)
