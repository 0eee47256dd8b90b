import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import AutoTokenizer

from tests.train.images import Image, collate_images
from train.data.prompt_formats import phi_format
from train.data.prompts import caption_turns, encode, tokenize
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model, load_tokenizer
from train.settings import LlmSettings

pytestmark = pytest.mark.slow("starts a process for each hash")

ROOT = Path(__file__).parents[3]
KINDS = [("nf4", "bf16"), ("nf4", "fp32"), ("none", "bf16"), ("none", "fp32")]
ELSEWHERE = """
import sys, torch
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model, load_tokenizer
from train.settings import LlmSettings
settings = LlmSettings(model=sys.argv[1], quantize="nf4", dtype="bf16")
model = load_language_model(settings, torch.device("cpu"))
print(language_model_fingerprint(model, load_tokenizer(settings)))
"""


@pytest.fixture
def load(phi_dir):
    def load(quantize="nf4", dtype="bf16"):
        settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype=dtype)
        return load_language_model(settings, torch.device("cpu"))

    return load


def flip_a_bit(tensor):
    """Flip one bit of the tensor's last value."""
    tensor.data.reshape(-1).view(torch.uint8)[-1] ^= 1


@pytest.mark.parametrize(("quantize", "dtype"), KINDS)
def test_two_loads_have_one_fingerprint(load, tokenizer, quantize, dtype):
    first, second = (language_model_fingerprint(load(quantize, dtype), tokenizer) for _ in "ab")
    assert first == second
    assert len(bytes.fromhex(first)) == 16


def test_every_quantisation_and_type_has_a_fingerprint_of_its_own(load, tokenizer):
    found = {language_model_fingerprint(load(*kind), tokenizer) for kind in KINDS}
    assert len(found) == len(KINDS)


def test_another_process_finds_the_same_fingerprint(load, tokenizer, phi_dir):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(phi_dir)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == language_model_fingerprint(load(), tokenizer)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_one_bit_of_any_tensor_changes_the_fingerprint(load, tokenizer, quantize):
    model = load(quantize)
    before = language_model_fingerprint(model, tokenizer)
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code]
            tensors.append(state.offset)
    assert len(tensors) > 30
    for tensor in tensors:
        flip_a_bit(tensor)
        assert language_model_fingerprint(model, tokenizer) != before
        flip_a_bit(tensor)
    assert language_model_fingerprint(model, tokenizer) == before


def test_the_same_bytes_in_another_shape_have_another_fingerprint(load, tokenizer):
    model = load("none")
    before = language_model_fingerprint(model, tokenizer)
    weight = model.model.layers[0].mlp.fc1.weight
    weight.data = weight.data.reshape(weight.shape[1], weight.shape[0])
    assert language_model_fingerprint(model, tokenizer) != before


def test_one_merge_less_changes_the_fingerprint(load, tokenizer, phi_dir, tmp_path):
    for file in phi_dir.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, path = load(), tmp_path / "tokenizer.json"
    copy = AutoTokenizer.from_pretrained(tmp_path)
    wanted = language_model_fingerprint(model, tokenizer)
    assert language_model_fingerprint(model, copy) == wanted
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert language_model_fingerprint(model, other) != wanted


def test_another_eos_changes_the_fingerprint(load, tokenizer, phi_dir):
    other = AutoTokenizer.from_pretrained(phi_dir)
    other.eos_token = other.convert_ids_to_tokens(5)
    model = load()
    assert language_model_fingerprint(model, other) != language_model_fingerprint(model, tokenizer)


def test_use_changes_no_fingerprint(make_model, phi_dir, store):
    settings = LlmSettings(model=str(phi_dir), quantize="nf4", dtype="bf16")
    tokenizer, model = load_tokenizer(settings), make_model(quantize="nf4", dtype="bf16")
    before = language_model_fingerprint(model.language_model, tokenizer)
    encode(["a red cat", "dog"], tokenizer)
    texts = tokenize([caption_turns("a cat")], phi_format(tokenizer), 9)
    image = Image(0, tuple(texts))
    batch = collate_images([[image]], torch.from_numpy(store.gather([100])))
    model.train()(batch).backward()
    with torch.inference_mode():
        model.eval()(batch)
    assert language_model_fingerprint(model.language_model, tokenizer) == before
