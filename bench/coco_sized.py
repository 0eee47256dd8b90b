"""Makes what training starts from, as large as COCO 2017 and LLaVA-Instruct-150K, without pictures.

The annotation files are in the official layouts, and `pipeline.index` itself makes the tables of
them. Texts are random words of the demo's language, as long as the real texts; pictures are a
few small JPEGs over and over, told apart by what follows its end; features are random.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

from bench.stores import SPEC, make_random_store
from cache.files.atomic import write_json

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class DataSize:
    """How many records a data set has."""

    images: dict[str, int]
    """By split, as the captions."""
    captions: dict[str, int]
    conversations: dict[str, int]
    """By kind; all are about images of train."""

    def divided_by(self, divisor: int) -> "DataSize":
        """Return a data set of the same shape with so many times fewer records."""
        return DataSize(
            *(
                {name: count // divisor for name, count in counts.items()}
                for counts in (self.images, self.captions, self.conversations)
            )
        )


COCO = DataSize(
    images={"train": 118_287, "val": 5_000},
    captions={"train": 591_753, "val": 25_014},
    conversations={"conversation": 56_681, "detail": 23_240, "complex": 77_791},
)
"""With LLaVA-Instruct's 157,712 conversations."""

PICTURE_SIZE = (128, 96)
"""Pixels."""

CAPTION_WORDS = (8, 15)
TURNS = {"conversation": (3, 6), "detail": (1, 1), "complex": (1, 1)}
QUESTION_WORDS = (6, 16)
ANSWER_WORDS = {"conversation": (8, 40), "detail": (80, 130), "complex": (90, 170)}

SPEC_SMALL = dataclasses.replace(SPEC, model="ViT-demo-32", width=128)
"""The demo's tower has this width; ViT-B/32 has these 49 patches."""

Random = np.random.Generator


def make_workspace(folder: Path, size: DataSize) -> None:
    """Make index, features and settings in an empty folder."""
    write_inputs(folder, size)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.index"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    store = make_random_store(folder / "made", sum(size.images.values()), SPEC_SMALL)
    store.rename(folder / "data/features")


def write_inputs(folder: Path, size: DataSize, num_pictures: int = 1) -> None:
    """Make pictures, some of them different, annotation files and settings in an empty folder."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(sum(size.images.values()))
    image_ids = {
        "train": np.sort(shuffled[: size.images["train"]]),
        "val": np.sort(shuffled[size.images["train"] :]),
    }
    words = demo_words()
    pictures = [draw_picture(rng) for _ in range(num_pictures)]
    raw = folder / "raw"
    raw.mkdir()
    for split, ids in image_ids.items():
        captions = captions_file(rng, words, ids, size.captions[split])
        write_json(raw / f"captions_{split}.json", captions)
        write_pictures(raw / f"{split}.zip", ids, pictures)
    write_json(raw / "instruct.json", list(conversations(rng, words, image_ids["train"], size)))
    write_settings(folder)


def demo_words() -> NDArray[np.object_]:
    """Return the whole words that the demo's tokenizer knows: a token each."""
    tokenizer = json.loads((ROOT / "demo/checkpoints/phi/tokenizer.json").read_text())
    # In this alphabet of bytes, that letter is a space.
    words = [name[1:] for name in tokenizer["model"]["vocab"] if name.startswith("Ġ")]
    return np.array(sorted(word for word in words if word.isalpha()), dtype=object)


def sentence(rng: Random, words: NDArray[np.object_], lengths: tuple[int, int]) -> str:
    """Return random words; the smallest and the greatest number of them are given."""
    drawn = words[rng.integers(0, len(words), rng.integers(lengths[0], lengths[1] + 1))]
    return " ".join(drawn.tolist())


def captions_file(
    rng: Random, words: NDArray[np.object_], image_ids: NDArray[np.int64], count: int
) -> dict[str, Any]:
    """Return the content of a captions file: five an image, and one more for the first ones."""
    captioned = np.resize(image_ids, count).tolist()
    return {
        "info": {"description": "as large as COCO 2017"},
        "licenses": [{"id": 1, "name": "none"}],
        "images": [
            {"id": i, "file_name": file_name(i), "width": 640, "height": 480, "license": 1}
            for i in image_ids.tolist()
        ],
        "annotations": [
            {"id": number, "image_id": i, "caption": sentence(rng, words, CAPTION_WORDS)}
            for number, i in enumerate(captioned)
        ],
    }


def conversations(
    rng: Random, words: NDArray[np.object_], image_ids: NDArray[np.int64], size: DataSize
) -> Iterator[dict[str, Any]]:
    """Yield the records of an instruct file, kind by kind."""
    for kind, count in size.conversations.items():
        for image_id in rng.choice(image_ids, count).tolist():
            said = []
            for turn in range(rng.integers(TURNS[kind][0], TURNS[kind][1] + 1)):
                question = sentence(rng, words, QUESTION_WORDS) + "?" + "\n<image>" * (turn == 0)
                answer = sentence(rng, words, ANSWER_WORDS[kind])
                said += [("human", question), ("gpt", answer)]
            turns = [{"from": role, "value": text} for role, text in said]
            yield {
                "id": Path(file_name(image_id)).stem,
                "image": file_name(image_id),
                "conversations": turns,
            }


def file_name(image_id: int) -> str:
    """Return the name that COCO gives an image."""
    return f"{image_id:012}.jpg"


def draw_picture(rng: Random) -> bytes:
    """Return the JPEG of some coloured ellipses."""
    image = Image.new("RGB", PICTURE_SIZE)
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        corners = np.sort(rng.integers(0, PICTURE_SIZE, (2, 2)), axis=0)
        draw.ellipse(corners.reshape(-1).tolist(), fill=tuple(rng.integers(0, 256, 3).tolist()))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def write_pictures(
    path: Path, image_ids: Iterable[int], pictures: Sequence[bytes], mark: str = ""
) -> None:
    """Write a zip of a few pictures under many names; no two files of a mark are alike."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, image_id in enumerate(image_ids):
            data = pictures[number % len(pictures)] + f"{mark}{image_id}".encode()
            archive.writestr(file_name(image_id), data)


def write_settings(folder: Path) -> None:
    """Write the demo's settings with these inputs, and a row of history for every step."""
    values = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    splits = {
        split: {"images": f"raw/{split}.zip", "captions": f"raw/captions_{split}.json"}
        for split in ("train", "val")
    }
    values["data"] |= splits | {"source": "local", "instruct": "raw/instruct.json"}
    values["llm"]["model"] = str(ROOT / "demo/checkpoints/phi")
    for stage in ("pretrain", "finetune"):
        values[stage] |= {"log_every_steps": 1, "validate_every_steps": 10**9}
    # JSON is YAML, but for numbers like 1e-05, which this does not have.
    write_json(folder / "params.yaml", values)
