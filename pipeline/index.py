"""Stage index: one clean set of tables from annotations and image files.

Writes `data/index/{images,captions,conversations,pope,rejected}.parquet` and `reports/index.json`.
Every record of the inputs is in a table or rejected; instances, from which yes-no questions are
made, are counted.
"""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cache.files.atomic import link_or_copy, write_json
from cache.texts import printable
from pipeline.images.source import open_archives
from pipeline.indexing.annotations import CaptionsFile
from pipeline.indexing.captions import read_captions
from pipeline.indexing.collect import collect_captions, collect_conversations, split_by_hash
from pipeline.indexing.image_collection import ImageCollection, ImageRow
from pipeline.indexing.instruct import read_instruct
from pipeline.indexing.pope import (
    QuestionFiles,
    collect_questions,
    images_asked_about,
    read_question_files,
)
from pipeline.indexing.records import Kind
from pipeline.indexing.rejections import (
    check_reject_rates,
    count_records,
    describe_commonest,
    faulty_records,
)
from pipeline.indexing.tables import write_table
from workspace.data_settings import DataSettings, Split
from workspace.errors import StageError
from workspace.paths import INDEX, REPORTS, WORK
from workspace.settings import Params
from workspace.stage import run_stage

REPORT = REPORTS / "index.json"
KINDS: tuple[Kind, ...] = ("images", "captions", "conversations")
"""Kinds of records for encoding and training; the others are for yes-no questions."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """The rows of the tables and the numbers of the report."""

    tables: dict[str, list[Any]]
    """Rows by table, sorted as they are written."""
    num_read: dict[Kind, int]
    other_files: Counter[str]
    """Numbers of files that are no images by their names, by suffix, where all images of the data
    are indexed."""
    question_report: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """Return the content of `reports/index.json`.

        The numbers read, kept and rejected of `pope` count the questions that POPE published; its
        `subsets` count all questions.
        """
        counts: dict[str, Any] = {
            kind: count_records(kind, self.tables["rejected"], num_read)
            for kind, num_read in self.num_read.items()
        }
        for kind in KINDS:
            splits = Counter(row.split for row in self.tables[kind])
            counts[kind]["splits"] = dict(sorted(splits.items()))
        if self.other_files:
            counts["images"]["other_files"] = dict(self.other_files.most_common())
        counts["pope"] |= self.question_report
        return counts


def index(params: Params) -> None:
    """Run the stage.

    Raises:
        StageError: Annotations or images cannot be used, or too many records are rejected.
    """
    data = params.section("data", DataSettings)
    built = build_index(data, params.seed())
    tables = dict(built.tables)
    rejected = tables.pop("rejected")
    work = WORK / "index"
    shutil.rmtree(work, ignore_errors=True)
    rejected_path = write_table(work, "rejected", rejected)
    check_reject_rates(rejected, built.num_read, data.max_reject_rate, rejected_path)
    for name, rows in tables.items():
        write_table(work, name, rows)
    _publish(work, INDEX)
    write_json(REPORT, built.report())
    kept = ", ".join(f"{len(tables[kind])} {kind}" for kind in KINDS)
    questions, num_rejected = len(tables["pope"]), len(faulty_records(rejected))
    print(f"index: {kept}, {questions} yes-no questions kept, {num_rejected} records rejected")
    if built.other_files:
        suffixes = ", ".join(f"{n} .{suffix}" for suffix, n in built.other_files.most_common(5))
        print(f"index: other files are left out: {printable(suffixes)}")


def build_index(data: DataSettings, seed: int) -> Index:
    """Read all inputs and decide which records are accepted.

    Raises:
        StageError: A file is missing or has another layout, or no image is usable.
    """
    listed = read_all_captions(data)
    files = [file for of_split in listed.values() for file in of_split]
    scored = data.splits.get("val", data.train)
    question_files = read_question_files(scored.caption_paths)
    instruct = read_instruct(data.instruct_paths, files, question_files, seed)

    images = collect_images(data, listed, question_files)
    other_files: Counter[str] = Counter()
    if not files and not data.instruct_paths:
        for split in data.splits:
            other_files += images.add_files(split)
    captions, bad_captions = collect_captions(listed, images)
    conversations, bad_conversations = collect_conversations(
        instruct.conversations, images, holdout=data.instruct_holdout, seed=seed
    )
    questions = collect_questions(question_files, images.rows, seed, images.problems)
    rejected = [bad for file in files for bad in file.rejected] + instruct.rejected
    rejected += images.rejected + bad_captions + bad_conversations + questions.rejected
    if not images.rows:
        raise StageError(
            f"data.train.images, data.val.images: not one usable image. "
            f"{describe_commonest(rejected)}"
        )
    if images.split_of and files:
        _check_both_splits(images.rows.values(), data.val_share)
    return Index(
        tables={
            "images": sorted(images.rows.values(), key=lambda row: row.image_id),
            "captions": sorted(captions, key=lambda row: (row.image_id, row.caption_id)),
            "conversations": sorted(
                conversations, key=lambda row: (row.image_id, row.conversation_id)
            ),
            "pope": questions.rows,
            "rejected": sorted(rejected, key=lambda row: get_args(Kind).index(row.kind)),
        },
        num_read={
            "images": images.num_without_number + sum(file.num_images_read for file in files),
            "captions": sum(file.num_captions for file in files),
            "conversations": instruct.num_conversations,
            "objects": questions.num_objects + instruct.num_objects,
            "pope": question_files.num_official,
        },
        other_files=other_files,
        question_report=questions.report(question_files),
    )


def collect_images(
    data: DataSettings, listed: Mapping[Split, list[CaptionsFile]], questions: QuestionFiles
) -> ImageCollection:
    """Return the images that captions files list, with their splits.

    Args:
        data: Where the images are, and how they are split.
        listed: The captions files of each split.
        questions: POPE's questions, whose images are kept out of training with Karpathy's split.

    Raises:
        StageError: A place of images is missing or cannot be read.
    """
    # Without captions nothing is scored on split val, so only `split: hash` asks for a cut.
    has_captions = any(listed.values())
    is_cut = data.split_name == "hash" and (has_captions or data.split == "hash")
    images = ImageCollection(
        open_archives(data, data.splits),
        split_of=partial(split_by_hash, val_share=data.val_share) if is_cut else None,
        listing={"val"} if listed.get("val") else (),
    )
    images.add_listed(
        {split: [i for file in of_split for i in file.images] for split, of_split in listed.items()}
    )
    if data.split == "karpathy":
        images.move_to_val(images_asked_about(questions, images.rows))
    return images


def read_all_captions(data: DataSettings) -> dict[Split, list[CaptionsFile]]:
    """Read the captions files of each split.

    Raises:
        StageError: A file is missing or has another layout.
    """
    return {
        split: [
            read_captions(path, key=f"data.{split}.captions", split=data.split)
            for path in source.caption_paths
        ]
        for split, source in data.splits.items()
    }


def _check_both_splits(images: Collection[ImageRow], val_share: float) -> None:
    num_val = sum(image.split == "val" for image in images)
    if num_val in (0, len(images)):
        raise StageError(
            f"data.split: hash puts {num_val} of {len(images)} images into split val and "
            f"{len(images) - num_val} into train, with data.val_share {val_share}. Both need an "
            f"image: change data.val_share, or bring more images."
        )


def _publish(work: Path, folder: Path) -> None:
    """Replace a folder by the files of a work folder; at no moment does it hold a mixture."""
    staged = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (staged, replaced):
        _remove(leftover)
    for file in sorted(work.iterdir()):
        link_or_copy(file, staged / file.name)
    if os.path.lexists(folder):
        folder.rename(replaced)
    staged.rename(folder)
    _remove(replaced)
    shutil.rmtree(work)


def _remove(folder: Path) -> None:
    """Delete a folder, or a link to one without what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_stage(index, __doc__)
