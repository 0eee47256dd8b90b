"""Yes-no questions made from COCO's instances, as in POPE (Li et al. 2023, arXiv 2305.10355).

Half of them ask for an object that is there, half for one that is not. POPE takes only images with
more than three kinds of objects, this takes every image with at least one, so that small data has
questions too; and what an object is often seen with is counted over all that the image shows, not
for one object of it. A right answer is what annotators outlined, who left out a few things.
"""

import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import xxhash

from pipeline.indexing.records import (
    RecordError,
    Rejection,
    as_object,
    id_of,
    lists_of,
    parse_all,
    read_json,
    refuse,
    text_of,
)

BESIDE = "beside data.val.captions"
"""Where the files of questions are looked for, in the place of a settings key."""

REMEDY = "Replace it, or take it away."

MOST_IMAGES = 500
MOST_OBJECTS = 3
"""Objects of an image that are asked for, and as many others, as in POPE."""


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
    """What an instances file says about its pictures; grows by each entry."""

    nouns: dict[int, str] = field(default_factory=dict)
    """Name by category id."""
    shown: dict[int, set[str]] = field(default_factory=dict)
    """Names of what is outlined, by image id."""
    image_names: dict[int, str] = field(default_factory=dict)
    """File name by image id; one that cannot be used is not there."""
    unclear: set[int] = field(default_factory=set)
    """Images with an outline of something unknown: nothing is known to be absent there."""
    rejected: list[Rejection] = field(default_factory=list)
    num_entries: int = 0

    def add_image(self, entry: Any) -> None:
        """Take in an entry of `images`, of which only the name counts."""
        with contextlib.suppress(RecordError):
            image = as_object(entry)
            self.image_names[id_of(image, "id")] = text_of(image, "file_name")

    def add_category(self, _record: str, entry: dict[str, Any]) -> None:
        """Take in an entry of `categories`.

        Raises:
            RecordError: It cannot be used.
        """
        number, noun = id_of(entry, "id"), " ".join(text_of(entry, "name").split())
        if not noun:
            raise RecordError("category without a name")
        if number in self.nouns:
            raise RecordError(f"category id repeated: {number}")
        self.nouns[number] = noun

    def add_object(self, _record: str, entry: dict[str, Any]) -> None:
        """Take in an entry of `annotations`.

        Raises:
            RecordError: It cannot be used.
        """
        image_id = id_of(entry, "image_id")
        try:
            category = id_of(entry, "category_id")
            if category not in self.nouns:
                raise RecordError(f"category unknown: {category}")
        except RecordError:
            self.unclear.add(image_id)
            raise
        self.shown.setdefault(image_id, set()).add(self.nouns[category])


def read_instances(path: Path) -> Instances:
    """Read a file in the layout of COCO's `instances_val2017.json`.

    Raises:
        StageError: No such file, not JSON, or another layout.
    """
    value = read_json(path, BESIDE, REMEDY)
    images, categories, annotations = lists_of(value, "images", "categories", "annotations")
    if categories is None or annotations is None:
        reason = "not an object with the lists 'categories' and 'annotations'"
        refuse(path, BESIDE, reason, REMEDY)
    found = Instances(num_entries=len(categories) + len(annotations))
    for entry in images or ():
        found.add_image(entry)
    for entries, take_in, name in (
        (categories, found.add_category, "categories"),
        (annotations, found.add_object, "annotations"),
    ):
        parse_all(entries, take_in, "objects", f"{path.name}: {name}", found.rejected)
    return found


def make_questions(
    instances: Instances, image_ids: Collection[int], seed: int
) -> list[QuestionRow]:
    """Ask for up to three objects that are there and as many that are not, in three subsets.

    `random` asks for any absent objects, `popular` for those that most images show, and
    `adversarial` for those most often seen together with what the image shows. Objects that are
    there are the same in all three.

    Args:
        instances: What is in the pictures. All of them count for what is seen how often.
        image_ids: Those that may be asked about.
        seed: Decides which images and objects are chosen, each by its own hash, so that another
            image changes little.

    Returns:
        The questions by subset and image, yes and no in turn. For a category that is listed but
        never shown, the answer is always no.
    """
    absent = Absent(instances, seed)
    rows = []
    for image_id in _choose_images(instances, image_ids, seed):
        there = sorted(instances.shown[image_id], key=lambda noun: _rank(seed, image_id, noun))
        for subset, not_there in absent.by_subset(image_id).items():
            pairs = list(zip(there, not_there, strict=False))[:MOST_OBJECTS]
            asked = [turn for pair in pairs for turn in zip(pair, ("yes", "no"), strict=True)]
            rows += [
                QuestionRow(f"{subset}/{image_id}/{number}", image_id, subset, _ask(noun), label)
                for number, (noun, label) in enumerate(asked, start=1)
            ]
    return rows


class Absent:
    """Ranks the objects that an image does not show."""

    def __init__(self, instances: Instances, seed: int) -> None:
        self._shown = instances.shown
        self._nouns = set(instances.nouns.values())
        self._seed = seed
        self._images: Counter[str] = Counter()
        self._images_of_both: Counter[tuple[str, str]] = Counter()
        for shown in instances.shown.values():
            self._images.update(shown)
            self._images_of_both.update(permutations(shown, 2))

    def by_subset(self, image_id: int) -> dict[str, list[str]]:
        """Return them in the order of each subset; where two are equal, the more popular first."""
        shown = self._shown[image_id]
        popular = sorted(self._nouns - shown, key=lambda noun: (-self._images[noun], noun))
        return {
            "random": sorted(popular, key=lambda noun: _rank(self._seed, image_id, noun)),
            "popular": popular,
            "adversarial": sorted(
                popular,
                key=lambda noun: -sum(self._images_of_both[noun, other] for other in shown),
            ),
        }


def _choose_images(instances: Instances, image_ids: Collection[int], seed: int) -> list[int]:
    known = (instances.shown.keys() & set(image_ids)) - instances.unclear
    return sorted(sorted(known, key=lambda image_id: _rank(seed, image_id))[:MOST_IMAGES])


def _rank(*parts: object) -> int:
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def _ask(noun: str) -> str:
    article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"Is there {article} {noun} in the image?"
