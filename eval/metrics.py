"""Scores of captions and of yes-no answers, each as a measure that has an interval.

Caption scores are those of the official COCO evaluation (Chen et al. 2015, arXiv 1504.00325)
without its Java tokenizer; yes-no scores are those of POPE (Li et al. 2023, arXiv 2305.10355).
Scores of free answers are in `eval.scoring.answers`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from cache.texts import first_few
from eval.bootstrap import Measure, Sums, divide, mean_of
from eval.scoring.ptb_tokenizer import tokenize_caption

BLEU_ORDERS = 4


def score_captions(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[str, float]:
    """Score one caption per image as the official COCO evaluation does.

    CIDEr is CIDEr-D, whose word weights come from these references, so a single image scores 0.
    References without any word give 0 too, where the official program stops with an error.

    Args:
        references: Image id to at least one caption by a person.
        candidates: Image id to the caption to score, which may be empty.

    Returns:
        `BLEU-1` to `BLEU-4` and `ROUGE-L` from 0 to 1, and `CIDEr` from 0 to 10, where 1.0 is what
        papers print as 100.

    Raises:
        ValueError: No image, an image without references, or different image ids.
    """
    return _values(caption_measures(references, candidates))


def score_pope(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Score yes-no answers about objects as POPE does.

    Args:
        labels: The right answers, `yes` or `no`.
        answers: Texts of a model, in the order of the labels; `yes_or_no` reads them.

    Returns:
        `accuracy`, `precision`, `recall` and `f1` of yes, and `yes_rate`, the share of answers
        that say yes. A ratio with a denominator of 0 is 0.

    Raises:
        ValueError: No question, different numbers of labels and answers, or an unknown label.
    """
    return _values(pope_measures(labels, answers))


def _values(measures: Mapping[str, Measure]) -> dict[str, float]:
    return {name: measure.value for name, measure in measures.items()}


