"""Reads the files of captions that `data.train.captions` and `data.val.captions` name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pipeline.images.names import plain_name
from pipeline.indexing.annotations import CaptionRecord, CaptionsFile, ImageRecord
from pipeline.indexing.records import (
    AnnotationFile,
    Entry,
    RecordError,
    Rejection,
    caption_text,
    file_name_field,
    int64_field,
    list_fields,
    parse_all,
    positions,
    require_object,
    str_field,
)
from pipeline.indexing.texts.columns import CAPTION, CAPTION_COLUMNS, IMAGE, name_in
from pipeline.indexing.texts.entries import layout_of, open_entries
from pipeline.indexing.texts.karpathy import is_karpathy, parse_karpathy
from pipeline.indexing.texts.llava import answer_as_caption, image_name
from pipeline.indexing.texts.packed import is_packed, read_packed_captions


def read_captions(
    path: str | Path,
    *,
    key: str,
    split: Literal["val2017", "karpathy", "hash"] = "val2017",
) -> CaptionsFile:
    """Read a file of captions in any layout that `SplitSettings.captions` lists.

    Karpathy's file says of each image whether it is for training. With `data.split: hash`, which
    asks for another division, its images and captions are read without that. With `val2017` all of
    its images would be of one split, those of its val and test too, so it is refused.

    Args:
        path: A path, or an fsspec URL; of tar shards and of tables with image bytes, a pattern too.
        key: The settings key, for the error text.
        split: The setting `data.split`.

    Raises:
        StageError: The file does not exist, has another layout, or lists no image.
    """
    if split != "karpathy" and is_packed(path, key):
        return read_packed_captions(path, key)
    file = AnnotationFile(path, key)
    with open_entries(file, CAPTION_COLUMNS) as content:
        karpathy = isinstance(content, dict) and is_karpathy(content)
        if split == "karpathy" and not karpathy:
            file.refuse(
                "data.split is karpathy, but this is not in the layout of dataset_coco.json"
            )
        if split == "val2017" and karpathy:
            file.refuse(
                "Karpathy's splits, which data.split: val2017 would ignore; write data.split: "
                "karpathy, or hash to cut its images anew"
            )
        if not isinstance(content, dict):
            return _records(file, content)
        if karpathy:
            return parse_karpathy(file, content, with_splits=split == "karpathy")
        return _coco(file, content)


def _coco(file: AnnotationFile, value: dict[str, Any]) -> CaptionsFile:
    """Parse a value in the layout of COCO's `captions_train2017.json`."""
    entries, annotations = list_fields(value, "images", "annotations")
    if entries is None or annotations is None:
        file.refuse("not an object with the lists 'images' and 'annotations'")
    if not entries:
        file.refuse("its list 'images' is empty")
    rejected: list[Rejection] = []
    listed = positions(entries, f"{file.name}: images")
    images = parse_all(listed, _coco_image, "images", rejected)
    texts = positions(annotations, f"{file.name}: annotations")
    captions = parse_all(texts, _coco_caption, "captions", rejected)
    return CaptionsFile(images, captions, rejected, len(entries), len(annotations))


def _coco_image(record: str, entry: dict[str, Any]) -> ImageRecord:
    return ImageRecord(record, int64_field(entry, "id"), file_name_field(entry, "file_name"))


def _coco_caption(record: str, entry: dict[str, Any]) -> CaptionRecord:
    caption = caption_text(str_field(entry, "caption"))
    return CaptionRecord(record, int64_field(entry, "id"), int64_field(entry, "image_id"), caption)


def _records(file: AnnotationFile, entries: Iterator[Entry]) -> CaptionsFile:
    """Parse LLaVA's records or the rows of a table, each of which names its image."""
    layout, entries = layout_of(file, entries, CAPTION_COLUMNS)
    if layout == "conversations":
        return _named_captions(file, entries, image_name, answer_as_caption)
    return _named_captions(file, entries, _row_image, _row_caption)


def _row_image(row: dict[str, Any]) -> str:
    return file_name_field(row, name_in(row, IMAGE))


def _row_caption(row: dict[str, Any]) -> str:
    return caption_text(str_field(row, name_in(row, CAPTION)))


def _named_captions(
    file: AnnotationFile,
    entries: Iterator[Entry],
    name_of: Callable[[dict[str, Any]], str],
    caption_of: Callable[[dict[str, Any]], str],
) -> CaptionsFile:
    """Number the captions by their records; an image is listed where it is named first."""
    images: dict[str, ImageRecord] = {}
    captions, rejected, number = [], list[Rejection](), -1
    for number, (record, value) in enumerate(entries):
        try:
            entry = require_object(value)
            name = name_of(entry)
            key = plain_name(name)
            if key not in images:
                images[key] = ImageRecord(record, None, name)
            image = images[key]
            captions.append(CaptionRecord(record, number, image.file_name, caption_of(entry)))
        except RecordError as error:
            rejected.append(Rejection("captions", record, str(error)))
    if number < 0:
        file.refuse("it holds no record")
    return CaptionsFile(list(images.values()), captions, rejected, len(images), number + 1)
