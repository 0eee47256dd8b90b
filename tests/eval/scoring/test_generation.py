import math

import numpy as np
import pytest

import eval.scoring.generation
from eval.metrics import score_captions, score_pope
from eval.scoring.answers import rouge_l
from eval.scoring.conditions import other_images
from eval.scoring.evaluated_models import EvaluatedModel
from eval.scoring.generation import answer_questions, answer_yes_no, caption_images
from eval.scoring.losses import Losses
from eval.scoring.score_names import CONDITIONS, CONTROLS, NO_BETTER_SIDE, SEEN
from eval.scoring.yes_no import YesNo
from train.data.examples import Question
from train.model.captioner import CaptionModel
from train.model.generate import Generation, generate
from train.model.projector import seeded_projector

REFERENCES = {
    139: ["a red cat on the box", "the cat is red"],
    100: ["a blue dog in the green box"],
    117: ["nine boats under a bridge at night", "boats and a bridge"],
    121: ["two people eat \u00e9clairs \U0001f370 in Z\u00fcrich"],
}
QUESTIONS = [
    Question(139, "What is on the box", "a red cat"),
    Question(100, "What is in the box", "a blue dog"),
    Question(139, "how many", "one"),
]


@pytest.fixture
def say(monkeypatch):
    """Replace the model with one whose text depends on the image alone."""

    def say(texts):
        calls = []

        def made(model, prompt_format, store, image_ids, questions, **limits):
            calls.append((list(image_ids), list(questions), limits))
            return [texts[i] for i in image_ids]

        monkeypatch.setattr(eval.scoring.generation, "generate", made)
        return calls

    return say


def said(text, num_tokens=3, stopped=True):
    return Generation(text, num_tokens, stopped)


