"""Parses the layout of Karpathy's `dataset_coco.json`, which splits COCO 2014 as papers do.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments", 2015. His files of Flickr8k and Flickr30k
have the same layout without COCO's ids.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.indexing.annotations import CaptionRecord, CaptionsFile, ImageRecord
from pipeline.indexing.records import (
    COCO_2014,
    AnnotationFile,
    Entry,
    RecordError,
    Rejection,
    caption_text,
    file_name_field,
    int64_field,
    parse_all,
    positions,
    require_object,
    str_field,
)
from workspace.data_settings import Split

SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""The split of each split of the file: restval is the part of val2014 that is trained on."""


def is_karpathy(value: dict[str, Any]) -> bool:
    """Whether a JSON object has the layout."""
    images = value.get("images")
    if not isinstance(images, list) or isinstance(value.get("annotations"), list):
        return False
    first = next((image for image in images if isinstance(image, dict)), {})
    return "sentences" in first


def parse_karpathy(
    file: AnnotationFile, value: dict[str, Any], *, with_splits: bool
) -> CaptionsFile:
    """Parse a value of this layout.

    Args:
        file: The file, for the positions of its records.
        value: The value for which `is_karpathy` is true.
        with_splits: Whether the images get the splits of the file.
    """
    rejected: list[Rejection] = []
    entries = value["images"]
    has_ids = any(isinstance(entry, dict) and "cocoid" in entry for entry in entries)

    def parse_image(record: str, entry: dict[str, Any]) -> ImageRecord:
        name = file_name_field(entry, "filename")
        image_id = int64_field(entry, "cocoid") if has_ids else None
        split = _split(entry) if with_splits else None
        folder = str_field(entry, "filepath") + "/" if "filepath" in entry else ""
        file_name = file_name_field({"filename": folder + name}, "filename")
        name_of_2017 = COCO_2014.sub("", name)
        others = (name_of_2017,) if name_of_2017 != name else ()
        return ImageRecord(record, image_id, file_name, others, split)

    def parse_caption(record: str, entry: dict[str, Any]) -> CaptionRecord:
        image = entry["image"]
        if image is None:
            raise RecordError("image unknown or rejected: the image of this sentence")
        sentence = require_object(entry["sentence"])
        caption = caption_text(str_field(sentence, "raw"))
        return CaptionRecord(record, int64_field(sentence, "sentid"), image, caption)

    listed = positions(entries, f"{file.name}: images")
    images = parse_all(listed, parse_image, "images", rejected)
    of_images = {
        image.record: image.file_name if image.image_id is None else image.image_id
        for image in images
    }
    captions = parse_all(_sentences(file, entries, of_images), parse_caption, "captions", rejected)
    num_bad = sum(rejection.kind == "captions" for rejection in rejected)
    return CaptionsFile(images, captions, rejected, len(entries), len(captions) + num_bad)


def _split(entry: dict[str, Any]) -> Split:
    name = str_field(entry, "split")
    if name not in SPLITS:
        raise RecordError(f"split is none of {', '.join(SPLITS)}: {name[:40]!r}")
    return SPLITS[name]


def _sentences(
    file: AnnotationFile, entries: list[Any], of_images: dict[str, int | str]
) -> Iterator[Entry]:
    """Yield each sentence with what its caption calls its image, None for a rejected image."""
    for image, entry in positions(entries, f"{file.name}: images"):
        found = entry.get("sentences") if isinstance(entry, dict) else None
        sentences = found if isinstance(found, list) else []
        for record, sentence in positions(sentences, f"{image}.sentences"):
            yield record, {"sentence": sentence, "image": of_images.get(image)}
