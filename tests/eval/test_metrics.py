import math
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from eval.metrics import (
    cider_by_image,
    mean_over_subsets,
    pope_measures,
    score_captions,
    score_pope,
    tokenized,
)

REFERENCES = {
    7: ["A brown dog runs over the green grass.", "The dog is running outside."],
    2: ["Two red boats lie on a quiet lake.", "Boats on the water at dawn."],
    5: ["A man isn't riding his old bicycle today.", "Somebody pushes a bike."],
}
FIRST = {image_id: captions[0] for image_id, captions in REFERENCES.items()}


def test_a_candidate_equal_to_a_reference_has_full_bleu_and_rouge() -> None:
    scores = score_captions(REFERENCES, FIRST)
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(1.0)


def test_cider_of_the_only_reference_is_ten() -> None:
    only = {image_id: captions[:1] for image_id, captions in REFERENCES.items()}
    assert score_captions(only, FIRST)["CIDEr"] == pytest.approx(10.0)


def test_scores_of_a_small_case_are_those_computed_by_hand() -> None:
    scores = score_captions(
        {1: ["a b c d"], 2: ["p q r s t u v w"]},
        {1: "a b x d", 2: "p q r s t u v w"},
    )
    # Matches over guesses, both captions together: 11/12 words, 8/10 pairs, 6/8, 5/6.
    assert scores["BLEU-1"] == pytest.approx(11 / 12)
    assert scores["BLEU-2"] == pytest.approx(math.sqrt(11 / 12 * 8 / 10))
    assert scores["BLEU-4"] == pytest.approx((11 / 12 * 8 / 10 * 6 / 8 * 5 / 6) ** 0.25)
    # Common subsequence a b d: precision = recall = 3/4.
    assert scores["ROUGE-L"] == pytest.approx((3 / 4 + 1) / 2)
    # Every n-gram has the same weight, so each cosine is shared n-grams over n-grams: of words
    # 3/4, of pairs 1/3, none longer; ten times their mean, for the first image.
    assert scores["CIDEr"] == pytest.approx((10 * (3 / 4 + 1 / 3) / 4 + 10) / 2)


def test_a_short_candidate_pays_the_brevity_penalty() -> None:
    scores = score_captions({1: ["a b c d e f"]}, {1: "a b c"})
    assert scores["BLEU-1"] == pytest.approx(math.exp(1 - 2))


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    scores = score_captions({1: ["a b", "a b c d e f g h"]}, {1: "a b x y"})
    precision, recall, beta = 1 / 2, 1.0, 1.2
    wanted = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert scores["ROUGE-L"] == pytest.approx(wanted)


def test_case_and_punctuation_do_not_count() -> None:
    loud = {image_id: text.upper().rstrip(".") + " !" for image_id, text in FIRST.items()}
    assert score_captions(REFERENCES, loud) == score_captions(REFERENCES, FIRST)


def test_order_of_images_and_references_changes_nothing() -> None:
    candidates = {7: "a dog in grass", 2: "red boats on a lake", 5: "a man on a bike"}
    ids = list(REFERENCES)
    random.Random(0).shuffle(ids)
    mixed = {image_id: REFERENCES[image_id][::-1] for image_id in ids}
    assert score_captions(mixed, candidates) == pytest.approx(
        score_captions(REFERENCES, candidates), rel=1e-12
    )


def test_a_line_break_in_a_caption_moves_no_other_caption() -> None:
    broken = {i: [c.replace(" ", "\r", 1) for c in captions] for i, captions in REFERENCES.items()}
    assert score_captions(broken, FIRST) == score_captions(REFERENCES, FIRST)


def test_empty_candidates_score_nothing() -> None:
    scores = score_captions(REFERENCES, dict.fromkeys(REFERENCES, ""))
    assert scores.keys() == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert list(scores.values()) == pytest.approx([0.0] * 6, abs=1e-6)


@pytest.mark.parametrize("candidate", ["", "a cat"])
def test_references_without_a_word_give_no_cider(candidate: str) -> None:
    references, candidates = {1: ["", "."], 2: ["\U0001f370"]}, {1: candidate, 2: candidate}
    assert score_captions(references, candidates)["CIDEr"] == 0
    assert cider_by_image(references, candidates) == {1: 0, 2: 0}


def test_the_cider_of_the_images_has_the_whole_cider_as_its_mean() -> None:
    candidates = {7: "A dog runs.", 2: "Two red boats lie on a lake.", 5: ""}
    found = cider_by_image(REFERENCES, dict(reversed(candidates.items())))
    assert found.keys() == candidates.keys()
    assert max(found, key=found.__getitem__) == 2
    assert found[5] == 0
    mean = sum(found.values()) / len(found)
    assert mean == pytest.approx(score_captions(REFERENCES, candidates)["CIDEr"])


