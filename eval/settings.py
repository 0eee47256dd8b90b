"""The settings of the evaluation: section `evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

MAX_NEW_TOKENS = 4096
"""Limit of the token settings: an untrained model may never end a text by itself."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Section `evaluate`."""

    caption_images: int
    """Most validation images that are captioned."""
    questions: int
    """Most held-out questions that are asked."""
    pope_images: int
    """Most images of each subset of yes-no questions."""
    caption_question: str
    """Request for a caption to the fine-tuned model; stage 1 alone captions without any."""
    caption_tokens: int
    """Most tokens of a caption."""
    answer_tokens: int
    """Most tokens of an answer."""
    max_text_tokens: int
    """Most tokens of a question, and of a conversation in the loss of the answers."""
    batch_size: int
    """Number of texts that are generated together."""
    exclude_contaminated: bool
    """Whether images that were trained on are left out of the evaluation."""
    stages: tuple[Literal["pretrain", "finetune"], ...] = ("pretrain", "finetune")
    """Stages whose runs are evaluated; the run of another one may be missing."""
    minutes: float | None = None
    """Time for losses and texts; null for no limit. The losses and each kind of text get an equal
    share, and stop at a whole number of images, at least one batch, the same in all conditions."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, wanted 1 or more")
        if not self.stages:
            raise ValueError("stages is empty, wanted pretrain, finetune or both")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, wanted more than 0, or null")
        for name in ("caption_tokens", "answer_tokens"):
            if getattr(self, name) > MAX_NEW_TOKENS:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, wanted at most {MAX_NEW_TOKENS}"
                )


def shown_setting(values: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a setting from unchecked values, for a text; None if it is absent."""
    part = values.get(section)
    return part.get(key) if isinstance(part, Mapping) else None
