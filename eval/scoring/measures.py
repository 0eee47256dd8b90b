"""What is scored of captions, answers and yes-no answers, as measures that have intervals.

The values are those of `eval.metrics`; here they are taken apart into sums over texts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.rouge.rouge import Rouge

from eval.bootstrap import Measure, Sums, divide, mean_of, ratio_of
from eval.metrics import (
    ciders,
    exact_match,
    is_short,
    repeated_4grams_counts,
    rouge_l,
    token_f1,
    tokenized_pairs,
    yes_or_no,
)
from train.model.generate import Generation

BLEU_ORDERS = 4


def caption_measures(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[str, Measure]:
    """Return those of `eval.metrics.score_captions`; the texts are in order of image id.

    In the intervals the word weights of CIDEr stay those of all references.
    """
    wanted, found = tokenized_pairs(references, candidates)
    rouge = Rouge()
    rouges = [rouge.calc_score(found[i], wanted[i]) for i in wanted]
    bleus = _bleu_parts([found[i][0] for i in wanted], list(wanted.values()))
    measures = {f"BLEU-{n}": Measure(bleus, _bleu(n)) for n in range(1, BLEU_ORDERS + 1)}
    return measures | {"ROUGE-L": mean_of(rouges), "CIDEr": mean_of(ciders(wanted, found))}


def _bleu_parts(candidates: Sequence[str], references: Sequence[list[str]]) -> Sums:
    """Return correct and guessed n-grams of each order, and both lengths: [N, 2 * 4 + 2]."""
    scorer = BleuScorer(n=BLEU_ORDERS)
    for candidate, texts in zip(candidates, references, strict=True):
        scorer += (candidate, texts)
    rows = [
        [*text["correct"], *text["guess"], text["testlen"], _closest(text)] for text in scorer.ctest
    ]
    return np.array(rows, dtype=np.float64)


def _closest(text: dict[str, list[int]]) -> int:
    length = text["testlen"]
    return min((abs(wanted - length), wanted) for wanted in text["reflen"])[1]  # type: ignore[operator]


def _bleu(order: int) -> Callable[[Sums], Sums]:
    """Return BLEU of some order from sums, smoothed as pycocoevalcap does."""

    def of_sums(sums: Sums) -> Sums:
        correct, guessed = sums[..., :BLEU_ORDERS] + 1e-15, sums[..., BLEU_ORDERS:-2] + 1e-9
        bleu = np.prod((correct / guessed)[..., :order], axis=-1) ** (1 / order)
        ratio = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
        smoothed: Sums = bleu * np.exp(np.minimum(0, 1 - 1 / ratio))
        return smoothed

    return of_sums


def answer_measures(targets: Sequence[str], answers: Sequence[str]) -> dict[str, Measure]:
    """Return those of free answers; exact match counts answers whose target is short."""
    pairs = list(zip(targets, answers, strict=True))
    short = [float(is_short(target)) for target in targets]
    matches = [exact_match(*pair) * counts for pair, counts in zip(pairs, short, strict=True)]
    return {
        "exact_match": ratio_of(matches, short),
        "token_f1": mean_of([token_f1(*pair) for pair in pairs]),
        "ROUGE-L": mean_of([rouge_l(*pair) for pair in pairs]),
    }


def pope_measures(labels: Sequence[str], answers: Sequence[str]) -> dict[str, Measure]:
    """Return those of `eval.metrics.score_pope`."""
    cells = [("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")]
    pairs = [(label, yes_or_no(answer)) for label, answer in zip(labels, answers, strict=True)]
    counts = np.array([[pair == cell for cell in cells] for pair in pairs], dtype=np.float64)

    def measure(of: Callable[[Sums, Sums, Sums, Sums], Sums]) -> Measure:
        return Measure(counts, lambda sums: of(*np.moveaxis(sums, -1, 0)))

    return {
        "accuracy": measure(lambda tp, fp, fn, tn: divide(tp + tn, tp + fp + fn + tn)),
        "precision": measure(lambda tp, fp, fn, tn: divide(tp, tp + fp)),
        "recall": measure(lambda tp, fp, fn, tn: divide(tp, tp + fn)),
        "f1": measure(lambda tp, fp, fn, tn: divide(2 * tp, 2 * tp + fp + fn)),
        "yes_rate": measure(lambda tp, fp, fn, tn: divide(tp + fp, tp + fp + fn + tn)),
    }


def form_measures(made: Sequence[Generation]) -> dict[str, Measure]:
    """Return those that need no target: whether texts end, repeat themselves, how long they are."""
    repeated, all_4grams = zip(*(repeated_4grams_counts(one.text) for one in made), strict=True)
    return {
        "stop_rate": mean_of([float(one.stopped) for one in made]),
        "repeated_4grams": ratio_of(repeated, all_4grams),
        "mean_tokens": mean_of([float(one.num_tokens) for one in made]),
    }
