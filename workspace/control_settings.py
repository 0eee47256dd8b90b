"""The settings of controls: section `controls`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ControlsSettings:
    """Section `controls`: controls that cost a training run. The section may be left out."""

    trained_blind: bool = False
    """Train the last stage that has texts a second time, on the same texts in the same order, with
    the features of other images: what such a model answers right needs no look at the picture. Off
    by default, because it takes as long as the stage; the page then has the three controls that
    need no training."""