@pytest.fixture
def nobody(store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return EvaluatedModel("nobody", None, None, None, store, 0, "nobody")


ONE_LOSS = Losses([139, 100], [3.0, 2.0], [4, 1])


def ask_all(evaluated, settings, questions=QUESTIONS):
    return answer_questions(evaluated, questions, dict.fromkeys(CONDITIONS, ONE_LOSS), settings)


def shown(ids, store):
    """The images whose features are shown under each condition."""
    others = other_images(ids, store)
    return [ids, [others[i] for i in ids], ids, ids]


def test_captions_are_scored_with_their_own_image_and_with_another(say, nobody, store, limits):
    texts = {i: said(references[-1]) for i, references in REFERENCES.items()}
    calls = say(texts)
    scores, captions = caption_images(nobody, REFERENCES, "val", None, limits(caption_tokens=9))
    ids, others = sorted(REFERENCES), other_images(list(REFERENCES), store)
    assert [call[0] for call in calls] == shown(ids, store)
    for _, questions, settings in calls:
        assert questions == [None] * 4
        assert (settings["max_tokens"], settings["batch_size"]) == (9, 3)
    seen = score_captions(REFERENCES, {i: texts[i].text for i in ids})
    blind = score_captions(REFERENCES, {i: texts[others[i]].text for i in ids})
    assert {key: scores[key] for key in seen} == pytest.approx(seen)
    assert {key: scores["blind"][key] for key in blind} == pytest.approx(blind)
    assert scores["CIDEr"] > 10 * blind["CIDEr"]
    for caption in captions:
        i = caption.image_id
        assert (caption.generations[SEEN], caption.generations["blind"]) == (
            texts[i],
            texts[others[i]],
        )
        assert caption.targets == tuple(REFERENCES[i])
        assert caption.question == ""
    assert [c.image_id for c in captions] == ids
    assert np.mean([c.score for c in captions]) == pytest.approx(scores["CIDEr"])


def test_every_control_has_every_score_and_every_score_an_interval(say, nobody, limits):
    say({i: said(references[-1]) for i, references in REFERENCES.items()})
    captions, _ = caption_images(nobody, REFERENCES, "val", None, limits())
    answers, _ = ask_all(nobody, limits())
    pope, _ = answer_yes_no(nobody, POPE, {}, limits())
    for scores, extra in (
        (captions, set()),
        (answers, {"by_type", "short_count"}),
        (answers["by_type"]["what"], {"short_count"}),
        (pope["random"], set()),
    ):
        keys = scores.keys() - extra - {*CONTROLS, "gains"}
        for section in (scores, *(scores[control] for control in CONTROLS)):
            assert keys <= section.keys()
            assert section["intervals"].keys() == keys - {"count", "intervals"}
        form = {*NO_BETTER_SIDE, "count", "intervals"}
        assert list(scores["gains"]) == list(CONTROLS)
        for control, gains in scores["gains"].items():
            assert gains.keys() == keys - form
            for name, gain in gains.items():
                better = scores[control][name] - scores[name]
                assert gain["gain"] == pytest.approx(better if name == "loss" else -better)
            for name, (low, high) in section["intervals"].items():
                assert low <= section[name] + 1e-9
                assert section[name] <= high + 1e-9 or name.startswith("BLEU")


def test_a_caption_that_is_asked_for_is_asked_as_in_training(say, nobody, limits):
    calls = say({i: said("a cat") for i in REFERENCES})
    _, captions = caption_images(nobody, REFERENCES, "val", "What is it", limits())
    assert [questions for _, questions, _ in calls] == [["What is it"] * 4] * 4
    assert {caption.question for caption in captions} == {"What is it"}


def test_answers_are_scored_with_their_own_image_and_with_another(say, nobody, store, limits):
    texts = {139: said("A red cat!"), 100: said("the blue boat")}
    calls = say(texts)
    scores, answers = ask_all(nobody, limits(answer_tokens=7))
    assert [call[0] for call in calls] == shown([139, 100, 139], store)
    for _, questions, settings in calls:
        assert questions == [q.question for q in QUESTIONS]
        assert (settings["max_tokens"], settings["batch_size"]) == (7, 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_f1"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    pairs = [("a red cat", "A red cat!"), ("a blue dog", "the blue boat"), ("one", "A red cat!")]
    assert scores["ROUGE-L"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert (scores["blind"]["exact_match"], scores["blind"]["token_f1"]) == (0, 0)
    assert (scores["short_count"], scores["loss"]) == (3, 1.0)
    assert [(a.image_id, a.question, a.targets) for a in answers] == [
        (q.image_id, q.question, (q.answer,)) for q in QUESTIONS
    ]
    assert [a.score for a in answers] == [1, 0, 0]
    assert [a.generations[SEEN].text for a in answers] == [
        "A red cat!",
        "the blue boat",
        "A red cat!",
    ]
    assert [a.generations["blind"].text for a in answers] == [
        "the blue boat",
        "A red cat!",
        "the blue boat",
    ]


def test_the_types_of_questions_share_the_answers_out(say, nobody, limits):
    say({139: said("one"), 100: said("a blue dog")})
    scores, _ = ask_all(nobody, limits())
    by_type = scores["by_type"]
    assert {name: section["count"] for name, section in by_type.items()} == {
        "what": 2,
        "how many": 1,
    }
    assert by_type["how many"]["exact_match"] == 1
    assert by_type["what"]["exact_match"] == 0.5
    assert by_type["what"]["blind"]["exact_match"] == 0


def test_a_long_answer_is_not_to_match_word_by_word(say, nobody, limits):
    long = "one two three four five six seven"
    say({139: said(f"{long} eight"), 100: said("a blue dog")})
    questions = [Question(139, "Why", long), Question(100, "What", "a blue dog")]
    scores, answers = ask_all(nobody, limits(), questions)
    assert (scores["exact_match"], scores["short_count"]) == (1, 1)
    assert [a.score for a in answers] == [pytest.approx(14 / 15), 1]


POPE = {
    "random": [
        YesNo(139, "Is there a cat", "yes", "1"),
        YesNo(139, "Is there a dog", "no", "2"),
        YesNo(100, "Is there a dog", "yes", "3"),
    ],
    "popular": [
        YesNo(139, "Is there a cat", "yes", "1"),
        YesNo(100, "Is there a boat", "no", "2"),
    ],
}


def test_yes_no_questions_are_scored_by_subset_and_asked_once(say, nobody, store, limits):
    calls = say({139: said("Yes"), 100: said("No, there is none.")})
    scores, answers = answer_yes_no(nobody, POPE, {}, limits())
    assert [call[0] for call in calls] == shown([100, 100, 139, 139], store)
    assert calls[0][1] == [f"Is there a {noun}" for noun in ("boat", "dog", "cat", "dog")]
    random = score_pope(["yes", "no", "yes"], ["yes", "yes", "no"])
    assert {key: scores["random"][key] for key in random} == pytest.approx(random)
    assert scores["popular"]["accuracy"] == 1
    assert scores["popular"]["blind"]["accuracy"] == 0
    of_subset = {name: [a for a in answers if a.subset == name] for name in POPE}
    assert [a.score for a in of_subset["random"]] == [1, 0, 0]
    assert [a.targets for a in of_subset["popular"]] == [("yes",), ("no",)]


@pytest.mark.parametrize("kind", ["caption", "answer"])
def test_what_needs_no_target_is_counted_by_hand(say, nobody, limits, kind):
    say(
        {139: said("a b c d a b c d", 8, False), 100: said("", 0), 117: said("a", 1), 121: said("")}
    )
    if kind == "caption":
        scores, _ = caption_images(nobody, REFERENCES, "val", None, limits())
        assert (scores["stop_rate"], scores["mean_tokens"], scores["count"]) == (3 / 4, 3, 4)
        assert scores["blind"]["mean_tokens"] == 3, "the others are the same images"
    else:
        scores, _ = ask_all(nobody, limits())
        assert scores["stop_rate"] == pytest.approx(1 / 3)
        assert scores["blind"]["stop_rate"] == pytest.approx(2 / 3)
        assert scores["mean_tokens"] == pytest.approx(16 / 3)
        assert (scores["count"], scores["blind"]["count"]) == (3, 3)
    assert scores["repeated_4grams"] == 1 / 5


def numbers_in(value):
    """All numbers below some keys."""
    values = value.values() if isinstance(value, dict) else value
    for one in values:
        if isinstance(one, dict | list):
            yield from numbers_in(one)
        else:
            yield one


@pytest.mark.parametrize(
    "text", ["", " ", ".", "\U0001f370", "\ufffd\ufffd", "a\u0000b\nc", "?" * 999]
)
def test_whatever_is_said_or_wanted_has_finite_scores(say, nobody, limits, text):
    say({i: said(text) for i in range(100, 140)})
    for references in ({139: [text]}, {139: [text, ""], 100: [""]}, {139: ["a cat"], 100: ["x"]}):
        scores, captions = caption_images(nobody, references, "val", "", limits())
        numbers = [*numbers_in(scores), *(c.score for c in captions)]
        assert len(numbers) > 40
        assert all(map(math.isfinite, numbers))
    questions = [Question(139, text, text), Question(139, text, text), Question(100, "", "")]
    scores, _ = ask_all(nobody, limits(), questions)
    assert scores["exact_match"] >= 2 / 3
    assert all(map(math.isfinite, numbers_in(scores)))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_each_condition_shows_the_features_that_it_names(
    make_model, prompt_format, store, limits, quantize, nobody
):
    model = make_model(quantize=quantize, lora=0.5)
    untrained = CaptionModel(seeded_projector("mlp", 8, 64, 9), model.language_model)
    evaluated = EvaluatedModel("tiny", model, untrained, prompt_format, store, 0, quantize)
    questions = [Question(i, "where", "in the box") for i in (139, 100, 117, 121, 130)]
    own = [question.image_id for question in questions]
    others = other_images(own, store)
    _, answers = ask_all(evaluated, limits(answer_tokens=12), questions)

    def plain(model, image_ids):
        return generate(
            model, prompt_format, store, image_ids,
            ["where"] * 5, max_tokens=12, batch_size=8, description="test",
        )  # fmt: skip

    made = {name: [a.generations[name] for a in answers] for name in CONDITIONS}
    assert made[SEEN] == plain(model, own)
    assert made["blind"] == plain(model, [others[i] for i in own])
    assert made["untrained"] == plain(untrained, own)
    texts = {name: tuple(one.text for one in made[name]) for name in CONDITIONS}
    assert len(set(texts.values())) == 4
