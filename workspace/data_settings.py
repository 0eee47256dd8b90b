"""Section `data` of the settings, which all stages read."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Paths of the images and captions of one split."""

    images: str
    """A folder, or a zip file, which is read in place."""
    captions: str
    """A JSON file in the layout of COCO's captions."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`: the inputs of the stages fetch and index."""

    source: Literal["demo", "coco", "local"]
    """Origin of the files below: rendered by the demo, downloaded, or already here."""
    train: SplitSettings
    val: SplitSettings
    instruct: str
    """A JSON file in the layout of LLaVA-Instruct, about images of either split; or of COCO's
    instances, from which, with the captions, short conversations are made."""
    instruct_holdout: float
    """Share of the images whose conversations are held out for evaluation, 0 to 1."""
    max_reject_rate: float
    """Share of rejected records of a kind above which the index stage fails, 0 to 1."""
    follow_links: bool = False
    """Whether symbolic links in a folder of images may lead out of it."""
    split: Literal["val2017", "hash"] = "val2017"
    """`val2017`: an image is of the split whose captions list it. `hash`: both splits name the same
    images and captions, and a hash of an image's id decides its split, whatever other images
    there are."""
    val_share: float = 0.2
    """With `split: hash`, the share of the images in split val, 0 to 1, met about: each image is
    decided for itself."""

    def __post_init__(self) -> None:
        check_share("instruct_holdout", self.instruct_holdout)
        check_share("max_reject_rate", self.max_reject_rate)
        check_share("val_share", self.val_share)
        if self.split == "hash" and self.train != self.val:
            raise ValueError(
                f"split is hash, which cuts one set of images, so train and val must name the same "
                f"images and captions; train names {self.train.images} and {self.train.captions}, "
                f"val {self.val.images} and {self.val.captions}"
            )


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless a setting is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")
