import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train.loop.step
from tests.train.images import logits_of
from train.data.examples import Example
from train.data.packing import PADDING
from train.data.prompts import caption_turns, conversation_turns, tokenize
from train.loop.step import build_step, mean_loss, optimizer_step, pass_seed
from train.model.language_model import compute_lora_in_input_dtype
from workspace.errors import StageError

EXAMPLES = [
    Example(139, (caption_turns("a red cat"), caption_turns("the dog is on the box"))),
    Example(100, (conversation_turns([("where", "in the box"), ("how many", "two")]),)),
    Example(120, (caption_turns(""),)),
]
MANY = [
    Example(
        n, (caption_turns("a red cat"), caption_turns("the dog"), caption_turns("blue " * (n % 4)))
    )
    for n in range(100, 112)
]
BUDGETS = [(1, 1), (30, 30), (60, 100), (10_000, 10_000), (None, 1), (None, 300)]
"""Row and pass tokens."""


@pytest.fixture
def build(prompt_format, store):
    def build(
        examples=EXAMPLES, *, row_tokens=64, pass_tokens=10_000, max_text_tokens=99,
        prompt_format=prompt_format,
    ):  # fmt: skip
        return build_step(
            examples,
            prompt_format,
            store,
            pass_tokens=pass_tokens,
            row_tokens=row_tokens,
            max_text_tokens=max_text_tokens,
            device=torch.device("cpu"),
        )

    return build


def by_hand(model, prompt_format, store, examples):
    """Losses of the supervised tokens of plain sequences, one a text."""
    losses = []
    for example in examples:
        patches = model.embed_patches(torch.from_numpy(store.gather([example.image_id])))
        for text in tokenize(example.texts, prompt_format, 99):
            ids = torch.tensor([text.token_ids])
            lead = model.embed_text(torch.tensor([prompt_format.lead], dtype=torch.int64))
            embeds = torch.cat([lead, patches, model.embed_text(ids)], dim=1)
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
            all_losses = nn.functional.cross_entropy(
                logits[len(prompt_format.lead) + 3 : -1], ids[0], reduction="none"
            )
            losses += all_losses[torch.tensor(text.is_target)].tolist()
    return losses


# What is prepared


@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
def test_features_stand_before_the_texts_of_their_own_image(build, store, row_tokens, pass_tokens):
    data = build(MANY, row_tokens=row_tokens, pass_tokens=pass_tokens)
    seen = Counter()
    for batch in data.batches:
        seen.update(batch.image_ids.tolist())
        assert batch.patches_NPD.dtype == torch.float16
        wanted = torch.from_numpy(store.gather(batch.image_ids))
        assert torch.equal(batch.patches_NPD, wanted)
    assert seen == Counter(example.image_id for example in MANY)
    assert [batch.number for batch in data.batches] == list(range(len(data.batches)))
    if row_tokens == 1:
        assert len(data.batches) == len(MANY)
    if row_tokens == 10_000:
        assert len(data.batches) == 1


@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
def test_counts_are_those_of_the_texts(build, prompt_format, row_tokens, pass_tokens):
    texts = [b for e in EXAMPLES for b in tokenize(e.texts, prompt_format, 99)]
    data = build(row_tokens=row_tokens, pass_tokens=pass_tokens)
    batches = data.batches
    assert data.image_ids == [139, 100, 120]
    assert data.num_target_tokens == sum(b.num_target_tokens for b in texts)
    assert data.num_target_tokens == sum(len(batch.target_ids) for batch in batches)
    assert data.num_positions == 3 * 4 + sum(len(b.token_ids) - 1 for b in texts)
    assert data.num_positions == sum(int((b.image_numbers != PADDING).sum()) for b in batches)
    assert data.num_slots == sum(batch.token_ids.numel() for batch in batches)
    assert data.num_cut == 0


@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_process_reads_the_features_of_its_own_passes_alone(
    build, store, monkeypatch, row_tokens, pass_tokens, num_processes
):
    gathered, gather = [], store.gather
    monkeypatch.setattr(store, "gather", lambda ids: gathered.extend(ids.tolist()) or gather(ids))
    for rank in range(num_processes):
        processes = SimpleNamespace(num_processes=num_processes, process_index=rank)
        monkeypatch.setattr(train.loop.step, "PartialState", lambda p=processes: p)
        before = len(gathered)
        data = build(MANY, row_tokens=row_tokens, pass_tokens=pass_tokens)
        assert len(data.image_ids) == len(MANY), "every process packs the whole step"
        own = gathered[before:]
        assert own
        assert len(own) == sum(len(batch.patches_NPD) for batch in data.batches)
    # No image is cut into two passes, so no row is read twice.
    assert sorted(gathered) == [example.image_id for example in MANY]


