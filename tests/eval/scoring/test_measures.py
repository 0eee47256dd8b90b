import random

import pytest

from eval.metrics import (
    exact_match,
    rouge_l,
    score_captions,
    score_pope,
    token_f1,
)
from eval.scoring.measures import answer_measures, caption_measures, form_measures, pope_measures
from train.model.generate import Generation

WORDS = ["a", "the", "red", "cat", "dog", "boat", "on", "in", "under", "two", "box", "and", "looks"]


def text(rng, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randrange(most)))


@pytest.mark.parametrize("seed", range(4))
def test_caption_measures_are_the_official_scores(seed):
    rng = random.Random(seed)
    ids = rng.sample(range(1000), 30)
    references = {i: [text(rng) + " cat" for _ in range(rng.randrange(1, 6))] for i in ids}
    candidates = {i: rng.choice([text(rng), references[i][0]]) for i in ids}
    found = {name: m.value for name, m in caption_measures(references, candidates).items()}
    assert found == pytest.approx(score_captions(references, candidates), abs=1e-12)


def test_caption_measures_of_nothing_said_are_the_official_scores():
    references = {1: ["a red cat"], 2: ["two boats"]}
    candidates = {1: "", 2: ""}
    found = {name: m.value for name, m in caption_measures(references, candidates).items()}
    assert found == pytest.approx(score_captions(references, candidates), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_pope_measures_are_the_official_scores(seed):
    rng = random.Random(seed)
    labels = rng.choices(["yes", "no"], k=50)
    answers = rng.choices(["Yes", "no", "No, there is not.", "", "It is not there"], k=50)
    found = {name: m.value for name, m in pope_measures(labels, answers).items()}
    assert found == pytest.approx(score_pope(labels, answers), abs=1e-12)


def test_pope_measures_where_nobody_says_yes():
    found = {name: m.value for name, m in pope_measures(["no", "no"], ["no", "no"]).items()}
    assert found == score_pope(["no", "no"], ["no", "no"])


def test_answer_measures_are_means_and_only_short_targets_are_to_match():
    targets = ["Red.", "the cat sits under the two red boats today", "two"]
    answers = ["red", "the cat sits under the two red boats today", "three"]
    found = {name: m.value for name, m in answer_measures(targets, answers).items()}
    pairs = list(zip(targets, answers, strict=True))
    assert found["exact_match"] == 0.5
    assert [exact_match(*pair) for pair in pairs] == [1.0, 1.0, 0.0]
    assert found["token_f1"] == pytest.approx(sum(token_f1(*pair) for pair in pairs) / 3)
    assert found["ROUGE-L"] == pytest.approx(sum(rouge_l(*pair) for pair in pairs) / 3)


def test_without_a_short_target_there_is_nothing_to_match():
    long = "one two three four five six"
    assert answer_measures([long], [long])["exact_match"].value == 0.0


def test_form_measures_count_ends_lengths_and_repetition():
    made = [
        Generation("a cat a cat a cat", 6, False),
        Generation("a red boat", 3, True),
        Generation("", 0, True),
    ]
    found = {name: m.value for name, m in form_measures(made).items()}
    assert found["stop_rate"] == pytest.approx(2 / 3)
    assert found["mean_tokens"] == 3.0
    # Of "a cat a cat a cat" one of three 4-grams stood there before; the others have none.
    assert found["repeated_4grams"] == pytest.approx(1 / 3)
