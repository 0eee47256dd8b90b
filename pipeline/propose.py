"""Command: writes settings for a folder of your own pictures, and says what was chosen and why.

`make mine PICTURES=folder` runs it, then the stages index and extract with these settings.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import write_text
from cache.files.foreign import reading_foreign_file
from cache.remote.urls import is_url
from cache.texts import one_line
from pipeline.images.archives import ImageArchive
from pipeline.images.names import IMAGE_SUFFIXES, ImageNameError, is_named_as_image
from pipeline.images.zip_file import REMEDY
from pipeline.indexing.annotations import CaptionsFile
from pipeline.indexing.captions import read_captions
from pipeline.indexing.collect import split_by_hash
from pipeline.indexing.image_collection import ImageCollection
from pipeline.indexing.records import Rejection
from pipeline.indexing.rejections import describe_commonest
from pipeline.indexing.texts.packed import is_packed
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
"""Names, without suffix, of files of captions as most people and the Hub call them."""

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")
"""Suffixes of files among the pictures that may be their captions."""

ARCHIVE_SUFFIXES = (".tar", ".parquet", ".zip")
"""Suffixes of files in which pictures are looked for where a folder has none itself."""

MAX_CANDIDATES = 20
"""Most files of such suffixes that are tried; more are texts of another kind."""

MAX_WORKERS = 8

MAX_REJECT_RATE = 0.1
"""Share of unusable pictures and captions that `data.max_reject_rate` allows."""

VAL_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of split val: the usual one, and others for a handful of pictures."""

HANDFUL = 100
"""Most pictures with captions of which a share could put all into one split."""


def propose(pictures: str, captions: str | None, out: Path) -> None:
    """Write a settings file.

    Args:
        pictures: Folder, archive or URL of the pictures.
        captions: File of captions; None: one among the pictures, if there is one.
        out: The settings file; another one of this name is refused.

    Raises:
        SettingsError: There is no picture, or the settings file is not one of this command.
        StageError: The pictures or captions cannot be read.
    """
    _check_own(out)
    pictures = _absolute(pictures, "PICTURES")
    data = None if captions else coco_section(Path(pictures))
    if data is None:
        data = data_section(pictures, captions and _absolute(captions, "CAPTIONS"))
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    _say(f"as many decoding processes as CPU cores: {workers}")
    _say("one in ten pictures and captions may be unusable; each is listed with its reason")
    _say("vision tower: CLIP ViT-B/32, 49 patches a picture; OpenAI's weights of 0.35 GB")
    pretrained = choose_weights()
    write_text(out, settings_text(data, pretrained, workers))
    _say(f"{out} written")


def _check_own(out: Path) -> None:
    """Refuse to replace a file that this command did not write.

    Raises:
        SettingsError: There is another file, a link or a folder.
    """
    if not os.path.lexists(out):
        return
    if not out.is_symlink() and out.is_file():
        with out.open("rb") as file:
            if file.read(len(WRITTEN)) == WRITTEN.encode():
                return
    raise SettingsError(f"{out}: was not written by this command. Move it away.")


def coco_section(folder: Path) -> str | None:
    """Return the section `data` of a folder in COCO's layout; None if a file is missing.

    Conversations are those of the only `llava_*.json` in it.
    """
    splits = []
    for split in ("train", "val"):
        name = f"{split}2017"
        images = [folder / name, folder / f"{name}.zip"]
        captions = [base / f"captions_{name}.json" for base in (folder, folder / "annotations")]
        found = [next(filter(Path.exists, paths), None) for paths in (images, captions)]
        if None in found:
            return None
        splits.append([str(path) for path in found])
    conversations = [str(path) for path in folder.glob("llava_*.json")]
    instruct = conversations[0] if len(conversations) == 1 else None
    _say(f"COCO's layout in {folder}: its pictures and captions of train2017 and val2017")
    _say(f"conversations of {instruct}" if instruct else "no conversations: no llava_*.json alone")
    return _section(splits[0], splits[1], instruct, VAL_SHARES[0])


def data_section(pictures: str, captions: str | None) -> str:
    """Return the section `data` of pictures, and of captions named or found among them."""
    pictures, archive = find_pictures(pictures)
    file: CaptionsFile | None
    if captions:
        file = read_captions(captions, key="CAPTIONS", split="hash")
    else:
        captions, file = captions_among(pictures)
    val_share: float | None = VAL_SHARES[0]
    if file:
        check_captions(file, archive, str(captions))
        val_share = choose_val_share(archive, file)
        if val_share is None:
            _say("the captions are left out: training needs a picture to learn from, and another")
            captions = None
        else:
            _say(f"a hash of their ids keeps about {val_share:.0%} of these pictures for scores")
    else:
        _say("no captions, so features of all pictures; CAPTIONS=file.csv names some")
    return _section([pictures, captions], None, None, val_share or VAL_SHARES[0])


def check_captions(file: CaptionsFile, archive: ImageArchive, path: str) -> None:
    """Say how many captions can be used, before minutes are spent on their pictures.

    Raises:
        SettingsError: Fewer than nine in ten.
    """
    missing: dict[str, str] = {}
    for image in file.images:
        try:
            archive.find(image.file_name)
        except ImageNameError as error:
            missing[image.file_name] = str(error)
    listed: dict[object, str] = {image.image_id: image.file_name for image in file.images}
    names = [listed.get(caption.image, str(caption.image)) for caption in file.captions]
    bad = [rejection for rejection in file.rejected if rejection.kind == "captions"]
    bad += [
        Rejection("captions", caption.record, missing[name])
        for caption, name in zip(file.captions, names, strict=True)
        if name in missing
    ]
    usable = {name for name in names if name not in missing}
    others = f"; {len(bad)} others cannot be used" if bad else ""
    _say(f"{file.num_captions - len(bad)} captions of {len(usable)} pictures in {path}{others}")
    num_left = sum(map(is_named_as_image, archive.all_names())) - len(usable)
    if num_left > 0:
        _say(f"{num_left} pictures have no caption, and get no features")
    if len(bad) > MAX_REJECT_RATE * file.num_captions:
        raise SettingsError(
            f"{path}: {len(bad)} of {file.num_captions} captions cannot be used, wanted at most "
            f"one in ten. {describe_commonest(bad)} Mend the file, or write the settings by hand."
        )


