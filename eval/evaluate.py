"""Stage evaluate: captions and answers of the trained models, their scores, and the report page.

Captions are made for validation images: by stage 1 alone straight behind the patches, and by the
fine-tuned model when asked for one. Answers are to the questions about held-out images, and to
yes-no questions about objects.
"""

import csv
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cache import FeatureStore
from cache.command import run_stage
from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.files import sha256_of, write_json, write_text
from cache.settings import Params
from eval.asking import ask_captions, ask_pope, ask_questions
from eval.controls import CONTROLS, Asked
from eval.pictures import thumbnails_of
from eval.predictions import Predictions
from eval.report import gallery_image_ids, render_report
from eval.settings import EvaluateSettings
from eval.work import Work, choose_work
from train.data import FEATURES
from train.language_model import load_language_model, load_lora, load_tokenizer
from train.model import CaptionModel
from train.projector import load_projector, seeded_projector
from train.run import RUNS, pick_device
from train.settings import LlmSettings

REPORTS = Path("reports")

STAGES = ("pretrain", "finetune")

NOTHING: dict[str, Any] = {"count": 0, **{control: {"count": 0} for control in CONTROLS}}
"""Scores of a kind of which there is nothing to ask."""


def evaluate(params: Params) -> None:
    """Score both runs, and write scores, predictions and the report page."""
    settings = params.section("evaluate", EvaluateSettings)
    data = params.section("data", DataSettings)
    llm = params.section("llm", LlmSettings)
    # Read before the models run for hours: a run that is not there is found at once.
    histories = {stage: read_history(stage) for stage in STAGES}
    provenance = read_provenance(params)
    store = FeatureStore(FEATURES)
    work = choose_work(settings, store, params.seed())
    scores, predictions = score_runs(work, settings, llm, store, params.seed())
    write_json(REPORTS / "eval.json", scores)
    write_json(REPORTS / "contamination.json", work.contamination_list())
    predictions.write_table(REPORTS / "predictions.parquet")
    predictions.write_coco_results(REPORTS / "captions_results.json")
    examples = predictions.examples()
    page = render_report(
        scores=scores,
        examples=examples,
        thumbnails=thumbnails_of(gallery_image_ids(examples), data),
        histories=histories,
        provenance=provenance,
        contamination=work.contamination_list(),
    )
    write_text(REPORTS / "index.html", page)
    print_summary(scores)


def score_runs(
    work: Work, settings: EvaluateSettings, llm: LlmSettings, store: FeatureStore, seed: int
) -> tuple[dict[str, Any], Predictions]:
    """Ask stage 1 alone, then the fine-tuned model, and score them.

    Returns:
        The content of eval.json, and everything that was said.
    """
    language_model = load_language_model(llm, pick_device())
    tokenizer = load_tokenizer(llm)
    # All of both runs is loaded before either is asked: a damaged one is found at once.
    stage_1, both = (load_asked(stage, language_model, tokenizer, store, seed) for stage in STAGES)
    adapter = load_lora(language_model, RUNS / "finetune" / "adapter")
    said = Predictions(work.splits)
    with adapter.disable_adapter():
        alone = score_captions(stage_1, work, "", settings, said)
    scores = {
        "captions": score_captions(both, work, settings.caption_question, settings, said),
        "answers": score_answers(both, work, settings, said),
        "pope": score_pope(both, work, settings, said),
        "pretrain_only": {"captions": alone},
        "contamination": work.contamination_counts(),
        "projectors_sha256": {stage: sha256_of(projector_of(stage)) for stage in STAGES},
    }
    return scores, said


def load_asked(
    stage: str,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    seed: int,
) -> Asked:
    """Load a stage's projector, and make the one that it would be without training."""
    width = language_model.config.hidden_size
    projector = load_projector(projector_of(stage), store.spec.width, width)
    untrained = seeded_projector(projector.kind, store.spec.width, width, seed)
    model, control = (
        CaptionModel(one.to(language_model.device), language_model)
        for one in (projector, untrained)
    )
    return Asked(stage, model, control, tokenizer, store, seed)


def projector_of(stage: str) -> Path:
    """Return the file of a stage's projector, by whose hash a run is recognised."""
    return RUNS / stage / "projector.safetensors"


def score_captions(
    asked: Asked, work: Work, question: str, settings: EvaluateSettings, said: Predictions
) -> dict[str, Any]:
    """Let a model caption the validation images; without any, the counts are 0."""
    without = {"without_features": work.without_features["captions"]}
    if not work.references:
        return NOTHING | without
    scores, captions = ask_captions(asked, work.references, question, settings)
    said.add(captions, model=asked.name, kind="caption")
    return scores | without


def score_answers(
    asked: Asked, work: Work, settings: EvaluateSettings, said: Predictions
) -> dict[str, Any]:
    """Ask about the held-out images; without any question, the counts are 0."""
    without = {"without_features": work.without_features["answers"]}
    if not work.questions:
        return NOTHING | without
    scores, answers = ask_questions(asked, work.questions, work.examples, settings)
    said.add(answers, model=asked.name, kind="answer")
    return scores | without


def score_pope(
    asked: Asked, work: Work, settings: EvaluateSettings, said: Predictions
) -> dict[str, Any]:
    """Ask yes-no questions, subset by subset; without any question there is no subset."""
    if not work.pope:
        return {}
    scores, answers = ask_pope(asked, work.pope, settings)
    for subset, texts in answers.items():
        said.add(texts, model=asked.name, kind="pope", subset=subset)
    without = {"without_features": work.without_features["pope"]}
    return {subset: section | without for subset, section in scores.items()}


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
    for subset, pope in scores["pope"].items():
        blind = pope["blind"]["accuracy"]
        print(f"pope:     {subset} accuracy {pope['accuracy']:.3f} (blind {blind:.3f})")
    print(f"report:   {(REPORTS / 'index.html').resolve().as_uri()}")


if __name__ == "__main__":
    run_stage(evaluate, __doc__)
