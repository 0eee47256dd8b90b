import pytest

from eval.scoring.answers import (
    answer_measures,
    exact_match,
    form_measures,
    normalize_answer,
    repeated_4grams_counts,
    rouge_l,
    token_f1,
)
from train.model.generate import Generation


def test_normalizing_drops_case_articles_punctuation_and_spaces() -> None:
    assert normalize_answer("  The  Red-dog, an\napple & A theory! ") == "reddog apple theory"


def test_exact_match_ignores_what_normalizing_drops() -> None:
    assert exact_match("A red dog.", "red dog") == 1.0
    assert exact_match("A red dog.", "red dogs") == 0.0


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        ("red dog", "The red dog!", 1.0),
        ("red dog", "red cat", 1 / 2),
        ("dog dog dog", "dog", 1 / 2),
        ("red dog", "boat", 0.0),
        ("the", "", 1.0),
        ("dog", "the", 0.0),
    ],
)
def test_token_f1_counts_shared_words(target: str, prediction: str, score: float) -> None:
    assert token_f1(target, prediction) == pytest.approx(score)
    assert token_f1(prediction, target) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "repeated", "total"),
    [
        ("", 0, 0),
        ("a b c", 0, 0),
        ("a b c d e", 0, 2),
        ("A b c d a B c d", 1, 5),
        ("x x x x x x", 2, 3),
    ],
)
def test_repetition_is_counted_within_a_text(text: str, repeated: int, total: int) -> None:
    assert repeated_4grams_counts(text) == (repeated, total)


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
