"""The exported language model has the weights that the run computes with."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, GPT2Config, PhiForCausalLM

from cache.errors import SettingsError
from eval.llava.text import phi_config, plain_weights
from train.settings import LlmSettings
from workspace.errors import StageError


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("lora", [None, 0.0])
def test_a_plain_phi_with_the_weights_computes_the_same(make_model, phi_dir, quantize, lora):
    model = make_model(quantize=quantize, lora=lora).eval().language_model
    settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype="fp32")
    plain = PhiForCausalLM(phi_config(settings)).eval()
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
    config = phi_config(settings)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert config.dtype == torch.bfloat16
    assert str(phi_dir) not in config.to_json_string()


def test_another_kind_of_model_is_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="bf16")
    with pytest.raises(StageError, match="is of type 'gpt2', and only Phi can be exported"):
        phi_config(settings)


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "no such model"}'])
def test_a_damaged_config_is_an_error_of_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="bf16")
    with pytest.raises(
        SettingsError, match=r"^llm\.model: cannot load [^\n]*: config\.json: [^\n]*$"
    ):
        phi_config(settings)
