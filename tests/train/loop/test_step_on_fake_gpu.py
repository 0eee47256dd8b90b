"""The training step on fake tensors of a GPU: devices, dtypes, and where the host would wait."""

import dataclasses

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train.model.attention
from tests.conftest import WIDTH
from tests.stand_in_gpu.fake import DEVICE, FakeGpu
from tests.stand_in_gpu.models import ARCHITECTURES
from train.data.examples import Example
from train.data.prompts import caption_turns, conversation_turns
from train.loop.step import build_step, mean_loss, optimizer_step
from train.model.attention import score_dtype
from train.model.captioner import CaptionModel
from train.model.language_model import add_lora
from train.model.projector import seeded_projector
from train.settings import LoraSettings

pytestmark = [
    pytest.mark.stand_in_gpu,
    pytest.mark.slow(reason="a process of its own that loads torch and transformers"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

EXAMPLES = [
    Example(
        n,
        (
            caption_turns("a red cat"),
            caption_turns("blue " * (n % 4)),
            conversation_turns([("where", "in the box"), ("how many", "two")]),
        ),
    )
    for n in range(100, 112)
]

PASSES = ["one row", "rows"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def make_fake_model(gpu, monkeypatch):
    """Build a model on the fake GPU, for passes of one row (FlexAttention) or of rows (SDPA)."""

    def make(passes, *, architecture="phi", dtype=torch.bfloat16, stage=2):
        language_model = ARCHITECTURES[architecture]().to(dtype).eval().requires_grad_(False)
        if stage == 2:
            add_lora(language_model, LoraSettings(r=4, alpha=8, dropout=0.1), 0)
        projector = seeded_projector("mlp", WIDTH, language_model.config.hidden_size, 0)
        if passes == "rows":
            monkeypatch.setattr(train.model.attention, "_flex_works", lambda model: False)
        with gpu.running():
            model = CaptionModel(gpu.move(projector), gpu.move(language_model))
        assert model.packs_one_row == (passes == "one row")
        return model

    return make


@pytest.fixture
def build(prompt_format, store):
    def build(model, **budgets):
        data = build_step(
            EXAMPLES,
            prompt_format,
            store,
            pass_tokens=256,
            row_tokens=None if model.packs_one_row else 64,
            max_text_tokens=99,
            device=DEVICE,
        )
        assert len(data.batches) > 1
        return data

    return build


def make_step(gpu, model, data):
    """Make a step; return the optimizer's gradients and where the host would wait."""
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-3)
    with gpu.running() as host:
        optimizer_step(model, optimizer, data, clip_norm=1.0, seed=(0, 1))
    return {n: p.grad for n, p in model.trainable_parameters().items()}, host.waits


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("passes", PASSES)
def test_a_step_stays_on_the_gpu(gpu, make_fake_model, build, passes, architecture, dtype, stage):
    model = make_fake_model(passes, architecture=architecture, dtype=dtype, stage=stage)
    gradients, _ = make_step(gpu, model, build(model))
    assert any("lora" in name for name in gradients) == (stage == 2)
    assert {name.split(".")[0] for name in gradients} >= {"projector"}
    for name, gradient in gradients.items():
        assert (gradient.device, gradient.dtype) == (DEVICE, torch.float32), name


@pytest.mark.parametrize("passes", PASSES)
def test_the_host_waits_once_a_step_at_its_end(gpu, make_fake_model, build, passes):
    model = make_fake_model(passes)
    data = build(model)
    _, waits = make_step(gpu, model, data)
    assert waits == ["copy from cuda to cpu"]
    with gpu.running() as host:
        for batch in data.batches:
            model(batch.to(DEVICE)).backward()
    assert host.waits == []


@pytest.mark.parametrize("passes", PASSES)
def test_the_host_waits_once_a_validation(gpu, make_fake_model, build, passes):
    model = make_fake_model(passes)
    with gpu.running() as host:
        mean_loss(model, build(model))
    assert host.waits == ["value of torch.float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sdpa_is_given_a_mask_that_it_need_not_convert(
    gpu, make_fake_model, build, monkeypatch, dtype
):
    seen = []

    def attend(module, query, key, value, mask, **options):
        seen.append({query.dtype, key.dtype, value.dtype, mask.dtype})
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    model = make_fake_model("rows", dtype=dtype)
    monkeypatch.setattr(train.model.attention, "sdpa_attention_forward", attend)
    with gpu.running():
        model(build(model).batches[0].to(DEVICE))
    assert seen == [{score_dtype(dtype)}] * 2


def test_a_pass_is_one_pinned_copy(make_fake_model, build):
    for batch in build(make_fake_model("one row")).batches:
        assert batch.block.is_pinned()
        begin, end = batch.block.data_ptr(), batch.block.data_ptr() + batch.block.nbytes
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                assert begin <= value.data_ptr() < end, name


# The fake GPU finds what it is there for


TENSORS = [
    "patches_NPD", "token_ids", "positions", "image_numbers", "text_ids", "patch_slots",
    "target_slots", "target_ids",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "patches_NPD"])
@pytest.mark.parametrize("passes", PASSES)
def test_a_tensor_that_was_left_on_the_cpu_is_found(gpu, make_fake_model, build, passes, name):
    model = make_fake_model(passes)
    batch = build(model).batches[0]
    with gpu.running():
        moved = dataclasses.replace(batch.to(DEVICE), **{name: getattr(batch, name)})
        with pytest.raises(RuntimeError, match="device"):
            model(moved).backward()


def test_the_names_are_those_of_a_batchs_tensors(make_fake_model, build):
    batch = build(make_fake_model("rows")).batches[0]
    found = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert found == [*TENSORS, "block"]


@pytest.mark.parametrize("what", ["features", "embeddings"])
def test_a_tensor_of_another_dtype_is_found(gpu, make_fake_model, build, what):
    model = make_fake_model("rows")
    dtype = {"features": torch.float16, "embeddings": torch.float32}[what]
    model.embed_patches = lambda patches: model.projector(patches.to(dtype))
    batch = build(model).batches[0]
    with gpu.running(), pytest.raises(RuntimeError, match="dtype"):
        model(batch.to(DEVICE))


def test_each_way_of_waiting_is_counted(gpu):
    with gpu.running() as host:
        vector = torch.ones(2, device=DEVICE)
        ways = {
            "value of torch.float32": [vector[0].item, lambda: float(vector[0])],
            "value of torch.bool": [lambda: bool((vector > 0).all())],
            "copy from cuda to cpu": [
                vector.cpu,
                vector.tolist,
                lambda: torch.ones(2).copy_(vector),
            ],
            "copy from cpu to cuda": [lambda: torch.ones(2).to(DEVICE)],
        }
        for wanted, calls in ways.items():
            for call in calls:
                host.waits.clear()
                call()
                assert host.waits == [wanted]
        host.waits.clear()
        torch.ones(2).to(DEVICE, non_blocking=True)
        torch.ones(2).copy_(vector, non_blocking=True)
        assert host.waits == []
        with pytest.raises(RuntimeError):
            vector.nonzero()
