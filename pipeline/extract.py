"""Stage extract: runs the vision tower once over the indexed images and publishes a store.

Each shard is encoded into the work directory under a name that determines its content, so that a
killed run continues where it stopped and a changed image costs one shard. The finished shards are
then linked into `data/features/`, the index last. If every shard exists already, no image is
opened, and the tower is not loaded unless its weights are named by a hub id. With
`encoder.model: external` a store that exists is checked and published, and nothing is encoded. The
finished store is published to the URL of `extract.to` as well.
"""

import shutil
import time
from pathlib import Path

import numpy as np

from cache.files.atomic import sha256_of_pieces, write_json
from cache.plan import PlannedShard, check_num_shards, plan_shards
from cache.publish import publish
from cache.remote.upload import try_to_write, upload
from cache.spec import Spec
from cache.texts import human_size
from pipeline.encoding.lazy_encoder import LazyEncoder
from pipeline.encoding.stats import ExtractionStats
from pipeline.encoding.work_folder import (
    delete_unfinished,
    probe_path,
    recover_shards,
    verified_hash,
    verified_hashes,
    write_with_hash,
)
from pipeline.external import take_store
from pipeline.images.source import ImageSource, open_images, read_source
from pipeline.settings import EXTERNAL, EncoderSettings, ExtractSettings
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.locks import folder_lock
from workspace.paths import FEATURES, IMAGES, REPORTS, SHARDS
from workspace.settings import Params
from workspace.stage import run_stage

REPORT = REPORTS / "extract.json"


def extract(params: Params) -> None:
    """Make the store that the settings and the index describe."""
    data = params.section("data", DataSettings)
    settings = params.section("extract", ExtractSettings)
    encoder_settings = params.section("encoder", EncoderSettings)
    source = read_source()
    stats = ExtractionStats()
    with folder_lock(SHARDS):
        delete_unfinished(SHARDS)
        if settings.to is not None:
            # Refused now, and not after hours of encoding.
            try_to_write(settings.to)
        if encoder_settings.model == EXTERNAL:
            plan, spec = take_store(encoder_settings, source, settings, stats)
        else:
            encoder = LazyEncoder(encoder_settings)
            plan, hashes = make_shards(source, data, encoder, settings, stats)
            spec = encoder.spec
            publish(FEATURES, plan, SHARDS, spec, hashes, probe_path(spec))
        write_report(plan, spec, stats)
        if settings.to is not None:
            print(f"extract: {upload(FEATURES, settings.to)}")


def make_shards(
    source: ImageSource,
    data: DataSettings,
    encoder: LazyEncoder,
    settings: ExtractSettings,
    stats: ExtractionStats,
) -> tuple[list[PlannedShard], dict[str, str]]:
    """Encode every planned shard that the work directory lacks.

    An image that does not decode is dropped, which changes the shards around it; so planning and
    encoding repeat until every planned shard exists.

    Returns:
        The plan, and the sha256 of each of its shards by file name; all are in the work directory.

    Raises:
        StageError: More images failed than the settings allow, or the tower has changed.
    """
    hashes: dict[str, str] = {}
    # Each round adds the failed images to `stats.failures` and the finished shards to `hashes`.
    while True:
        decodable = ~np.isin(source.image_ids, list(stats.failures))
        plan = plan_shards(
            source.image_ids[decodable],
            source.source_xxh3[decodable],
            encoder.spec.fingerprint,
            settings.shard_rows,
        )
        check_num_shards(plan, settings.shard_rows)
        missing = recover_or_list_missing(plan, hashes, encoder.spec)
        prepare_probe(encoder, must_check=bool(missing))
        if not missing:
            break
        check_space(missing, plan, encoder.spec)
        encode(missing, open_images(source, data), encoder, settings, stats)
        hashes |= stats.encoded_shards
    if not plan:
        raise StageError(f"{IMAGES}: none of its {len(decodable)} images could be decoded.")
    return plan, hashes


