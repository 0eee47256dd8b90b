"""Stage `index`: one clean set of tables from annotations and image files.

Writes `data/index/{images,captions,conversations,rejected}.parquet` and `reports/index.json`.
Every record of the inputs is in a table or among the rejected ones.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.command import run_stage
from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.files import WORK, link_or_copy, replacing, write_json
from cache.images import ImageArchive
from cache.settings import Params
from pipeline.annotations import Kind, Rejection, read_captions, read_conversations
from pipeline.collect import (
    CaptionRow,
    ConversationRow,
    ImageCollection,
    ImageRow,
    collect_captions,
    collect_conversations,
)

INDEX = Path("data/index")
REPORT = Path("reports/index.json")
KINDS: tuple[Kind, ...] = ("images", "captions", "conversations")

SCHEMAS = {
    "images": pa.schema(
        [
            ("image_id", pa.int64()),
            ("split", pa.string()),
            ("file_name", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("num_bytes", pa.int64()),
            ("source_xxh3", pa.uint64()),
        ]
    ),
    "captions": pa.schema(
        [
            ("caption_id", pa.int64()),
            ("image_id", pa.int64()),
            ("split", pa.string()),
            ("caption", pa.string()),
        ]
    ),
    "conversations": pa.schema(
        [
            ("conversation_id", pa.string()),
            ("image_id", pa.int64()),
            ("split", pa.string()),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ]
    ),
    "rejected": pa.schema(
        [("kind", pa.string()), ("record", pa.string()), ("reason", pa.string())]
    ),
}


@dataclass(frozen=True, kw_only=True)
class Index:
    """All rows of the four tables, sorted as they are written."""

    images: list[ImageRow]
    captions: list[CaptionRow]
    conversations: list[ConversationRow]
    rejected: list[Rejection]
    num_read: dict[Kind, int]


def index(params: Params) -> None:
    """Run the stage.

    Raises:
        StageError: Annotations or images that cannot be used, or too many rejected records.
    """
    data = params.section("data", DataSettings)
    built = build_index(data, params.seed())
    work = WORK / "index"
    shutil.rmtree(work, ignore_errors=True)
    _write_table(work / "rejected.parquet", built.rejected)
    check_reject_rates(built, data.max_reject_rate, work / "rejected.parquet")
    for kind in KINDS:
        _write_table(work / f"{kind}.parquet", getattr(built, kind))
    _publish(work, INDEX)
    counts = report(built)
    write_json(REPORT, counts)
    kept = ", ".join(f"{counts[kind]['kept']} {kind}" for kind in KINDS)
    print(f"index: {kept} kept, {len(built.rejected)} records rejected")


def build_index(data: DataSettings, seed: int) -> Index:
    """Read all inputs and decide what is kept.

    Raises:
        StageError: A file that is missing or of another layout, or not one usable image.
    """
    train = read_captions(Path(data.train.captions), key="data.train.captions")
    val = read_captions(Path(data.val.captions), key="data.val.captions")
    instruct = read_conversations(Path(data.instruct), key="data.instruct")
    train_archive = ImageArchive(data.train.images, key="data.train.images")
    val_archive = ImageArchive(data.val.images, key="data.val.images")

    images = ImageCollection()
    images.add_all(train.images, "train", train_archive)
    images.add_all(val.images, "val", val_archive)
    captions, bad_captions = collect_captions(
        {"train": train.captions, "val": val.captions}, images.rows
    )
    conversations, bad_conversations = collect_conversations(
        instruct.conversations,
        images,
        train_archive,
        holdout=data.instruct_holdout,
        seed=seed,
    )
    rejected = train.rejected + val.rejected + instruct.rejected
    rejected += images.rejected + bad_captions + bad_conversations
    if not images.rows:
        raise StageError(
            f"data.train.images, data.val.images: not one usable image. {_commonest(rejected)}"
        )
    return Index(
        images=sorted(images.rows.values(), key=lambda row: row.image_id),
        captions=sorted(captions, key=lambda row: (row.image_id, row.caption_id)),
        conversations=sorted(conversations, key=lambda row: (row.image_id, row.conversation_id)),
        rejected=sorted(rejected, key=lambda rejection: KINDS.index(rejection.kind)),
        num_read={
            "images": train.num_images + val.num_images + images.num_adopted,
            "captions": train.num_captions + val.num_captions,
            "conversations": instruct.num_conversations,
        },
    )


def check_reject_rates(built: Index, limit: float, table: Path) -> None:
    """Refuse an index of which too much is missing.

    Args:
        built: The index.
        limit: Greatest share of rejected records of a kind.
        table: Where all rejections can be read, for the error text.

    Raises:
        StageError: Above the limit; names the commonest reasons with an example each.
    """
    for kind in KINDS:
        rejected = [rejection for rejection in built.rejected if rejection.kind == kind]
        if len(rejected) > limit * built.num_read[kind]:
            raise StageError(
                f"{kind}: {len(rejected)} of {built.num_read[kind]} rejected, "
                f"data.max_reject_rate allows {limit:g}. {_commonest(rejected)} "
                f"All of them: {table}. Mend the inputs, or raise the limit."
            )


def _commonest(rejected: list[Rejection]) -> str:
    counts = Counter(map(_reason_class, rejected))
    examples = {_reason_class(rejection): rejection for rejection in reversed(rejected)}
    named = [
        f"{count} x {reason} ({examples[reason].record}: {examples[reason].reason})"
        for reason, count in counts.most_common(3)
    ]
    return f"Commonest reasons: {'; '.join(named)}."


def _reason_class(rejection: Rejection) -> str:
    return rejection.reason.partition(":")[0]


def report(built: Index) -> dict[str, Any]:
    """Return the numbers of `reports/index.json`."""
    return {kind: _report_kind(built, kind) for kind in KINDS}


def _report_kind(built: Index, kind: Kind) -> dict[str, Any]:
    rows = getattr(built, kind)
    reasons = Counter(_reason_class(r) for r in built.rejected if r.kind == kind)
    return {
        "read": built.num_read[kind],
        "kept": len(rows),
        "rejected": sum(reasons.values()),
        "reasons": dict(sorted(reasons.items())),
        "splits": dict(sorted(Counter(row.split for row in rows).items())),
    }


def _write_table(path: Path, rows: list[Any]) -> None:
    schema = SCHEMAS[path.stem]
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pydict(columns, schema=schema), temporary, compression="zstd")


def _publish(work: Path, folder: Path) -> None:
    """Swap a folder for the files of a work folder; no moment shows a mixture of both."""
    staged = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (staged, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    for file in sorted(work.iterdir()):
        link_or_copy(file, staged / file.name)
    if folder.exists():
        folder.rename(replaced)
    staged.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    run_stage(index, __doc__)