def caption_measures(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[str, Measure]:
    """Return the scores of `score_captions` as measures, whose texts are in order of image id.

    The intervals keep CIDEr's word weights of all references.
    """
    wanted, found = _tokenized_pairs(references, candidates)
    rouge = Rouge()
    bleu_sums = _bleu_sums([found[i][0] for i in wanted], list(wanted.values()))
    measures = {f"BLEU-{n}": Measure(bleu_sums, _bleu(n)) for n in range(1, BLEU_ORDERS + 1)}
    measures["ROUGE-L"] = mean_of([rouge.calc_score(found[i], wanted[i]) for i in wanted])
    return measures | {"CIDEr": mean_of(_ciders(wanted, found))}


def cider_by_image(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[int, float]:
    """Return the CIDEr of each image, whose mean is the CIDEr of `score_captions`."""
    wanted, found = _tokenized_pairs(references, candidates)
    return dict(zip(wanted, _ciders(wanted, found), strict=True))


def pope_measures(labels: Sequence[str], answers: Sequence[str]) -> dict[str, Measure]:
    """Return the scores of `score_pope` as measures."""
    _check_labels(labels, answers)
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


def pope_mean_measures(
    subsets: Sequence[str], labels: Sequence[str], answers: Sequence[str]
) -> dict[str, Measure]:
    """Return the mean of each score of `score_pope` over subsets.

    Args:
        subsets: The subset of each question; each subset's questions stand together.
        labels: The right answers.
        answers: Texts of a model, in the order of the labels.
    """
    parts, start = [], 0
    for size in Counter(subsets).values():
        end = start + size
        parts.append(pope_measures(labels[start:end], answers[start:end]))
        start = end
    return {name: mean_over_subsets([part[name] for part in parts]) for name in parts[0]}


def mean_over_subsets(measures: Sequence[Measure]) -> Measure:
    """Return the mean of one score over subsets, each of which counts the same.

    Papers print the mean F1 of POPE's three subsets as the score POPE.

    Args:
        measures: The score in each subset, of which each has as many sums.

    Returns:
        A measure of the texts of all subsets, one subset after the other.
    """
    num_texts, num_sums = sum(len(m.parts_NK) for m in measures), measures[0].parts_NK.shape[1]
    parts = np.zeros((num_texts, num_sums * len(measures)))
    row = 0
    for number, measure in enumerate(measures):
        texts = len(measure.parts_NK)
        columns = slice(num_sums * number, num_sums * (number + 1))
        parts[row : row + texts, columns] = measure.parts_NK
        row += texts

    def of_sums(sums: Sums) -> Sums:
        split = np.split(sums, len(measures), axis=-1)
        scores = [m.of_sums(part) for m, part in zip(measures, split, strict=True)]
        mean: Sums = np.mean(scores, axis=0)
        return mean

    return Measure(parts, of_sums)


def yes_or_no(answer: str) -> str:
    """Return `yes` or `no` for an answer, as POPE reads it.

    Only the first sentence counts. It says no if one of its words is `No`, `not` or `no`, and yes
    otherwise, so an empty answer is a yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@functools.lru_cache(maxsize=2**16)
def tokenized(caption: str) -> str:
    """Return a caption's tokens, joined by spaces as pycocoevalcap takes them."""
    return " ".join(tokenize_caption(caption))


def _tokenized_pairs(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Tokenise references and candidates, in order of image id."""
    _check_images(references, candidates)
    # The last digits of a mean depend on the order.
    image_ids = sorted(references)
    wanted = {i: [tokenized(text) for text in references[i]] for i in image_ids}
    return wanted, {i: [tokenized(candidates[i])] for i in image_ids}


def _ciders(wanted: dict[int, list[str]], found: dict[int, list[str]]) -> list[float]:
    """Return the CIDEr of each image from tokenised captions."""
    if not any(text for texts in wanted.values() for text in texts):
        return [0.0] * len(wanted)
    _, scores = Cider().compute_score(wanted, found)
    return [float(score) for score in scores]


def _bleu_sums(candidates: Sequence[str], references: Sequence[list[str]]) -> Sums:
    """Return each text's n-gram matches and n-grams by order, and both lengths: [N, 2 * 4 + 2]."""
    scorer = BleuScorer(n=BLEU_ORDERS)
    for candidate, texts in zip(candidates, references, strict=True):
        scorer += (candidate, texts)
    rows = [
        [*text["correct"], *text["guess"], text["testlen"], _closest_length(text)]
        for text in scorer.ctest
    ]
    return np.array(rows, dtype=np.float64)


def _closest_length(text: dict[str, list[int]]) -> int:
    length = text["testlen"]
    return min((abs(wanted - length), wanted) for wanted in text["reflen"])[1]  # type: ignore[operator]


def _bleu(order: int) -> Callable[[Sums], Sums]:
    """Return the function from sums to BLEU of an order, smoothed as pycocoevalcap does."""

    def of_sums(sums: Sums) -> Sums:
        correct, guessed = sums[..., :BLEU_ORDERS] + 1e-15, sums[..., BLEU_ORDERS:-2] + 1e-9
        bleu = np.prod((correct / guessed)[..., :order], axis=-1) ** (1 / order)
        ratio = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
        smoothed: Sums = bleu * np.exp(np.minimum(0, 1 - 1 / ratio))
        return smoothed

    return of_sums


def _check_images(references: dict[int, list[str]], candidates: dict[int, str]) -> None:
    if references.keys() != candidates.keys():
        missing = _first_ids(references.keys() - candidates.keys())
        extra = _first_ids(candidates.keys() - references.keys())
        raise ValueError(
            f"candidates must have the image ids of the references: missing {missing}, "
            f"extra {extra}."
        )
    if not references:
        raise ValueError("no captions to score: references and candidates hold no image.")
    bare = {image_id for image_id, captions in references.items() if not captions}
    if bare:
        raise ValueError(
            f"each image needs at least one reference caption: without, {_first_ids(bare)}."
        )


def _first_ids(image_ids: Collection[int]) -> str:
    return first_few(sorted(image_ids)) or "none"


def _check_labels(labels: Sequence[str], answers: Sequence[str]) -> None:
    if len(labels) != len(answers):
        raise ValueError(
            f"each question needs one label and one answer: found {len(labels)} labels and "
            f"{len(answers)} answers."
        )
    if not labels:
        raise ValueError("no questions to score: labels and answers are empty.")
    others = sorted(set(labels) - {"yes", "no"})
    if others:
        raise ValueError(f"a label is 'yes' or 'no', found {first_few(map(repr, others))}.")
