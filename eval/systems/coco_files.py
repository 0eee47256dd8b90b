"""Reads captions by people and captions of a system, both in COCO's formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.systems.files import check_text, read_values, refuse


def read_captions(path: Path) -> dict[int, list[str]]:
    """Return the captions of each image of a captions file.

    Raises:
        StageError: The file is not in COCO's format.
    """
    return captions_of(path, read_values(path))


def captions_of(path: Path, content: Any) -> dict[int, list[str]]:
    """Return the captions of each image in the value of a captions file.

    Raises:
        StageError: The value is not in COCO's format.
    """
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        refuse(
            path,
            "wanted COCO's format, an object with the list 'annotations', or labelled questions: "
            "the references come first, the results of systems after them",
        )
    captions: dict[int, list[str]] = {}
    for image_id, caption in _entries(path, "annotations", annotations):
        captions.setdefault(image_id, []).append(caption)
    return captions


def read_results(path: Path) -> dict[int, str]:
    """Return the caption of each image of a results file.

    Raises:
        StageError: The file is not in COCO's format, or has two captions of an image.
    """
    content = read_values(path)
    if not isinstance(content, list):
        refuse(path, "wanted COCO's format: a list of objects with image_id and caption")
    results: dict[int, str] = {}
    for image_id, caption in _entries(path, "", content):
        if image_id in results:
            refuse(path, f"image {image_id} has two captions, wanted one")
        results[image_id] = caption
    return results


def _entries(path: Path, place: str, entries: list[Any]) -> Iterator[tuple[int, str]]:
    for position, entry in enumerate(entries):
        found = entry if isinstance(entry, dict) else {}
        image_id, caption = found.get("image_id"), found.get("caption")
        where = f"{place}[{position}]"
        # True is an int to isinstance, but no id.
        if type(image_id) is not int or not isinstance(caption, str):
            refuse(path, f"{where}: wanted an object with a number 'image_id' and a text 'caption'")
        yield image_id, check_text(path, where, caption)
