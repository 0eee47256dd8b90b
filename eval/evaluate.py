"""Stage evaluate: captions and answers of the trained models, their scores, and the report page.

Captions are made for validation images: by stage 1 alone straight behind the patches, and by the
fine-tuned model when asked for one. Answers are to the questions about held-out images.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache import FeatureStore
from cache.command import run_stage
from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.files import replacing, write_json, write_text
from cache.settings import Params
from eval.asking import Asked, Model, answer_losses, ask_captions, ask_questions
from eval.pictures import with_thumbnails
from eval.report import Example, render_report
from eval.settings import EvaluateSettings
from train.data import (
    FEATURES,
    read_caption_examples,
    read_conversation_examples,
    read_questions,
    with_features,
)
from train.language_model import load_language_model, load_lora, load_tokenizer
from train.model import CaptionModel
from train.projector import load_projector
from train.run import RUNS, pick_device
from train.settings import LlmSettings

REPORTS = Path("reports")

PREDICTIONS = pa.schema(
    [
        ("model", pa.string()),
        ("kind", pa.string()),
        ("image_id", pa.int64()),
        ("question", pa.string()),
        ("targets", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("num_tokens", pa.int32()),
        ("stopped", pa.bool_()),
        ("score", pa.float64()),
        ("blind_prediction", pa.string()),
    ]
)

Item = TypeVar("Item")

Said = dict[tuple[str, str], list[Asked]]
"""Model and kind to what it said."""


def evaluate(params: Params) -> None:
    """Score both runs, and write scores, predictions and the report page."""
    settings = params.section("evaluate", EvaluateSettings)
    data = params.section("data", DataSettings)
    llm = params.section("llm", LlmSettings)
    # Read before the models run for hours: a run that is not there is found at once.
    histories = {stage: read_history(stage) for stage in ("pretrain", "finetune")}
    provenance = read_provenance(params)
    store = FeatureStore(FEATURES)
    scores, said = score_runs(settings, llm, store, params.seed())
    write_json(REPORTS / "eval.json", scores)
    write_predictions(said)
    examples = with_thumbnails(gallery_examples(said), data)
    page = render_report(
        scores=scores,
        examples=examples,
        histories=histories,
        provenance=provenance,
    )
    write_text(REPORTS / "index.html", page)
    print_summary(scores)


def score_runs(
    settings: EvaluateSettings, llm: LlmSettings, store: FeatureStore, seed: int
) -> tuple[dict[str, Any], Said]:
    """Ask stage 1 alone, then the fine-tuned model, and score them.

    Returns:
        The content of eval.json, and everything that was said.
    """
    device = pick_device()
    language_model = load_language_model(llm, device)
    tokenizer = load_tokenizer(llm)
    width = language_model.config.hidden_size

    def load(stage: str) -> Model:
        path = RUNS / stage / "projector.safetensors"
        projector = load_projector(path, store.spec.width, width).to(device)
        return Model(stage, CaptionModel(projector, language_model), tokenizer, store)

    said: Said = {}
    references = choose_references(settings.caption_images, store, seed)
    model = load("pretrain")
    stage_1, said["pretrain", "caption"] = caption_scores(model, references, "", settings)
    load_lora(language_model, RUNS / "finetune" / "adapter")
    model = load("finetune")
    captions, said["finetune", "caption"] = caption_scores(
        model, references, settings.caption_question, settings
    )
    answers, said["finetune", "answer"] = score_answers(model, settings, seed)
    scores = {"captions": captions, "answers": answers, "pretrain_only": {"captions": stage_1}}
    return scores, said


def caption_scores(
    model: Model, references: dict[int, list[str]], question: str, settings: EvaluateSettings
) -> tuple[dict[str, Any], list[Asked]]:
    """Let a model caption images; without any, the count is 0 and there are no scores."""
    if not references:
        return {"count": 0, "blind": {"count": 0}}, []
    return ask_captions(model, references, question, settings)


def score_answers(
    model: Model, settings: EvaluateSettings, seed: int
) -> tuple[dict[str, Any], list[Asked]]:
    """Ask about held-out images; without any, the count is 0 and there are no scores.

    A turn that asks for a caption is left out: captions are scored as captions.
    """
    examples = with_features(
        read_conversation_examples("holdout"), model.store, "conversations of split holdout"
    )
    known = set(examples.image_ids.tolist())
    questions = [
        q
        for q in read_questions("holdout")
        if q.image_id in known and q.question != settings.caption_question
    ]
    questions = choose(questions, settings.questions, seed)
    if not questions:
        return {"count": 0, "blind": {"count": 0}}, []
    scores, answers = ask_questions(model, questions, settings)
    asked = {question.image_id for question in questions}
    loss, blind_loss = answer_losses(model, examples.only(asked)[:], settings.max_text_tokens)
    blind: dict[str, Any] = {**scores["blind"], "loss": blind_loss}
    return {**scores, "loss": loss, "blind": blind}, answers


def choose_references(most: int, store: FeatureStore, seed: int) -> dict[int, list[str]]:
    """Return the captions of up to so many validation images, chosen by the seed alone."""
    examples = with_features(read_caption_examples("val"), store, "captions of split val")
    return {
        example.image_id: [text[0].text for text in example.texts]
        for example in choose(examples, most, seed)
    }


def choose(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """Return up to so many items, chosen by the seed alone, in their order."""
    order = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[number] for number in sorted(order)]


def gallery_examples(said: Said) -> list[Example]:
    """Return what the fine-tuned model said as examples of the page."""
    return [
        Example(
            image_id=asked.image_id,
            kind="caption" if kind == "caption" else "answer",
            question="" if kind == "caption" else asked.question,
            targets=asked.targets,
            prediction=asked.seen.text,
            blind_prediction=asked.blind.text,
            score=asked.score,
            thumbnail=None,
        )
        for (model, kind), texts in said.items()
        if model == "finetune"
        for asked in texts
    ]


def write_predictions(said: Said) -> None:
    """Write everything that was said, one row a text."""
    rows = [
        {
            "model": model,
            "kind": kind,
            "image_id": asked.image_id,
            "question": asked.question,
            "targets": list(asked.targets),
            "prediction": asked.seen.text,
            "num_tokens": asked.seen.num_tokens,
            "stopped": asked.seen.stopped,
            "score": asked.score,
            "blind_prediction": asked.blind.text,
        }
        for (model, kind), texts in said.items()
        for asked in texts
    ]
    with replacing(REPORTS / "predictions.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), temporary)


def read_history(stage: str) -> list[dict[str, float]]:
    """Return the rows of a run's history.csv; what a step does not have is left out.

    Raises:
        StageError: No such file, or not a table of numbers.
    """
    path = RUNS / stage / "history.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (FileNotFoundError, csv.Error, ValueError, TypeError) as error:
        raise StageError(f"{path}: no history ({error}). Run the {stage} stage.") from None


def read_provenance(params: Params) -> dict[str, Any]:
    """Return the provenance of the fine-tuned run, and the settings.

    Raises:
        StageError: No such file, or not a JSON object.
    """
    path = RUNS / "finetune" / "provenance.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values | {"settings": params.values}
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise StageError(f"{path}: no provenance ({error}). Run the finetune stage.") from None


def print_summary(scores: dict[str, Any]) -> None:
    """Say the main scores beside their blind controls, and where the page is."""
    captions, answers = scores["captions"], scores["answers"]
    if captions["count"]:
        blind = captions["blind"]["CIDEr"]
        print(f"captions: CIDEr {captions['CIDEr']:.3f} (blind {blind:.3f})")
    if answers["count"]:
        blind = answers["blind"]["exact_match"]
        print(f"answers:  exact match {answers['exact_match']:.3f} (blind {blind:.3f})")
    print(f"report:   {(REPORTS / 'index.html').resolve().as_uri()}")


if __name__ == "__main__":
    run_stage(evaluate, __doc__)
