"""Collects `pope.parquet`: questions made from an instances file, and those that POPE published.

Both kinds of files are optional and lie beside the captions that are scored. POPE's own files (Li
et al. 2023, arXiv 2305.10355) exist in versions of 2,910 and 3,000 random questions, so each
question is read with its label, and its position means nothing. It belongs to the image of the same
name, since a number alone can be the id of any picture.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cache.remote.urls import is_url
from pipeline.indexing.image_collection import ImageRow
from pipeline.indexing.records import (
    AnnotationFile,
    RecordError,
    Rejection,
    file_name_field,
    image_id_in,
    int64_field,
    parse_record_json,
    require_object,
    str_field,
)
from pipeline.indexing.rejections import NOT_INDEXED
from pipeline.indexing.yes_no_questions import (
    KEY,
    REMEDY,
    Instances,
    QuestionRow,
    coco_name,
    make_questions,
    merge_instances,
    read_instances,
)

OFFICIAL = "coco_pope_"
"""Start of the names of POPE's own files; the subset follows."""

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of captions files in layouts in which there are no instances."""


@dataclass(frozen=True, slots=True)
class OfficialQuestion:
    """A question that POPE published."""

    record: str
    """Position of the question, such as "coco_pope_random.json: question 7"."""
    image_name: str
    row: QuestionRow
    """Its image id is the number in the image's name."""


@dataclass(frozen=True)
class QuestionFiles:
    """The files beside the captions."""

    instances: Instances
    """The objects of all instances files together."""
    instances_paths: list[Path]
    official: list[OfficialQuestion]
    rejected: list[Rejection]
    """Unusable entries of both kinds of files."""
    num_official: int
    """Questions in POPE's own files, usable or not."""
    names: list[str]
    """Names of all files."""
    why_empty: str
    """Why no questions result, if none do."""


@dataclass(frozen=True)
class Questions:
    """The rows of `pope.parquet`: by subset, then in the order made or read."""

    rows: list[QuestionRow]
    rejected: list[Rejection]
    num_objects: int
    """Entries of the instances file that were checked."""

    def report(self, files: QuestionFiles) -> dict[str, Any]:
        """Return the fields of the stage's report beyond those of other tables."""
        subsets = Counter(row.subset for row in self.rows)
        fields = {"files": files.names, "subsets": dict(sorted(subsets.items()))}
        return fields if self.rows else fields | {"why_empty": files.why_empty}


def read_question_files(captions: Sequence[str | Path]) -> QuestionFiles:
    """Read the files of both kinds beside captions files, each once.

    Args:
        captions: The captions files of split val, or of the one set of images that is cut into
            splits. Nothing is looked for beside a URL; without captions there are no questions.

    Raises:
        StageError: A file cannot be used.
    """
    local = [Path(path) for path in captions if not is_url(path)]
    candidates = dict.fromkeys(map(_instances_beside, local))
    instances_paths = [path for path in candidates if path and path.exists()]
    folders = dict.fromkeys(path.parent for path in local)
    official_paths = [
        path for folder in folders for path in sorted(folder.glob(f"{OFFICIAL}*.json"))
    ]
    instances = merge_instances({path: read_instances(path) for path in instances_paths})
    official, rejected = [], list(instances.rejected)
    for path in official_paths:
        official += read_official(path, rejected)
    num_bad = sum(rejection.kind == "pope" for rejection in rejected)
    names = [path.name for path in instances_paths + official_paths]
    return QuestionFiles(
        instances=instances,
        instances_paths=instances_paths,
        official=official,
        rejected=rejected,
        num_official=len(official) + num_bad,
        names=names,
        why_empty=(
            "no question of these files is about an image of the index"
            if names
            else _why_no_files(local, is_remote=len(local) < len(captions))
        ),
    )


def _instances_beside(captions: Path) -> Path | None:
    """Return where the instances of a captions file would be; COCO's have JSON's suffix."""
    path = captions.with_name(captions.name.replace("captions", "instances"))
    if path == captions:
        return None
    return path.with_suffix(".json") if path.suffix in TABLE_SUFFIXES else path


def _why_no_files(captions: list[Path], *, is_remote: bool) -> str:
    if not captions:
        return (
            "the captions are at a URL, and questions are looked for beside files on this machine"
            if is_remote
            else "there are no captions, beside which questions are looked for"
        )
    unnamed = next((path for path in captions if _instances_beside(path) is None), None)
    if unnamed:
        return f"{unnamed.name} has no 'captions' in its name, so no instances file belongs to it"
    wanted = " nor ".join(str(path.name) for path in filter(None, map(_instances_beside, captions)))
    folders = " or ".join(dict.fromkeys(str(path.parent) for path in captions))
    return f"neither {wanted} nor {OFFICIAL}*.json is in {folders}"


