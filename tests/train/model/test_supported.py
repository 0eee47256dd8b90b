"""Which language models training takes, and what it says of those that it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import train.model.attention
import train.model.captioner
import train.model.supported
from cache.errors import SettingsError
from train.finetune import finetune
from train.model.supported import (
    check_packing,
    check_supported,
    small_copy,
)
from train.pretrain import pretrain
from train.settings import LlmSettings

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
REFUSED = {
    "MixtralForCausalLM": (
        {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 2},
        "experts.down_proj",
    ),
    "Lfm2ForCausalLM": (
        {"intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "conv"]},
        "conv.weight",
    ),
    "BloomForCausalLM": ({}, "its attention cannot be replaced"),
}  # fmt: skip


def folder_of(config, folder, phi_dir):
    """Write a random model and the tokenizer of the tests."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in phi_dir.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_model_that_cannot_be_trained_right_is_refused_by_name(
    workspace, kind, stage, monkeypatch, tmp_path, phi_dir
):
    def loaded(*_):
        raise AssertionError("the language model was loaded")

    sizes, reason = REFUSED[kind]
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))
    folder = folder_of(config(**SIZES | sizes), tmp_path / "model", phi_dir)
    for module in ("captions", "conversations"):
        monkeypatch.setattr(f"train.stages.{module}.load_language_model", loaded)
    workspace.write_stage_1()
    with pytest.raises(SettingsError) as error:
        stage(workspace.params(llm={"model": str(folder)}))
    for word in (str(folder), kind, reason, "docs/models.md"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(f"runs/{stage.__name__}/params.yaml").exists()


def test_a_phi_is_supported(phi_dir):
    check_supported(LlmSettings(model=str(phi_dir), quantize="nf4", dtype="fp32"))


def test_the_random_state_is_left_alone(phi_dir):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_supported(LlmSettings(model=str(phi_dir), quantize="nf4", dtype="fp32"))
    assert torch.equal(torch.get_rng_state(), before)


LLAMA = SIZES | {"intermediate_size": 64}


def test_weights_without_their_scales_are_refused(tmp_path, phi_dir):
    folder = folder_of(transformers.LlamaConfig(**LLAMA), tmp_path / "model", phi_dir)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(".weight"))
    weights[name] = (100 * weights[name]).to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=rf"model\.safetensors: {name} is of type I8"):
        check_supported(LlmSettings(model=str(folder), quantize="none", dtype="fp32"))


# Faults that the small copy finds


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.LlamaConfig(**LLAMA | {"num_attention_heads": 4}, num_key_value_heads=3),
            "4 heads of attention cannot share 3 heads of keys",
        ),
        (transformers.LlamaConfig(**LLAMA, is_encoder_decoder=True), "decoder_start_token_id"),
        (transformers.CTRLConfig(**SIZES, dff=64), "inputs_embeds"),
    ],
    ids=["heads", "encoder-decoder", "no inputs_embeds"],
)
def test_a_model_that_would_fail_later_is_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        check_packing(config)


def test_layers_that_lora_cannot_tell_from_blocks_are_refused(monkeypatch):
    def numbered(config):
        model = small_copy(config)
        for block in model.model.layers:
            block.mlp = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64), nn.SiLU())
        return model

    monkeypatch.setattr(train.model.supported, "small_copy", numbered)
    with pytest.raises(ValueError, match="LlamaDecoderLayer"):
        check_packing(transformers.LlamaConfig(**LLAMA))


def without_window(dense_mask):
    return lambda batch, dtype, window=None: dense_mask(batch, dtype)


def window_by_slot(window_mask_mod):
    """Measure the window in slots of the row, in which other texts lie between."""

    def by_slot(sees, positions, window):
        return lambda row, head, query, key: sees(row, head, query, key) & (key > query - window)

    return by_slot


def without_softcap(packed_attention):
    return lambda *inputs, softcap=None, **options: packed_attention(*inputs, **options)


def weight_alone(output_logits):
    return lambda model, hidden: hidden @ model.get_output_embeddings().weight.T


FAULTS = {
    "dense_mask": (train.model.attention, without_window, transformers.Gemma3TextConfig()),
    "window_mask_mod": (
        train.model.attention, window_by_slot, transformers.MistralConfig(sliding_window=4096),
    ),
    "packed_attention": (train.model.attention, without_softcap, transformers.Gemma2Config()),
    "soft cap: output_logits": (train.model.captioner, weight_alone, transformers.Gemma2Config()),
    "scale: output_logits": (
        train.model.captioner, weight_alone, transformers.GraniteConfig(logits_scaling=8.0),
    ),
    "bias: output_logits": (train.model.captioner, weight_alone, transformers.PhiConfig()),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_found(monkeypatch, fault):
    module, breaking, config = FAULTS[fault]
    name = fault.rpartition(" ")[2]
    check_packing(config)
    monkeypatch.setattr(module, name, breaking(getattr(module, name)))
    with pytest.raises(ValueError, match="differ from those of one sequence a text"):
        check_packing(config)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Gemma3TextConfig", "GPT2Config"])
def test_the_copy_is_small_and_keeps_the_layer_types_and_the_width_of_a_head(kind):
    config = getattr(transformers, kind)()
    copy = small_copy(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert copy.config.hidden_size == 2 * width
    assert copy.config.num_hidden_layers == 2
    types = getattr(config, "layer_types", None)
    assert set(getattr(copy.config, "layer_types", None) or ()) == set(types or ())
    assert sum(p.numel() for p in copy.parameters()) < 5e6
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in copy.parameters())


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 40, "factor": 4.0, "partial_rotary_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.GPT2Config(**SIZES, n_positions=60), 60),
        (
            transformers.Phi3Config(
                **SIZES, intermediate_size=64, rope_parameters=LONGROPE, pad_token_id=0,
                max_position_embeddings=160,
                original_max_position_embeddings=40, num_key_value_heads=2,
            ),
            40,
        ),
        (transformers.LlamaConfig(**SIZES, intermediate_size=64, max_position_embeddings=60), None),
        (
            transformers.LlamaConfig(
                **LLAMA, max_position_embeddings=60,
                rope_parameters=DYNAMIC | {"original_max_position_embeddings": None},
            ),
            60,
        ),
    ],
    ids=["learned", "longrope", "rotary", "dynamic"],
)  # fmt: skip
def test_the_positions_of_a_model_are_those_of_its_table_or_of_one_way_of_counting(
    config, limit, tmp_path, phi_dir
):
    folder = folder_of(config, tmp_path / "model", phi_dir)
    llm = LlmSettings(model=str(folder), quantize="none", dtype="fp32")
    assert check_supported(llm) == limit


def test_an_original_limit_that_is_no_number_is_refused(tmp_path, phi_dir):
    rope = DYNAMIC | {"original_max_position_embeddings": "abc"}
    config = transformers.LlamaConfig(**LLAMA)
    folder = folder_of(config, tmp_path / "model", phi_dir)
    values = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(SettingsError, match="'abc'"):
        check_supported(LlmSettings(model=str(folder), quantize="none", dtype="fp32"))
