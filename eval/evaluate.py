"""Stage evaluate: captions and answers of the trained models, their scores, and the report page.

Stage 1 alone captions images of split val or test straight after the patches. The fine-tuned model
captions the same images when asked to, and answers questions about held-out images and yes-no
questions about objects. Every text is generated from the image's own features and, as controls,
from those of a wrong image, from noise, through an untrained projector and, if there is one, by the
model of the stage `control`. A stage without texts is not scored, and the page says why. With
`evaluate.minutes` each kind of text stops at a whole number of images.
"""

from collections.abc import Callable, Mapping, Sized
from typing import Any

from cache import FeatureStore
from cache.files.atomic import write_json, write_text
from eval.report.gallery import gallery_image_ids, gallery_texts
from eval.report.gaps import gaps
from eval.report.page import render_report
from eval.report.thumbnails import thumbnails_of
from eval.runs import (
    FinishedRun,
    finish_times,
    open_control,
    open_stages,
    read_history,
    read_trained_on,
)
from eval.score_warnings import changed_inputs_warning, random_tower_warning
from eval.scoring import generation_cache
from eval.scoring.budget import Budget, of_images
from eval.scoring.evaluated_models import EvaluatedModels, load_models
from eval.scoring.gains import read_gain, use_of_picture, written
from eval.scoring.generation import (
    EMPTY_SCORES,
    Scores,
    answer_questions,
    answer_yes_no,
    caption_images,
    mean_of_subsets,
)
from eval.scoring.losses import answer_losses
from eval.scoring.predictions import (
    Prediction,
    write_coco_results,
    write_pope_answers,
    write_pope_questions,
    write_predictions,
)
from eval.scoring.questions import EvaluationSet, choose_evaluation_set
from eval.scoring.score_names import BLIND, DECODING, TRAINED_BLIND
from eval.settings import EvaluateSettings
from train.run import weights_of
from train.settings import LlmSettings
from workspace.clock import utc_now
from workspace.data_settings import DataSettings
from workspace.paths import FEATURES, REPORTS, RUNS
from workspace.settings import Params
from workspace.stage import run_stage


def evaluate(params: Params, now: Callable[[], str] = utc_now) -> None:
    """Score the runs that were trained, and write scores, predictions and the report page.

    Args:
        params: Settings.
        now: Returns the time for the page, as `utc_now` does.
    """
    settings = params.section("evaluate", EvaluateSettings)
    data = params.section("data", DataSettings)
    # Everything that can be missing is read before the models run for hours.
    stages: tuple[str, ...] = settings.stages
    histories = {stage: read_history(RUNS / stage) for stage in stages}
    trained_on = {stage: read_trained_on(RUNS / stage) for stage in stages}
    store = FeatureStore(FEATURES)
    runs = open_stages(params.section("llm", LlmSettings), store, stages)
    control = open_control(runs)
    *_, last_run = runs.values()
    prompt_format = last_run.prompt_format
    evaluation_set = choose_evaluation_set(settings, store, prompt_format, params.seed())
    warning = score_warning(params, runs)

    models = load_models(runs, store, params.seed(), control)
    scores, predictions = score_models(models, evaluation_set, settings, params.seed())
    if control:
        scores["controls"] = {TRAINED_BLIND: {"weights_sha256": weights_of(control.folder)}}
    scores["split"] = {"name": data.split_name, "captions": evaluation_set.caption_split}
    scores["decoding"] = DECODING
    scores["trained"] = {stage: run.is_trained for stage, run in runs.items()}
    scores["trained_on"] = {s: trained_on[s] for s, run in runs.items() if run.is_trained}

    contamination = evaluation_set.contamination_list()
    # Without a trained stage 2, the captions of stage 1 alone are all there is.
    shown_model = "finetune" if models.both_stages else "pretrain"
    write_json(REPORTS / "eval.json", scores)
    write_json(REPORTS / "contamination.json", contamination)
    write_predictions(REPORTS / "predictions.parquet", predictions)
    write_coco_results(REPORTS / "captions_results.json", predictions, shown_model)
    pope = evaluation_set.pope
    write_pope_questions(REPORTS / "pope_questions.jsonl", pope, evaluation_set.file_names)
    write_pope_answers(REPORTS / "pope_answers.jsonl", pope, predictions)
    texts = gallery_texts(predictions, shown_model)
    page = render_report(
        scores=scores,
        examples=texts,
        thumbnails=thumbnails_of(gallery_image_ids(texts), data),
        file_names=evaluation_set.file_names,
        histories={stage: histories[stage] for stage, run in runs.items() if run.is_trained},
        provenance=last_run.provenance | {"settings": params.values},
        contamination=contamination,
        dates={"evaluate": now()} | finish_times(runs),
        warning=warning,
    )
    write_text(REPORTS / "index.html", page)
    generation_cache.clear()
    print_summary(scores, warning)


