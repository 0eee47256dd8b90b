import re

import pytest
import torch
from torch import nn

from train.data.examples import Example
from train.data.prompts import caption_turns
from train.loop.step import build_step
from train.model.captioner import CaptionModel
from train.model.language_model import LORA_TARGETS
from train.model.preflight import check_first_logits, check_model
from train.settings import LlmSettings
from workspace.errors import StageError

KINDS = [(quantize, dtype) for quantize in ("nf4", "none") for dtype in ("bf16", "fp32")]


@pytest.fixture
def check(make_model, tokenizer, phi_dir):
    """Check a fresh model after something was done to it."""

    def check(damage=lambda model: None, *, quantize="nf4", dtype="bf16", lora=False, wanted=None):
        model = make_model(quantize=quantize, dtype=dtype, lora=0.05 if lora else None)
        damage(model)
        settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype=dtype)
        check_model(model, tokenizer, settings, lora=lora if wanted is None else wanted)
        return model

    return check


def refused(text):
    return pytest.raises(StageError, match=rf"before the first step: {text}")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("quantize", "dtype"), KINDS)
def test_a_model_as_it_is_loaded_is_accepted(check, quantize, dtype, lora):
    model = check(quantize=quantize, dtype=dtype, lora=lora)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_without_the_bias_of_the_checkpoint_is_refused(check, lora):
    def take(model):
        model.language_model.lm_head.bias = None

    with refused("lm_head.bias: wanted the checkpoint's, found none. Install"):
        check(take, lora=lora)


def test_lora_where_none_is_wanted_is_refused_and_the_other_way_round(check):
    with refused("layers with LoRA: wanted 0, found 12, which differ in model"):
        check(lora=True, wanted=False)
    with refused("layers with LoRA: wanted 12, found 0, which differ in model"):
        check(lora=False, wanted=True)


def test_a_model_of_fewer_layers_than_it_says_is_refused(check):
    def claim(model):
        model.language_model.config.num_hidden_layers = 3

    with refused("linear layers of the blocks: wanted 18, found 12"):
        check(claim)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (LORA_TARGETS[:-1], "10, which differ in model.layers.0.mlp.fc2, model.layers.1.mlp.fc2"),
        ((*LORA_TARGETS, "lm_head"), "13, which differ in lm_head"),
        ((*LORA_TARGETS, "embed_tokens"), "13, which differ in model.embed_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_on_other_layers_than_those_of_the_blocks_is_refused(check, targets, found):
    from peft import LoraConfig, get_peft_model

    def add(model):
        get_peft_model(model.language_model, LoraConfig(r=2, target_modules=list(targets)))

    with refused(rf"layers with LoRA: wanted 12, found {re.escape(found)}\."):
        check(add, quantize="none", wanted=True)


def test_resized_embeddings_are_refused(check):
    def grow(model):
        model.language_model.resize_token_embeddings(520, mean_resizing=False)
        model.language_model.requires_grad_(False)

    with refused(r"rows of embeddings and lm_head: wanted 512, found \(520, 520\)"):
        check(grow)


def test_a_tokenizer_of_more_entries_than_rows_is_refused(make_model, tokenizer, phi_dir):
    class Larger:
        def __len__(self):
            return 513

    settings = LlmSettings(model=str(phi_dir), quantize="none", dtype="fp32")
    with refused("entries of the tokenizer: wanted at most 512, found 513"):
        check_model(make_model(), Larger(), settings, lora=False)


def test_an_id_of_the_tokenizer_beyond_the_last_row_is_refused(make_model, phi_dir):
    class Sparse:
        def __len__(self):
            return 2

        def get_vocab(self):
            return {"a": 0, "b": 512}

    settings = LlmSettings(model=str(phi_dir), quantize="none", dtype="fp32")
    with refused("ids of the tokenizer: wanted below 512, found 512"):
        check_model(make_model(), Sparse(), settings, lora=False)


def test_another_precision_than_the_settings_say_is_refused(make_model, tokenizer, phi_dir):
    model = make_model(quantize="nf4", dtype="fp32")
    for quantize, dtype, text in (
        ("nf4", "bf16", r"what layers compute in: wanted bf16, found \{torch.float32\}"),
        ("none", "fp32", "layers in NF4: wanted 0, found 12"),
    ):
        settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype=dtype)
        with refused(text):
            check_model(model, tokenizer, settings, lora=False)
    one = model.language_model.model.layers[1].mlp.fc1
    one.compute_dtype = torch.float16
    with refused(r"what layers compute in: wanted fp32, found .*torch.float16"):
        check_model(
            model,
            tokenizer,
            LlmSettings(model=str(phi_dir), quantize="nf4", dtype="fp32"),
            lora=False,
        )


@pytest.mark.parametrize("lora", [False, True])
def test_a_layer_that_was_not_quantised_is_refused(check, lora):
    def swap(model):
        mlp = model.language_model.model.layers[0].mlp
        if lora:
            mlp.fc1.base_layer = nn.Linear(64, 128).requires_grad_(False)
        else:
            mlp.fc1 = nn.Linear(64, 128).requires_grad_(False)

    with refused("layers in NF4: wanted 12, found 11, which differ in model.layers.0.mlp.fc1"):
        check(swap, lora=lora)


def test_a_base_that_learns_and_lora_that_does_not_are_refused(check):
    def thaw(model):
        model.language_model.model.final_layernorm.weight.requires_grad_(True)

    def freeze(model):
        model.language_model.model.layers[0].mlp.fc1.lora_A.requires_grad_(False)

    text = "tensors of the language model that learn: wanted"
    with refused(f"{text} 0, found 1, which differ in model.final_layernorm.weight"):
        check(thaw)
    with refused(f"{text} 24, found 25, which differ in model.final_layernorm.weight"):
        check(thaw, lora=True)
    with refused(f"{text} 24, found 23, which differ in model.layers.0.mlp.fc1.lora_A"):
        check(freeze, lora=True)


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_of_the_frozen_model_while_training_is_refused(check, monkeypatch, lora):
    monkeypatch.setattr(CaptionModel, "train", nn.Module.train)
    with refused("frozen layers that are not in eval.. while training: wanted 0, found"):
        check(lora=lora)


@pytest.fixture
def first_step(tokenizer, store):
    return build_step(
        [Example(100, (caption_turns("a red cat"), caption_turns("the dog")))],
        tokenizer,
        store,
        pass_tokens=99,
        row_tokens=99,
        max_text_tokens=99,
        device=torch.device("cpu"),
    )


def test_logits_that_are_not_finite_are_refused_and_counted(make_model, first_step):
    model = make_model(quantize="nf4", dtype="bf16", lora=0.05)
    check_first_logits(model, first_step)
    assert not any(module.training for module in model.modules())
    model.language_model.lm_head.bias.data[7] = torch.inf
    number = sum(len(batch.slots) for batch in first_step.batches)
    text = f"that are not finite: wanted 0, found {number}"
    with refused(f"logits of the first forward pass {text}"):
        check_first_logits(model, first_step)


def test_the_checks_leave_no_trace_in_what_is_learned(make_model, tokenizer, phi_dir, first_step):
    settings = LlmSettings(model=str(phi_dir), quantize="nf4", dtype="bf16")

    def gradients(checked):
        model = make_model(quantize="nf4", dtype="bf16", lora=0.5)
        torch.manual_seed(3)
        if checked:
            check_model(model, tokenizer, settings, lora=True)
            check_first_logits(model, first_step)
        (batch,) = first_step.batches
        model.train()(batch).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(True), gradients(False)))
