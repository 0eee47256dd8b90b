"""The settings of the evaluation: section `evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_NEW_TOKENS = 4096
"""A model that never ends a text, as an untrained one may, goes on to the limit."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Section `evaluate`."""

    caption_images: int
    """Most validation images that are captioned."""
    questions: int
    """Most held-out questions that are asked."""
    pope_images: int
    """Most images that yes-no questions are asked about, in each subset."""
    caption_question: str
    """How the fine-tuned model is asked for a caption; stage 1 alone needs no question."""
    caption_tokens: int
    """Most tokens of a caption."""
    answer_tokens: int
    """Most tokens of an answer."""
    max_text_tokens: int
    """Longest question, and longest text behind an image when the loss of answers is measured."""
    batch_size: int
    """Texts that are generated at the same time."""
    exclude_contaminated: bool
    """Whether images that were trained on are left out of the evaluation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, wanted 1 or more")
        for name in ("caption_tokens", "answer_tokens"):
            if getattr(self, name) > MAX_NEW_TOKENS:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, wanted at most {MAX_NEW_TOKENS}"
                )


def shown_setting(values: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a setting that is only spoken of, from values that nobody has checked.

    Returns:
        None where the section is absent, is no section, or lacks the key.
    """
    part = values.get(section)
    return part.get(key) if isinstance(part, Mapping) else None