def score_warning(params: Params, runs: Mapping[str, FinishedRun]) -> str:
    """Return the warnings that stand above the scores, or nothing."""
    settings = {stage: run.params.values for stage, run in runs.items()}
    provenances = {stage: run.provenance for stage, run in runs.items()}
    warnings = (
        random_tower_warning(params.values, *settings.values()),
        changed_inputs_warning(params.values, settings, provenances),
    )
    return " ".join(filter(None, warnings))


def score_models(
    models: EvaluatedModels,
    evaluation_set: EvaluationSet,
    settings: EvaluateSettings,
    seed: int,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Let stage 1 alone and the fine-tuned model generate, and score both.

    Returns:
        The content of eval.json, and all generated texts. The sections of a stage that was not
        trained are empty.
    """
    stage_1, model = models.stage_1, models.both_stages
    references, split = evaluation_set.references, evaluation_set.caption_split
    tasks: list[Sized] = [references] * bool(stage_1)
    if model:
        tasks += [
            references,
            evaluation_set.examples,
            evaluation_set.questions,
            evaluation_set.pope,
        ]
    budget = Budget(settings.minutes, sum(map(bool, tasks)), seed)
    # Losses first: they take minutes and show most faults before hours of generation.
    limit = settings.max_text_tokens
    losses = answer_losses(model, evaluation_set.examples, limit, budget) if model else {}
    stage_1_scores = caption_scores = answer_scores = EMPTY_SCORES
    pope_scores: dict[str, Scores] = {}
    pope_mean = mean_of_subsets([], seed)
    predictions: list[Prediction] = []
    if stage_1:
        with models.without_adapter():
            stage_1_scores, captions = caption_images(
                stage_1, references, split, None, settings, budget
            )
        predictions += captions
    if model:
        caption_scores, captions = caption_images(
            model, references, split, settings.caption_question, settings, budget
        )
        answer_scores, answers = answer_questions(
            model, evaluation_set.questions, losses, settings, budget
        )
        pope_scores, yes_no_answers = answer_yes_no(
            model, evaluation_set.pope, evaluation_set.splits, settings, budget
        )
        asked = (question.image_id for qs in evaluation_set.pope.values() for question in qs)
        reached = budget.reached((answer.image_id for answer in yes_no_answers), asked)
        pope_mean = mean_of_subsets(yes_no_answers, seed) | reached
        predictions += [*captions, *answers, *yes_no_answers]
    counts = evaluation_set.without_features.items()
    without_features = {kind: {"without_features": count} for kind, count in counts}
    scores = {
        "captions": caption_scores | without_features["captions"],
        "answers": answer_scores
        | without_features["answers"]
        | {"too_long": evaluation_set.num_too_long},
        "pope": {name: section | without_features["pope"] for name, section in pope_scores.items()},
        "pope_mean": pope_mean,
        "pretrain_only": {"captions": stage_1_scores | without_features["captions"]},
        "contamination": evaluation_set.contamination_counts(),
        "weights_sha256": {stage: weights_of(RUNS / stage) for stage in settings.stages},
    }
    if settings.minutes is not None:
        scores["budget"] = {"minutes": settings.minutes}
    return scores, predictions


def print_summary(scores: Mapping[str, Any], warning: str) -> None:
    """Print the main scores with their gains over the wrong image, and the page's address."""
    if warning:
        print(f"warning:  {warning}")
    for sentence in gaps(scores):
        print(f"note:     {sentence}")
    captions, answers = scores["captions"], scores["answers"]
    if not scores["trained"].get("finetune"):
        captions = scores["pretrain_only"]["captions"]
    if captions["count"]:
        print(f"captions: {_beside_wrong_image(captions, 'CIDEr', 'CIDEr')}")
    if answers["count"]:
        # A long answer never matches its target exactly.
        mostly_short = 2 * answers["short_count"] >= answers["count"]
        name, key = ("exact match", "exact_match") if mostly_short else ("token F1", "token_f1")
        print(f"answers:  {_beside_wrong_image(answers, name, key)}")
    for subset, pope in scores["pope"].items():
        print(f"pope:     {_beside_wrong_image(pope, f'{subset} accuracy', 'accuracy')}")
    if len(scores["pope_mean"]["subsets"]) > 1:
        print(f"pope:     {_beside_wrong_image(scores['pope_mean'], 'mean F1', 'f1')}")
    print(f"report:   {(REPORTS / 'index.html').resolve().as_uri()}")


def _beside_wrong_image(section: Mapping[str, Any], name: str, key: str) -> str:
    text = f"{name}{of_images(section)} {section[key]:.3f} (wrong image {section[BLIND][key]:.3f}"
    gain = read_gain(section, key)
    return f"{text}; gain {written(gain)}): {use_of_picture(gain)}" if gain else f"{text})"


if __name__ == "__main__":
    run_stage(evaluate, __doc__)
