"""Everything that was said: as a table, as COCO results, as the examples of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files.atomic import write_bytes, write_json
from eval.report.gallery import Example, Kind
from eval.scoring.conditions import CONTROLS, SEEN
from eval.scoring.generation import Prediction
from eval.scoring.question_types import question_type

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("kind", pa.string()),
        ("subset", pa.string()),
        ("image_id", pa.int64()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("question_type", pa.string()),
        ("targets", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("num_tokens", pa.int32()),
        ("stopped", pa.bool_()),
        ("score", pa.float64()),
        *((f"{control}_prediction", pa.string()) for control in CONTROLS),
    ]
)

BOTH_STAGES = "finetune"
"""Name of the model whose texts the page and the COCO results show."""


@dataclass(frozen=True)
class Predictions:
    """Rows of the table, in the order in which things were asked."""

    splits: Mapping[int, str]
    """Image id to train or val."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, said: Sequence[Prediction], *, model: str, kind: Kind, subset: str = "") -> None:
        """Add what a model said.

        Args:
            said: Its texts.
            model: The stage that made it.
            kind: Of text; answers are to questions about held-out images of split train.
            subset: Of yes-no questions.
        """
        for one in said:
            self.rows.append(
                {
                    "model": model,
                    "kind": kind,
                    "subset": subset,
                    "image_id": one.image_id,
                    "split": self._split(kind, one.image_id),
                    "question": one.question,
                    "question_type": question_type(one.question) if kind == "answer" else "",
                    "targets": list(one.targets),
                    "prediction": one.made[SEEN].text,
                    "num_tokens": one.made[SEEN].num_tokens,
                    "stopped": one.made[SEEN].stopped,
                    "score": one.score,
                    **{f"{control}_prediction": one.made[control].text for control in CONTROLS},
                }
            )

    def _split(self, kind: Kind, image_id: int) -> str:
        known: dict[Kind, str] = {"caption": "val", "answer": "holdout"}
        return known.get(kind) or self.splits.get(image_id, "")

    def write_table(self, path: Path) -> None:
        """Write one row a text."""
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.rows, schema=SCHEMA), buffer)
        write_bytes(path, memoryview(buffer.getvalue()))

    def write_coco_results(self, path: Path) -> None:
        """Write the captions of the fine-tuned model as the COCO evaluation takes them."""
        results = [
            {"image_id": row["image_id"], "caption": row["prediction"]}
            for row in self.rows
            if (row["model"], row["kind"]) == (BOTH_STAGES, "caption")
        ]
        write_json(path, results)

    def examples(self) -> list[Example]:
        """Return what the fine-tuned model said as examples of the page."""
        return [
            Example(
                image_id=row["image_id"],
                kind=row["kind"],
                split=row["split"],
                question="" if row["kind"] == "caption" else row["question"],
                question_type=row["subset"] or row["question_type"],
                targets=tuple(row["targets"]),
                prediction=row["prediction"],
                blind_prediction=row["blind_prediction"],
                score=row["score"],
                num_tokens=row["num_tokens"],
                stopped=row["stopped"],
            )
            for row in self.rows
            if row["model"] == BOTH_STAGES
        ]
