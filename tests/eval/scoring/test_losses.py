import math

import numpy as np
import pytest
import torch

import eval.scoring.conditions
import eval.scoring.losses
from cache.errors import SettingsError
from eval.scoring.conditions import other_images
from eval.scoring.evaluated_models import EvaluatedModel
from eval.scoring.losses import answer_losses
from eval.scoring.score_names import CONDITIONS, SEEN
from train.data.examples import Example
from train.data.prompts import conversation_turns
from train.loop.step import build_step, mean_loss
from train.model.captioner import CaptionModel
from train.model.projector import seeded_projector
from workspace.errors import StageError


@pytest.fixture(scope="module", params=["none", "nf4"])
def evaluated(request, make_model, prompt_format, store):
    model = make_model(quantize=request.param, lora=0.5)
    untrained = CaptionModel(seeded_projector("mlp", 8, 64, 9), model.language_model)
    return EvaluatedModel("tiny", model, untrained, prompt_format, store, 0, "tiny")


EXAMPLES = [
    Example(139, (conversation_turns([("where", "in the box"), ("how many", "two")]),)),
    Example(100, (conversation_turns([("What is it", "a cat")]), conversation_turns([("is", "")]))),
    Example(120, (conversation_turns([("is it red", "yes")]),)),
]


def loss_of(evaluated, examples, max_text_tokens=64, model=None):
    data = build_step(
        examples,
        evaluated.prompt_format,
        evaluated.store,
        pass_tokens=9999,
        row_tokens=9999,
        max_text_tokens=max_text_tokens,
        device=torch.device("cpu"),
    )
    return mean_loss(model or evaluated.model, data)


@pytest.mark.parametrize("cut", [{}, {"PASS_TOKENS": 1}, {"ROW_TOKENS": 1}, {"STEP_IMAGES": 2}])
def test_the_loss_is_that_of_training_whatever_the_chunk_sizes(evaluated, monkeypatch, cut):
    for name, value in cut.items():
        monkeypatch.setattr(eval.scoring.losses, name, value)
    others = other_images([139, 100, 120], evaluated.store)
    losses = answer_losses(evaluated, EXAMPLES, 64)
    assert tuple(losses) == CONDITIONS
    found = {name: part.measure.value for name, part in losses.items()}
    assert found[SEEN] == pytest.approx(loss_of(evaluated, EXAMPLES), rel=1e-5)
    swapped = [Example(others[e.image_id], e.texts) for e in EXAMPLES]
    assert found["blind"] == pytest.approx(loss_of(evaluated, swapped), rel=1e-5)
    untrained = loss_of(evaluated, EXAMPLES, model=evaluated.untrained)
    assert found["untrained"] == pytest.approx(untrained, rel=1e-5)
    assert np.ptp(list(found.values())) > 1e-3, "features matter"


def test_every_image_has_the_loss_that_it_has_alone(evaluated):
    losses = answer_losses(evaluated, EXAMPLES, 64)[SEEN]
    assert losses.image_ids == [139, 100, 120]
    for total, count, example in zip(losses.sums, losses.num_tokens, EXAMPLES, strict=True):
        assert total / count == pytest.approx(loss_of(evaluated, [example]), rel=1e-5)


def test_with_the_same_features_the_loss_of_the_wrong_image_is_the_loss(evaluated, monkeypatch):
    monkeypatch.setattr(
        eval.scoring.conditions, "other_images", lambda ids, store: {i: i for i in ids}
    )
    losses = answer_losses(evaluated, EXAMPLES, 64)
    assert losses[SEEN] == losses["blind"]


def test_the_loss_ends_at_the_longest_text(evaluated):
    losses = answer_losses(evaluated, EXAMPLES, 20)[SEEN]
    assert losses.measure.value == pytest.approx(loss_of(evaluated, EXAMPLES, 20), rel=1e-5)


def test_an_image_whose_answers_are_all_cut_off_is_left_out(evaluated):
    long = Example(130, (conversation_turns([("where " * 90, "in the box")]),))
    with_it = answer_losses(evaluated, [*EXAMPLES, long], 64)[SEEN]
    assert with_it == answer_losses(evaluated, EXAMPLES, 64)[SEEN]
    with pytest.raises(StageError, match="max_text_tokens: 1 cuts off every answer of 3 images"):
        answer_losses(evaluated, EXAMPLES, 1)


def test_conversations_beyond_the_models_positions_are_refused(evaluated, monkeypatch):
    given = len(evaluated.prompt_format.lead) + evaluated.store.spec.patches
    monkeypatch.setattr(eval.scoring.losses, "most_positions", lambda model: given + 64)
    answer_losses(evaluated, EXAMPLES, 64)
    with pytest.raises(SettingsError, match=rf"takes up to {given + 65}\. Lower max_text_tokens"):
        answer_losses(evaluated, EXAMPLES, 65)


def test_dropout_is_off_for_scores(evaluated):
    first = answer_losses(evaluated, EXAMPLES, 64)
    evaluated.model.train()
    assert answer_losses(evaluated, EXAMPLES, 64) == first


def test_a_loss_that_is_no_number_is_an_error_in_words(make_model, prompt_format, store):
    model = make_model()
    next(model.projector.parameters()).data.fill_(math.nan)
    evaluated = EvaluatedModel("finetune", model, model, prompt_format, store, 0, "x")
    with pytest.raises(StageError, match=r"finetune: the loss of the answers \(seen\) is not fin"):
        answer_losses(evaluated, EXAMPLES, 64)
