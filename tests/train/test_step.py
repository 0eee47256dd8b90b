import math
from collections import Counter

import pytest
import torch
from torch import nn

from cache.errors import StageError
from train.data import Example
from train.prompts import caption_text, conversation_text, tokenize
from train.step import build_step, mean_loss

EXAMPLES = [
    Example(139, (caption_text("a red cat"), caption_text("the dog is on the box"))),
    Example(100, (conversation_text([("where", "in the box"), ("how many", "two")]),)),
    Example(120, (caption_text(""),)),
]


@pytest.fixture
def build(tokenizer, store):
    def build(examples=EXAMPLES, max_tokens=10_000, max_text_tokens=99):
        return build_step(
            examples,
            tokenizer,
            store,
            max_tokens=max_tokens,
            max_text_tokens=max_text_tokens,
            device=torch.device("cpu"),
        )

    return build


def by_hand(model, tokenizer, store, examples):
    """Mean over the supervised tokens of plain sequences, one a text."""
    losses = []
    for example in examples:
        patches = model.embed_patches(torch.from_numpy(store.gather([example.image_id])))
        for branch in tokenize(example.texts, tokenizer, 99):
            ids = torch.tensor([branch.token_ids])
            embeds = torch.cat([patches, model.embed_text(ids)], dim=1)
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
            all_losses = nn.functional.cross_entropy(logits[3:-1], ids[0], reduction="none")
            losses += all_losses[torch.tensor(branch.learned)].tolist()
    return losses


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_features_stand_before_the_texts_of_their_own_image(build, store, max_tokens):
    data = build(max_tokens=max_tokens)
    assert Counter(i for _, batch in data.parts for i in batch.image_ids) == {
        139: 1,
        100: 1,
        120: 1,
    }
    for patches, batch in data.parts:
        assert patches.dtype == torch.float16
        assert torch.equal(patches, torch.from_numpy(store.gather(batch.image_ids)))
    assert len(data.parts) == {1: 3, 30: 2, 10_000: 1}.get(max_tokens)


def test_counts_are_those_of_the_texts(build, tokenizer):
    branches = [b for e in EXAMPLES for b in tokenize(e.texts, tokenizer, 99)]
    for max_tokens in (1, 10_000):
        data = build(max_tokens=max_tokens)
        assert data.image_ids == [139, 100, 120]
        assert data.num_learned == sum(b.num_learned for b in branches)
        assert data.num_learned == sum(len(batch.targets) for _, batch in data.parts)
        assert data.num_positions == 3 * 4 + sum(len(b.token_ids) - 1 for b in branches)
        assert data.num_positions == sum(int((b.segments >= 0).sum()) for _, b in data.parts)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_mean_loss_is_the_mean_of_plain_sequences(build, make_model, tokenizer, store, quantize):
    model = make_model(quantize=quantize, lora=0.5)
    for max_tokens in (1, 30, 10_000):
        found = mean_loss(model.train(), build(max_tokens=max_tokens))
        assert not model.training
        losses = by_hand(model, tokenizer, store, EXAMPLES)
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert math.isfinite(found)


def test_a_question_that_leaves_no_room_for_its_answer_costs_no_one_else(build, make_model):
    long = Example(101, (conversation_text([("what " * 50, "yes")]),))
    model = make_model()
    for max_tokens in (1, 10_000):
        data = build([*EXAMPLES, long], max_tokens, max_text_tokens=40)
        assert data.num_learned == build(max_text_tokens=40).num_learned
        wanted = mean_loss(model, build(max_text_tokens=40))
        assert mean_loss(model, data) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(StageError, match=r"image 101 .* max_text_tokens is 40"):
        build([long], max_text_tokens=40)
