"""Section `data` of the settings, which all stages read."""

from dataclasses import dataclass
from typing import Literal

from cache.errors import SettingsError

Split = Literal["train", "val", "test"]
"""Splits of the images: `test` exists with Karpathy's split alone."""

SplitName = Literal["val2017", "karpathy", "hash"]
"""Ways to split the images."""


@dataclass(frozen=True, kw_only=True)
class ImagePath:
    """Where images are, and how texts name them."""

    path: str
    """A folder, a `.zip`, a `.tar` (webdataset), a `.parquet` with image bytes, a pattern such as
    `shards/*.tar`, or the fsspec URL of any of these. Nothing is unpacked."""
    prefix: str = ""
    """Folder that texts put before the names of these files: with `gqa/images`, a text's
    `gqa/images/1.jpg` is the file `1.jpg` here."""

    def __post_init__(self) -> None:
        parts = self.prefix.rstrip("/").split("/")
        if self.prefix and any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"prefix is {self.prefix!r}, wanted folders like coco/train2017")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Where the images and captions of one split are."""

    images: str | ImagePath | tuple[str | ImagePath, ...]
    """A path, or a section of `path` and `prefix`, or a list of these."""
    captions: str | tuple[str, ...] | None = None
    """One or more files of captions, or none: COCO's JSON, LLaVA's JSON or JSONL, a CSV, TSV, JSONL
    or parquet with columns `image` and `caption`, or webdataset shards with `.txt` or `.json`."""

    @property
    def image_paths(self) -> tuple[ImagePath, ...]:
        """All places of images."""
        given = self.images if isinstance(self.images, tuple) else (self.images,)
        return tuple(ImagePath(path=i) if isinstance(i, str) else i for i in given)

    @property
    def caption_paths(self) -> tuple[str, ...]:
        """All files of captions."""
        return _paths(self.captions)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`: the inputs of the stages fetch and index."""

    source: Literal["demo", "coco", "local"]
    """Origin of the files below: rendered by the demo, downloaded, or already here."""
    train: SplitSettings
    val: SplitSettings | None = None
    """None: a hash of their ids puts `val_share` of the images of `train` into split val."""
    instruct: str | tuple[str, ...] | None = None
    """One or more files of conversations about images of either split, or none: LLaVA's JSON or
    JSONL, or a CSV, TSV, JSONL or parquet with columns `image`, `question` and `answer`. Or COCO's
    instances, from which, with the captions, short conversations are made."""
    instruct_holdout: float
    """Share of the images whose conversations are held out for evaluation, 0 to 1."""
    max_reject_rate: float
    """Share of rejected records of a kind above which the index stage fails, 0 to 1."""
    follow_links: bool = False
    """Whether symbolic links in a folder of images may lead out of it."""
    split: SplitName = "val2017"
    """`val2017`: an image is of the split whose captions list it. `karpathy`: the captions are
    Karpathy's `dataset_coco.json`, whose splits count (train and restval, val, test). `hash`: a
    hash of an image's id decides its split, whatever other images there are. With the last two
    there is one set of images: `val` is null, or names the same as `train`."""
    val_share: float = 0.2
    """With splits by hash, the share of the images in split val, 0 to 1, met about: each image is
    decided for itself."""

    def __post_init__(self) -> None:
        check_share("instruct_holdout", self.instruct_holdout)
        check_share("max_reject_rate", self.max_reject_rate)
        check_share("val_share", self.val_share)
        if self.split != "val2017" and self.val not in (None, self.train):
            raise ValueError(
                f"split is {self.split}, which cuts one set of images, so val must be null or name "
                f"the same images and captions as train; train names {self.train.images} and "
                f"{self.train.captions}, val {self.val.images} and {self.val.captions}"
            )

    @property
    def split_name(self) -> SplitName:
        """How images are split, for reports: val2017, karpathy or hash."""
        return "hash" if self.val is None and self.split == "val2017" else self.split

    @property
    def splits(self) -> dict[Split, SplitSettings]:
        """The images and captions to read, each once, by the split that they are named for."""
        if self.val is None or self.split_name != "val2017":
            return {"train": self.train}
        return {"train": self.train, "val": self.val}

    @property
    def instruct_paths(self) -> tuple[str, ...]:
        """All files of conversations."""
        return _paths(self.instruct)


def _paths(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless a setting is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")


def check_writable_url(name: str, url: str) -> None:
    """Raise a ValueError unless a setting is a URL of a kind that can be written here."""
    # Imports fsspec, which most commands need not load.
    from cache.remote.urls import check_writable, filesystem_of

    try:
        check_writable(url)
        # Refuses a kind of URL whose package is missing.
        filesystem_of(url)
    except SettingsError as error:
        raise ValueError(f"{name}: {error}") from None
