"""Collects `pope.parquet`: questions made from an instances file, and those that POPE published.

Both kinds of file are looked for beside the captions of split val; neither has to be there. POPE's
own (Li et al. 2023, arXiv 2305.10355) exist in versions of 2,910 and 3,000 random questions, so a
question is taken whole, with its label, and nothing is known by its position. It belongs to the
image that has its name: a number alone can be the id of any picture.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from pipeline.indexing.image_collection import ImageRow
from pipeline.indexing.records import (
    RecordError,
    Rejection,
    as_object,
    file_name_of,
    id_of,
    image_id_in,
    json_value,
    read_text,
    refuse,
    text_of,
)
from pipeline.indexing.rejections import NOT_INDEXED
from pipeline.indexing.yes_no_questions import (
    BESIDE,
    REMEDY,
    Instances,
    QuestionRow,
    make_questions,
    read_instances,
)

OFFICIAL = "coco_pope_"
"""How the names of POPE's own files begin; the subset follows."""

_COCO_2014 = re.compile("^COCO_(train|val|test)2014_")
"""What COCO 2014 puts before the names that its pictures have in COCO 2017."""


@dataclass(frozen=True, slots=True)
class OfficialQuestion:
    """A question that POPE published; `record` says where it stands."""

    record: str
    image_name: str
    row: QuestionRow
    """With the number in the image's name as its id."""


@dataclass(frozen=True)
class QuestionFiles:
    """What lies beside the captions of split val."""

    instances: Instances
    official: list[OfficialQuestion]
    rejected: list[Rejection]
    """Entries of either kind of file that cannot be used."""
    num_official: int
    """Questions in POPE's own files, usable or not."""
    names: list[str]
    why_empty: str
    """Why no question may come of it."""


@dataclass(frozen=True)
class Questions:
    """The rows of `pope.parquet`: by subset, then as they were made or read."""

    rows: list[QuestionRow]
    rejected: list[Rejection]
    num_objects: int
    """Entries of the instances file that were looked at."""

    def report(self, files: QuestionFiles) -> dict[str, Any]:
        """Return what the stage's report says besides what was read and rejected."""
        subsets = Counter(row.subset for row in self.rows)
        said = {"files": files.names, "subsets": dict(sorted(subsets.items()))}
        return said if self.rows else said | {"why_empty": files.why_empty}


def read_question_files(captions: Path) -> QuestionFiles:
    """Read the files beside the captions of split val that are there.

    Raises:
        StageError: A file that is there cannot be used.
    """
    instances_path = captions.with_name(captions.name.replace("captions", "instances"))
    has_instances = instances_path != captions and instances_path.exists()
    instances = read_instances(instances_path) if has_instances else Instances()
    official_paths = sorted(captions.parent.glob(f"{OFFICIAL}*.json"))
    official, rejected = [], list(instances.rejected)
    for path in official_paths:
        official += read_official(path, rejected)
    num_bad = sum(rejection.kind == "pope" for rejection in rejected)
    names = [path.name for path in [instances_path] * has_instances + official_paths]
    return QuestionFiles(
        instances, official, rejected, len(official) + num_bad, names, _why_empty(captions, names)
    )


def _why_empty(captions: Path, names: list[str]) -> str:
    if names:
        return "no question of these files is about an image of the index"
    if "captions" not in captions.name:
        return f"{captions.name} has no 'captions' in its name, so no instances file belongs to it"
    instances = captions.name.replace("captions", "instances")
    return f"neither {instances} nor {OFFICIAL}*.json is in {captions.parent}"


def collect_questions(
    files: QuestionFiles,
    images: Mapping[int, ImageRow],
    seed: int,
    problems: Mapping[int, str] = MappingProxyType({}),
) -> Questions:
    """Make questions about the images of split val, and keep POPE's own about any image.

    Args:
        files: What there is to make and keep questions of.
        images: All images of the index, by id.
        seed: Decides which images and objects are asked for.
        problems: Ids of COCO that no text can rely on, and why.
    """
    rejected = list(files.rejected)
    others = dict(_other_pictures(files, images))
    rejected += [Rejection("objects", *other) for other in others.values()]
    val = [i for i, image in images.items() if image.split == "val" and i not in others]
    rows = make_questions(files.instances, val, seed)
    ids = _ids_by_name(images.values())
    for question in files.official:
        try:
            rows.append(_about_its_image(question, ids, problems))
        except RecordError as error:
            rejected.append(Rejection("pope", question.record, str(error)))
    num_objects = files.instances.num_entries + len(others)
    return Questions(sorted(rows, key=lambda row: row.subset), rejected, num_objects)


def _other_pictures(
    files: QuestionFiles, images: Mapping[int, ImageRow]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the ids under which the instances file has other pictures of val; place and reason."""
    for image_id, name in files.instances.image_names.items():
        image = images.get(image_id)
        if image and image.split == "val" and _coco_name(name) != _coco_name(image.file_name):
            reason = f"image of another name: {image_id} is {name!r}, not {image.file_name!r}"
            yield image_id, (f"{files.names[0]}: image {image_id}", reason)


def _ids_by_name(images: Iterable[ImageRow]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = defaultdict(list)
    for image in images:
        ids[_coco_name(image.file_name)].append(image.image_id)
    return ids


def _coco_name(file_name: str) -> str:
    """Return what all releases of COCO call a picture, without folder and ending."""
    return _COCO_2014.sub("", PurePosixPath(file_name).stem)


def _about_its_image(
    question: OfficialQuestion, ids: dict[str, list[int]], problems: Mapping[int, str]
) -> QuestionRow:
    if problem := problems.get(question.row.image_id):
        raise RecordError(problem)
    found = ids.get(_coco_name(question.image_name), [])
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
        rejected: Grows by the lines that cannot be used.

    Raises:
        StageError: Not a text in UTF-8, or no line is a question.
    """
    subset = f"official {path.stem.removeprefix(OFFICIAL)}"
    # Not splitlines: a text may hold other characters that end a line for it.
    lines = [line for line in read_text(path, BESIDE, REMEDY).split("\n") if line.strip()]
    found: dict[str, OfficialQuestion] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        record = f"{path.name}: question {number}"
        try:
            entry = as_object(json_value(line))
            row = _official_row(subset, entry)
            if row.question_id in found:
                raise RecordError(f"question id repeated: {row.question_id}")
            found[row.question_id] = OfficialQuestion(record, entry["image"], row)
        except RecordError as error:
            bad.append(Rejection("pope", record, str(error)))
    if not found:
        reason = bad[0].reason if bad else "the file is empty"
        refuse(path, BESIDE, f"no line is a question of POPE: {reason}", REMEDY)
    rejected += bad
    return list(found.values())


def _official_row(subset: str, entry: dict[str, Any]) -> QuestionRow:
    image_id = image_id_in(file_name_of(entry, "image"))
    question, label = text_of(entry, "text").strip(), text_of(entry, "label")
    if not question:
        raise RecordError("empty question")
    if label not in ("yes", "no"):
        raise RecordError(f"label is neither yes nor no: {label[:40]!r}")
    number = id_of(entry, "question_id")
    return QuestionRow(f"{subset}/{number}", image_id, subset, question, label)
