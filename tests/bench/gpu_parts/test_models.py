import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import LlamaConfig, PhiConfig

from bench.gpu_parts.models import make_caption_model, make_language_model, with_shared_weights
from train.model.language_model import load_language_model
from train.settings import LlmSettings, LoraSettings

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PHI = PhiConfig(**SHAPE, num_attention_heads=2, partial_rotary_factor=0.5)
LLAMA = LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2)
LORA = LoraSettings(r=2, alpha=4, dropout=0.0)
IDS = torch.arange(12)[None]


def make(config=PHI, quantize=False, dtype=torch.float32):
    return make_language_model(config, quantize=quantize, dtype=dtype, device=CPU)


def load_with_sdpa(settings):
    model = load_language_model(settings, CPU)
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("config", [PHI, LLAMA])
def test_a_model_is_the_one_that_its_saved_weights_give(config, tmp_path):
    model = make(config)
    model.save_pretrained(tmp_path)
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="fp32")
    loaded = load_with_sdpa(settings)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(IDS).logits, loaded(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_is_the_one_that_loading_quantises(dtype, tmp_path):
    make(dtype=dtype).save_pretrained(tmp_path)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    loaded = load_with_sdpa(LlmSettings(model=str(tmp_path), quantize="nf4", dtype=name))
    model = make(quantize=True, dtype=dtype)
    kinds = {n: type(m) for n, m in loaded.named_modules() if isinstance(m, nn.Linear)}
    assert {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)} == kinds
    assert Linear4bit in kinds.values()
    torch.testing.assert_close(model(IDS).logits, loaded(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("quantize", [False, True])
def test_lora_on_a_copy_with_shared_weights_leaves_the_model_as_it_is(quantize):
    base = make(quantize=quantize)
    before = base(IDS).logits
    shared = with_shared_weights(base)
    assert all(map(torch.equal, base.parameters(), shared.parameters()))
    pointers = [p.data_ptr() for p in base.parameters()]
    assert [p.data_ptr() for p in shared.parameters()] == pointers
    model = make_caption_model(shared, vision_width=8, lora=LORA)
    assert torch.equal(base(IDS).logits, before)
    # A fresh LoRA would change nothing, and one of its matrices would get no gradient.
    assert not torch.equal(shared(IDS).logits, before)
    names = model.trainable_parameters()
    assert {"lora_A", "lora_B"} <= {part for name in names for part in name.split(".")}


def test_what_is_drawn_is_the_same_every_time():
    models = [make_caption_model(make(), vision_width=8, lora=LORA) for _ in range(2)]
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