def find_pictures(path: str) -> tuple[str, ImageArchive]:
    """Return where the pictures are: at a path or, if a folder has none, in its archives.

    Raises:
        SettingsError: There is no picture.
        StageError: The path cannot be read.
    """
    archive = ImageArchive([ImagePath(path=path)], key="PICTURES")
    names = archive.all_names()
    num_pictures = sum(map(is_named_as_image, names))
    if num_pictures:
        _say(f"{num_pictures} pictures in {path}")
        return path, archive
    for suffix in ARCHIVE_SUFFIXES:
        if any(Path(path).glob(f"*{suffix}")):
            _say(f"no picture in {path} itself, so those in its archives")
            return find_pictures(f"{glob.escape(path)}/*{suffix}")
    raise SettingsError(
        f"PICTURES: {path} has {len(names)} files, none of them with the name of a picture "
        f"({', '.join(sorted(IMAGE_SUFFIXES))}). Name the folder or archive that has them."
    )


def captions_among(pictures: str) -> tuple[str | None, CaptionsFile | None]:
    """Return the one file among the pictures that holds captions, and its records.

    Of shards and tables, this is the path of the pictures itself.
    """
    found: dict[str, CaptionsFile] = {}
    for path in _candidates(pictures):
        try:
            file = read_captions(path, key="captions", split="hash")
        except StageError as error:
            reason = str(error).removeprefix("captions: ").removesuffix(f" {REMEDY}")
            _say(f"not taken for captions: {reason}")
            continue
        if file.captions:
            found[path] = file
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        _say(f"several files may be the captions; name one with CAPTIONS: {', '.join(found)}")
    return None, None


def _candidates(pictures: str) -> Sequence[str]:
    """Return the paths that may hold captions: those of the usual names in a folder, or else all of
    the suffixes, unless they are many. As with pictures, a link leads nowhere out of the folder.
    """
    if is_packed(pictures, "PICTURES"):
        return (pictures,)
    folder = Path(pictures)
    if not folder.is_dir():
        return ()
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES]
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    outside = [path for path in paths if not path.resolve().is_relative_to(folder.resolve())]
    for path in outside:
        _say(f"not taken for captions: {path}, a link out of the folder; CAPTIONS=file names it")
    paths = [path for path in paths if path not in outside]
    usual = [path for path in paths if path.stem.lower() in NAMES]
    return [str(path) for path in usual or (paths if len(paths) <= MAX_CANDIDATES else ())]


def choose_val_share(archive: ImageArchive, file: CaptionsFile) -> float | None:
    """Return the first share with which both splits get a picture; None if none does."""
    if len(file.images) > HANDFUL:
        return VAL_SHARES[0]
    images = ImageCollection({"train": archive})
    images.add_listed({"train": file.images})
    # Without a usable picture, the index stage says why.
    if not images.rows:
        return VAL_SHARES[0]
    for share in VAL_SHARES:
        if len({split_by_hash(image_id, share) for image_id in images.rows}) > 1:
            return share
    return None


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
        reason = one_line(error)
        if failure:
            reason = f"the model hub cannot be reached ({failure.rstrip('.')})"
        _say(
            f"RANDOM weights instead, because {reason}. Such features only serve to try the "
            f"stages: run the same command again where there is a network, or name a checkpoint "
            f"in encoder.pretrained"
        )
        return RANDOM
    return OPENAI


def settings_text(data: str, pretrained: str, workers: int) -> str:
    """Return the settings file: a section `data`, and all other sections of the template."""
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
{data}  instruct_holdout: 0.1         # share of the images
  max_reject_rate: {MAX_REJECT_RATE}

fetch:
  files: []                     # only the source coco downloads
{rest}"""


def _section(
    train: Sequence[str | None],
    val: Sequence[str | None] | None,
    instruct: str | None,
    val_share: float,
) -> str:
    """Return the lines of section `data` about splits, each given as images and captions."""
    text = f"  train:\n{_split(train)}"
    if val:
        text += f"  val:\n{_split(val)}"
    else:
        text += "  val: null                     # a hash of ids keeps val_share of the images\n"
    return f"{text}  instruct: {_quoted(instruct)}\n  val_share: {val_share}\n"


def _split(paths: Sequence[str | None]) -> str:
    return f"    images: {_quoted(paths[0])}\n    captions: {_quoted(paths[1])}\n"


def _quoted(text: str | None) -> str:
    """Return a text as YAML in double quotes, with an escape for all that is not printable."""
    if text is None:
        return "null"
    return '"' + "".join(map(_quoted_sign, text)) + '"'


def _quoted_sign(sign: str) -> str:
    if sign in '"\\':
        return "\\" + sign
    return sign if sign.isprintable() else f"\\U{ord(sign):08x}"


def _absolute(path: str, key: str) -> str:
    """Return a URL as it is, and of a path the absolute one without `..`, for people to read."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{key}: {path!r} is not UTF-8, as settings are. Rename it.") from None
    return path if is_url(path) else os.path.abspath(Path(path).expanduser())  # noqa: PTH100


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
