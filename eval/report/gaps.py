"""Says what an evaluation lacks, and why: a stage, a kind of text, or images beyond its budget."""

from eval.report.scores import Section, pope_sections, section_of
from train.untrained import REASONS

_UNTRAINED = {
    "pretrain": "Stage 1 was not trained, because {}: stage 2 started from random weights of the "
    "projector.",
    "finetune": "Stage 2 was not trained, because {}: all scores are of stage 1 alone.",
}
"""Stage to the sentence about it, with a place for the reason."""

_TITLES = {"pretrain": "Stage 1 alone", "finetune": "Stage 2"}


def untrained_stages(scores: Section) -> list[str]:
    """Return the stages of which `reports/eval.json` says that they were not trained."""
    trained = scores.get("trained") or {}
    return [stage for stage in REASONS if trained.get(stage) is False]


def skipped_stages(scores: Section) -> list[str]:
    """Return the stages that `evaluate.stages` left out."""
    trained = scores.get("trained")
    return [stage for stage in REASONS if trained and stage not in trained]


def gaps(scores: Section) -> list[str]:
    """Return a sentence for each stage and each kind of text that was not scored, and the budget.

    Args:
        scores: Content of `reports/eval.json`; any section may be absent.
    """
    untrained, skipped = untrained_stages(scores), skipped_stages(scores)
    if "finetune" in {*untrained, *skipped}:
        # Stage 1 alone only writes captions.
        sections = {"captions": section_of(scores, "pretrain_only", "captions")}
    else:
        sections = {kind: section_of(scores, kind) for kind in ("captions", "answers")}
        sections["pope"] = pope_sections(scores)
    return [
        *(_UNTRAINED[stage].format(REASONS[stage]) for stage in untrained),
        *(f"{_TITLES[stage]} was not evaluated (evaluate.stages)." for stage in skipped),
        *_budget(scores),
        *(_unscored(scores, kind) for kind, section in sections.items() if not section),
    ]


def _budget(scores: Section) -> list[str]:
    minutes = (scores.get("budget") or {}).get("minutes")
    if minutes is None:
        return []
    return [
        f"The evaluation had {minutes:g} minutes (evaluate.minutes). In brackets stands the number "
        f"of images behind scores and intervals: a random sample, the same in all conditions."
    ]


def _unscored(scores: Section, kind: str) -> str:
    name = "yes/no questions" if kind == "pope" else kind
    counts = (scores.get("contamination") or {}).get(kind) or {}
    if counts.get("left_out"):
        return f"No {name} were scored: all of their pictures are in the training data."
    split = (scores.get("split") or {}).get("captions")
    if kind == "captions" and split:
        return f"No captions were scored: split {split} has none."
    return f"No {name} were scored: the evaluation data has none."
