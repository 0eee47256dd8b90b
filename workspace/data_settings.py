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
    """A JSON file in the layout of LLaVA-Instruct, about images of either split."""
    instruct_holdout: float
    """Share of the images whose conversations are held out for evaluation, 0 to 1."""
    max_reject_rate: float
    """Share of rejected records of a kind above which the index stage fails, 0 to 1."""
    follow_links: bool = False
    """Whether symbolic links in a folder of images may lead out of it."""

    def __post_init__(self) -> None:
        check_share("instruct_holdout", self.instruct_holdout)
        check_share("max_reject_rate", self.max_reject_rate)


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless a setting is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")
