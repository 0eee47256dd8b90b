"""Decodes images in worker processes ahead of the encoder, and writes shards behind it.

The three run at the same time: worker processes decode whole batches, this thread encodes them,
one more thread hashes and writes the shard before. At most two shards are in memory.

Letters: B images of a batch, S side of the input in pixels, P patches, D width of the tower.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cache.errors import StageError
from cache.files import sha256_of, write_text
from cache.images import ImageArchive, ImageNameError
from cache.plan import PlannedShard
from cache.shard import write_shard
from pipeline.decode import DecodeError, Resize, decode_rgb
from pipeline.encoder import Encoder

PREFETCH_BATCHES = 2
"""Decoded batches that wait for the encoder, per worker process."""


@dataclass(frozen=True)
class ImageSource:
    """The indexed images and where their bytes are; arrays and lists have one entry an image."""

    image_ids: NDArray[np.int64]
    """Ascending."""
    source_xxh3: NDArray[np.uint64]
    file_names: list[str]
    splits: list[str]
    archives: dict[str, ImageArchive]
    """Split to its images."""

    def read(self, image_id: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            StageError: The file is gone, or is not the one that was indexed.
        """
        position = int(np.searchsorted(self.image_ids, image_id))
        archive, name = self.archives[self.splits[position]], self.file_names[position]
        try:
            data = archive.read(name)
        except ImageNameError as error:
            raise StageError(f"{archive.path}: {error}. Run the index stage again.") from None
        if xxhash.xxh3_64_intdigest(data) != self.source_xxh3[position]:
            raise StageError(
                f"{archive.path}: {name} is not the file that was indexed. "
                f"Run the index stage again."
            )
        return data


@dataclass
class Encoding:
    """What became of one run: counts, failures and where the time went."""

    failures: dict[int, str] = field(default_factory=dict)
    """Image id to the reason why it could not be decoded."""
    encoded_shards: set[str] = field(default_factory=set)
    """File names. One that a later failure displaced is among them, but not in the last plan."""
    images_encoded: int = 0
    elapsed: float = 0.0
    """Seconds on the wall."""
    decode_seconds: float = 0.0
    """Summed over the worker processes, so it can exceed `elapsed`."""
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    """Hashing and writing, in its own thread."""


@dataclass(frozen=True)
class DecodedBatch:
    """Some images of one shard, on their way from a worker process to the encoder."""

    shard_number: int
    start: int
    """Row of the first image in its shard."""
    pixels_BSSC: Tensor
    """uint8; images that failed are left out."""
    failures: dict[int, str]
    error: str
    """Why the whole run must stop, or empty."""
    seconds: float


