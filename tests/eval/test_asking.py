import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval.asking
from cache.errors import StageError
from eval.asking import Model, answer_losses, ask_captions, ask_questions, other_images
from eval.metrics import repeated_4grams, score_captions
from train.data import Example, Question
from train.generate import Generation, generate
from train.prompts import conversation_text, question_text
from train.step import build_step, mean_loss

STORE = SimpleNamespace(image_ids=np.arange(100, 140), root="data/features")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 39, 40])
def test_every_image_gets_another_one_of_the_set_and_none_twice(count):
    image_ids = random.Random(count).sample(range(100, 140), count)
    others = other_images(image_ids, STORE)
    assert others.keys() == set(others.values()) == set(image_ids)
    assert all(own != other for own, other in others.items())


def test_who_gets_whom_depends_on_the_set_alone():
    image_ids = [131, 101, 120, 107, 139]
    wanted = other_images(image_ids, STORE)
    assert other_images(image_ids[::-1] + image_ids, STORE) == wanted
    assert other_images(tuple(sorted(image_ids)), STORE) == wanted


@pytest.mark.parametrize("image_id", [100, 117, 139])
def test_a_single_image_gets_another_one_of_the_store(image_id):
    other = other_images([image_id, image_id], STORE)[image_id]
    assert other != image_id
    assert other in STORE.image_ids


def test_a_store_of_one_image_has_no_blind_control(make_store):
    store = make_store([7])
    with pytest.raises(StageError, match="holds one image, so there is none for the blind"):
        other_images([7, 7], store)


def test_no_images_have_no_others():
    assert other_images([], STORE) == {}


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
    """Put a speaker in place of the model, that looks at the image and at nothing else."""

    def say(texts):
        calls = []

        def made(model, tokenizer, store, image_ids, prompts, **limits):
            calls.append((list(image_ids), list(prompts), limits))
            return [texts[i] for i in image_ids]

        monkeypatch.setattr(eval.asking, "generate", made)
        return calls

    return say


def said(text, num_tokens=3, stopped=True):
    return Generation(text, num_tokens, stopped)


def nobody():
    return Model("nobody", None, None, STORE)


def test_captions_are_scored_for_their_own_image_and_blind_for_another(say, limits):
    texts = {i: said(references[-1]) for i, references in REFERENCES.items()}
    calls = say(texts)
    scores, captions = ask_captions(nobody(), REFERENCES, "", limits(caption_tokens=9))
    ids, others = list(REFERENCES), other_images(list(REFERENCES), STORE)
    assert [call[0] for call in calls] == [ids, [others[i] for i in ids]]
    for _, prompts, settings in calls:
        assert prompts == [""] * 4
        assert (settings["max_tokens"], settings["batch_size"]) == (9, 3)
    seen = score_captions(REFERENCES, {i: texts[i].text for i in ids})
    blind = score_captions(REFERENCES, {i: texts[others[i]].text for i in ids})
    assert {key: scores[key] for key in seen} == seen
    assert {key: scores["blind"][key] for key in blind} == blind
    assert scores["CIDEr"] > 10 * blind["CIDEr"]
    for caption in captions:
        i = caption.image_id
        assert (caption.seen, caption.blind) == (texts[i], texts[others[i]])
        assert caption.targets == tuple(REFERENCES[i])
        assert caption.question == ""
    assert [c.image_id for c in captions] == ids
    assert np.mean([c.score for c in captions]) == pytest.approx(scores["CIDEr"])
    assert scores["blind"].keys() == scores.keys() - {"blind"}


def test_a_caption_that_is_asked_for_is_asked_as_in_training(say, limits):
    calls = say({i: said("a cat") for i in REFERENCES})
    _, captions = ask_captions(nobody(), REFERENCES, "What is it", limits())
    assert [prompts for _, prompts, _ in calls] == [[question_text("What is it")] * 4] * 2
    assert {caption.question for caption in captions} == {"What is it"}


