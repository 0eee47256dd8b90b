"""Predictions: the texts that the models generated, and the files that hold them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files.atomic import write_bytes, write_json, write_text
from eval.metrics import yes_or_no
from eval.scoring.answers import exact_match, is_short
from eval.scoring.question_types import question_type
from eval.scoring.score_names import CONTROLS, SEEN, TRAINED_BLIND
from eval.scoring.yes_no import YesNo
from train.model.generate import Generation

Kind = Literal["caption", "answer", "pope"]

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
"""Columns of `reports/predictions.parquet`."""

WITHOUT_SIGHT = pa.schema(
    [(f"{TRAINED_BLIND}_prediction", pa.string()), ("right_without_sight", pa.bool_())]
)
"""Further columns, where a control was trained; null where it was not asked."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model generated for one question about one image, under each condition."""

    model: str
    """The stage that made the model."""
    kind: Kind
    subset: str = ""
    """Subset of a yes-no question."""
    image_id: int
    split: str
    """val or test of a caption, holdout of an answer, else the image's split in the index."""
    question: str
    """Empty where the model continued straight after the patches."""
    targets: tuple[str, ...]
    generations: dict[str, Generation]
    """By condition."""
    score: float
    """CIDEr of a caption; exact match of an answer with a short target, token F1 of other answers;
    1 or 0 of yes and no."""

    @property
    def seen(self) -> Generation:
        """The text that the model generated with the image's own features."""
        return self.generations[SEEN]

    @property
    def question_type(self) -> str:
        """The type of the question of an answer; empty for other kinds."""
        return question_type(self.question) if self.kind == "answer" else ""

    @property
    def right_without_sight(self) -> bool | None:
        """Whether the control that was trained without sight answers right.

        None if it was not asked, or for a text that can be better or worse, but not right.
        """
        found = self.generations.get(TRAINED_BLIND)
        if found is None or self.kind == "caption":
            return None
        (target,) = self.targets
        if self.kind == "pope":
            return yes_or_no(found.text) == target
        return bool(exact_match(target, found.text)) if is_short(target) else None

    def row(self) -> dict[str, Any]:
        """Return the row of the table, keyed as `SCHEMA` and `WITHOUT_SIGHT`."""
        return {
            "model": self.model,
            "kind": self.kind,
            "subset": self.subset,
            "image_id": self.image_id,
            "split": self.split,
            "question": self.question,
            "question_type": self.question_type,
            "targets": list(self.targets),
            "prediction": self.seen.text,
            "num_tokens": self.seen.num_tokens,
            "stopped": self.seen.stopped,
            "score": self.score,
            **{
                f"{control}_prediction": generation.text
                for control, generation in self.generations.items()
                if control != SEEN
            },
            "right_without_sight": self.right_without_sight,
        }


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write the table of all predictions."""
    schema = SCHEMA
    if any(TRAINED_BLIND in prediction.generations for prediction in predictions):
        schema = pa.schema([*SCHEMA, *WITHOUT_SIGHT])
    table = pa.Table.from_pylist([prediction.row() for prediction in predictions], schema=schema)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_bytes(path, memoryview(buffer.getvalue()))


def write_coco_results(path: Path, predictions: Sequence[Prediction], model: str) -> None:
    """Write the captions of a model in COCO's results format."""
    results = [
        {"image_id": prediction.image_id, "caption": prediction.seen.text}
        for prediction in predictions
        if (prediction.model, prediction.kind) == (model, "caption")
    ]
    write_json(path, results)


def write_pope_questions(
    path: Path, subsets: Mapping[str, Sequence[YesNo]], file_names: Mapping[int, str]
) -> None:
    """Write yes-no questions with their labels in POPE's layout, for answers of other systems.

    Args:
        path: File to write.
        subsets: Subset to its questions.
        file_names: Image id to file name.
    """
    _write_json_lines(
        path,
        [
            {
                "question_id": question.question_id,
                "image": file_names[question.image_id],
                "text": question.question,
                "label": question.label,
                "category": subset,
            }
            for subset, questions in subsets.items()
            for question in questions
        ],
    )


def write_pope_answers(
    path: Path, subsets: Mapping[str, Sequence[YesNo]], predictions: Sequence[Prediction]
) -> None:
    """Write the answers to yes-no questions in the layout of LLaVA's answers.

    Args:
        path: File to write.
        subsets: Subset to its questions.
        predictions: Texts of all kinds; a question without an answer is left out.
    """
    answers = {
        (answer.subset, answer.image_id, answer.question): answer.seen.text
        for answer in predictions
        if answer.kind == "pope"
    }
    _write_json_lines(
        path,
        [
            {
                "question_id": question.question_id,
                "prompt": question.question,
                "text": answers[subset, question.image_id, question.question],
                "category": subset,
            }
            for subset, questions in subsets.items()
            for question in questions
            if (subset, question.image_id, question.question) in answers
        ],
    )


def _write_json_lines(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
