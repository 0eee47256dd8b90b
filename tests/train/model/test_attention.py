"""Laws of the mask, in both of its forms, and of the attention under it."""

import dataclasses
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import PhiConfig, PhiForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train.model.attention
from tests.train.images import Image, collate_images, pack_images
from train.data.packing import PADDING
from train.data.prompts import TokenizedText
from train.model.attention import (
    NAME,
    PROBE_LENGTH,
    block_mask,
    dense_mask,
    mask_mod,
    packed_attention,
    use_packed_attention,
)
from train.model.captioner import CaptionModel
from train.model.generate import generate
from train.model.projector import seeded_projector

PATCHES = 4

eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def small_batch(random_images, seed):
    (rows,) = pack_images(random_images(seed), PATCHES, row_tokens=60, pass_tokens=10_000)
    assert max(map(len, rows)) > 1
    return collate_images(rows, PATCHES)


def large_batch(seed, patches=300):
    """Rows of several blocks of 128, with images and texts that are longer than a block."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 200, (5, 3)).tolist(), [400], [1, 1, 1, 1]]
    images = [
        Image(
            number,
            tuple(TokenizedText(rng.integers(1, 99, k).tolist(), [True] * k) for k in texts),
        )
        for number, texts in enumerate(lengths)
    ]
    (rows,) = pack_images(images, patches, row_tokens=1500, pass_tokens=100_000)
    assert len(rows) > 1
    assert max(map(len, rows)) > 1
    return collate_images(rows, patches)


def seen_in_dense(batch):
    return dense_mask(batch, torch.float64)[:, 0] == 0


def seen_in_blocks(mask, length):
    """Whom each query sees, from what a kernel reads: full blocks as they are, the other blocks
    that are named under the rule, and nothing else: bool [R, T, T].
    """
    rows, _, blocks = mask.kv_num_blocks.shape
    size = mask.BLOCK_SIZE[0]
    seen = torch.zeros(rows, blocks * size, blocks * size, dtype=torch.bool)
    for row, query in itertools.product(range(rows), range(blocks)):
        queries = torch.arange(query * size, (query + 1) * size)
        for numbers, indices, full in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            for key in indices[row, 0, query, : numbers[row, 0, query]].tolist():
                keys = torch.arange(key * size, (key + 1) * size)
                inside = (queries[:, None] < length) & (keys < length)
                if not full:
                    at = queries.clamp(max=length - 1)[:, None], keys.clamp(max=length - 1)
                    inside &= mask.mask_mod(torch.tensor(row), torch.tensor(0), *at)
                seen[row, queries[:, None], keys] = inside
    return seen[:, :length, :length]


# The rule


@pytest.mark.parametrize("seed", range(3))
def test_a_position_sees_its_images_patches_and_its_own_text_up_to_itself(random_images, seed):
    batch = small_batch(random_images, seed)
    seen = seen_in_dense(batch)
    assert (batch.image_numbers == PADDING).any()
    for r in range(len(seen)):
        images, texts = batch.image_numbers[r].tolist(), batch.text_ids[r].tolist()
        for query, key in itertools.product(range(len(images)), repeat=2):
            wanted = (
                key <= query
                and images[key] == images[query]
                and (texts[key] == 0 or texts[key] == texts[query])
            )
            assert seen[r, query, key] == wanted


@pytest.mark.parametrize("seed", range(3))
def test_every_position_sees_itself_and_nothing_real_sees_padding(random_images, seed):
    batch = small_batch(random_images, seed)
    seen = seen_in_dense(batch)
    assert seen.diagonal(dim1=1, dim2=2).all()
    is_real = batch.image_numbers != PADDING
    assert not (seen & is_real[:, :, None] & ~is_real[:, None, :]).any()
    assert not (seen & ~is_real[:, :, None] & is_real[:, None, :]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dense_mask_is_nought_or_minus_infinity_of_the_models_type(random_images, dtype):
    batch = small_batch(random_images, 0)
    mask = dense_mask(batch, dtype)
    num_rows, length = batch.image_numbers.shape
    assert mask.shape == (num_rows, 1, length, length)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}


# Two forms of one rule


@pytest.mark.parametrize("seed", range(3))
def test_both_forms_let_exactly_the_same_pairs_see(random_images, seed):
    for batch in (small_batch(random_images, seed), large_batch(seed)):
        mask = block_mask(batch)
        length = batch.image_numbers.shape[1]
        assert mask.seq_lengths == (length, length)
        assert torch.equal(seen_in_blocks(mask, length), seen_in_dense(batch))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_in_which_nothing_is_seen_are_left_out(seed):
    batch = large_batch(seed)
    mask = block_mask(batch)
    size = mask.BLOCK_SIZE[0]
    seen = seen_in_dense(batch)
    behind = -seen.shape[1] % size
    padded = nn.functional.pad(seen, (0, behind, 0, behind))
    blocks = padded.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == blocks.any((2, 4)).sum()
    assert mask.full_kv_num_blocks.sum() == blocks.all(4).all(2).sum() > 0
    assert blocks.any((2, 4)).sum() < blocks.any((2, 4)).numel() / 2


@eager_flex
@torch.no_grad()
@pytest.mark.parametrize(("head_width", "scaling"), [(16, None), (80, None), (80, 0.3)])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_both_forms_give_the_same_attention(head_width, scaling, key_heads):
    batch = large_batch(0, patches=130)
    num_rows, length = batch.image_numbers.shape
    shape = (num_rows, 2, length, head_width)
    torch.manual_seed(0)
    query = torch.randn(shape, dtype=torch.float64)
    key, value = torch.randn(2, num_rows, key_heads, length, head_width, dtype=torch.float64)
    module = nn.Module()
    module.is_causal = True
    module.num_key_value_groups = 2 // key_heads
    options = {"dropout": 0.0, "scaling": scaling}
    blocks, no_weights = packed_attention(module, query, key, value, block_mask(batch), **options)
    dense, _ = packed_attention(
        module, query, key, value, dense_mask(batch, torch.float64), **options
    )
    assert no_weights is None
    assert blocks.shape == dense.shape == (shape[0], shape[2], 2, head_width)
    assert blocks.is_contiguous()
    torch.testing.assert_close(blocks, dense, rtol=1e-12, atol=1e-12)


@eager_flex
@torch.no_grad()
@pytest.mark.parametrize("form", [block_mask, lambda batch: dense_mask(batch, torch.float32)])
def test_scores_beyond_float16_attend_as_in_float64(form, monkeypatch):
    """Some kernels keep scores in float32 anyway; no kernel is relied on."""
    dtypes = []
    for name in ("flex_attention", "sdpa_attention_forward"):
        real = getattr(train.model.attention, name)

        def recorded(*arguments, real=real, **options):
            dtypes.append({a.dtype for a in arguments if isinstance(a, torch.Tensor)})
            return real(*arguments, **options)

        monkeypatch.setattr(train.model.attention, name, recorded)
    batch = large_batch(0, patches=130)
    torch.manual_seed(0)
    shape = (len(batch.image_numbers), 2, batch.image_numbers.shape[1], 32)
    query, key, value = torch.randn(3, *shape)
    # The same number is added to all scores, and attention does not change.
    query[..., 16:], key[..., 16:] = 160, 160
    half = [tensor.half() for tensor in (query, key, value)]
    assert (half[0][..., :1, :] @ half[1].mT).isinf().all()
    module = nn.Module()
    module.is_causal = True
    found, _ = packed_attention(module, *half, form(batch))
    assert dtypes == [{torch.float32}]
    exact = [tensor.double() for tensor in half]
    mask = dense_mask(batch, torch.float64)
    wanted, _ = packed_attention(module, *exact, mask)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)


def overflowing(model):
    """Let the scores of a model exceed the largest float16, without any change to attention."""
    for block in model.language_model.model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj):
            # Rotary embeddings leave the last half of a head as it is.
            parts = [p.data.unflatten(0, (2, 32))[:, 16:] for p in layer.parameters()]
            for part, number in zip(parts, (0.0, 160.0), strict=True):
                part.fill_(number)
    return model


def test_a_float16_model_whose_scores_overflow_has_the_loss_of_float64(make_model, random_images):
    batch = small_batch(random_images, 0)
    features = torch.randn(len(batch.image_ids), PATCHES, 8).half()
    batch = dataclasses.replace(batch, patches_NPD=features)
    model = overflowing(make_model(dtype="fp16"))
    losses = model.train().token_losses(batch)
    losses.sum().backward()
    exact = overflowing(make_model()).double().train()
    wanted = exact.token_losses(batch)
    wanted.sum().backward()
    torch.testing.assert_close(losses.double(), wanted, rtol=0.03, atol=0.03)
    for name, parameter in exact.trainable_parameters().items():
        found = model.get_parameter(name).grad
        assert (found - parameter.grad).norm() < 0.05 * parameter.grad.norm() + 1e-6, name


def test_generation_in_float16_attends_in_float32(make_model, prompt_format, store, monkeypatch):
    dtypes = set()

    def attend(module, query, key, value, attention_mask, **options):
        dtypes.update((query.dtype, key.dtype, value.dtype))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(train.model.attention, "sdpa_attention_forward", attend)
    model = overflowing(make_model(dtype="fp16"))
    (made,) = generate(
        model,
        prompt_format,
        store,
        [100],
        ["What is"],
        max_tokens=9,
        batch_size=1,
        description="test",
    )
    assert dtypes == {torch.float32}
    assert made.num_tokens > 0


def test_any_other_mask_is_transformers_own_business():
    module = nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(3, 2, 2, 9, 8)
    for mask in (None, torch.randn(2, 1, 9, 9)):
        found, _ = packed_attention(module, query, key, value, mask, scaling=0.5)
        wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.5)
        assert torch.equal(found, wanted)


def wide_model(heads=2, head_width=80):
    """A Phi whose heads are as wide as Phi-2's."""
    torch.manual_seed(0)
    phi = PhiForCausalLM(
        PhiConfig(
            vocab_size=128,
            hidden_size=heads * head_width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=1024,
            pad_token_id=None,
        )
    )
    for parameter in phi.parameters():
        nn.init.normal_(parameter, std=0.2)
    phi.requires_grad_(False).eval()
    return CaptionModel(seeded_projector("mlp", 8, heads * head_width, 0), phi).double()


