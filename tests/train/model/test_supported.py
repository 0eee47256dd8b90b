"""Which language models training takes: those whose blocks LoRA covers whole."""

import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from cache.errors import SettingsError
from train.finetune import finetune
from train.model.language_model import check_supported
from train.pretrain import pretrain
from train.settings import LlmSettings

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OTHERS = {
    "LlamaForCausalLM": (LlamaConfig(**SIZES), "6 of its 14", "o_proj"),
    "MistralForCausalLM": (
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4), "6 of its 14", "gate_proj",
    ),
    "Qwen2ForCausalLM": (Qwen2Config(**SIZES, num_key_value_heads=2), "6 of its 14", "down_proj"),
    "GPTNeoXForCausalLM": (GPTNeoXConfig(**SIZES), "2 of its 8", "query_key_value"),
    "GPT2LMHeadModel": (
        GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
        "0 of its 9", "c_attn",
    ),
}  # fmt: skip


@pytest.fixture(params=OTHERS)
def other(request, phi_dir, tmp_path):
    """A folder with another kind of model and the tokenizer of the tests."""
    folder = tmp_path / request.param
    config = OTHERS[request.param][0]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in phi_dir.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_model_that_lora_does_not_cover_whole_is_refused_by_name(
    workspace, other, stage, monkeypatch
):
    def loaded(*_):
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr(f"train.{stage.__name__}.load_language_model", loaded)
    workspace.write_stage_1()
    with pytest.raises(SettingsError) as error:
        stage(workspace.params(llm={"model": str(other)}))
    _, covered, layer = OTHERS[other.name]
    words = (str(other), other.name, covered, layer, "microsoft/phi-2")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert not Path(f"runs/{stage.__name__}/params.yaml").exists()


def test_a_phi_is_covered_whole(phi_dir):
    check_supported(LlmSettings(model=str(phi_dir), quantize="nf4", dtype="fp32"))
