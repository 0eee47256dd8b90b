"""The settings of what is learned from: section `data`, read by the stages before and after."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Where the images and the captions of one split lie."""

    images: str
    """A folder, or a zip that is read in place."""
    captions: str
    """Captions in the official COCO layout."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`: what is fetched and indexed."""

    source: Literal["demo", "coco", "local"]
    """Who makes the files below: the embedded world, a download, or nobody."""
    train: SplitSettings
    val: SplitSettings
    instruct: str
    """Conversations in the official LLaVA-Instruct layout, about images of `train`."""
    instruct_holdout: float
    """Share of the images with conversations that are kept for evaluation."""
    max_reject_rate: float
    """Share of rejected records of a kind above which the index stage fails."""
    follow_links: bool = False
    """Whether links in a folder of images may lead out of it."""

    def __post_init__(self) -> None:
        check_share("instruct_holdout", self.instruct_holdout)
        check_share("max_reject_rate", self.max_reject_rate)


def check_share(name: str, value: float) -> None:
    """Refuse a number that is no share.

    Raises:
        ValueError: Not from 0 to 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, wanted a share from 0 to 1")