@eager_flex
@torch.no_grad()
def test_a_model_with_phi_2s_width_of_a_head_says_the_same_under_both_forms():
    model, batch = wide_model(), large_batch(0, patches=130)
    patches = torch.randn(len(batch.image_ids), 130, 8, dtype=torch.float64)
    batch = dataclasses.replace(batch, patches_NPD=patches)
    dense = model.hidden(batch)
    asked = []

    def blocks(batch):
        asked.append(batch)
        return {"attention_mask": block_mask(batch)}

    model._masks = blocks
    torch.testing.assert_close(model.hidden(batch), dense, rtol=1e-10, atol=1e-10)
    assert len(asked) == 1


# Which one a model gets


def test_on_the_cpu_a_model_gets_the_dense_form_in_its_own_type(make_model, random_images):
    model = make_model()
    assert model.language_model.config._attn_implementation == NAME
    batch = small_batch(random_images, 0)
    for dtype in (torch.float32, torch.float64):
        masks = model.to(dtype)._masks(batch)
        assert torch.equal(masks.pop("attention_mask"), dense_mask(batch, dtype))
        assert not masks


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"num_attention_heads": 32, "hidden_size": 2560}, [(32, 80), (32, 80)]),
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576},
            [(9, 64), (3, 64)],
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "hidden_size": 8},
            [(4, 256), (1, 256)],
        ),
    ],
)
@pytest.mark.parametrize("error", [None, RuntimeError("no such\nkernel"), NotImplementedError("x")])
def test_on_a_gpu_blocks_are_used_where_they_work_with_the_models_own_heads(
    monkeypatch, capsys, random_images, config, wanted, error
):
    shapes = []

    def attend(module, query, key, value, mask, softcap):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        shapes.extend([query.shape, key.shape])
        if error:
            raise error
        return query * key.sum() * value.sum(), None

    monkeypatch.setattr(train.model.attention, "packed_attention", attend)
    for name in ("randn", "zeros"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *shape, real=real, device=None, **options: real(*shape, **options)
        )
    monkeypatch.setattr(train.model.attention, "_block_mask", lambda *numbers: None)
    model = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        dtype=torch.bfloat16,
        config=SimpleNamespace(**config),
        set_attn_implementation=lambda name: None,
    )
    make_masks, has_blocks = use_packed_attention(model)
    assert has_blocks == (error is None)
    batch = small_batch(random_images, 0)
    (mask,) = make_masks(batch).values()
    assert shapes == [(1, heads, PROBE_LENGTH, width) for heads, width in wanted]
    said = capsys.readouterr().err
    if error is None:
        assert mask is None
        assert said == ""
    else:
        assert torch.equal(mask, dense_mask(batch, torch.bfloat16))
        reason = " ".join(str(error).split())
        assert said == f"FlexAttention does not work here, SDPA is used: {reason}\n"


