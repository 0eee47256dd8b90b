"""The law of packed rows: loss and gradients are those of one sequence a text.

Held in float64, where only a wrong formula can make a difference.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from tests.train.images import Image, collate_images, logits_of, pack_images
from train.data.packing import PADDING
from train.data.prompts import TokenizedText, caption_turns, conversation_turns, tokenize
from train.model.attention import NAME

PATCHES, WIDTH = 4, 8

TEXTS = [
    [caption_turns(c) for c in ("a red cat", "", "the dog is on the box", "a red dog")],
    [conversation_turns([("What is", "yes"), ("how many", "no")]), caption_turns("a red cat")],
    [caption_turns("blue")],
    [conversation_turns([("where is the cat", "in the box")])] * 2,
    [conversation_turns([("is it", "yes"), ("What", "a cat"), ("where", "on the dog")])],
]
BUDGETS = [(1, 1), (30, 30), (60, 60), (60, 150), (80, 10_000), (10_000, 10_000), (10_000, 30)]


@pytest.fixture
def model(make_model):
    return make_model("resblock", lora=0.0).double().train()


@pytest.fixture
def images(prompt_format):
    return [Image(n, tuple(tokenize(texts, prompt_format, 99))) for n, texts in enumerate(TEXTS)]


@pytest.fixture
def patches():
    """float64 [N, P, D], of numbers that float16 and float32 hold as well; by image id."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TEXTS), PATCHES, WIDTH, generator=generator).half().double()


def alone(model, patches_1PD, text):
    """Loss of one plain sequence, with transformers' own attention, mask and positions."""
    ids = torch.tensor([text.token_ids])
    embeds = torch.cat([model.embed_patches(patches_1PD), model.embed_text(ids)], dim=1)
    model.language_model.set_attn_implementation("sdpa")
    logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits
    model.language_model.set_attn_implementation(NAME)
    losses = nn.functional.cross_entropy(logits[0, PATCHES - 1 : -1], ids[0], reduction="none")
    return losses[torch.tensor(text.is_target)].sum()


def one_by_one(model, patches, images):
    return sum(
        alone(model, patches[[image.image_id]], text) for image in images for text in image.texts
    )


def packed(model, patches, images, row_tokens, pass_tokens):
    passes = pack_images(images, PATCHES, row_tokens=row_tokens, pass_tokens=pass_tokens)
    batches = [collate_images(rows, patches) for rows in passes]
    return sum(model(batch) for batch in batches)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    learning = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    assert any("lora_A" in name for name in learning)
    assert any("projector" in name for name in learning)
    return learning


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        difference = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert difference < tolerance, name


@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 2, 4, 0, 1)])
def test_packed_rows_have_the_loss_and_gradients_of_one_sequence_a_text(
    model, images, patches, row_tokens, pass_tokens, order
):
    separate = one_by_one(model, patches, images)
    together = packed(model, patches, [images[n] for n in order], row_tokens, pass_tokens)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=0)
    assert_close(gradients(model, together), gradients(model, separate), 1e-10)


def test_the_budgets_give_other_rows_and_passes(images):
    shapes = set()
    for row_tokens, pass_tokens in BUDGETS:
        passes = pack_images(images, PATCHES, row_tokens=row_tokens, pass_tokens=pass_tokens)
        shapes.add(tuple(tuple(len(row) for row in rows) for rows in passes))
    assert len(shapes) >= 5
    assert ((1,),) * 5 in shapes, "each alone"
    assert ((5,),) in shapes, "all in one row"


@pytest.mark.parametrize("rows", [[[4, 1], [0, 2, 3]], [[3], [2, 1, 0, 4]], [[0, 1, 2, 3, 4]]])
def test_it_holds_for_any_images_in_any_row(model, images, patches, rows):
    together = model(collate_images([[images[n] for n in row] for row in rows], patches))
    separate = one_by_one(model, patches, images)
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=0)
    assert_close(gradients(model, together), gradients(model, separate), 1e-10)


def test_it_holds_behind_pooled_patches(model, images):
    model.projector.pool = 2
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(len(TEXTS), 4 * PATCHES, WIDTH, generator=generator).double()
    rows = [[images[n] for n in row] for row in ([4, 1], [0, 2, 3])]
    together = model(collate_images(rows, whole, pool=2))
    separate = one_by_one(model, whole, images)
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=0)
    assert_close(gradients(model, together), gradients(model, separate), 1e-10)


