"""Says what an evaluation lacks, and why: a stage without texts, a kind of text without any."""

from eval.report.scores import Section, pope_sections, section_of
from train.stages.untrained import REASONS

_UNTRAINED = {
    "pretrain": "Stage 1 was not trained, because {}: stage 2 started from random weights of the "
    "projector.",
    "finetune": "Stage 2 was not trained, because {}: all scores are of stage 1 alone.",
}
"""Stage to the sentence about it, with a place for the reason."""


def untrained_stages(scores: Section) -> list[str]:
    """Return the stages of which `reports/eval.json` says that they were not trained."""
    trained = scores.get("trained") or {}
    return [stage for stage in REASONS if trained.get(stage) is False]


def gaps(scores: Section) -> list[str]:
    """Return a sentence for each stage that was not trained, and each kind that was not scored.

    Args:
        scores: Content of `reports/eval.json`; any section may be absent.
    """
    untrained = untrained_stages(scores)
    if "finetune" in untrained:
        # Stage 1 alone only writes captions.
        sections = {"captions": section_of(scores, "pretrain_only", "captions")}
    else:
        sections = {kind: section_of(scores, kind) for kind in ("captions", "answers")}
        sections["pope"] = pope_sections(scores)
    return [
        *(_UNTRAINED[stage].format(REASONS[stage]) for stage in untrained),
        *(_unscored(scores, kind) for kind, section in sections.items() if not section),
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
