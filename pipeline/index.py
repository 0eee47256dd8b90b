"""Stage index: one clean set of tables from annotations and image files.

Writes `data/index/{images,captions,conversations,pope,rejected}.parquet` and `reports/index.json`.
Every record of the inputs is in a table or among the rejected ones; instances, from which yes-no
questions are made, are counted.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files.atomic import link_or_copy, write_bytes, write_json
from pipeline.images.names import ImageArchive
from pipeline.indexing.annotations import read_captions, read_conversations
from pipeline.indexing.collect import (
    CaptionRow,
    ConversationRow,
    collect_captions,
    collect_conversations,
)
from pipeline.indexing.image_collection import ImageCollection, ImageRow
from pipeline.indexing.image_lookup import Split
from pipeline.indexing.pope import QuestionFiles, Questions, collect_questions, read_question_files
from pipeline.indexing.records import Kind, Rejection
from pipeline.indexing.rejections import check_reject_rates, commonest, count, with_faults
from pipeline.indexing.yes_no_questions import QuestionRow
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.paths import INDEX, REPORTS, WORK
from workspace.settings import Params
from workspace.stage import run_stage

REPORT = REPORTS / "index.json"
KINDS: tuple[Kind, ...] = ("images", "captions", "conversations")
"""What is trained and encoded; the other kinds are about yes-no questions."""

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
    "pope": pa.schema(
        [
            ("question_id", pa.string()),
            ("image_id", pa.int64()),
            ("subset", pa.string()),
            ("question", pa.string()),
            ("label", pa.string()),
        ]
    ),
    "rejected": pa.schema(
        [("kind", pa.string()), ("record", pa.string()), ("reason", pa.string())]
    ),
}


@dataclass(frozen=True, kw_only=True)
class Index:
    """All rows of the five tables, sorted as they are written."""

    images: list[ImageRow]
    captions: list[CaptionRow]
    conversations: list[ConversationRow]
    questions: Questions
    question_files: QuestionFiles
    rejected: list[Rejection]
    num_read: dict[Kind, int]

    @property
    def pope(self) -> list[QuestionRow]:
        """The yes-no questions."""
        return self.questions.rows


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
    check_reject_rates(
        built.rejected, built.num_read, data.max_reject_rate, work / "rejected.parquet"
    )
    for table in (*KINDS, "pope"):
        _write_table(work / f"{table}.parquet", getattr(built, table))
    _publish(work, INDEX)
    write_json(REPORT, report(built))
    kept = ", ".join(f"{len(getattr(built, kind))} {kind}" for kind in KINDS)
    questions, rejected = len(built.pope), len(with_faults(built.rejected))
    print(f"index: {kept}, {questions} yes-no questions kept, {rejected} records rejected")


def build_index(data: DataSettings, seed: int) -> Index:
    """Read all inputs and decide what is kept.

    Raises:
        StageError: A file that is missing or of another layout, or not one usable image.
    """
    train = read_captions(Path(data.train.captions), key="data.train.captions")
    val = read_captions(Path(data.val.captions), key="data.val.captions")
    instruct = read_conversations(Path(data.instruct), key="data.instruct")
    question_files = read_question_files(Path(data.val.captions))

    images = ImageCollection(open_archives(data))
    images.add_listed({"train": train.images, "val": val.images})
    captions, bad_captions = collect_captions(
        {"train": train.captions, "val": val.captions}, images
    )
    conversations, bad_conversations = collect_conversations(
        instruct.conversations, images, holdout=data.instruct_holdout, seed=seed
    )
    questions = collect_questions(question_files, images.rows, seed, images.problems)
    rejected = train.rejected + val.rejected + instruct.rejected
    rejected += images.rejected + bad_captions + bad_conversations + questions.rejected
    if not images.rows:
        raise StageError(
            f"data.train.images, data.val.images: not one usable image. {commonest(rejected)}"
        )
    return Index(
        images=sorted(images.rows.values(), key=lambda row: row.image_id),
        captions=sorted(captions, key=lambda row: (row.image_id, row.caption_id)),
        conversations=sorted(conversations, key=lambda row: (row.image_id, row.conversation_id)),
        questions=questions,
        question_files=question_files,
        rejected=sorted(rejected, key=lambda rejection: get_args(Kind).index(rejection.kind)),
        num_read={
            "images": train.num_images + val.num_images + images.num_adopted,
            "captions": train.num_captions + val.num_captions,
            "conversations": instruct.num_conversations,
            "objects": questions.num_objects,
            "pope": question_files.num_official,
        },
    )


def open_archives(data: DataSettings) -> dict[Split, ImageArchive]:
    """Open the images of both splits.

    Raises:
        StageError: There are none.
    """
    follow = data.follow_links
    train = ImageArchive(data.train.images, key="data.train.images", follow_links=follow)
    val = ImageArchive(data.val.images, key="data.val.images", follow_links=follow)
    return {"train": train, "val": val}


def report(built: Index) -> dict[str, Any]:
    """Return the numbers of `reports/index.json`.

    Of `pope`, what was read, kept and rejected are the questions that POPE published; `subsets`
    counts all.
    """
    counts: dict[str, Any] = {
        kind: count(kind, built.rejected, num_read) for kind, num_read in built.num_read.items()
    }
    for kind in KINDS:
        splits = Counter(row.split for row in getattr(built, kind))
        counts[kind]["splits"] = dict(sorted(splits.items()))
    counts["pope"] |= built.questions.report(built.question_files)
    return counts


def _write_table(path: Path, rows: list[Any]) -> None:
    schema = SCHEMAS[path.stem]
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), buffer, compression="zstd")
    write_bytes(path, memoryview(buffer.getvalue()))


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