def test_answers_are_scored_for_their_own_image_and_blind_for_another(say, limits):
    texts = {139: said("A red cat!"), 100: said("the blue boat")}
    calls = say(texts)
    scores, answers = ask_questions(nobody(), QUESTIONS, limits(answer_tokens=7))
    assert [call[0] for call in calls] == [[139, 100, 139], [100, 139, 100]]
    for _, prompts, settings in calls:
        assert prompts == [question_text(q.question) for q in QUESTIONS]
        assert (settings["max_tokens"], settings["batch_size"]) == (7, 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_f1"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert (scores["blind"]["exact_match"], scores["blind"]["token_f1"]) == (0, 0)
    assert scores["blind"].keys() == scores.keys() - {"blind"}
    assert [(a.image_id, a.question, a.targets) for a in answers] == [
        (q.image_id, q.question, (q.answer,)) for q in QUESTIONS
    ]
    assert [a.score for a in answers] == [1, 0, 0]
    assert [a.seen.text for a in answers] == ["A red cat!", "the blue boat", "A red cat!"]
    assert [a.blind.text for a in answers] == ["the blue boat", "A red cat!", "the blue boat"]


@pytest.mark.parametrize("kind", ["caption", "answer"])
def test_what_needs_no_target_is_counted_by_hand(say, limits, kind):
    say(
        {139: said("a b c d a b c d", 8, False), 100: said("", 0), 117: said("a", 1), 121: said("")}
    )
    if kind == "caption":
        scores, _ = ask_captions(nobody(), REFERENCES, "", limits())
        assert (scores["stop_rate"], scores["mean_tokens"], scores["count"]) == (3 / 4, 3, 4)
        assert scores["blind"]["mean_tokens"] == 3, "the others are the same images"
    else:
        scores, _ = ask_questions(nobody(), QUESTIONS, limits())
        assert scores["stop_rate"] == pytest.approx(1 / 3)
        assert scores["blind"]["stop_rate"] == pytest.approx(2 / 3)
        assert scores["mean_tokens"] == pytest.approx(16 / 3)
        assert (scores["count"], scores["blind"]["count"]) == (3, 3)
    assert scores["repeated_4grams"] == repeated_4grams(["a b c d a b c d"]) == 1 / 5


@pytest.mark.parametrize(
    "text", ["", " ", ".", "\U0001f370", "\ufffd\ufffd", "a\u0000b\nc", "?" * 999]
)
def test_whatever_is_said_or_wanted_has_finite_scores(say, limits, text):
    say({i: said(text) for i in range(100, 140)})
    for references in ({139: [text]}, {139: [text, ""], 100: [""]}, {139: ["a cat"], 100: ["x"]}):
        scores, captions = ask_captions(nobody(), references, "", limits())
        numbers = [*scores.values(), *scores["blind"].values(), *(c.score for c in captions)]
        assert all(math.isfinite(n) for n in numbers if not isinstance(n, dict))
    questions = [Question(139, text, text), Question(139, text, text), Question(100, "", "")]
    scores, _ = ask_questions(nobody(), questions, limits())
    assert scores["exact_match"] >= 2 / 3
    assert all(0 <= scores[key] <= 1 for key in ("exact_match", "token_f1", "repeated_4grams"))


@pytest.fixture(scope="module", params=["none", "nf4"])
def asked(request, make_model, tokenizer, store):
    model = make_model(quantize=request.param, lora=0.5)
    return Model("tiny", model, tokenizer, store)


def test_the_blind_model_really_sees_the_other_image(asked, limits):
    questions = [Question(i, "where", "in the box") for i in (139, 100, 117, 121, 130)]
    own = [question.image_id for question in questions]
    others = other_images(own, asked.store)
    scores, answers = ask_questions(asked, questions, limits(answer_tokens=12))

    def plain(image_ids):
        return generate(
            asked.model, asked.tokenizer, asked.store, image_ids,
            [question_text("where")] * 5, max_tokens=12, batch_size=8, description="test",
        )  # fmt: skip

    assert [a.seen for a in answers] == plain(own)
    assert [a.blind for a in answers] == plain([others[i] for i in own])
    assert [a.seen.text for a in answers] != [a.blind.text for a in answers]
    assert scores["count"] == 5


EXAMPLES = [
    Example(139, (conversation_text([("where", "in the box"), ("how many", "two")]),)),
    Example(100, (conversation_text([("What is it", "a cat")]), conversation_text([("is", "")]))),
    Example(120, (conversation_text([("is it red", "yes")]),)),
]


def loss_of(asked, examples, max_text_tokens=64):
    data = build_step(
        examples,
        asked.tokenizer,
        asked.store,
        pass_tokens=9999,
        row_tokens=9999,
        max_text_tokens=max_text_tokens,
        device=torch.device("cpu"),
    )
    return mean_loss(asked.model, data)


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_the_loss_is_that_of_training_and_blind_that_of_the_other_images(
    asked, monkeypatch, max_tokens
):
    monkeypatch.setattr(eval.asking, "LOSS_TOKENS", max_tokens)
    others = other_images([139, 100, 120], asked.store)
    seen, blind = answer_losses(asked, EXAMPLES, 64)
    assert seen == pytest.approx(loss_of(asked, EXAMPLES), rel=1e-5)
    swapped = [Example(others[e.image_id], e.texts) for e in EXAMPLES]
    assert blind == pytest.approx(loss_of(asked, swapped), rel=1e-5)
    assert abs(seen - blind) > 1e-3, "features matter"


def test_with_the_same_features_the_blind_loss_is_the_loss(asked, monkeypatch):
    monkeypatch.setattr(eval.asking, "other_images", lambda ids, store: {i: i for i in ids})
    seen, blind = answer_losses(asked, EXAMPLES, 64)
    assert seen == blind


def test_the_loss_ends_at_the_longest_text(asked):
    seen, _ = answer_losses(asked, EXAMPLES, 20)
    assert seen == pytest.approx(loss_of(asked, EXAMPLES, 20), rel=1e-5)
    with pytest.raises(StageError, match="max_text_tokens is 1, which cuts off every answer"):
        answer_losses(asked, EXAMPLES, 1)


def test_dropout_is_off_for_scores(asked):
    first = answer_losses(asked, EXAMPLES, 64)
    asked.model.train()
    assert answer_losses(asked, EXAMPLES, 64) == first


def test_a_loss_that_is_no_number_is_an_error_in_words(make_model, tokenizer, store):
    model = make_model()
    next(model.projector.parameters()).data.fill_(math.nan)
    with pytest.raises(StageError, match=r"finetune: the loss of the answers is nan, blind nan"):
        answer_losses(Model("finetune", model, tokenizer, store), EXAMPLES, 64)
