"""Publishes a store to an fsspec URL, the index last: a reader never opens half a store.

Shards come first. They are named after their images, so that those of a former store and of the new
one stand side by side until the index is replaced; then the old ones are deleted. A file that must
take other bytes under a name of the former store (of another encoder the spec, of another machine
the probe or a shard) is sent after the former index has been deleted: meanwhile there is no store.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..errors import CacheError, CorruptShardError, IncompleteStoreError
from ..files.atomic import sha256_of
from ..files.scratch import ScratchFolder
from ..layout import StoreLayout
from ..spec import MAX_JSON_BYTES, SPEC_FILE, Spec
from ..store_index import INDEX_FILE, PROBE_FILE, SHARD_NAME, ShardFile, StoreIndex
from ..texts import human_size, without_passwords
from .claim import CLAIM_FILE, Claim
from .destination import PARTIAL, Destination
from .location import Location
from .origin import ORIGIN_FILE, origin_in

NUM_THREADS = 8
"""Files that are sent at a time."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Upload:
    """What an upload did; as a text, one line."""

    url: str
    num_images: int
    num_shards: int
    num_sent: int
    """Shards, and the probe, that the destination lacked."""
    bytes_sent: int
    num_deleted: int
    """Files of a former store."""

    def __str__(self) -> str:
        sent = f"{self.num_sent} files sent ({human_size(self.bytes_sent)})"
        deleted = f", {self.num_deleted} old files deleted" if self.num_deleted else ""
        url = without_passwords(self.url)
        return f"{url}: {self.num_images} images in {self.num_shards} shards, {sent}{deleted}"


@dataclass(frozen=True)
class PublishedStore:
    """The store that the destination holds."""

    spec: bytes | None = None
    index: bytes | None = None
    hashes: dict[str, str] | None = None
    """Name to sha256 of its shards and its probe; None if there is no index that can be read."""
    has_origin: bool = False
    """Whether its shards are read from elsewhere."""


def try_to_write(url: str) -> None:
    """Refuse a URL that a store cannot be published to, by writing a small file there.

    Raises:
        SettingsError: A URL of a kind that cannot be written.
        CacheError: Another process publishes a store there now.
        UnreachableStoreError: The server cannot be reached, or refuses.
    """
    with Claim(Destination(url)) as claim:
        # What an upload that was stopped has sent must not be forgotten.
        claim.is_complete = not claim.sent


def upload(root: str | Path, url: str) -> Upload:
    """Publish a store.

    What the destination has already is not sent again: a file whose sha256 its index has, or that
    of an upload which was stopped. Every other file is held against its sha256 before it is sent.

    Args:
        root: The store's folder.
        url: fsspec URL of the folder that becomes the store.

    Raises:
        SettingsError: A URL of a kind that cannot be written.
        CacheError: Another process writes there, or the folder is another program's.
        PatchcacheError: The store is not whole; the former store at the URL is then still there.
        UnreachableStoreError: The server cannot be reached, refuses, or does not take the files.
    """
    destination = Destination(url)
    layout, index = StoreLayout.open(root, partial=False)
    files = list(index.shards)
    if index.probe_sha256 is not None:
        size = layout.location.size(PROBE_FILE) or 0
        files.append(ShardFile(PROBE_FILE, size, index.probe_sha256))
    with Claim(destination, {file.name: file.sha256 for file in files}) as claim:
        sent = _replace(destination, claim, layout.location, files)
        num_deleted = _delete_others(destination, claim, {file.name for file in files})
        claim.is_complete = True
    return Upload(
        url=destination.url,
        num_images=len(index.image_ids),
        num_shards=len(index.shards),
        num_sent=len(sent),
        bytes_sent=sum(file.num_bytes for file in sent),
        num_deleted=num_deleted,
    )


def _replace(
    destination: Destination, claim: Claim, source: Location, files: list[ShardFile]
) -> list[ShardFile]:
    """Send the missing files, then the index; return the files that were sent."""
    spec = source.path(SPEC_FILE).read_bytes()
    index = source.path(INDEX_FILE).read_bytes()
    if _files_of(spec, index, str(source.root)) != {file.name: file.sha256 for file in files}:
        raise CacheError(
            f"{source.root}: another store was published there since this command began. Run it "
            f"again."
        )
    former = _read_former(destination)
    hashes = former.hashes or {}
    known, listed = hashes | claim.sent, destination.list()
    missing = [
        file
        for file in files
        if known.get(file.name) != file.sha256 or listed.get(file.name) != file.num_bytes
    ]
    changed = [f for f in missing if hashes.get(f.name, f.sha256) != f.sha256]
    added = [file for file in missing if file not in changed]

    def checked(file: ShardFile) -> Path:
        claim.check()
        path = source.path(file.name, file.num_bytes, file.sha256)
        if sha256_of(path) != file.sha256:
            raise CorruptShardError(
                f"{path}: its sha256 is not the one in {INDEX_FILE}. {source.remedy}"
            )
        return path

    def send(file: ShardFile) -> None:
        destination.put(file.name, checked(file))

    total = sum(file.num_bytes for file in missing)
    with tqdm(desc="push", total=total, unit="B", unit_scale=True, disable=None) as bar:

        def send_all(some: list[ShardFile]) -> None:
            for file in in_parallel(send, some):
                claim.sent[file.name] = file.sha256
                bar.update(file.num_bytes)

        send_all(added)
        is_readable = former.index is None or former.hashes is not None
        # All of them before the former index goes.
        for _ in in_parallel(checked, changed):
            pass
        if changed or former.spec not in (None, spec) or not is_readable:
            claim.confirm()
            destination.delete(INDEX_FILE)
        send_all(changed)
    claim.confirm()
    if former.spec != spec:
        destination.put(SPEC_FILE, spec)
    _check_listed(destination, files)
    claim.confirm()
    if former.has_origin:
        destination.delete(INDEX_FILE)
        destination.delete(ORIGIN_FILE)
    destination.put(INDEX_FILE, index)
    if destination.read(INDEX_FILE) != index:
        raise CacheError(
            f"{destination.url}/{INDEX_FILE}: is not the one that was just written: another "
            f"program writes there. Stop it, and run the same command again."
        )
    claim.confirm()
    return missing