class BatchDecoder(Dataset[DecodedBatch]):
    """Decodes the n-th batch of some shards; a batch never crosses a shard."""

    def __init__(self, shards: list[PlannedShard], source: ImageSource, encoder: Encoder) -> None:
        spec = encoder.spec
        self._source, self._side, self._resize = source, spec.image_size, cast(Resize, spec.resize)
        self._batches = [
            (number, start, shard.image_ids[start : start + spec.batch_size])
            for number, shard in enumerate(shards)
            for start in range(0, len(shard.image_ids), spec.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> DecodedBatch:
        started = time.perf_counter()
        shard_number, start, image_ids = self._batches[index]
        pixels: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        error = ""
        try:
            for image_id in image_ids.tolist():
                data = self._source.read(image_id)
                try:
                    pixels.append(decode_rgb(data, self._side, self._resize))
                except DecodeError as reason:
                    failures[image_id] = str(reason)
        except StageError as reason:
            # Sent as a value: an exception would arrive wrapped in the worker's traceback.
            error = str(reason)
        stacked = np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)
        seconds = time.perf_counter() - started
        return DecodedBatch(
            shard_number, start, torch.from_numpy(stacked), failures, error, seconds
        )


def encode_shards(
    shards: list[PlannedShard],
    source: ImageSource,
    encoder: Encoder,
    folder: Path,
    *,
    workers: int,
    max_failures: int,
    totals: Encoding,
) -> None:
    """Encode some shards into a folder.

    A shard with an image that does not decode is not written: without that image it is another
    shard. Its images are still decoded, so that one pass finds all failures.

    Args:
        shards: What to encode.
        source: Where the images are.
        encoder: The vision tower.
        folder: Each shard appears in it under its own name, whole, as soon as it is done.
        workers: Decoding processes; 0 decodes here.
        max_failures: More failed images than this stop the run.
        totals: Added to.

    Raises:
        StageError: Too many failures, images that are not the indexed ones, or a worker that died.
    """
    started = time.perf_counter()
    shape = (encoder.spec.patches, encoder.spec.width)
    broken: set[int] = set()
    features_NPD = np.empty((0, *shape), np.float16)
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for batch in _decoded(shards, source, encoder, workers):
            totals.decode_seconds += batch.seconds
            _check_batch(batch, totals, max_failures, len(source.image_ids))
            shard = shards[batch.shard_number]
            if batch.failures:
                broken.add(batch.shard_number)
            if batch.shard_number in broken:
                continue
            if batch.start == 0:
                features_NPD = np.empty((len(shard.image_ids), *shape), np.float16)
            stop = batch.start + len(batch.pixels_BSSC)
            features_NPD[batch.start : stop] = _timed_encode(encoder, batch.pixels_BSSC, totals)
            if stop == len(shard.image_ids):
                if written:
                    written.result()
                written = writer.submit(_write, folder, shard, encoder, features_NPD, totals)
        if written:
            written.result()
    totals.elapsed += time.perf_counter() - started


def _decoded(
    shards: list[PlannedShard], source: ImageSource, encoder: Encoder, workers: int
) -> Iterator[DecodedBatch]:
    loader = DataLoader(
        BatchDecoder(shards, source, encoder),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=encoder.device.type == "cuda",
    )
    num_images = sum(len(shard.image_ids) for shard in shards)
    with tqdm(total=num_images, desc="extract", unit="image", disable=None) as bar:
        try:
            for batch in loader:
                yield batch
                bar.update(len(batch.pixels_BSSC) + len(batch.failures))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise StageError(
                f"extract: a decoding process died ({str(error).splitlines()[0]}). Finished "
                f"shards are kept; lower extract.workers if memory ran out, and run again."
            ) from None


def _check_batch(batch: DecodedBatch, totals: Encoding, max_failures: int, num_images: int) -> None:
    if batch.error:
        raise StageError(batch.error)
    totals.failures.update(batch.failures)
    if len(totals.failures) > max_failures:
        examples = [f"image {id_}: {why}" for id_, why in list(totals.failures.items())[:3]]
        raise StageError(
            f"extract: {len(totals.failures)} images failed to decode so far, at most "
            f"{max_failures} of {num_images} may (extract.max_failure_rate): "
            f"{'; '.join(examples)}. Mend or remove them, run index and extract again."
        )


def _timed_encode(encoder: Encoder, pixels_BSSC: Tensor, totals: Encoding) -> NDArray[np.float16]:
    started = time.perf_counter()
    features_BPD = encoder.encode(pixels_BSSC)
    totals.encode_seconds += time.perf_counter() - started
    return features_BPD


def hash_file(folder: Path, shard: PlannedShard) -> Path:
    """Return where the sha256 of a finished shard is kept, beside it."""
    return folder / f"{shard.key}.sha256"


def _write(
    folder: Path,
    shard: PlannedShard,
    encoder: Encoder,
    features_NPD: NDArray[np.float16],
    totals: Encoding,
) -> None:
    started = time.perf_counter()
    fresh = folder / f".{shard.name}.new"
    write_shard(fresh, encoder.spec, shard.image_ids, features_NPD)
    # Before the shard has its name, so that a shard without its hash is never there.
    write_text(hash_file(folder, shard), sha256_of(fresh))
    os.replace(fresh, folder / shard.name)
    totals.encoded_shards.add(shard.name)
    totals.images_encoded += len(shard.image_ids)
    totals.write_seconds += time.perf_counter() - started
