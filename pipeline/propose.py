"""Command: writes settings for a folder of your own pictures, and says what was chosen and why.

`make mine PICTURES=folder` runs it, then the stages index and extract with these settings.
"""

import json
import os
import re
from pathlib import Path

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import write_text
from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from pipeline.images.archives import ImageArchive
from pipeline.indexing.image_collection import IMAGE_SUFFIXES
from pipeline.settings import RANDOM
from pipeline.towers.hub import logging_disabled, offline_if_hub_unreachable
from workspace.code_hash import ROOT
from workspace.data_settings import ImagePath
from workspace.errors import StageError

TEMPLATE = ROOT / "configs/laptop.yaml"
"""Its sections from `encoder` on are taken."""

MODEL, OPENAI = "ViT-B-32-quickgelu", "openai"
"""The tower of the template."""

WRITTEN = "# Written by `make mine`, which overwrites it: edit a copy.\n"

NAMES = ("captions", "metadata")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Names of a file among the pictures that is taken for their captions."""

MAX_WORKERS = 8


def propose(pictures: str, captions: str | None, out: Path) -> None:
    """Write a settings file.

    Args:
        pictures: Folder, archive or URL of the pictures.
        captions: File of captions; None: one among the pictures, if there is one.
        out: The settings file; another one of this name is refused.

    Raises:
        SettingsError: There is no picture, or the settings file is not one of this command.
        StageError: The pictures cannot be read.
    """
    if out.exists() and not out.read_text().startswith(WRITTEN):
        raise SettingsError(f"{out}: was not written by this command. Move it away.")
    pictures = _absolute(pictures)
    names = ImageArchive([ImagePath(path=pictures)], key="PICTURES").all_names()
    num_pictures = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    if not num_pictures:
        raise SettingsError(
            f"PICTURES: {pictures} has {len(names)} files, none of them with the name of a "
            f"picture ({', '.join(IMAGE_SUFFIXES)}). Name the folder or archive that holds them."
        )
    _say(f"{num_pictures} pictures in {pictures}, {len(names) - num_pictures} other files")
    captions = _absolute(captions) if captions else captions_among(pictures)
    if captions:
        _say(f"captions of {captions}")
        _say("no second set of pictures: a hash of their ids keeps 20 % for the scores")
    else:
        _say("no captions, so features of all pictures; CAPTIONS=file.csv names some")
    pretrained = choose_weights()
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    _say(f"as many decoding processes as CPU cores: {workers}")
    _say("one in ten pictures and captions may be unusable; each is listed with its reason")
    write_text(out, settings_text(pictures, captions, pretrained, workers))
    _say(f"{out} written")


def captions_among(pictures: str) -> str | None:
    """Return the file of captions in a folder of pictures; None if there is none, or several."""
    paths = [Path(pictures) / f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES]
    found = [str(path) for path in paths if path.is_file()]
    if len(found) > 1:
        _say(f"several files could be the captions, so none is taken: {', '.join(found)}")
    return found[0] if len(found) == 1 else None


def choose_weights() -> str:
    """Return OpenAI's weights of CLIP, downloaded, or random ones where they cannot be had."""
    import open_clip

    weights = open_clip.get_pretrained_cfg(MODEL, OPENAI)
    try:
        with (
            offline_if_hub_unreachable() as failure,
            logging_disabled(),
            reading_foreign_file(StageError),
        ):
            open_clip.download_pretrained(weights)
    except (StageError, OSError) as error:
        reason = f"the model hub cannot be reached ({failure})" if failure else one_line(error)
        _say(
            f"vision tower: CLIP ViT-B/32 with RANDOM weights, because {reason}. Such features are "
            f"for trying the stages alone: with a network, run the same command again, or name a "
            f"checkpoint in encoder.pretrained"
        )
        return RANDOM
    _say("vision tower: OpenAI's CLIP ViT-B/32, 49 patches a picture")
    return OPENAI


def settings_text(pictures: str, captions: str | None, pretrained: str, workers: int) -> str:
    """Return the settings file: its own section `data`, and all other sections of the template."""
    rest = TEMPLATE.read_text()
    rest = rest[rest.index("\nencoder:") :]
    for key, value in {
        "pretrained": pretrained,
        "workers": str(workers),
        "max_failure_rate": "0.1",
    }.items():
        rest = re.sub(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", rest)
    return f"""{WRITTEN}
seed: 0

data:
  source: local
  train: {{images: {json.dumps(pictures)}, captions: {json.dumps(captions)}}}
  val: null                     # a hash of their ids keeps val_share of the images for the scores
  instruct: null                # conversations for stage 2
  instruct_holdout: 0.1         # share of the images
  max_reject_rate: 0.1
  val_share: 0.2

fetch:
  files: []                     # only the source coco downloads
{rest}"""


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _say(text: str) -> None:
    print(f"mine: {text}", flush=True)


def main() -> None:
    """Read the command line and write the settings."""
    parser = command_parser(__doc__)
    parser.add_argument("pictures", help="folder, archive or URL of pictures")
    parser.add_argument("--captions", metavar="FILE", help="a CSV with columns image and caption")
    parser.add_argument("--out", type=Path, default=Path("mine.yaml"), help="(default: mine.yaml)")
    arguments = parser.parse_args()
    run_guarded(lambda: propose(arguments.pictures, arguments.captions, arguments.out))


if __name__ == "__main__":
    main()
