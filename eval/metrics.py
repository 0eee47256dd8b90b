"""Scores of texts: captions, yes-no answers, free answers, and repetition.

Owns what a score means; running the model is the work of `train.model.generate`. Caption scores are
those of the official COCO evaluation (Chen et al. 2015, arXiv 1504.00325) without its Java
tokenizer.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from cache.texts import first_few
from eval.scoring.ptb_tokenizer import tokenize_caption

SHORT_WORDS = 5
"""Most words, without articles, of a target that an answer is to match exactly."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_captions(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[str, float]:
    """Score one caption an image as the official COCO evaluation does.

    CIDEr is CIDEr-D, whose word weights come from these references: one image alone scores 0, and
    so does everything if no reference has a word, which the official program stops at.

    Args:
        references: For each image id, at least one caption that a person wrote.
        candidates: For each image id, the caption to score; it may be empty.

    Returns:
        `BLEU-1` to `BLEU-4` and `ROUGE-L` from 0 to 1, and `CIDEr` from 0 to 10, where 1.0 is what
        papers print as 100.

    Raises:
        ValueError: No image at all, an image without references, or different image ids.
    """
    wanted, found = tokenized_pairs(references, candidates)
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    rouge, _ = Rouge().compute_score(wanted, found)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return scores | {"ROUGE-L": float(rouge), "CIDEr": float(np.mean(ciders(wanted, found)))}


def cider_by_image(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> dict[int, float]:
    """Return the CIDEr of each image, whose mean is the CIDEr of `score_captions`."""
    wanted, found = tokenized_pairs(references, candidates)
    return dict(zip(wanted, ciders(wanted, found), strict=True))


def score_pope(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Score yes-no answers about objects as POPE does (Li et al. 2023, arXiv 2305.10355).

    Only the first sentence of an answer counts. It says no if one of its words is `No`, `not` or
    `no`, and yes otherwise, so that an empty answer is a yes.

    Args:
        labels: The right answers, `yes` or `no`.
        answers: Texts of a model, in the order of the labels.

    Returns:
        `accuracy`, `precision`, `recall` and `f1` of yes, and `yes_rate`, the share of answers
        that say yes. A ratio without any case is 0.

    Raises:
        ValueError: No question, different numbers of labels and answers, or another label.
    """
    _check_labels(labels, answers)
    counts = Counter(zip(labels, map(yes_or_no, answers), strict=True))
    true_yes, false_yes = counts["yes", "yes"], counts["no", "yes"]
    precision = _ratio(true_yes, true_yes + false_yes)
    recall = _ratio(true_yes, true_yes + counts["yes", "no"])
    return {
        "accuracy": _ratio(true_yes + counts["no", "no"], len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_rate": _ratio(true_yes + false_yes, len(labels)),
    }


def normalize_answer(text: str) -> str:
    """Make answers comparable as SQuAD does (Rajpurkar et al. 2016, arXiv 1606.05250).

    Lower case, without ASCII punctuation, without a, an and the, single spaces.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def exact_match(target: str, prediction: str) -> float:
    """Return 1.0 if both texts are the same after `normalize_answer`, else 0.0.

    Nothing said is right only where nothing was wanted, not where an article was.
    """
    if not target.strip() or not prediction.strip():
        return float(target.strip() == prediction.strip())
    return float(normalize_answer(target) == normalize_answer(prediction))


def token_f1(target: str, prediction: str) -> float:
    """Return the F1 of the words that both texts share, as SQuAD counts it.

    Words are those of `normalize_answer`; a word counts as often as it stands in both. Two texts
    without words agree, one without and one with words do not.
    """
    wanted, found = normalize_answer(target).split(), normalize_answer(prediction).split()
    if not wanted or not found:
        return float(wanted == found)
    return 2 * (Counter(wanted) & Counter(found)).total() / (len(wanted) + len(found))


def is_short(target: str) -> bool:
    """Say whether an answer is so short that another wording of it would be a wrong answer."""
    return len(normalize_answer(target).split()) <= SHORT_WORDS


def rouge_l(target: str, prediction: str) -> float:
    """Return ROUGE-L of one answer, on the tokens of the caption evaluation.

    Two texts without tokens agree.
    """
    wanted, found = _tokenized(target), _tokenized(prediction)
    if not wanted or not found:
        return float(wanted == found)
    return float(Rouge().calc_score([found], [wanted]))


def repeated_4grams_counts(text: str) -> tuple[int, int]:
    """Return how many 4-grams of a text stood in it before, and how many it has.

    The share of a corpus is the sum of the first over the sum of the second: one minus the share of
    distinct 4-grams (seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319). Tokens are parted by
    white space, in lower case; a text of fewer than four has no 4-gram.
    """
    tokens = text.lower().split()
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return len(grams) - len(set(grams)), len(grams)


def tokenized_pairs(
    references: dict[int, list[str]], candidates: dict[int, str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Tokenise references and candidates as pycocoevalcap takes them, in order of image id.

    Raises:
        ValueError: As `score_captions`.
    """
    _check_images(references, candidates)
    # One order of images, because the last digits of a mean depend on it.
    image_ids = sorted(references)
    wanted = {i: [_tokenized(text) for text in references[i]] for i in image_ids}
    return wanted, {i: [_tokenized(candidates[i])] for i in image_ids}


def ciders(wanted: dict[int, list[str]], found: dict[int, list[str]]) -> list[float]:
    """Return the CIDEr of each image from tokenised captions, in order of image id."""
    if not any(text for texts in wanted.values() for text in texts):
        return [0.0] * len(wanted)
    _, scores = Cider().compute_score(wanted, found)
    return [float(score) for score in scores]


@functools.lru_cache(maxsize=2**16)
def _tokenized(caption: str) -> str:
    return " ".join(tokenize_caption(caption))


def yes_or_no(answer: str) -> str:
    """Return what an answer says, as POPE reads it: `yes` or `no`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check_images(references: dict[int, list[str]], candidates: dict[int, str]) -> None:
    if references.keys() != candidates.keys():
        missing = _some(references.keys() - candidates.keys())
        extra = _some(candidates.keys() - references.keys())
        raise ValueError(
            f"candidates must have the image ids of the references: missing {missing}, "
            f"extra {extra}."
        )
    if not references:
        raise ValueError("no captions to score: references and candidates hold no image.")
    bare = {image_id for image_id, captions in references.items() if not captions}
    if bare:
        raise ValueError(
            f"each image needs at least one reference caption: without, {_some(bare)}."
        )


def _some(image_ids: Collection[int]) -> str:
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