def _read_former(destination: Destination) -> PublishedStore:
    """Read spec, index and origin of the destination.

    Raises:
        CacheError: There is an index without a spec, which is another program's, or an origin that
            is another program's in a local folder, where it would be read.
    """
    spec, index = destination.read(SPEC_FILE), destination.read(INDEX_FILE)
    origin = destination.read(ORIGIN_FILE, MAX_JSON_BYTES)
    has_origin = origin is not None and origin_in(origin) is not None
    if origin is not None and not has_origin and destination.is_local:
        raise CacheError(
            f"{destination.url}/{ORIGIN_FILE}: is no part of a store. Publish to another folder, "
            f"or delete it."
        )
    if index is None:
        return PublishedStore(spec, has_origin=has_origin)
    if spec is None:
        raise CacheError(
            f"{destination.url}: holds an {INDEX_FILE} and no {SPEC_FILE}, so that is no part of a "
            f"store. Publish to another folder, or delete it."
        )
    try:
        hashes = _files_of(spec, index, destination.url)
    except CacheError:
        # Damaged, or of another version of the format: it is replaced.
        hashes = None
    return PublishedStore(spec, index, hashes, has_origin)


def _files_of(spec: bytes, index: bytes, where: str) -> dict[str, str]:
    """Return the sha256 of each shard and of the probe by name, as an index has them.

    Raises:
        CacheError: Spec or index are damaged.
    """
    with ScratchFolder() as folder:
        path = folder / INDEX_FILE
        path.write_bytes(index)
        read = StoreIndex.read(path, Spec.from_json(spec, where))
    probe = {} if read.probe_sha256 is None else {PROBE_FILE: read.probe_sha256}
    return {file.name: file.sha256 for file in read.shards} | probe


def _check_listed(destination: Destination, files: list[ShardFile]) -> None:
    """Refuse to write an index that names a file which is not there."""
    listed = destination.list()
    absent = [file.name for file in files if listed.get(file.name) != file.num_bytes]
    if absent:
        raise IncompleteStoreError(
            f"{destination.url}: files that were sent and are not there, or of another size: "
            f"{len(absent)}, the first: {absent[0]}. Another program changes files there. Run the "
            f"same command again."
        )


def _delete_others(destination: Destination, claim: Claim, names: set[str]) -> int:
    """Delete the shards and the probe of a former store, and unfinished files; return how many.

    The index in place names none of them. Files whose names no store has are somebody's own.
    """
    others = [name for name in destination.list() if _is_of_store(name) and name not in names]

    def delete(name: str) -> None:
        claim.check()
        destination.delete(name)

    return len(list(in_parallel(delete, others)))


def _is_of_store(name: str) -> bool:
    unfinished = PARTIAL.fullmatch(name)
    name = unfinished[1] if unfinished else name
    always = unfinished and name in (SPEC_FILE, INDEX_FILE, CLAIM_FILE)
    return bool(always or SHARD_NAME.fullmatch(name) or name == PROBE_FILE)


def in_parallel(action: Callable[[Item], object], items: Sequence[Item]) -> Iterator[Item]:
    """Run an action on each item in threads; yield the items that are done.

    After an error no further item is begun, and the error is raised when the others are done. An
    interrupt does not wait for them: the threads end with the process.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    done: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    errors: list[BaseException] = []
    stopped = threading.Event()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stopped.is_set():
                item = todo.get_nowait()
                try:
                    action(item)
                except BaseException as error:
                    errors.append(error)
                    stopped.set()
                else:
                    done.put(item)
        done.put(None)

    working = min(NUM_THREADS, len(items))
    for _ in range(working):
        threading.Thread(target=work, daemon=True).start()
    try:
        while working:
            if (finished := done.get()) is None:
                working -= 1
            else:
                yield finished
    finally:
        stopped.set()
    if errors:
        raise errors[0]
