"""Takes a store that others wrote, such as one of `cache.write_store`, in place of encoding.

The store is checked to its last byte and against the index of the workspace, then published as it
is; or, with `encoder.stream`, without its shards, which are then checked when they are read. A
store with features of another file than the indexed one is refused: they would be trained on beside
the texts of that file.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from cache.audit import audit
from cache.errors import REMEDY, SettingsError
from cache.layout import StoreLayout
from cache.plan import PlannedShard
from cache.publish import publish_copy, publish_origin
from cache.remote.location import Location
from cache.spec import Spec
from cache.store_index import INDEX_FILE, StoreIndex
from cache.texts import first_few, without_passwords
from pipeline.encoding.stats import ExtractionStats
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings, ExtractSettings
from workspace.errors import StageError
from workspace.paths import FEATURES, IMAGES

KEY = "encoder.pretrained"
"""The setting that names the store."""


def take_store(
    encoder: EncoderSettings,
    source: ImageSource,
    settings: ExtractSettings,
    stats: ExtractionStats,
) -> tuple[list[PlannedShard], Spec]:
    """Check a store and publish it as that of the workspace.

    Args:
        encoder: Names its folder or URL, and says whether its shards stay there.
        source: The indexed images.
        settings: Of the stage.
        stats: Updated with the images that the store lacks, as failures.

    Returns:
        The shards, and the spec of the features.

    Raises:
        SettingsError: The store is the one that would be replaced by it.
        StageError: It is damaged, lacks too many images, or has features of other files.
    """
    root = encoder.pretrained
    if encoder.stream:
        layout, index = StoreLayout.open(root, partial=False)
        _check_shards_exist(layout)
        _check_images(index, root, source, settings, stats)
        publish_origin(FEATURES, layout.location, index)
        return _plan_of(index), layout.spec
    location = Location(root)
    if not location.is_remote and Path(root).resolve() == FEATURES.resolve():
        raise SettingsError(
            f"{KEY}: {root} is what this stage replaces. Write the store elsewhere."
        )
    _check_files(location)
    spec = location.read_spec()
    index = StoreIndex.read(location.path(INDEX_FILE), spec)
    _check_images(index, root, source, settings, stats)
    publish_copy(FEATURES, location, index)
    return _plan_of(index), spec


def _check_shards_exist(layout: StoreLayout) -> None:
    """Refuse a store behind a URL that lacks a shard; the sizes of the others have been checked."""
    sizes = {file.name: layout.location.size(file.name) for file in layout.shards}
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise StageError(
            f"{KEY}: {layout.location.root} lacks {len(missing)} of its {len(sizes)} shards: "
            f"{first_few(missing)}. {layout.location.remedy}"
        )


def _check_files(location: Location) -> None:
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = audit(location, deep=True, progress=progress)
    if not report.ok:
        first = report.problems[0].replace(REMEDY, "Write or copy the store again.")
        raise StageError(
            f"{KEY}: problems of the store: {len(report.problems)}, the first: {first}"
        )


def _check_images(
    index: StoreIndex,
    root: str,
    source: ImageSource,
    settings: ExtractSettings,
    stats: ExtractionStats,
) -> None:
    """Hold the images of a store against those of the workspace.

    Raises:
        StageError: Too many are missing, or a file is another one.
    """
    _, stored, indexed = np.intersect1d(
        index.image_ids, source.image_ids, assume_unique=True, return_indices=True
    )
    others = index.source_xxh3[stored] != source.source_xxh3[indexed]
    if others.any():
        raise StageError(
            f"{KEY}: {root} has features of other files than {IMAGES} for {int(others.sum())} of "
            f"{len(stored)} images: {first_few(source.image_ids[indexed[others]])}. Write their "
            f"rows with xxh3_64 of the files that are indexed, or run index on the files that the "
            f"features were made of."
        )
    missing = np.delete(source.image_ids, indexed).tolist()
    allowed = int(settings.max_failure_rate * len(source.image_ids))
    if len(missing) > allowed or not len(stored):
        raise StageError(
            f"{KEY}: {root} lacks {len(missing)} of {len(source.image_ids)} images, at most "
            f"{allowed} may be missing (extract.max_failure_rate): {first_few(missing)}. Write "
            f"their rows, or take the images out and run index."
        )
    shown = without_passwords(str(root))
    stats.failures |= dict.fromkeys(missing, f"{shown} has no features of it")
    if extra := len(index.image_ids) - len(stored):
        print(
            f"extract: {shown}: {extra} of its images are not indexed and stay unused", flush=True
        )


def _plan_of(index: StoreIndex) -> list[PlannedShard]:
    return [
        PlannedShard(Path(file.name).stem, index.image_ids[rows], index.source_xxh3[rows])
        for file, rows in zip(index.shards, index.by_shard, strict=True)
    ]
