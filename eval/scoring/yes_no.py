"""Reads the yes-no questions about objects that the index stage made and collected."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cache.errors import StageError
from cache.files.parquet import read_columns

POPE = Path("data/index/pope.parquet")

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("question", pa.string()),
        ("label", pa.string()),
        ("question_id", pa.string()),
        ("subset", pa.string()),
    ]
)
"""What is read of the table."""


@dataclass(frozen=True, slots=True)
class YesNo:
    """A question about an image whose right answer is the label, yes or no."""

    image_id: int
    question: str
    label: str
    question_id: str
    """Unique over all subsets; of POPE's own questions, the subset and their number."""


def read_pope() -> dict[str, list[YesNo]]:
    """Return the questions of each subset, in the table's order.

    Returns:
        Nothing if there is no table: an index made by an older version has none.

    Raises:
        StageError: The table is damaged, or another one.
    """
    if not POPE.exists():
        return {}

    def refuse(detail: str) -> StageError:
        return StageError(f"{POPE}: {detail}. Run the index stage, or `dvc pull`.")

    rows = read_columns(POPE, SCHEMA, refuse).to_pylist()
    for row in rows:
        if row["label"] not in ("yes", "no"):
            raise refuse(f"column label holds {row['label'][:20]!r}, wanted yes or no")
    questions = [(row.pop("subset"), YesNo(**row)) for row in rows]
    subsets: dict[str, list[YesNo]] = {}
    for subset, question in questions:
        subsets.setdefault(subset, []).append(question)
    return subsets
