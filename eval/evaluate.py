"""Stage evaluate: captions and answers of the trained models, their scores, and the report page.

Captions are made for validation images: by stage 1 alone straight behind the patches, and by the
fine-tuned model when asked for one. Answers are to the questions about held-out images, and to
yes-no questions about objects.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cache import FeatureStore
from cache.files.atomic import write_json, write_text
from eval.changed_inputs import changed_inputs_warning
from eval.random_tower import random_tower_warning
from eval.report.gallery import gallery_image_ids
from eval.report.page import render_report
from eval.report.thumbnails import thumbnails_of
from eval.runs import (
    STAGES,
    Models,
    finish_times,
    load_models,
    read_history,
    read_provenances,
    read_settings,
)
from eval.scoring.conditions import CONTROLS, EvaluatedModel
from eval.scoring.generation import ask_captions, ask_pope, ask_questions
from eval.scoring.generation_cache import clear
from eval.scoring.losses import Losses, answer_losses
from eval.scoring.predictions import Predictions
from eval.scoring.questions import EvaluationSet, choose_evaluation_set
from eval.settings import EvaluateSettings
from train.model.language_model import load_tokenizer
from train.run import weights_of
from train.settings import LlmSettings
from workspace.clock import utc_now
from workspace.data_settings import DataSettings
from workspace.paths import FEATURES, REPORTS, RUNS
from workspace.settings import Params
from workspace.stage import run_stage

EMPTY_SCORES: dict[str, Any] = {"count": 0, **{control: {"count": 0} for control in CONTROLS}}
"""Scores of a kind of which there is nothing to ask."""


def evaluate(params: Params, now: Callable[[], str] = utc_now) -> None:
    """Score both runs, and write scores, predictions and the report page.

    Args:
        params: Settings.
        now: Tells the time that the page is dated with, as `utc_now` does.
    """
    settings = params.section("evaluate", EvaluateSettings)
    data = params.section("data", DataSettings)
    llm = params.section("llm", LlmSettings)
    # Read before the models run for hours: a run that is not there is found at once.
    histories = {stage: read_history(stage) for stage in STAGES}
    run_settings = read_settings()
    store = FeatureStore(FEATURES)
    tokenizer = load_tokenizer(llm)
    provenances = read_provenances(store, llm, tokenizer)
    work = choose_evaluation_set(settings, store, tokenizer, params.seed())
    warnings = (
        random_tower_warning(params.values, *run_settings.values()),
        changed_inputs_warning(params.values, run_settings, provenances),
    )
    warning = " ".join(filter(None, warnings))
    models = load_models(llm, tokenizer, store, params.seed())
    scores, predictions = score_models(models, work, settings)
    write_json(REPORTS / "eval.json", scores)
    write_json(REPORTS / "contamination.json", work.contamination_list())
    predictions.write_table(REPORTS / "predictions.parquet")
    predictions.write_coco_results(REPORTS / "captions_results.json")
    examples = predictions.examples()
    page = render_report(
        scores=scores,
        examples=examples,
        thumbnails=thumbnails_of(gallery_image_ids(examples), data),
        file_names=work.file_names,
        histories=histories,
        provenance=provenances["finetune"] | {"settings": params.values},
        contamination=work.contamination_list(),
        dates={"evaluate": now()} | finish_times(provenances),
        warning=warning,
    )
    write_text(REPORTS / "index.html", page)
    clear()
    print_summary(scores, warning)


def score_models(
    models: Models, work: EvaluationSet, settings: EvaluateSettings
) -> tuple[dict[str, Any], Predictions]:
    """Ask stage 1 alone and the fine-tuned model, and score them.

    Returns:
        The content of eval.json, and everything that was said.
    """
    said = Predictions(work.splits)
    both = models.both
    # Minutes, before the hours that follow: what is wrong with a model mostly shows in its loss.
    losses = answer_losses(both, work.examples, settings.max_text_tokens) if work.examples else {}
    with models.adapter.disable_adapter():
        alone = score_captions(models.stage_1, work, "", settings, said)
    scores = {
        "captions": score_captions(both, work, settings.caption_question, settings, said),
        "answers": score_answers(both, work, losses, settings, said),
        "pope": score_pope(both, work, settings, said),
        "pretrain_only": {"captions": alone},
        "contamination": work.contamination_counts(),
        "weights_sha256": {stage: weights_of(RUNS / stage) for stage in STAGES},
    }
    return scores, said


def score_captions(
    asked: EvaluatedModel,
    work: EvaluationSet,
    question: str,
    settings: EvaluateSettings,
    said: Predictions,
) -> dict[str, Any]:
    """Let a model caption the validation images; without any, the counts are 0."""
    without = {"without_features": work.without_features["captions"]}
    if not work.references:
        return EMPTY_SCORES | without
    scores, captions = ask_captions(asked, work.references, question, settings)
    said.add(captions, model=asked.name, kind="caption")
    return scores | without


def score_answers(
    asked: EvaluatedModel,
    work: EvaluationSet,
    losses: Mapping[str, Losses],
    settings: EvaluateSettings,
    said: Predictions,
) -> dict[str, Any]:
    """Ask about the held-out images; without any question, the counts are 0."""
    without = {
        "without_features": work.without_features["answers"],
        "too_long": work.num_too_long,
    }
    if not work.questions:
        return EMPTY_SCORES | without
    scores, answers = ask_questions(asked, work.questions, losses, settings)
    said.add(answers, model=asked.name, kind="answer")
    return scores | without


def score_pope(
    asked: EvaluatedModel, work: EvaluationSet, settings: EvaluateSettings, said: Predictions
) -> dict[str, Any]:
    """Ask yes-no questions, subset by subset; without any question there is no subset."""
    if not work.pope:
        return {}
    scores, answers = ask_pope(asked, work.pope, settings)
    for subset, texts in answers.items():
        said.add(texts, model=asked.name, kind="pope", subset=subset)
    without = {"without_features": work.without_features["pope"]}
    return {subset: section | without for subset, section in scores.items()}


def print_summary(scores: dict[str, Any], warning: str) -> None:
    """Say the main scores beside their blind controls, and where the page is."""
    if warning:
        print(f"warning:  {warning}")
    captions, answers = scores["captions"], scores["answers"]
    if captions["count"]:
        blind = captions["blind"]["CIDEr"]
        print(f"captions: CIDEr {captions['CIDEr']:.3f} (blind {blind:.3f})")
    if answers["count"]:
        # Long answers are never the same word by word.
        key, name = ("token_f1", "token F1")
        if 2 * answers["short_count"] >= answers["count"]:
            key, name = ("exact_match", "exact match")
        print(f"answers:  {name} {answers[key]:.3f} (blind {answers['blind'][key]:.3f})")
    for subset, pope in scores["pope"].items():
        blind = pope["blind"]["accuracy"]
        print(f"pope:     {subset} accuracy {pope['accuracy']:.3f} (blind {blind:.3f})")
    print(f"report:   {(REPORTS / 'index.html').resolve().as_uri()}")


if __name__ == "__main__":
    run_stage(evaluate, __doc__)
