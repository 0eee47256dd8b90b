"""Stage extract: runs the vision tower once over the indexed images and publishes a store.

Each shard is encoded into the work directory and kept there under a name that says what is in
it, so that a killed run goes on where it was and a changed image costs one shard. The finished
shards are then linked into `data/features/`, the index last.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.command import run_stage
from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.files import WORK, sha256_of, write_json
from cache.images import ImageArchive
from cache.plan import PlannedShard, plan_shards
from cache.publish import publish
from cache.settings import Params
from cache.spec import Spec
from pipeline.encode import Encoding, ImageSource, encode_shards, hash_file
from pipeline.encoder import Encoder, load_encoder
from pipeline.settings import EncoderSettings, ExtractSettings

IMAGES = Path("data/index/images.parquet")
COLUMNS = ("image_id", "split", "file_name", "source_xxh3")
FEATURES = Path("data/features")
REPORT = Path("reports/extract.json")
FINISHED = WORK / "shards"
"""Every shard ever encoded here, under its name; of any encoder and any set of images."""


def extract(params: Params) -> None:
    """Make the store that the settings and the index describe."""
    data = params.section("data", DataSettings)
    settings = params.section("extract", ExtractSettings)
    encoder_settings = params.section("encoder", EncoderSettings)
    source = read_source(data)
    encoder = load_encoder(encoder_settings)
    totals = Encoding()
    plan = make_shards(source, encoder, settings, totals)
    publish(FEATURES, plan, FINISHED, encoder.spec)
    write_report(plan, encoder.spec, totals)


def read_source(data: DataSettings) -> ImageSource:
    """Read the index, and open the images that it speaks of.

    Raises:
        StageError: No index, an empty one, or no images where the settings say.
    """
    try:
        table = pq.read_table(IMAGES, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{IMAGES}: {error}. Run the index stage first.") from None
    if not table.num_rows:
        raise StageError(f"{IMAGES}: holds no image. Check the section data and run index.")
    splits = table["split"].to_pylist()
    paths = {"train": data.train.images, "val": data.val.images}
    return ImageSource(
        image_ids=table["image_id"].to_numpy(),
        source_xxh3=table["source_xxh3"].to_numpy(),
        file_names=table["file_name"].to_pylist(),
        splits=splits,
        archives={
            split: ImageArchive(paths[split], key=f"data.{split}.images")
            for split in sorted(set(splits))
        },
    )


def check_space(missing: list[PlannedShard], spec: Spec) -> None:
    """Say how much is to be made, and refuse to start where it cannot fit.

    Raises:
        StageError: The file system has less free space than the features need.
    """
    num_images = sum(len(shard.image_ids) for shard in missing)
    needed = num_images * spec.patches * spec.width * 2
    free = shutil.disk_usage(FINISHED).free
    print(f"extract: {num_images} images to encode, {needed / 2**20:.0f} MiB", flush=True)
    if needed > free:
        raise StageError(
            f"{FINISHED}: the features need {needed / 2**30:.1f} GiB more, "
            f"{free / 2**30:.1f} are free. Make room and run the same command again."
        )


def make_shards(
    source: ImageSource, encoder: Encoder, settings: ExtractSettings, totals: Encoding
) -> list[PlannedShard]:
    """Encode whatever the work directory lacks.

    An image that does not decode leaves the set of images, which changes the shards around it;
    so the plan is made again without it until every planned shard is there.

    Returns:
        The plan; a valid file of each of its shards lies in the work directory.

    Raises:
        StageError: More images failed than the settings allow.
    """
    FINISHED.mkdir(parents=True, exist_ok=True)
    while True:
        kept = ~np.isin(source.image_ids, list(totals.failures))
        plan = plan_shards(
            source.image_ids[kept],
            source.source_xxh3[kept],
            encoder.spec.fingerprint,
            settings.shard_rows,
        )
        missing = [shard for shard in plan if not is_finished(shard)]
        if not missing:
            break
        check_space(missing, encoder.spec)
        encode_shards(
            missing,
            source,
            encoder,
            FINISHED,
            workers=settings.workers,
            max_failures=int(settings.max_failure_rate * len(source.image_ids)),
            totals=totals,
        )
    if not plan:
        raise StageError(f"{IMAGES}: none of its {len(kept)} images could be decoded.")
    return plan


def is_finished(planned: PlannedShard) -> bool:
    """Tell whether the work directory has this shard, with the bytes that were written."""
    path, hashed = FINISHED / planned.name, hash_file(FINISHED, planned)
    if not path.exists() or not hashed.exists():
        return False
    if sha256_of(path) == hashed.read_text():
        return True
    print(f"extract: encoding {path} again: its bytes are not those that were written")
    return False


def write_report(plan: list[PlannedShard], spec: Spec, totals: Encoding) -> None:
    """Write what the run did, and say it in a line."""
    images = sum(len(shard.image_ids) for shard in plan)
    encoded = len(totals.encoded_shards & {shard.name for shard in plan})
    rate = totals.images_encoded / totals.elapsed if totals.elapsed else 0.0
    report = {
        "images": images,
        "failed": len(totals.failures),
        "failures": {str(image_id): reason for image_id, reason in totals.failures.items()},
        "shards": len(plan),
        "shards_encoded": encoded,
        "shards_reused": len(plan) - encoded,
        "images_per_second": round(rate, 2),
        "seconds": {
            "decode": round(totals.decode_seconds, 3),
            "encode": round(totals.encode_seconds, 3),
            "write": round(totals.write_seconds, 3),
        },
        "fingerprint": spec.fingerprint,
    }
    write_json(REPORT, report)
    print(
        f"extract: {images} images in {len(plan)} shards, {encoded} encoded now "
        f"({rate:.0f} images/s), {len(totals.failures)} failed"
    )


if __name__ == "__main__":
    run_stage(extract, __doc__)