def test_padding_is_counted_as_computed_but_not_as_read(build):
    data = build(MANY, row_tokens=40, pass_tokens=10_000)
    (batch,) = data.batches
    is_padding = batch.image_numbers == PADDING
    assert data.num_slots == is_padding.numel()
    assert data.num_slots - data.num_positions == is_padding.sum() > 0


def test_texts_that_were_cut_are_counted(build, prompt_format):
    (longest,) = tokenize(EXAMPLES[1].texts, prompt_format, 99)
    for examples in (EXAMPLES, [*EXAMPLES, *EXAMPLES[1:2]]):
        data = build(examples, max_text_tokens=len(longest.token_ids) - 1)
        assert data.num_cut == len(examples) - 2
        assert build(examples, max_text_tokens=len(longest.token_ids)).num_cut == 0


def test_no_pass_is_larger_than_asked_but_for_one_row(build):
    for row_tokens, pass_tokens in BUDGETS:
        for batch in build(MANY, row_tokens=row_tokens, pass_tokens=pass_tokens).batches:
            rows, width = batch.token_ids.shape
            assert rows == 1 or rows * width <= pass_tokens
            assert width <= (row_tokens or pass_tokens) or (batch.image_numbers <= 0).all()


def test_a_question_that_leaves_no_room_for_its_answer_costs_no_one_else(build, make_model):
    long = Example(101, (conversation_turns([("what " * 50, "yes")]),))
    model = make_model()
    for pass_tokens in (1, 10_000):
        data = build([*EXAMPLES, long], pass_tokens=pass_tokens, max_text_tokens=40)
        assert data.num_target_tokens == build(max_text_tokens=40).num_target_tokens
        wanted = mean_loss(model, build(max_text_tokens=40))
        assert mean_loss(model, data) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(StageError, match=r"image 101 .* max_text_tokens is 40"):
        build([long], max_text_tokens=40)


# What is computed


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_mean_loss_is_the_mean_of_plain_sequences(
    build, make_model, prompt_format, store, quantize
):
    model = make_model(quantize=quantize, lora=0.5)
    for row_tokens, pass_tokens in BUDGETS:
        data = build(row_tokens=row_tokens, pass_tokens=pass_tokens)
        found = mean_loss(model.train(), data)
        assert not model.training
        losses = by_hand(model, prompt_format, store, EXAMPLES)
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert math.isfinite(found)


@pytest.mark.parametrize(("row_tokens", "pass_tokens"), BUDGETS)
def test_with_tokens_before_the_patches_it_is_still_that_of_plain_sequences(
    build, make_model, chat_prompts, store, row_tokens, pass_tokens
):
    model = make_model(lora=0.5).double()
    assert chat_prompts.lead
    data = build(row_tokens=row_tokens, pass_tokens=pass_tokens, prompt_format=chat_prompts)
    losses = by_hand(model.eval(), chat_prompts, store, EXAMPLES)
    assert data.num_target_tokens == len(losses)
    assert mean_loss(model, data) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    texts = [text for e in EXAMPLES for text in tokenize(e.texts, chat_prompts, 99)]
    of_texts = sum(len(text.token_ids) - 1 for text in texts)
    assert data.num_positions == 3 * (len(chat_prompts.lead) + 4) + of_texts


def step_gradients(model, data, *, seed=(0, 1), clip_norm=1e30):
    """Return the loss and the gradients that an optimizer is given in a step."""
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=0.0)
    loss = optimizer_step(model, optimizer, data, clip_norm=clip_norm, seed=seed)
    return loss, {
        name: parameter.grad.clone() for name, parameter in model.trainable_parameters().items()
    }


def assert_same(found, wanted, tolerance=1e-10):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.fixture
def model(make_model):
    return make_model(lora=0.0).double()


def test_a_step_has_the_gradients_of_the_mean_over_all_its_tokens(model, build):
    found_loss, found = step_gradients(model, build(pass_tokens=1, row_tokens=1))
    model.zero_grad()
    data = build()
    (batch,) = data.batches
    logits = logits_of(model.train(), batch)
    loss = nn.functional.cross_entropy(logits, batch.target_ids)
    loss.backward()
    assert found_loss == pytest.approx(loss.item() * data.num_target_tokens, rel=1e-12)
    assert_same(found, {name: p.grad for name, p in model.trainable_parameters().items()})


@pytest.mark.parametrize(
    ("row_tokens", "pass_tokens"),
    [(1, 1), (30, 30), (60, 100), (40, 40), (100, 90), (None, 1), (None, 128)],
)
def test_no_packing_changes_the_gradients_of_a_step(model, build, row_tokens, pass_tokens):
    wanted_loss, wanted = step_gradients(model, build(MANY, row_tokens=10_000))
    data = build(MANY, row_tokens=row_tokens, pass_tokens=pass_tokens)
    assert len(data.batches) > 1
    loss, found = step_gradients(model, data)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert_same(found, wanted)


