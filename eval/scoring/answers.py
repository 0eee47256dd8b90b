"""Scores of free answers, and of any generated text without its targets.

Answers are compared word by word as SQuAD does (Rajpurkar et al. 2016, arXiv 1606.05250).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from pycocoevalcap.rouge.rouge import Rouge

from eval.bootstrap import Measure, mean_of, ratio_of
from eval.metrics import tokenized
from train.model.generate import Generation

SHORT_WORDS = 5
"""Most words, articles left out, of a target that an answer should match exactly."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation and articles, and reduce white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def is_short(target: str) -> bool:
    """Return whether a target is so short that other words would make a wrong answer."""
    return len(normalize_answer(target).split()) <= SHORT_WORDS


def exact_match(target: str, prediction: str) -> float:
    """Return 1.0 if both texts are equal after `normalize_answer`, else 0.0.

    An empty prediction matches an empty target alone, not a target that is only an article.
    """
    if not target.strip() or not prediction.strip():
        return float(target.strip() == prediction.strip())
    return float(normalize_answer(target) == normalize_answer(prediction))


def token_f1(target: str, prediction: str) -> float:
    """Return SQuAD's F1 over the normalised words of both texts, repeated words included.

    Two texts without words score 1; a text with words and a text without score 0.
    """
    wanted, found = normalize_answer(target).split(), normalize_answer(prediction).split()
    if not wanted or not found:
        return float(wanted == found)
    return 2 * (Counter(wanted) & Counter(found)).total() / (len(wanted) + len(found))


def rouge_l(target: str, prediction: str) -> float:
    """Return ROUGE-L over the tokens of the caption evaluation; 1 for two texts without tokens."""
    wanted, found = tokenized(target), tokenized(prediction)
    if not wanted or not found:
        return float(wanted == found)
    return float(Rouge().calc_score([found], [wanted]))


def repeated_4grams_counts(text: str) -> tuple[int, int]:
    """Return the number of 4-grams that repeat an earlier one, and of all 4-grams of a text.

    The ratio over a corpus is seq-rep-4 of Welleck et al. 2019 (arXiv 1908.04319). Tokens are
    separated by white space, in lower case; a text of fewer than four tokens has no 4-gram.
    """
    tokens = text.lower().split()
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return len(grams) - len(set(grams)), len(grams)


def answer_score(target: str, answer: str) -> float:
    """Return the score of one answer: exact match for a short target, token F1 for others."""
    return exact_match(target, answer) if is_short(target) else token_f1(target, answer)


def answer_measures(targets: Sequence[str], answers: Sequence[str]) -> dict[str, Measure]:
    """Return the measures of free answers; exact match is over short targets alone."""
    pairs = list(zip(targets, answers, strict=True))
    short = [float(is_short(target)) for target in targets]
    matches = [exact_match(*pair) * counts for pair, counts in zip(pairs, short, strict=True)]
    return {
        "exact_match": ratio_of(matches, short),
        "token_f1": mean_of([token_f1(*pair) for pair in pairs]),
        "ROUGE-L": mean_of([rouge_l(*pair) for pair in pairs]),
    }


def form_measures(generations: Sequence[Generation]) -> dict[str, Measure]:
    """Return the measures that need no target: whether texts end, repeat, and their lengths."""
    repeated, all_4grams = zip(
        *(repeated_4grams_counts(generation.text) for generation in generations), strict=True
    )
    return {
        "stop_rate": mean_of([float(generation.stopped) for generation in generations]),
        "repeated_4grams": ratio_of(repeated, all_4grams),
        "mean_tokens": mean_of([float(generation.num_tokens) for generation in generations]),
    }
