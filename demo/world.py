"""Renders the demo's data set: `python -m demo.world DIR [--train N] [--val N] [--seed N]`.

Writes the same files as a download of COCO 2017 and LLaVA-Instruct-150K: two zips of JPEGs,
captions and instances of both splits, and conversations about training images. The same arguments
give the same bytes.
"""

import io
import random
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import replacing, write_json
from demo.coco import captions_file, file_name, instances_file, instruct_file
from demo.draw import draw_scene
from demo.scenes import Scene, scene_at

NUM_TRAIN = 3000
NUM_VAL = 300

_JPEG_QUALITY = 90
_ZIP_DATE = (2017, 9, 1, 0, 0, 0)


def write_world(root: Path, num_train: int, num_val: int, seed: int) -> None:
    """Render the world into a folder, in the official layouts.

    Args:
        root: The folder; `train2017.zip`, `val2017.zip`, `annotations/*` and
            `llava_instruct_150k.json` appear there, each whole or not at all.
        num_train: Number of images in `train2017.zip`, with ids from 1.
        num_val: Number of images in `val2017.zip`, with the ids that follow.
        seed: Every seed gives other pictures.

    Raises:
        SettingsError: A number of images below 1.
    """
    for name, number in (("--train", num_train), ("--val", num_val)):
        if number < 1:
            raise SettingsError(f"{name} is {number}, wanted 1 or more images.")
    train = split_scenes("train2017", seed, first_id=1, num_images=num_train)
    val = split_scenes("val2017", seed, first_id=num_train + 1, num_images=num_val)
    for split, scenes in (("train2017", train), ("val2017", val)):
        _write_images(root / f"{split}.zip", split, scenes)
        rng = random.Random(f"{seed}/captions/{split}")
        annotations = root / "annotations"
        write_json(annotations / f"captions_{split}.json", captions_file(scenes, split, rng))
        write_json(annotations / f"instances_{split}.json", instances_file(scenes, split))
    rng = random.Random(f"{seed}/conversations")
    write_json(root / "llava_instruct_150k.json", instruct_file(train, rng))


def split_scenes(split: str, seed: int, first_id: int, num_images: int) -> dict[int, Scene]:
    """Return the scenes of a split by image id."""
    return {first_id + index: scene_at(seed, split, index) for index in range(num_images)}


def _write_images(path: Path, split: str, scenes: dict[int, Scene]) -> None:
    progress = tqdm(scenes.items(), desc=path.name, unit="image", disable=not sys.stderr.isatty())
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for image_id, scene in progress:
            data = io.BytesIO()
            draw_scene(scene).save(data, "JPEG", quality=_JPEG_QUALITY)
            # A member with a name alone would get the current time.
            member = zipfile.ZipInfo(f"{split}/{file_name(image_id)}", _ZIP_DATE)
            archive.writestr(member, data.getvalue())


def main() -> None:
    """Read the command line and render."""
    parser = command_parser(__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--train", type=int, default=NUM_TRAIN, help="images of split train (default: %(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=NUM_VAL, help="images of split val (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pictures (default: %(default)s)"
    )
    arguments = parser.parse_args()

    def work() -> None:
        write_world(arguments.root, arguments.train, arguments.val, arguments.seed)
        print(f"world: {arguments.train} + {arguments.val} images in {arguments.root}")

    run_guarded(work)


if __name__ == "__main__":
    main()