@pytest.mark.parametrize("lora", [None, 0.0])
def test_a_step_in_float16_is_that_in_float32(make_model, build, lora):
    data = build(MANY, row_tokens=80, pass_tokens=80)
    wanted_loss, wanted = step_gradients(make_model(lora=lora), data)
    loss, found = step_gradients(make_model(lora=lora, dtype="fp16"), data)
    assert loss == pytest.approx(wanted_loss, rel=1e-3)
    assert_same(found, wanted, 2e-2)


def test_gradients_of_many_tokens_do_not_underflow_in_float16(make_model, build):
    """A step of ten million tokens, of which these are a few."""
    many = 10_000_000
    data = build(MANY)
    few = data.num_target_tokens
    _, wanted = step_gradients(make_model(lora=0.0, dtype="fp16"), data)
    data = dataclasses.replace(data, num_target_tokens=many)
    _, found = step_gradients(make_model(lora=0.0, dtype="fp16"), data)
    assert_same(found, {name: gradient * (few / many) for name, gradient in wanted.items()}, 1e-5)


def test_a_gradient_of_the_sum_that_overflows_float16_is_taken_again(make_model, build):
    data = build(MANY)

    def gradients(dtype):
        model = make_model(lora=0.0, dtype=dtype)
        compute_lora_in_input_dtype(model)
        with torch.no_grad():
            # Logits of 100 times the size: the gradient of their sum is beyond 65,504.
            model.language_model.lm_head.weight *= 100 * 60
        return step_gradients(model, data)

    wanted_loss, wanted = gradients("fp32")
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 65_504 / (
        data.num_target_tokens
    )
    loss, found = gradients("fp16")
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    assert_same(found, wanted, 5e-2)


def test_gradients_do_not_pile_up_over_steps(model, build):
    first = step_gradients(model, build())
    second = step_gradients(model, build())
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_gradients_are_clipped_once_and_all_together(model, build):
    data = build(MANY, row_tokens=40, pass_tokens=40)
    _, whole = step_gradients(model, data)
    norm = torch.stack([grad.norm() for grad in whole.values()]).norm()
    _, clipped = step_gradients(model, data, clip_norm=float(norm) / 4)
    assert_same(clipped, {name: grad / 4 for name, grad in whole.items()}, 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(model, build, value):
    data = build()
    data.batches[-1].patches_NPD[0, 0, 0] = value
    before = {
        name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()
    }
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=1.0)
    with pytest.raises(FloatingPointError, match=r"the loss is nan, its gradient's norm nan"):
        optimizer_step(model, optimizer, data, clip_norm=1.0, seed=(0, 1))
    assert all(torch.equal(before[name], p) for name, p in model.trainable_parameters().items())


# LoRA's dropout


@pytest.fixture
def dropping(make_model):
    return make_model(lora=0.5).double()


@pytest.fixture
def two_passes(build):
    data = build(MANY, row_tokens=80, pass_tokens=80)
    assert len(data.batches) == 2
    return data


def with_passes(data, *passes):
    return dataclasses.replace(data, batches=list(passes))


def test_dropout_depends_on_seed_step_and_pass_alone(dropping, two_passes):
    torch.manual_seed(5)
    _, wanted = step_gradients(dropping, two_passes)
    torch.manual_seed(6)
    torch.rand(99)
    _, again = step_gradients(dropping, two_passes)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    for seed in ((1, 1), (0, 2)):
        _, other = step_gradients(dropping, two_passes, seed=seed)
        assert any(not torch.equal(other[name], wanted[name]) for name in wanted)


def test_what_a_pass_drops_depends_on_no_pass_before_it(dropping, two_passes):
    first, second = two_passes.batches
    _, wanted = step_gradients(dropping, two_passes)
    _, backwards = step_gradients(dropping, with_passes(two_passes, second, first))
    assert_same(backwards, wanted)
    _, one = step_gradients(dropping, with_passes(two_passes, first))
    _, other = step_gradients(dropping, with_passes(two_passes, second))
    assert_same({name: one[name] + other[name] for name in one}, wanted)
    renumbered = dataclasses.replace(first, number=7)
    _, elsewhere = step_gradients(dropping, with_passes(two_passes, renumbered))
    assert any(not torch.equal(elsewhere[name], one[name]) for name in one)


def test_seeds_of_passes_are_distinct_and_of_the_range_that_torch_takes():
    seeds = {
        pass_seed(seed, step, number)
        for seed in (0, 1, 2**31)
        for step in range(20)
        for number in range(20)
    }
    assert len(seeds) == 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    assert all(isinstance(seed, int) and not isinstance(seed, np.integer) for seed in seeds)


def test_the_frozen_part_of_the_model_never_drops(make_model, build):
    """Phi-2's own config has a dropout of 0.1 at three places."""
    model = make_model().double()
    _, wanted = step_gradients(model, build(), seed=(0, 1))
    _, other = step_gradients(model, build(), seed=(9, 9))
    assert all(torch.equal(other[name], wanted[name]) for name in wanted)
