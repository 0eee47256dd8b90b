"""How fast pictures become features: the tower alone, and from JPEGs to shards on all cores.

Random weights, which take as long as others. The pictures are those of `bench.extract`, stored in a
zip as COCO's are, and go through the engine of the extract stage.
"""

import os
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import xxhash

from bench.extract import jpeg
from bench.gpu_parts.report import Row
from cache.plan import plan_shards
from pipeline.encoding.batches import Job
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.engines import encode_job
from pipeline.images.archives import ImageArchive
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings
from workspace.data_settings import ImagePath

SHARD_ROWS = 1024
"""As in configs/coco.yaml."""

PICTURES = 64
"""How many image files differ."""


def tower_settings(model: str, precision: str, device: torch.device) -> EncoderSettings:
    """Return the settings of a tower with random weights."""
    return EncoderSettings(
        model=model,
        pretrained="random",
        layer=-2,
        precision=precision,  # type: ignore[arg-type]
        batch_size=64,
        device=str(device),
    )


def encode_pixels(settings: EncoderSettings, num_batches: int, batch: int) -> Row:
    """Encode decoded pictures; a GPU computes one batch while the one before is copied back."""
    encoder = load_encoder(settings)
    side = encoder.spec.image_size
    pixels_BSSC = torch.randint(0, 255, (batch, side, side, 3), dtype=torch.uint8)
    encoder.encode(pixels_BSSC)
    started = time.perf_counter()
    pending = encoder.submit(pixels_BSSC)
    for _ in range(num_batches - 1):
        following = encoder.submit(pixels_BSSC)
        encoder.result(pending)
        pending = following
    encoder.result(pending)
    seconds = time.perf_counter() - started
    return {"images_per_second": round(batch * num_batches / seconds, 1), "batch": batch}


def encode_files(settings: EncoderSettings, num_images: int) -> Row:
    """Make shards of JPEGs as the extract stage does, with a decoding process a core.

    The row names the phase that was busy for the largest share of the time: with all others faster,
    the work would take as long.
    """
    encoder = load_encoder(settings)
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_images(folder / "images.zip", num_images)
        spec = encoder.spec
        (folder / "shards").mkdir()
        job = Job(
            shards=plan_shards(source.image_ids, source.source_xxh3, spec.fingerprint, SHARD_ROWS),
            source=source,
            settings=settings,
            spec=spec,
            # Read by the encoders of a cluster alone.
            probe=folder / "probe",
            folder=folder / "shards",
            workers=workers,
            engine="local",
            max_failures=0,
        )
        started = time.perf_counter()
        stats = encode_job(job, encoder)
        stats.elapsed = time.perf_counter() - started
    shares = stats.busy_shares()
    return {
        "images_per_second": round(stats.images_encoded / stats.elapsed, 1),
        "workers": workers,
        "busy": {phase: round(share, 3) for phase, share in shares.items()},
        "limit": max(shares, key=shares.__getitem__),
    }


def make_images(path: Path, num_images: int) -> ImageSource:
    """Write a zip of JPEGs and return what the extract stage reads of it."""
    pictures = [jpeg(seed) for seed in range(min(PICTURES, num_images))]
    hashes = [xxhash.xxh3_64_intdigest(picture) for picture in pictures]
    names = [f"{number:012d}.jpg" for number in range(num_images)]
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, pictures[number % len(pictures)])
    return ImageSource(
        image_ids=np.arange(num_images, dtype=np.int64),
        source_xxh3=np.resize(np.array(hashes, np.uint64), num_images),
        file_names=names,
        splits=["train"] * num_images,
        archives={"train": ImageArchive([ImagePath(path=str(path))], key="data.train.images")},
    )