def recover_or_list_missing(
    plan: list[PlannedShard], hashes: dict[str, str], spec: Spec
) -> list[PlannedShard]:
    """Recover planned shards from DVC; return the shards that the work directory still lacks.

    The sha256 of every other planned shard is in `hashes` afterwards.
    """
    hashes |= verified_hashes([shard for shard in plan if shard.name not in hashes])
    missing = [shard for shard in plan if shard.name not in hashes]
    if missing:
        recover_shards({shard.name for shard in missing}, spec)
        hashes |= verified_hashes(missing)
    return [shard for shard in missing if shard.name not in hashes]


def prepare_probe(encoder: LazyEncoder, must_check: bool) -> None:
    """Check the encoder against the stored probe of its features; store one if there is none.

    Args:
        encoder: The encoder.
        must_check: Whether shards will be encoded. Otherwise an encoder that is not loaded is not
            checked, because the check would load it.

    Raises:
        StageError: The encoder gives other features than before.
    """
    path = probe_path(encoder.spec)
    is_stored = verified_hash(path) is not None
    if is_stored and not (must_check or encoder.is_loaded):
        return
    # Imports torch.
    from pipeline.encoding.probe import (
        check_probe,
        encode_probe_images,
        read_probe,
        serialize_probe,
    )

    if is_stored:
        check_probe(encoder.encoder, read_probe(path, encoder.spec))
        return
    data = serialize_probe(encode_probe_images(encoder.encoder), encoder.spec)
    write_with_hash(path, [data], sha256_of_pieces([data]))


def check_space(missing: list[PlannedShard], plan: list[PlannedShard], spec: Spec) -> None:
    """Print how much will be encoded, and refuse to start if it does not fit on the disk.

    Raises:
        StageError: A file system has less free space than the features need.
    """
    row_bytes = spec.patches * spec.width * 2
    num_images = sum(len(shard.image_ids) for shard in missing)
    needed = num_images * row_bytes
    print(f"extract: {num_images} images to encode, {human_size(needed)}", flush=True)
    _require_space(SHARDS, needed)
    if SHARDS.stat().st_dev != FEATURES.parent.stat().st_dev:
        # Hard links do not cross file systems: the whole store is copied.
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
    encoder: LazyEncoder,
    settings: ExtractSettings,
    stats: ExtractionStats,
) -> None:
    """Encode shards into the work directory."""
    # Imports torch.
    from pipeline.encoding.batches import Job
    from pipeline.encoding.engines import encode_job

    allowed = int(settings.max_failure_rate * len(source.image_ids))
    job = Job(
        shards=missing,
        source=source,
        settings=encoder.settings,
        spec=encoder.spec,
        probe=probe_path(encoder.spec),
        folder=SHARDS,
        workers=settings.workers,
        engine=settings.engine,
        max_failures=allowed - len(stats.failures),
    )
    started = time.perf_counter()
    stats.add(encode_job(job, encoder.encoder))
    stats.elapsed += time.perf_counter() - started


def write_report(plan: list[PlannedShard], spec: Spec, stats: ExtractionStats) -> None:
    """Write the report of the run, and print its main numbers."""
    images = sum(len(shard.image_ids) for shard in plan)
    encoded = len(stats.encoded_shards.keys() & {shard.name for shard in plan})
    rate = stats.images_encoded / stats.elapsed if stats.elapsed else 0.0
    phases = ("decode", "encode", "hash", "write")
    busy = stats.busy_shares()
    shares = {phase: busy.get(phase, 0.0) for phase in phases}
    report = {
        "images": images,
        "failed": len(stats.failures),
        "failures": {str(image_id): reason for image_id, reason in stats.failures.items()},
        "shards": len(plan),
        "shards_encoded": encoded,
        "shards_reused": len(plan) - encoded,
        "images_per_second": round(rate, 2),
        "seconds": {phase: round(stats.seconds[phase], 6) for phase in phases},
        "shares": {phase: round(share, 3) for phase, share in shares.items()},
        "fingerprint": spec.fingerprint,
    }
    write_json(REPORT, report)
    print(
        f"extract: {images} images in {len(plan)} shards, {encoded} of them encoded now "
        f"({rate:.0f} images/s), {len(stats.failures)} failed"
    )
    if encoded:
        print(
            "extract: busy " + ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
        )


if __name__ == "__main__":
    run_stage(extract, __doc__)
