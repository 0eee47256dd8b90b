"""Columns of tables of texts: CSV, TSV, JSONL and parquet."""

from collections.abc import Collection
from typing import Any

Columns = tuple[tuple[str, ...], ...]
"""For each wanted column its names: the first that a table has counts."""

IMAGE = ("image", "file_name")
CAPTION = ("caption", "text")
QUESTION = ("question",)
ANSWER = ("answer",)

CAPTION_COLUMNS: Columns = (IMAGE, CAPTION)
QUESTION_COLUMNS: Columns = (IMAGE, QUESTION, ANSWER)

CONVERSATIONS = "conversations"
"""The key by which LLaVA's layout is told from a table."""

ID = "id"


def has_columns(found: Collection[str], columns: Columns) -> bool:
    """Whether all wanted columns are among the found names."""
    return all(any(name in found for name in names) for names in columns)


def name_in(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of a column's names that an entry has; if it has none, the first."""
    return next((name for name in names if name in entry), names[0])


def describe_missing(found: Collection[str], columns: Columns) -> str:
    """Say which columns a table lacks, and which it has."""
    missing = [names for names in columns if not any(name in found for name in names)]
    wanted = " and ".join(" or ".join(map(repr, names)) for names in missing)
    names = ", ".join(repr(name[:40]) for name in list(found)[:10])
    return f"no column {wanted}; it has {names or 'none'}"
