"""Makes yes-no questions from COCO's instances, as in POPE (Li et al. 2023, arXiv 2305.10355).

Half of the questions ask for an object that is present, half for one that is absent. Two things
differ from POPE: every image with at least one object is used, not only those with more than three
kinds, so that small data sets have questions too; and co-occurrence is counted over all objects of
the image. An answer is right if the annotators agree, who left out a few objects.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from pipeline.indexing.records import (
    COCO_2014,
    AnnotationFile,
    RecordError,
    Rejection,
    int64_field,
    list_fields,
    parse_all,
    positions,
    require_object,
    str_field,
)

KEY = "beside data.val.captions"
"""Where the files of questions are found, in place of a settings key in error texts."""

REMEDY = "Replace it, or take it away."

MAX_IMAGES = 500
MAX_OBJECTS = 3
"""Present objects of an image that are asked for, and as many absent ones, as in POPE."""


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A row of `pope.parquet`."""

    question_id: str
    image_id: int
    subset: str
    question: str
    label: str


@dataclass
class Instances:
    """The objects in the images of an instances file; grows with each entry."""

    nouns: dict[int, str] = field(default_factory=dict)
    """Name by category id."""
    shown: dict[int, set[str]] = field(default_factory=dict)
    """Names of the outlined objects, by image id."""
    image_names: dict[int, str] = field(default_factory=dict)
    """File name by image id, of the usable entries."""
    unclear: set[int] = field(default_factory=set)
    """Images with an outline of unknown category, in which no object is known to be absent."""
    rejected: list[Rejection] = field(default_factory=list)
    num_entries: int = 0

    def add_image(self, entry: Any) -> None:
        """Add the name of an entry of `images`; an unusable one is ignored."""
        with contextlib.suppress(RecordError):
            image = require_object(entry)
            self.image_names[int64_field(image, "id")] = str_field(image, "file_name")

    def add_category(self, _record: str, entry: dict[str, Any]) -> None:
        """Add an entry of `categories`.

        Raises:
            RecordError: The entry cannot be used.
        """
        number, noun = int64_field(entry, "id"), " ".join(str_field(entry, "name").split())
        if not noun:
            raise RecordError("category without a name")
        if number in self.nouns:
            raise RecordError(f"category id repeated: {number}")
        self.nouns[number] = noun

    def add_object(self, _record: str, entry: dict[str, Any]) -> None:
        """Add an entry of `annotations`.

        Raises:
            RecordError: The entry cannot be used.
        """
        image_id = int64_field(entry, "image_id")
        try:
            category = int64_field(entry, "category_id")
            if category not in self.nouns:
                raise RecordError(f"category unknown: {category}")
        except RecordError:
            self.unclear.add(image_id)
            raise
        self.shown.setdefault(image_id, set()).add(self.nouns[category])


def read_instances(path: Path) -> Instances:
    """Read a file in the layout of COCO's `instances_val2017.json`.

    Raises:
        StageError: The file does not exist, is not JSON, or has another layout.
    """
    file = AnnotationFile(path, KEY, REMEDY)
    return parse_instances(file, file.read_json())


def parse_instances(file: AnnotationFile, value: Any) -> Instances:
    """Parse the value in a file of the layout of COCO's `instances_val2017.json`.

    Raises:
        StageError: The value has another layout.
    """
    images, categories, annotations = list_fields(value, "images", "categories", "annotations")
    if categories is None or annotations is None:
        file.refuse("not an object with the lists 'categories' and 'annotations'")
    instances = Instances(num_entries=len(categories) + len(annotations))
    for entry in images or ():
        instances.add_image(entry)
    rejected = instances.rejected
    named = positions(categories, f"{file.name}: categories")
    parse_all(named, instances.add_category, "objects", rejected)
    outlined = positions(annotations, f"{file.name}: annotations")
    parse_all(outlined, instances.add_object, "objects", rejected)
    return instances


