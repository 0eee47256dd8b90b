"""Lists the questions that the model trained without sight answers right."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.report.gallery import KIND_TITLES, GalleryText


@dataclass(frozen=True, kw_only=True)
class WithoutSight:
    """The questions of a kind that can be answered without looking."""

    title: str
    num_asked: int
    """Questions whose answers are right or wrong: with a short target, or yes-no questions."""
    texts: Sequence[GalleryText]
    """Those that are answered right."""

    @property
    def share(self) -> str:
        """Share of the questions that are answered right."""
        return f"{len(self.texts) / self.num_asked:.1%}"


def without_sight(texts: Sequence[GalleryText]) -> list[WithoutSight]:
    """Return the questions that can be answered without looking, a list for each kind of text.

    A yes-no question that stands in several subsets counts once in each. Without a control that was
    trained, the result is empty.
    """
    found = []
    for kind, title in KIND_TITLES.items():
        asked = [t for t in texts if t.kind == kind and t.right_without_sight is not None]
        if asked:
            right = [text for text in asked if text.right_without_sight]
            found.append(WithoutSight(title=title, num_asked=len(asked), texts=right))
    return found
