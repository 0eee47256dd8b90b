"""Stage extract: runs the vision tower once over the indexed images and publishes a store.

Each shard is encoded into the work directory and kept there under a name that says what is in
it, so that a killed run goes on where it was and a changed image costs one shard. The finished
shards are then linked into `data/features/`, the index last. Where all of them are there already,
nothing loads the tower, and no image is opened.
"""

import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache.files.atomic import sha256_of_pieces, write_json
from cache.files.parquet import read_columns, values_of
from cache.plan import PlannedShard, plan_shards
from cache.publish import publish
from cache.spec import Spec
from cache.texts import human_size
from pipeline.encoding.lazy_encoder import Tower
from pipeline.encoding.stats import Tally
from pipeline.encoding.work_folder import (
    checked_hash,
    checked_hashes,
    finish,
    probe_file,
    recover_finished,
)
from pipeline.images.names import ImageArchive
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings, ExtractSettings
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.locks import folder_lock
from workspace.paths import FEATURES, IMAGES, REPORTS, SHARDS
from workspace.settings import Params
from workspace.stage import run_stage

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("split", pa.string()),
        ("file_name", pa.string()),
        ("source_xxh3", pa.uint64()),
    ]
)
"""What is read of the table of images."""
REPORT = REPORTS / "extract.json"


def extract(params: Params) -> None:
    """Make the store that the settings and the index describe."""
    data = params.section("data", DataSettings)
    settings = params.section("extract", ExtractSettings)
    tower = Tower(params.section("encoder", EncoderSettings))
    source = read_source()
    tally = Tally()
    with folder_lock(SHARDS):
        plan, hashes = make_shards(source, data, tower, settings, tally)
        publish(FEATURES, plan, SHARDS, tower.spec, hashes, probe_file(tower.spec))
    write_report(plan, tower.spec, tally, settings)


def read_source() -> ImageSource:
    """Read the index; the images that it speaks of are not looked for yet.

    Raises:
        StageError: No index, or an empty one.
    """
    table = read_columns(
        IMAGES,
        SCHEMA,
        lambda detail: StageError(f"{IMAGES}: {detail}. Run the index stage first."),
    )
    if not table.num_rows:
        raise StageError(f"{IMAGES}: holds no image. Check the section data and run index.")
    return ImageSource(
        image_ids=values_of(table["image_id"]),
        source_xxh3=values_of(table["source_xxh3"]),
        file_names=table["file_name"].to_pylist(),
        splits=table["split"].to_pylist(),
        archives={},
    )


def open_images(source: ImageSource, data: DataSettings) -> ImageSource:
    """Open the images where the settings say.

    Raises:
        StageError: There are none.
    """
    paths = {"train": data.train.images, "val": data.val.images}
    if unknown := set(source.splits) - paths.keys():
        raise StageError(f"{IMAGES}: unknown splits {sorted(unknown)}. Run the index stage again.")
    archives = {
        split: ImageArchive(
            paths[split], key=f"data.{split}.images", follow_links=data.follow_links
        )
        for split in sorted(set(source.splits))
    }
    return dataclasses.replace(source, archives=archives)


def make_shards(
    source: ImageSource,
    data: DataSettings,
    tower: Tower,
    settings: ExtractSettings,
    tally: Tally,
) -> tuple[list[PlannedShard], dict[str, str]]:
    """Encode whatever the work directory lacks.

    An image that does not decode leaves the set of images, which changes the shards around it;
    so the plan is made again without it until every planned shard is there.

    Returns:
        The plan, and the sha256 of each of its shards by file name; all lie in the work directory.

    Raises:
        StageError: More images failed than the settings allow, or the tower is not what it was.
    """
    hashes: dict[str, str] = {}
    while True:
        kept = ~np.isin(source.image_ids, list(tally.failures))
        plan = plan_shards(
            source.image_ids[kept],
            source.source_xxh3[kept],
            tower.spec.fingerprint,
            settings.shard_rows,
        )
        missing = look_for(plan, hashes, tower.spec)
        prepare_probe(tower, must_check=bool(missing))
        if not missing:
            break
        check_space(missing, plan, tower.spec)
        encode(missing, open_images(source, data), tower, settings, tally)
        hashes |= tally.encoded_shards
    if not plan:
        raise StageError(f"{IMAGES}: none of its {len(kept)} images could be decoded.")
    return plan, hashes