def images_asked_about(files: QuestionFiles, images: Mapping[int, ImageRow]) -> set[int]:
    """Return the ids of the images that POPE's own questions are about."""
    names = {coco_name(question.image_name) for question in files.official}
    return {i for i, image in images.items() if coco_name(image.file_name) in names}


def collect_questions(
    files: QuestionFiles,
    images: Mapping[int, ImageRow],
    seed: int,
    problems: Mapping[int, str] = MappingProxyType({}),
) -> Questions:
    """Make questions about the images that are scored, and accept POPE's own about any image.

    The images of split test are scored if there are any, else those of val.

    Args:
        files: The instances and POPE's own questions.
        images: All images of the index, by id.
        seed: Decides which images and objects are asked for.
        problems: Why texts cannot rely on an image id, by id.
    """
    rejected = list(files.rejected)
    has_test = any(image.split == "test" for image in images.values())
    split = "test" if has_test else "val"
    scored = {i: image for i, image in images.items() if image.split == split}
    mismatches = _name_mismatches(files, scored)
    rejected += mismatches.values()
    rows = make_questions(files.instances, scored.keys() - mismatches.keys(), seed)
    ids: dict[str, list[int]] = defaultdict(list)
    for image in images.values():
        ids[coco_name(image.file_name)].append(image.image_id)
    for question in files.official:
        try:
            rows.append(_with_image_id(question, ids, problems))
        except RecordError as error:
            rejected.append(Rejection("pope", question.record, str(error)))
    num_objects = files.instances.num_entries + len(mismatches)
    return Questions(sorted(rows, key=lambda row: row.subset), rejected, num_objects)


def _name_mismatches(files: QuestionFiles, images: Mapping[int, ImageRow]) -> dict[int, Rejection]:
    """Return the ids that are another picture in the instances files than among the images."""
    mismatches = {}
    names = ", ".join(path.name for path in files.instances_paths)
    for image_id, name in files.instances.image_names.items():
        image = images.get(image_id)
        if image and coco_name(name) != coco_name(image.file_name):
            reason = f"image of another name: {image_id} is {name!r}, not {image.file_name!r}"
            where = f"{names}: image {image_id}"
            mismatches[image_id] = Rejection("objects", where, reason)
    return mismatches


def _with_image_id(
    question: OfficialQuestion, ids: dict[str, list[int]], problems: Mapping[int, str]
) -> QuestionRow:
    """Return a question's row with the id that its image has in the index."""
    if problem := problems.get(question.row.image_id):
        raise RecordError(problem)
    found = ids.get(coco_name(question.image_name), [])
    if not found:
        raise RecordError(f"{NOT_INDEXED}: {question.row.image_id}")
    if len(found) > 1:
        name = question.image_name
        raise RecordError(f"image name ambiguous: {name!r} may be image {found[0]} or {found[1]}")
    return dataclasses.replace(question.row, image_id=found[0])


def read_official(path: Path, rejected: list[Rejection]) -> list[OfficialQuestion]:
    """Read a file in the layout of POPE's `coco_pope_random.json`: a JSON object a line.

    Args:
        path: The file; its name gives the subset.
        rejected: Unusable lines are added.

    Raises:
        StageError: The file is not UTF-8, or no line is a question.
    """
    subset = f"official {path.stem.removeprefix(OFFICIAL)}"
    file = AnnotationFile(path, KEY, REMEDY)
    # Not splitlines, which also splits at other characters.
    lines = [line for line in file.read_text().split("\n") if line.strip()]
    questions: dict[str, OfficialQuestion] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        record = f"{path.name}: question {number}"
        try:
            entry = require_object(parse_record_json(line))
            row = _official_row(subset, entry)
            if row.question_id in questions:
                raise RecordError(f"question id repeated: {row.question_id}")
            questions[row.question_id] = OfficialQuestion(record, entry["image"], row)
        except RecordError as error:
            bad.append(Rejection("pope", record, str(error)))
    if not questions:
        reason = bad[0].reason if bad else "the file is empty"
        file.refuse(f"no line is a question of POPE: {reason}")
    rejected += bad
    return list(questions.values())


def _official_row(subset: str, entry: dict[str, Any]) -> QuestionRow:
    image_id = image_id_in(file_name_field(entry, "image"))
    question, label = str_field(entry, "text").strip(), str_field(entry, "label")
    if not question:
        raise RecordError("empty question")
    if label not in ("yes", "no"):
        raise RecordError(f"label is neither yes nor no: {label[:40]!r}")
    number = int64_field(entry, "question_id")
    return QuestionRow(f"{subset}/{number}", image_id, subset, question, label)
