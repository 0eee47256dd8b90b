import json

import pytest
import torch
from safetensors import safe_open

from bench.make_phi2 import PHI2, SHARD_BYTES, num_bytes, split, tensor_shapes, write_phi
from train.data.prompts import encode
from train.model.language_model import load_language_model, load_tokenizer
from train.settings import LlmSettings

pytestmark = pytest.mark.slow("makes a checkpoint of Phi-2's layout")

SMALL = PHI2 | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}
SENTENCES = (
    "A man riding a wave on top of a surfboard.",
    "Two zebras standing next to each other in a grassy field.",
    "The bathroom has a toilet and a pedestal sink with toiletries.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phi2")
    write_phi(path, SMALL, 8_000_000, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(LlmSettings(model=str(folder), quantize="none", dtype="fp32"))


def test_phi_2_is_two_files_and_all_its_tensors():
    shapes = tensor_shapes(PHI2)
    shards = split(shapes, SHARD_BYTES)
    assert len(shards) == 2
    assert [name for shard in shards for name in shard] == list(shapes)
    assert sum(map(num_bytes, shapes.values())) == 5_559_367_680, "the hub's total_size"
    assert shapes["lm_head.bias"] == (51200,)
    assert next(iter(shards[0])) == "model.embed_tokens.weight"


def test_the_model_that_is_written_is_the_one_that_loads(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    settings = LlmSettings(model=str(folder), quantize="none", dtype="fp32")
    model = load_language_model(settings, torch.device("cpu"))
    state = model.state_dict()
    assert state.keys() == index["weight_map"].keys()
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as tensors:
            written = tensors.get_tensor(name)
        assert written.dtype == torch.float16
        assert torch.equal(state[name], written.float())
        assert written.float().std() > 0.01, "no tensor is constant"
    assert model.config.resid_pdrop == 0.1
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.4


def test_the_weights_depend_on_the_seed_alone(folder, tmp_path):
    for seed in (0, 1):
        write_phi(tmp_path / str(seed), SMALL, 8_000_000, seed)
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json"):
        assert (tmp_path / "0" / name).read_bytes() == (folder / name).read_bytes()
    weights = "model-00001-of-00002.safetensors"
    assert (tmp_path / "1" / weights).read_bytes() != (folder / weights).read_bytes()


def test_the_tokenizer_has_the_numbers_of_phi_2(tokenizer):
    assert len(tokenizer) == 50295
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert ends == {50256}
    assert tokenizer.pad_token_id is None


def test_english_takes_about_as_many_tokens_as_with_phi_2(tokenizer):
    words = sum(len(sentence.split()) for sentence in SENTENCES)
    tokens = sum(map(len, encode(SENTENCES, tokenizer)))
    assert 1.1 < tokens / words < 1.4


@pytest.mark.parametrize("text", [*SENTENCES, "Instruct: naïve 東京?\n    Output:\t\t 1.5 km 🐈"])
def test_every_text_comes_back(tokenizer, text):
    (token_ids,) = encode([text], tokenizer)
    assert tokenizer.decode(token_ids) == text
    assert max(token_ids) < 50295