def merge_instances(files: Mapping[Path, Instances]) -> Instances:
    """Return the objects of several files together.

    Of an id that is another picture in each of two files, nothing is asked: the later file's entry
    is rejected.

    Raises:
        StageError: Two files have other categories, so that an object that one does not outline
            is not known to be absent.
    """
    if len(files) == 1:
        return next(iter(files.values()))
    merged = Instances()
    for path, instances in files.items():
        merged.nouns = merged.nouns or instances.nouns
        if instances.nouns != merged.nouns:
            others = ", ".join(str(other) for other in files if other != path)
            AnnotationFile(path, KEY, REMEDY).refuse(f"other categories than in {others}")
        merged.rejected += instances.rejected
        merged.num_entries += instances.num_entries
        merged.unclear |= instances.unclear
        for image_id, nouns in instances.shown.items():
            merged.shown[image_id] = merged.shown.get(image_id, set()) | nouns
        for image_id, name in instances.image_names.items():
            known = merged.image_names.setdefault(image_id, name)
            if coco_name(known) != coco_name(name):
                reason = f"image of another name: {image_id} is {known!r} and {name!r}"
                record = f"{path.name}: image {image_id}"
                merged.rejected.append(Rejection("objects", record, reason))
                merged.num_entries += 1
                merged.unclear.add(image_id)
    return merged


def coco_name(file_name: str) -> str:
    """Return a picture's name in all releases of COCO, without folder and suffix."""
    return COCO_2014.sub("", PurePosixPath(file_name).stem)


def make_questions(
    instances: Instances, image_ids: Collection[int], seed: int
) -> list[QuestionRow]:
    """Ask for up to three present objects and as many absent ones, in three subsets.

    The absent objects are any in `random`, those in most images in `popular`, and those that most
    often occur with the image's objects in `adversarial`. The present objects are the same in all
    three.

    Args:
        instances: The objects in the images; all images count for how often objects occur.
        image_ids: Images that may be asked about.
        seed: Decides which images and objects are chosen, each by its own hash, so that an
            additional image changes little.

    Returns:
        The questions by subset and image, yes and no alternating. The answer is always no for a
        category that no image shows.
    """
    absent_objects = AbsentObjects(instances, seed)
    known = (instances.shown.keys() & set(image_ids)) - instances.unclear
    chosen = sorted(known, key=lambda image_id: rank_by_hash(seed, image_id))[:MAX_IMAGES]
    rows = []
    for image_id in sorted(chosen):
        present = sorted(
            instances.shown[image_id], key=lambda noun: rank_by_hash(seed, image_id, noun)
        )
        for subset, absent in absent_objects.by_subset(image_id).items():
            pairs = list(zip(present, absent, strict=False))[:MAX_OBJECTS]
            turns = [turn for pair in pairs for turn in zip(pair, ("yes", "no"), strict=True)]
            rows += [
                QuestionRow(
                    f"{subset}/{image_id}/{number}", image_id, subset, question_about(noun), label
                )
                for number, (noun, label) in enumerate(turns, start=1)
            ]
    return rows


class AbsentObjects:
    """Ranks the objects that an image does not show."""

    def __init__(self, instances: Instances, seed: int) -> None:
        self._shown = instances.shown
        self._nouns = set(instances.nouns.values())
        self._seed = seed
        self._num_images: Counter[str] = Counter()
        self._num_images_of_both: Counter[tuple[str, str]] = Counter()
        for shown in instances.shown.values():
            self._num_images.update(shown)
            self._num_images_of_both.update(permutations(shown, 2))

    def by_subset(self, image_id: int) -> dict[str, list[str]]:
        """Return the absent objects in the order of each subset; the more popular wins a tie."""
        shown = self._shown[image_id]
        popular = sorted(self._nouns - shown, key=lambda noun: (-self._num_images[noun], noun))
        return {
            "random": sorted(popular, key=lambda noun: rank_by_hash(self._seed, image_id, noun)),
            "popular": popular,
            "adversarial": sorted(
                popular,
                key=lambda noun: -sum(self._num_images_of_both[noun, other] for other in shown),
            ),
        }


def rank_by_hash(*parts: object) -> int:
    """Return a 64-bit hash of some values, by which images and objects are put in order."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def question_about(noun: str) -> str:
    """Return POPE's question whether an image shows an object."""
    article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"Is there {article} {noun} in the image?"