def test_one_image_alone_has_no_cider() -> None:
    assert score_captions({1: ["a dog"]}, {1: "a dog"})["CIDEr"] == 0.0


def test_scoring_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    score_captions(REFERENCES, FIRST)
    assert capfd.readouterr() == ("", "")


def test_different_images_are_named() -> None:
    references = {image_id: ["a dog"] for image_id in range(10)}
    with pytest.raises(ValueError, match=r"missing 0, 1, 2, 3, 4, \.\.\., extra 99\.$"):
        score_captions(references, {7: "", 8: "", 9: "", 99: ""})
    with pytest.raises(ValueError, match=r"missing none, extra 3\.$"):
        score_captions({1: ["a"]}, {1: "a", 3: "b"})


def test_an_image_without_references_is_named() -> None:
    with pytest.raises(ValueError, match=r"at least one reference caption: without, 4\.$"):
        score_captions({1: ["a"], 4: []}, {1: "a", 4: "b"})


def test_no_captions_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no captions to score"):
        score_captions({}, {})


def test_pope_counts_yes_as_the_positive_answer() -> None:
    labels = ["yes", "yes", "yes", "yes", "no", "no", "no", "no", "no", "no"]
    answers = ["Yes", "yes.", "No", "Yes, it is", "No", "no", "not here", "Yes", "No.", "no"]
    assert score_pope(labels, answers) == pytest.approx(
        {"accuracy": 8 / 10, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "yes_rate": 4 / 10}
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes. But no cat", "yes"),
        ("There is no, dog", "no"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_an_answer_as_the_official_script(answer: str, says: str) -> None:
    assert score_pope([says], [answer])["accuracy"] == 1.0


def test_pope_ratios_without_cases_are_zero() -> None:
    assert score_pope(["no"], ["no"]) == {
        "accuracy": 1.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes_rate": 0.0,
    }


@pytest.mark.parametrize(
    ("labels", "answers", "message"),
    [
        (["yes"], [], "found 1 labels and 0 answers"),
        ([], [], "no questions to score"),
        (["yes", "Maybe"], ["a", "b"], "found 'Maybe'"),
    ],
)
def test_pope_refuses_what_it_cannot_score(
    labels: list[str], answers: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_pope(labels, answers)


WORDS = ["a", "the", "red", "cat", "dog", "boat", "on", "in", "under", "two", "box", "and", "looks"]


def text(rng, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randrange(most)))


def official_scores(references, candidates):
    """The scores of pycocoevalcap's own classes on the same tokens."""
    wanted = {i: [tokenized(caption) for caption in references[i]] for i in sorted(references)}
    found = {i: [tokenized(candidates[i])] for i in wanted}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = Rouge().compute_score(wanted, found)[0]
    return scores | {"CIDEr": Cider().compute_score(wanted, found)[0]}


@pytest.mark.parametrize("seed", range(4))
def test_caption_scores_are_those_of_pycocoevalcap(seed):
    rng = random.Random(seed)
    ids = rng.sample(range(1000), 30)
    references = {i: [text(rng) + " cat" for _ in range(rng.randrange(1, 6))] for i in ids}
    candidates = {i: rng.choice([text(rng), references[i][0]]) for i in ids}
    found = score_captions(references, candidates)
    assert found == pytest.approx(official_scores(references, candidates), abs=1e-12)


def test_scores_of_empty_captions_are_those_of_pycocoevalcap():
    references, candidates = {1: ["a red cat"], 2: ["two boats"]}, {1: "", 2: ""}
    found = score_captions(references, candidates)
    assert found == pytest.approx(official_scores(references, candidates), abs=1e-12)


def test_the_mean_over_subsets_counts_each_subset_the_same() -> None:
    small = pope_measures(["yes", "no"], ["yes", "yes"])
    large = pope_measures(["yes", "no", "no", "no"], ["yes", "no", "no", "yes"])
    mean = mean_over_subsets([small["accuracy"], large["accuracy"]])
    assert mean.value == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert mean_over_subsets([large["f1"]] * 3).value == pytest.approx(large["f1"].value)


def test_the_interval_of_a_mean_over_subsets_draws_an_image_with_its_questions_in_all() -> None:
    generator = random.Random(0)
    answers = [generator.choice(["yes", "no"]) for _ in range(60)]
    one = pope_measures(["yes", "no"] * 30, answers)["f1"]
    images = [number // 2 for number in range(60)]
    # The same questions in every subset: nothing is learned from their repetition.
    repeated = mean_over_subsets([one] * 3).interval(images * 3, 0)
    assert repeated == pytest.approx(one.interval(images, 0))
