"""Reads the index's table of yes-no questions about objects."""

from dataclasses import dataclass

import pyarrow as pa

from cache.files.parquet import read_columns
from workspace.errors import StageError
from workspace.paths import YES_NO_QUESTIONS

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("question", pa.string()),
        ("label", pa.string()),
        ("question_id", pa.string()),
        ("subset", pa.string()),
    ]
)
"""The columns that are read."""


@dataclass(frozen=True, slots=True)
class YesNo:
    """A question about an image, and its right answer: the label, yes or no."""

    image_id: int
    question: str
    label: str
    question_id: str
    """Unique over all subsets."""


def read_pope() -> dict[str, list[YesNo]]:
    """Return the questions of each subset, in the table's order.

    Returns:
        Nothing without a table: an index of an earlier version has none.

    Raises:
        StageError: The table is damaged, or has other columns.
    """
    if not YES_NO_QUESTIONS.exists():
        return {}

    def refuse(detail: str) -> StageError:
        return StageError(f"{YES_NO_QUESTIONS}: {detail}. Run the index stage, or `dvc pull`.")

    rows = read_columns(YES_NO_QUESTIONS, SCHEMA, refuse).to_pylist()
    for row in rows:
        if row["label"] not in ("yes", "no"):
            raise refuse(f"column label holds {row['label'][:20]!r}, wanted yes or no")
    subsets: dict[str, list[YesNo]] = {}
    for row in rows:
        subsets.setdefault(row.pop("subset"), []).append(YesNo(**row))
    return subsets
