"""The exported language model has the weights that the run computes with."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, PhiForCausalLM

from cache.errors import SettingsError
from eval.llava import text
from eval.llava.text import plain_weights, representable, text_part
from tests.conftest import ROWS
from tests.train.model.families import FAMILIES
from train.model.language_model import add_lora, load_language_model
from train.settings import LlmSettings, LoraSettings
from workspace.errors import StageError


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("lora", [None, 0.0])
def test_a_plain_phi_with_the_weights_computes_the_same(make_model, phi_dir, quantize, lora):
    model = make_model(quantize=quantize, lora=lora).eval().language_model
    settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype="fp32")
    plain = PhiForCausalLM(text_part(settings, 0).config).eval()
    plain.load_state_dict(dict(plain_weights(model, torch.float32)))
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        found, wanted = plain(tokens).logits, model(tokens).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_lora_is_merged_into_the_quantised_weights_and_not_the_original_ones(make_model, phi_dir):
    model = make_model(quantize="nf4", lora=0.0).language_model
    weights = dict(plain_weights(model, torch.float32))
    original = AutoModelForCausalLM.from_pretrained(phi_dir).state_dict()
    layer = model.get_submodule("model.layers.0.mlp.fc1")
    assert isinstance(layer.base_layer, Linear4bit)
    quantised = layer.base_layer.weight
    learned = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    found = weights["model.layers.0.mlp.fc1.weight"] - learned
    assert torch.allclose(found, dequantize_4bit(quantised.data, quantised.quant_state), atol=1e-6)
    assert (found - original["model.layers.0.mlp.fc1.weight"]).abs().max() > 1e-2
    assert weights.keys() == original.keys()


def test_bf16_is_rounded_once_after_the_sum(make_model):
    model = make_model(dtype="bf16", lora=0.0).language_model
    exact = dict(plain_weights(model, torch.float32))
    for name, tensor in plain_weights(model, torch.bfloat16):
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_phis_gelu_is_the_one_of_training(phi_dir):
    settings = LlmSettings(model=str(phi_dir), quantize="none", dtype="bf16")
    config = text_part(settings, 0).config
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert config.dtype == torch.bfloat16
    assert str(phi_dir) not in config.to_json_string()


@pytest.mark.parametrize("family", ["Gemma2"])
def test_a_soft_cap_of_logits_is_refused_by_name(tmp_path, family):
    FAMILIES[family].config().save_pretrained(tmp_path)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="bf16")
    with pytest.raises(StageError, match=r"'gemma2', which .* cannot represent: .*soft cap"):
        text_part(settings, 0)


@pytest.mark.parametrize(
    ("family", "scale", "has_bias", "is_tied"),
    [
        ("Phi", 1.0, True, False),
        ("Llama", 1.0, False, True),
        ("GPT2", 1.0, False, False),
        ("Granite", 0.25, False, False),
        ("Cohere", 0.25, False, False),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured(family, scale, has_bias, is_tied):
    """And an output layer that is scaled, or cannot be tied in LLaVA, is untied."""
    part = representable(FAMILIES[family].config())
    assert part.scale == pytest.approx(scale, rel=1e-12)
    assert (part.has_bias, part.config.tie_word_embeddings) == (has_bias, is_tied)


def test_without_its_soft_cap_a_gemma_2_is_represented():
    config = FAMILIES["Gemma2"].config()
    config.final_logit_softcapping = None
    assert representable(config).scale == 1


@pytest.mark.parametrize("broken", ["weights", "logits"])
def test_another_difference_than_that_of_the_output_layer_is_refused(monkeypatch, broken):
    real = text.text_weights

    def text_weights(*arguments):
        for name, tensor in real(*arguments):
            if name.endswith("layers.0.mlp.up_proj.weight"):
                name, tensor = (name + "s", tensor) if broken == "weights" else (name, 2 * tensor)
            yield name, tensor

    monkeypatch.setattr(text, "text_weights", text_weights)
    wanted = {"weights": "it has other weights: .*up_proj.weight", "logits": "has other logits"}
    with pytest.raises(ValueError, match=wanted[broken]):
        representable(FAMILIES["Llama"].config())


def test_measuring_leaves_the_random_state_and_the_config_alone():
    config = FAMILIES["Cohere"].config()
    before, state = config.to_dict(), torch.get_rng_state()
    representable(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_for_the_image_token_is_added_where_there_is_none(phi_dir):
    settings = LlmSettings(model=str(phi_dir), quantize="none", dtype="fp32")
    assert text_part(settings, ROWS - 1).config.vocab_size == ROWS
    assert text_part(settings, ROWS).config.vocab_size == ROWS + 1


def test_the_exported_config_is_not_quantised(tmp_path):
    config = FAMILIES["Llama"].config()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="bf16")
    assert "quantization" not in text_part(settings, 0).config.to_json_string()


def test_lora_is_merged_into_transposed_weights(tmp_path, phi_dir):
    """GPT-2's linear layers hold their weights transposed."""
    folder = FAMILIES["GPT2"].write(tmp_path, phi_dir)
    settings = LlmSettings(model=str(folder), quantize="none", dtype="fp32")
    model = load_language_model(settings, torch.device("cpu"))
    add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.0), 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        wanted, before = model(tokens).logits, plain(tokens).logits
        plain.load_state_dict(dict(plain_weights(model, torch.float32)), strict=False)
        found = plain(tokens).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "no such model"}'])
def test_a_damaged_config_is_an_error_of_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="bf16")
    with pytest.raises(
        SettingsError, match=r"^llm\.model: cannot load [^\n]*: config\.json: [^\n]*$"
    ):
        text_part(settings, 0)