def look_for(plan: list[PlannedShard], hashes: dict[str, str], spec: Spec) -> list[PlannedShard]:
    """Look for planned shards in the work directory, and in what DVC has.

    Args:
        plan: What there must be.
        hashes: Of the shards that are known to be there; what is found is added.
        spec: Of the features.

    Returns:
        The shards that are nowhere.
    """
    hashes |= checked_hashes([shard for shard in plan if shard.name not in hashes])
    missing = [shard for shard in plan if shard.name not in hashes]
    if missing:
        recover_finished({shard.name for shard in missing}, spec)
        hashes |= checked_hashes(missing)
    return [shard for shard in missing if shard.name not in hashes]


def prepare_probe(tower: Tower, must_check: bool) -> None:
    """Hold a loaded tower against the probe that is kept with its features; keep one if there is
    none.

    Args:
        tower: Loaded only if there is no probe, or if it must be checked.
        must_check: Whether features will be added.

    Raises:
        StageError: The tower makes other features than it did.
    """
    path = probe_file(tower.spec)
    is_kept = checked_hash(path) is not None
    if is_kept and not (must_check or tower.is_loaded):
        return
    # Imports torch.
    from pipeline.encoding.probe import check_probe, probe_bytes, read_probe, take_probe

    if is_kept:
        check_probe(tower.encoder, read_probe(path, tower.spec))
        return
    data = probe_bytes(take_probe(tower.encoder), tower.spec)
    finish(path, [data], sha256_of_pieces([data]))


def check_space(missing: list[PlannedShard], plan: list[PlannedShard], spec: Spec) -> None:
    """Say how much is to be made, and refuse to start where it cannot fit.

    Raises:
        StageError: A file system has less free space than the features need.
    """
    row_bytes = spec.patches * spec.width * 2
    num_images = sum(len(shard.image_ids) for shard in missing)
    needed = num_images * row_bytes
    print(f"extract: {num_images} images to encode, {human_size(needed)}", flush=True)
    _require_space(SHARDS, needed)
    if SHARDS.stat().st_dev != FEATURES.parent.stat().st_dev:
        # No hard links from one to the other: the whole store is copied.
        _require_space(FEATURES.parent, sum(len(shard.image_ids) for shard in plan) * row_bytes)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StageError(
            f"{folder}: the features need {human_size(needed)}, {human_size(needed - free)} more "
            f"than is free there. Make room and run the same command again."
        )


def encode(
    missing: list[PlannedShard],
    source: ImageSource,
    tower: Tower,
    settings: ExtractSettings,
    tally: Tally,
) -> None:
    """Encode some shards into the work directory."""
    # Imports torch.
    from pipeline.encoding.devices import Job, encode_job

    allowed = int(settings.max_failure_rate * len(source.image_ids))
    started = time.perf_counter()
    done = encode_job(
        Job(
            shards=missing,
            source=source,
            settings=tower.settings,
            spec=tower.spec,
            probe=probe_file(tower.spec),
            folder=SHARDS,
            workers=settings.workers,
            max_failures=allowed - len(tally.failures),
        ),
        tower.encoder,
    )
    tally.elapsed += time.perf_counter() - started
    tally.add(done)


def write_report(
    plan: list[PlannedShard], spec: Spec, tally: Tally, settings: ExtractSettings
) -> None:
    """Write what the run did, and say it in a line."""
    images = sum(len(shard.image_ids) for shard in plan)
    encoded = len(tally.encoded_shards.keys() & {shard.name for shard in plan})
    rate = tally.images_encoded / tally.elapsed if tally.elapsed else 0.0
    work = ("decode", "encode", "hash", "write")
    shares = tally.shares(settings.workers)
    report = {
        "images": images,
        "failed": len(tally.failures),
        "failures": {str(image_id): reason for image_id, reason in tally.failures.items()},
        "shards": len(plan),
        "shards_encoded": encoded,
        "shards_reused": len(plan) - encoded,
        "images_per_second": round(rate, 2),
        "seconds": {name: round(tally.seconds[name], 3) for name in work},
        "shares": {name: round(shares.get(name, 0.0), 3) for name in work},
        "fingerprint": spec.fingerprint,
    }
    write_json(REPORT, report)
    print(
        f"extract: {images} images in {len(plan)} shards, {encoded} of them encoded now "
        f"({rate:.0f} images/s), {len(tally.failures)} failed"
    )
    if encoded:
        busy = ", ".join(f"{name} {shares.get(name, 0.0):.0%}" for name in work)
        print(f"extract: busy {busy}")


if __name__ == "__main__":
    run_stage(extract, __doc__)
