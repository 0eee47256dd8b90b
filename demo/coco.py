"""Writes the world in the official layouts: COCO captions and instances, LLaVA-Instruct."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from demo.captions import captions
from demo.draw import SHORT_SIDE, picture_size, square_origin
from demo.questions import ask
from demo.scenes import NOUNS, Place, Scene

Record = dict[str, Any]

IMAGE_MARKER = "<image>"
_DATE = "2017-11-14 11:18:45"
_LICENSE = {
    "url": "http://www.apache.org/licenses/LICENSE-2.0",
    "id": 1,
    "name": "Apache License 2.0",
}
_TURNS = (3, 4, 5)
_CONVERSATIONS_WEIGHTS = (0.75, 0.25)
"""Shares of the images with one conversation, and with two."""


def file_name(image_id: int) -> str:
    """Return the file name of an image, as in COCO 2017."""
    return f"{image_id:012d}.jpg"


def captions_file(scenes: dict[int, Scene], split: str, rng: random.Random) -> Record:
    """Return the content of `captions_<split>.json`, with five captions per image.

    Args:
        scenes: Scene by image id.
        split: "train2017" or "val2017".
        rng: Source of all random choices.
    """
    annotations: list[Record] = []
    for image_id, scene in scenes.items():
        for text in captions(scene, rng):
            record = {"image_id": image_id, "id": len(annotations) + 1, "caption": text}
            annotations.append(record)
    return {**_head(scenes, split), "annotations": annotations}


def instances_file(scenes: dict[int, Scene], split: str) -> Record:
    """Return the content of `instances_<split>.json`: the square of every thing, in pixels."""
    annotations: list[Record] = []
    for image_id, scene in scenes.items():
        for kind in scene.kinds:
            for place in kind.places:
                record = {
                    **_shape(scene, place),
                    "iscrowd": 0,
                    "image_id": image_id,
                    "category_id": NOUNS.index(kind.noun) + 1,
                    "id": len(annotations) + 1,
                }
                annotations.append(record)
    categories = [
        {"supercategory": "thing", "id": number, "name": noun}
        for number, noun in enumerate(NOUNS, start=1)
    ]
    return {**_head(scenes, split), "annotations": annotations, "categories": categories}


def instruct_file(scenes: dict[int, Scene], rng: random.Random) -> list[Record]:
    """Return the content of `llava_instruct_150k.json`.

    A quarter of the images has two conversations of the same id, as in the official file.
    """
    records = [
        {
            "id": f"{image_id:012d}",
            "image": file_name(image_id),
            "conversations": list(_conversation(scene, rng)),
        }
        for image_id, scene in scenes.items()
        for _ in range(rng.choices((1, 2), _CONVERSATIONS_WEIGHTS)[0])
    ]
    rng.shuffle(records)
    return records


def _conversation(scene: Scene, rng: random.Random) -> Iterator[dict[str, str]]:
    for number, (question, answer) in enumerate(ask(scene, rng, rng.choice(_TURNS))):
        if number == 0:
            before = f"{IMAGE_MARKER}\n{question}"
            question = rng.choice((before, f"{question}\n{IMAGE_MARKER}"))
        yield {"from": "human", "value": question}
        yield {"from": "gpt", "value": answer}


def _head(scenes: dict[int, Scene], split: str) -> Record:
    info = {
        "description": "A small drawn world in the layout of COCO 2017",
        "url": "",
        "version": "1.0",
        "year": 2017,
        "contributor": "patchcache",
        "date_created": "2017/09/01",
    }
    images = [_image(image_id, scene, split) for image_id, scene in scenes.items()]
    return {"info": info, "licenses": [_LICENSE], "images": images}


def _image(image_id: int, scene: Scene, split: str) -> Record:
    width, height = picture_size(scene)
    return {
        "license": _LICENSE["id"],
        "file_name": file_name(image_id),
        "coco_url": f"http://images.cocodataset.org/{split}/{file_name(image_id)}",
        "height": height,
        "width": width,
        "date_captured": _DATE,
        "flickr_url": "",
        "id": image_id,
    }


def _shape(scene: Scene, place: Place) -> Record:
    """Return the square of a thing as COCO's outline, area and box."""
    origin_x, origin_y = square_origin(scene)
    left, top, right, bottom = _pixels(place.box, (origin_x, origin_y))
    outline = [left, top, right, top, right, bottom, left, bottom]
    width, height = round(right - left, 2), round(bottom - top, 2)
    return {
        "segmentation": [outline],
        "area": round(width * height, 2),
        "bbox": [left, top, width, height],
    }


def _pixels(box: Sequence[float], origin: tuple[int, int]) -> list[float]:
    return [round(origin[i % 2] + edge * SHORT_SIDE, 2) for i, edge in enumerate(box)]
