"""Reads the yes-no questions about objects that the index stage made and collected."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cache.errors import StageError
from cache.foreign import reading_foreign_file

POPE = Path("data/index/pope.parquet")

COLUMNS = ("image_id", "question", "label", "question_id", "subset")


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
    with reading_foreign_file(_damaged, POPE):
        with pq.ParquetFile(POPE) as file:
            rows = file.read(columns=list(COLUMNS)).to_pylist()
        questions = [(row["subset"], _yes_no(row)) for row in rows]
    subsets: dict[str, list[YesNo]] = {}
    for subset, question in questions:
        subsets.setdefault(subset, []).append(question)
    return subsets


def _damaged(detail: str) -> StageError:
    return StageError(f"{POPE}: {detail}. Run the index stage, or `dvc pull`.")


def _yes_no(row: dict[str, object]) -> YesNo:
    for name in COLUMNS:
        wanted = int if name == "image_id" else str
        if not isinstance(row[name], wanted):
            raise ValueError(f"column {name} holds {row[name]!r}, wanted {wanted.__name__}")
    if row["label"] not in ("yes", "no"):
        raise ValueError(f"column label holds {row['label']!r}, wanted yes or no")
    return YesNo(**{name: row[name] for name in COLUMNS if name != "subset"})  # type: ignore[arg-type]
