"""Reads the conversations that `data.instruct` names, or makes some from COCO's own annotations.

LLaVA-Instruct is about images of train2017 alone. For other images with COCO's annotations, an
instances file can stand in its place: it gives yes-no questions about objects, the captions give
requests for a caption. They teach stage 2 the form of an answer and which objects an image shows,
and nothing of what LLaVA-Instruct's descriptions and reasoning teach.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipeline.indexing.annotations import (
    CaptionsFile,
    ConversationRecord,
    ImageRecord,
    InstructFile,
)
from pipeline.indexing.pope import QuestionFiles
from pipeline.indexing.records import AnnotationFile, Entry, Rejection, parse_all
from pipeline.indexing.texts.columns import QUESTION_COLUMNS
from pipeline.indexing.texts.entries import layout_of, open_entries
from pipeline.indexing.texts.llava import conversation_of_row, parse_conversation
from pipeline.indexing.yes_no_questions import (
    MAX_OBJECTS,
    AbsentObjects,
    Instances,
    coco_name,
    parse_instances,
    question_about,
    rank_by_hash,
)

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
"""As in LLaVA-1.5, and in `evaluate.caption_question` of the settings files."""


def read_instruct(
    paths: Sequence[str | Path],
    listed: Sequence[CaptionsFile],
    questions: QuestionFiles,
    seed: int,
) -> InstructFile:
    """Read conversations in any layout that `DataSettings.instruct` lists, or make them.

    Args:
        paths: The files, paths or fsspec URLs; an instances file gives the conversations that are
            made from it. Without files there are no conversations.
        listed: The captions files, from whose images and captions conversations are made.
        questions: The files of yes-no questions; their instances files are not read twice, and
            their unusable entries are counted there.
        seed: Decides which objects are asked for.

    Raises:
        StageError: A file does not exist or has another layout.
    """
    files = [_read_file(path, listed, questions, seed) for path in paths]
    return InstructFile(
        [record for file in files for record in file.conversations],
        [rejection for file in files for rejection in file.rejected],
        sum(file.num_conversations for file in files),
        sum(file.num_objects for file in files),
    )


def _read_file(
    path: str | Path, listed: Sequence[CaptionsFile], questions: QuestionFiles, seed: int
) -> InstructFile:
    if str(path) in questions.instances_paths:
        return _made_of(questions.instances, listed, seed)
    file = AnnotationFile(path, "data.instruct")
    with open_entries(file, QUESTION_COLUMNS) as content:
        if not isinstance(content, dict):
            return _records(file, content)
        if "categories" not in content:
            file.refuse("neither a list of conversations nor COCO's instances")
        instances = parse_instances(file, content)
    made = _made_of(instances, listed, seed)
    rejected = instances.rejected + made.rejected
    return dataclasses.replace(made, rejected=rejected, num_objects=instances.num_entries)


def _records(file: AnnotationFile, entries: Iterator[Entry]) -> InstructFile:
    """Parse LLaVA's records, or rows of a table that are a question and its answer each."""
    layout, entries = layout_of(file, entries, QUESTION_COLUMNS)
    parse = parse_conversation if layout == "conversations" else conversation_of_row
    rejected: list[Rejection] = []
    records = parse_all(entries, parse, "conversations", rejected)
    return InstructFile(records, rejected, len(records) + len(rejected))


def _made_of(instances: Instances, listed: Sequence[CaptionsFile], seed: int) -> InstructFile:
    """Make conversations about the images of all captions files."""
    made: list[ConversationRecord] = []
    rejected: list[Rejection] = []
    for captions in listed:
        bad = _other_pictures(instances, captions)
        rejected += bad.values()
        made += make_conversations(instances, captions, seed, without=bad)
    return InstructFile(made, rejected, len(made) + len(rejected))


def _other_pictures(instances: Instances, captions: CaptionsFile) -> dict[int, Rejection]:
    """Return the ids that are another picture in the instances file than in the captions file."""
    found = {}
    for image in captions.images:
        if image.image_id is None:
            continue
        name = instances.image_names.get(image.image_id)
        if name is not None and coco_name(name) != coco_name(image.file_name):
            reason = (
                f"image of another name: {image.image_id} is {name!r} in the instances, not "
                f"{image.file_name!r}"
            )
            found[image.image_id] = Rejection("conversations", image.record, reason)
    return found


def make_conversations(
    instances: Instances, captions: CaptionsFile, seed: int, without: Collection[int] = ()
) -> Iterator[ConversationRecord]:
    """Ask for the first caption of each image, for up to three of its objects and as many others.

    Each question is a conversation of its own, so that no answer stands before another question:
    with yes and no in turn, a model would learn the turn. Of the absent objects one is any, one
    popular and one often beside the image's objects, as in the three subsets of yes-no questions.

    Args:
        instances: The objects in the images.
        captions: The images and their captions.
        seed: Decides which objects are asked for, each by its own hash.
        without: Ids of images that get no question about objects.
    """
    absent_objects = AbsentObjects(instances, seed)
    first_captions: dict[int | str, str] = {}
    for caption in captions.captions:
        first_captions.setdefault(caption.image, caption.caption)
    for image, image_id in _with_ids(captions.images, instances):
        caption = first_captions.get(image.file_name if image.image_id is None else image.image_id)
        if caption is not None:
            yield _conversation(image, "caption", CAPTION_REQUEST, caption)
        if image_id is None or image_id in without:
            continue
        for noun, answer in _objects(image_id, instances, absent_objects, seed):
            yield _conversation(image, noun, question_about(noun), answer)


def _with_ids(
    images: Sequence[ImageRecord], instances: Instances
) -> Iterator[tuple[ImageRecord, int | None]]:
    """Yield each image and its id in the instances.

    Where the captions file numbers no images, the id is that of the only picture of its name.
    """
    by_name: dict[str, int | None] = {}
    if any(image.image_id is None for image in images):
        for image_id, file_name in instances.image_names.items():
            name = coco_name(file_name)
            by_name[name] = None if name in by_name else image_id
    for image in images:
        if image.image_id is None:
            yield image, by_name.get(coco_name(image.file_name))
        else:
            yield image, image.image_id


def _objects(
    image_id: int, instances: Instances, absent_objects: AbsentObjects, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield objects and whether the image shows them, as many present as absent."""
    shown = instances.shown.get(image_id)
    if not shown or image_id in instances.unclear:
        return
    present = sorted(shown, key=lambda noun: rank_by_hash(seed, image_id, noun))[:MAX_OBJECTS]
    by_rank = zip(*absent_objects.by_subset(image_id).values(), strict=True)
    # Without repeats, in order: the first of each subset, then the second, ...
    absent = dict.fromkeys(noun for nouns in by_rank for noun in nouns)
    for yes, no in zip(present, absent, strict=False):
        yield yes, "Yes"
        yield no, "No"


def _conversation(image: ImageRecord, about: str, question: str, answer: str) -> ConversationRecord:
    return ConversationRecord(
        f"made of {image.record}",
        f"{PurePosixPath(image.file_name).stem} {about}",
        image.file_name,
        [{"role": "user", "text": question}, {"role": "assistant", "text": answer}],
    )
