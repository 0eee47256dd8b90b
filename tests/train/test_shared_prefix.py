"""The law of shared-prefix rows: loss and gradients are those of one sequence a text.

Held in float64, where only a wrong formula can make a difference.
"""

import pytest
import torch
from torch import nn

from train.batching import Row, collate, micro_batches
from train.prompts import Branch, caption_text, conversation_text, tokenize

PATCHES, WIDTH, HIDDEN = 4, 8, 64

TEXTS = [
    [caption_text(c) for c in ("a red cat", "", "the dog is on the box", "a red dog")],
    [conversation_text([("What is", "yes"), ("how many", "no")]), caption_text("a red cat")],
    [caption_text("blue")],
    [conversation_text([("where is the cat", "in the box")])] * 2,
]


@pytest.fixture
def model(make_model):
    return make_model("resblock", lora=0.0).double().train()


@pytest.fixture
def rows(tokenizer):
    return [Row(n, tuple(tokenize(texts, tokenizer, 99))) for n, texts in enumerate(TEXTS)]


@pytest.fixture
def patches():
    """float64, of numbers that float16 and float32 hold as well."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TEXTS), PATCHES, WIDTH, generator=generator).half().double()


def alone(model, patches_1PD, branch):
    """Loss of one plain sequence, with the language model's own mask and positions: float64 []."""
    ids = torch.tensor([branch.token_ids])
    embeds = torch.cat([model.embed_patches(patches_1PD), model.embed_text(ids)], dim=1)
    logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[0, PATCHES - 1 : -1], ids[0], reduction="none")
    return losses[torch.tensor(branch.learned)].sum()


def shared(model, patches_RPD, rows):
    batch = collate(rows, PATCHES)
    logits = model.logits(patches_RPD, batch)
    return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    learning = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learning)
    assert any("projector" in name for name in learning)
    return learning


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        difference = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert difference < tolerance, name


def test_shared_rows_have_the_loss_and_gradients_of_one_sequence_a_text(model, rows, patches):
    one_by_one = sum(
        alone(model, patches[n : n + 1], branch)
        for n, row in enumerate(rows)
        for branch in row.branches
    )
    together = shared(model, patches, rows)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=0)
    assert_close(gradients(model, together), gradients(model, one_by_one), 1e-10)


def test_the_same_holds_in_float32_within_the_promised_tolerance(make_model, rows, patches):
    model = make_model("mlp", lora=0.0).train()
    together = model(patches, collate(rows, PATCHES))
    assert together.dtype == torch.float32
    reference = make_model("mlp", lora=0.0).double().train()
    wanted = shared(reference, patches, rows)
    assert abs(together.item() / wanted.item() - 1) < 1e-5
    found = {name: grad.double() for name, grad in gradients(model, together).items()}
    assert_close(found, gradients(reference, wanted), 1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 60, 10_000])
def test_no_cut_into_forward_passes_changes_loss_or_gradients(model, rows, patches, max_tokens):
    whole = shared(model, patches, rows)
    parts = list(micro_batches(rows, PATCHES, max_tokens))
    assert (len(parts) == 1) == (max_tokens == 10_000)
    cut = sum(shared(model, patches[[row.image_id for row in part]], part) for part in parts)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
    assert_close(gradients(model, cut), gradients(model, whole), 1e-10)


def test_no_text_sees_another(model, rows, patches):
    batch = collate(rows, PATCHES)
    before = model.logits(patches, batch)
    owner = segment_of_targets(rows)
    swept = 0
    for r, row in enumerate(rows):
        for s, branch in enumerate(row.branches, start=1):
            if len(branch.token_ids) < 2:
                continue
            other = Branch([5, *(t ^ 1 for t in branch.token_ids[1:])], branch.learned)
            branches = (*row.branches[: s - 1], other, *row.branches[s:])
            changed = [*rows[:r], Row(row.image_id, branches), *rows[r + 1 :]]
            after = model.logits(patches, collate(changed, PATCHES))
            mine = torch.tensor([o == (r, s) for o in owner])
            assert torch.equal(after[~mine], before[~mine])
            assert not torch.equal(after[mine], before[mine])
            swept += 1
    assert swept >= 6


def test_no_image_sees_another_and_every_patch_matters(model, rows, patches):
    batch = collate(rows, PATCHES)
    before = model.logits(patches, batch)
    for r in range(len(rows)):
        for patch in range(PATCHES):
            changed = patches.clone()
            changed[r, patch] += 1
            after = model.logits(changed, batch)
            differs = (after != before).any(dim=1)
            assert differs[batch.target_rows == r].all()
            assert not differs[batch.target_rows != r].any()


def test_texts_in_another_order_give_the_same_loss(model, rows, patches):
    backwards = [Row(row.image_id, row.branches[::-1]) for row in rows]
    torch.testing.assert_close(
        shared(model, patches, backwards), shared(model, patches, rows), rtol=1e-12, atol=0
    )


def segment_of_targets(rows):
    """Return row and text number of each supervised token, in collate's order."""
    return [
        (r, s)
        for r, row in enumerate(rows)
        for s, branch in enumerate(row.branches, start=1)
        for is_learned in branch.learned
        if is_learned
    ]