def test_the_same_holds_in_float32_within_the_promised_tolerance(make_model, images, patches):
    model = make_model("mlp", lora=0.0).train()
    together = packed(model, patches, images, 60, 150)
    assert together.dtype == torch.float32
    reference = make_model("mlp", lora=0.0).double().train()
    separate = one_by_one(reference, patches, images)
    assert abs(together.item() / separate.item() - 1) < 1e-5
    found = {name: grad.double() for name, grad in gradients(model, together).items()}
    assert_close(found, gradients(reference, separate), 1e-5)


def test_the_loss_is_that_of_the_logits(model, images, patches):
    batch = collate_images([images[:2], images[2:]], patches)
    logits_SV = logits_of(model, batch)
    assert logits_SV.shape == (len(batch.target_ids), model.language_model.config.vocab_size)
    wanted = nn.functional.cross_entropy(logits_SV, batch.target_ids, reduction="sum")
    torch.testing.assert_close(model(batch), wanted, rtol=1e-12, atol=0)


def owners(images):
    """Return image and text number of each supervised token, in collate's order."""
    return [
        (image.image_id, number)
        for image in images
        for number, text in enumerate(image.texts)
        for is_target in text.is_target
        if is_target
    ]


ROWS = [[0, 1, 2], [3, 4]]


def laid_out(images, patches):
    return collate_images([[images[n] for n in row] for row in ROWS], patches)


@torch.no_grad()
def test_no_text_sees_another(model, images, patches):
    before = logits_of(model, laid_out(images, patches))
    owner = owners(images)
    swept = 0
    for image, number in sorted(set(owner)):
        texts = list(images[image].texts)
        text = texts[number]
        if len(text.token_ids) < 2:
            continue
        tokens = [5, *(token ^ 1 for token in text.token_ids[1:])]
        texts[number] = TokenizedText(tokens, text.is_target)
        changed = list(images)
        changed[image] = Image(image, tuple(texts))
        after = logits_of(model, laid_out(changed, patches))
        mine = torch.tensor([one == (image, number) for one in owner])
        assert torch.equal(after[~mine], before[~mine])
        assert not torch.equal(after[mine], before[mine])
        swept += 1
    assert swept >= 8


@torch.no_grad()
def test_a_text_sees_nothing_that_follows_in_it(model, images, patches):
    before = logits_of(model, laid_out(images, patches))
    (text,) = images[4].texts
    tokens = [*text.token_ids[:-3], *(token ^ 1 for token in text.token_ids[-3:])]
    changed = [*images[:4], Image(4, (TokenizedText(tokens, text.is_target),))]
    after = logits_of(model, laid_out(changed, patches))
    # Of the three tokens, all learned, the last one is never read.
    assert text.is_target[-3:] == [True] * 3
    assert torch.equal(after[:-2], before[:-2])
    assert (after[-2:] != before[-2:]).any(dim=1).all()


@torch.no_grad()
def test_no_image_sees_another_and_every_patch_matters(model, images, patches):
    batch = laid_out(images, patches)
    before = logits_of(model, batch)
    owner = torch.tensor([image for image, _ in owners(images)])
    for image, patch in itertools.product(range(len(images)), range(PATCHES)):
        changed = patches.clone()
        changed[image, patch] += 1
        differs = (logits_of(model, laid_out(images, changed)) != before).any(dim=1)
        assert differs[owner == image].all()
        assert not differs[owner != image].any()


@torch.no_grad()
def test_padding_changes_nothing(model, images, patches):
    batch = laid_out(images, patches)
    before = logits_of(model, batch)
    is_padding = batch.image_numbers == PADDING
    assert is_padding.any()
    noise = dataclasses.replace(
        batch,
        token_ids=batch.token_ids.masked_fill(is_padding, 7),
        positions=batch.positions.masked_fill(is_padding, 3),
    )
    assert torch.equal(logits_of(model, noise), before)
    for numbers in ROWS:
        alone = collate_images([[images[n] for n in numbers]], patches)
        assert (alone.image_numbers != PADDING).all()
        mine = torch.tensor([image in numbers for image, _ in owners(images)])
        found = logits_of(model, alone)
        torch.testing.assert_close(found, before[mine], rtol=1e-10, atol=1e-10)


def test_texts_in_another_order_give_the_same_loss(model, images, patches):
    backwards = [Image(image.image_id, image.texts[::-1]) for image in images]
    torch.testing.assert_close(
        packed(model, patches, backwards, 60, 150),
        packed(model, patches, images, 60, 150),
        rtol=1e-12,
        atol=0,
    )
