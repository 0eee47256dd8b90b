"""Gains of one evaluation over another one that asked the same, from the texts of both.

The table of predictions holds no losses, so there is no gain in the loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.bootstrap import Gain, Measure
from eval.metrics import caption_measures, pope_mean_measures
from eval.scoring.answers import answer_measures
from eval.scoring.question_types import question_type
from eval.scoring.score_names import NO_BETTER_SIDE

Row = Mapping[str, Any]
"""A row of the table of predictions."""

Pairs = Sequence[tuple[Row, Row]]
"""Predictions about the same questions."""


def paired_gains(model: str, kind: str, pairs: Pairs, seed: int = 0) -> dict[str, Gain]:
    """Return how much better the second texts of some pairs are than the first ones.

    Args:
        model: The stage that made the model.
        kind: The kind of the texts.
        pairs: All predictions of that model and kind.
        seed: Seed of the draws.

    Returns:
        Name of a score, like `captions.CIDEr`, to the gain; nothing where the targets differ, or
        where the texts cannot be scored.
    """
    if any(first["targets"] != second["targets"] for first, second in pairs):
        return {}
    ordered = sorted(pairs, key=lambda pair: int(pair[0]["image_id"]))
    gains = {}
    for section, of_section in _sections(model, kind, ordered):
        image_ids = [first["image_id"] for first, _ in of_section]
        try:
            befores, afters = (_measures(kind, rows) for rows in zip(*of_section, strict=True))
        except (ValueError, IndexError):
            # Without targets, or a label that is neither yes nor no.
            continue
        for name in befores.keys() - set(NO_BETTER_SIDE):
            gain = afters[name].gain_over(befores[name], image_ids, seed)
            gains[f"{section}.{name}"] = gain
    return gains


def _sections(model: str, kind: str, pairs: Pairs) -> Iterator[tuple[str, Pairs]]:
    """Yield the name of each section of `reports/eval.json`, and its pairs."""
    if kind == "caption":
        yield "captions" if model == "finetune" else "pretrain_only.captions", pairs
    if kind == "answer":
        yield "answers", pairs
        types = [question_type(first["question"]) for first, _ in pairs]
        for name in dict.fromkeys(types):
            chosen = [pair for pair, of_pair in zip(pairs, types, strict=True) if of_pair == name]
            yield f"answers.by_type.{name}", chosen
    if kind == "pope":
        subsets = {
            subset: [pair for pair in pairs if pair[0]["subset"] == subset]
            for subset in sorted({first["subset"] for first, _ in pairs})
        }
        for subset, of_subset in subsets.items():
            yield f"pope.{subset}", of_subset
        yield "pope_mean", [pair for of_subset in subsets.values() for pair in of_subset]


def _measures(kind: str, rows: Sequence[Row]) -> dict[str, Measure]:
    texts = [row["prediction"] for row in rows]
    if kind == "caption":
        references = {row["image_id"]: row["targets"] for row in rows}
        return caption_measures(references, dict(zip(references, texts, strict=True)))
    targets = [row["targets"][0] for row in rows]
    if kind == "answer":
        return answer_measures(targets, texts)
    return pope_mean_measures([row["subset"] for row in rows], targets, texts)