@pytest.mark.parametrize(("works", "elsewhere"), [(True, True), (True, False), (False, True)])
def test_all_processes_use_one_form(monkeypatch, capsys, works, elsewhere):
    module = train.model.attention
    monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    both = lambda own: torch.cat([own, torch.tensor([elsewhere])])  # noqa: E731
    monkeypatch.setattr(module, "gather_of_ranks", both)
    assert module._in_all_processes(works, torch.device("cpu")) == (works and elsewhere)
    assert ("another process" in capsys.readouterr().err) == (works and not elsewhere)


def test_a_full_memory_is_no_reason_to_use_sdpa(monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.model.attention, "packed_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        train.model.attention._flex_works(wide_model().language_model)


@torch.no_grad()
def test_compiled_functions_are_compiled_twice_whatever_the_lengths(monkeypatch):
    """Once for the first length and once for all others; grouped queries and a new mask a pass."""
    compilations = Counter()

    def compiled(function):
        def count(module, inputs):
            compilations[function.__name__] += 1
            return module.forward

        return torch.compile(function, fullgraph=True, backend=count)

    torch.compiler.reset()
    attend, create = compiled(flex_attention), compiled(create_block_mask)
    for length in (256, 384, 512, 2176, 384, 4096, 256):
        numbers = torch.arange(length)[None] // 50
        mask = create(mask_mod(numbers, numbers % 3), 1, None, length, length, device="cpu")
        query, key = torch.randn(1, 9, length, 16), torch.randn(1, 3, length, 16)
        attend(query, key, key, block_mask=mask, scale=0.1, enable_gqa=True)
    torch.compiler.reset()
    assert compilations == {"flex_attention": 2, "create_block_mask": 2}


@pytest.mark.parametrize("lora", [None, 0.5])
def test_generation_is_that_of_transformers_own_attention(make_model, prompt_format, store, lora):
    model = make_model(lora=lora)

    def made():
        return generate(
            model, prompt_format, store, [100, 139, 117, 121],
            [None, "What is", "a", "where is the cat"],
            max_tokens=20, batch_size=3, description="test",
        )  # fmt: skip

    packed = made()
    assert len({one.text for one in packed}) > 1
    model.language_model.set_attn_implementation("sdpa")
    assert made() == packed


def float64_mask(batch, window):
    return dense_mask(batch, torch.float64, window)


@eager_flex
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_both_forms_keep_windows_and_soft_caps_with_shared_keys(random_images, window, softcap):
    batch = small_batch(random_images, 1)
    rows, length = batch.token_ids.shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, length, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    attended = {}
    for form, make in (("block", block_mask), ("dense", float64_mask)):
        masks = {"attention_mask": make(batch, None), "window_mask": make(batch, window)}
        attended[form], _ = packed_attention(module, query, key, value, **masks | options)
    torch.testing.assert_close(attended["block"], attended["dense"])
    sees = (dense_mask(batch, torch.float64, window) == 0)[:, 0]
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
    wanted = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(attended["dense"], wanted)
    positions = batch.positions
    far = positions[:, :, None] - positions[:, None] >= (window or length)
    assert not (sees & far).any()
    assert window is None or (far & (dense_mask(batch, torch.float64) == 0)[:, 0]).any()
