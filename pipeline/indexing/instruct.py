"""Reads the conversations that `data.instruct` names, or makes some from COCO's own annotations.

LLaVA-Instruct is about images of train2017 alone. For other images with COCO's annotations, an
instances file can stand in its place: it gives yes-no questions about objects, the captions give
requests for a caption. They teach stage 2 the form of an answer and which objects an image shows,
and nothing of what LLaVA-Instruct's descriptions and reasoning teach.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipeline.indexing.annotations import (
    CaptionsFile,
    ConversationRecord,
    ImageRecord,
    InstructFile,
    parse_conversations,
)
from pipeline.indexing.pope import QuestionFiles, coco_name
from pipeline.indexing.records import AnnotationFile, Rejection
from pipeline.indexing.yes_no_questions import (
    MAX_OBJECTS,
    AbsentObjects,
    Instances,
    parse_instances,
    question_about,
    rank_by_hash,
)

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
"""As in LLaVA-1.5, and in `evaluate.caption_question` of the settings files."""


def read_instruct(
    path: Path, listed: Sequence[CaptionsFile], questions: QuestionFiles, seed: int
) -> InstructFile:
    """Read a file in the layout of LLaVA-Instruct, or make conversations from an instances file.

    Args:
        path: The file.
        listed: The captions files, from whose images and captions conversations are made.
        questions: The files of yes-no questions; their instances file is not read twice, and its
            unusable entries are counted there.
        seed: Decides which objects are asked for.

    Raises:
        StageError: The file does not exist, is not JSON, or has another layout.
    """
    instances, rejected, num_objects = questions.instances, list[Rejection](), 0
    if path != questions.instances_path:
        file = AnnotationFile(path, "data.instruct")
        value = file.read_json()
        if isinstance(value, list):
            return parse_conversations(file, value)
        if not (isinstance(value, dict) and "categories" in value):
            file.refuse("neither a list of conversations nor COCO's instances")
        instances = parse_instances(file, value)
        rejected, num_objects = list(instances.rejected), instances.num_entries
    made: list[ConversationRecord] = []
    for captions in listed:
        bad = _other_pictures(instances, captions)
        rejected += bad.values()
        made += make_conversations(instances, captions, seed, without=bad)
    num_bad = sum(rejection.kind == "conversations" for rejection in rejected)
    return InstructFile(made, rejected, len(made) + num_bad, num_objects)


def _other_pictures(instances: Instances, captions: CaptionsFile) -> dict[int, Rejection]:
    """Return the ids that are another picture in the instances file than in the captions file."""
    found = {}
    for image in captions.images:
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
    first_captions: dict[int, str] = {}
    for caption in captions.captions:
        first_captions.setdefault(caption.image_id, caption.caption)
    for image in captions.images:
        if image.image_id in first_captions:
            yield _conversation(image, "caption", CAPTION_REQUEST, first_captions[image.image_id])
        if image.image_id in without:
            continue
        for noun, answer in _objects(image.image_id, instances, absent_objects, seed):
            yield _conversation(image, noun, question_about(noun), answer)


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
