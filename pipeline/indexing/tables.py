"""The tables of the index: their columns, and how their rows are written."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files.atomic import write_bytes

INT, TEXT = pa.int64(), pa.string()
TURN = pa.struct({"role": TEXT, "text": TEXT})

SCHEMAS = {
    "images": pa.schema(
        {
            "image_id": INT,
            "split": TEXT,
            "file_name": TEXT,
            "width": pa.int32(),
            "height": pa.int32(),
            "num_bytes": INT,
            "source_xxh3": pa.uint64(),
        }
    ),
    "captions": pa.schema({"caption_id": INT, "image_id": INT, "split": TEXT, "caption": TEXT}),
    "conversations": pa.schema(
        {"conversation_id": TEXT, "image_id": INT, "split": TEXT, "turns": pa.list_(TURN)}
    ),
    "pope": pa.schema(
        {"question_id": TEXT, "image_id": INT, "subset": TEXT, "question": TEXT, "label": TEXT}
    ),
    "rejected": pa.schema({"kind": TEXT, "record": TEXT, "reason": TEXT}),
}
"""Columns by table."""


def write_table(folder: Path, name: str, rows: list[Any]) -> Path:
    """Write `<name>.parquet` from objects that have the table's columns as attributes."""
    schema = SCHEMAS[name]
    columns = {column: [getattr(row, column) for row in rows] for column in schema.names}
    if name == "rejected":
        # What is rejected may be a name that no UTF-8 can hold.
        columns = {column: list(map(_escaped, texts)) for column, texts in columns.items()}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), buffer, compression="zstd")
    path = folder / f"{name}.parquet"
    write_bytes(path, memoryview(buffer.getvalue()))
    return path


def _escaped(text: str) -> str:
    """Return a text with an escape for each half of a character."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
