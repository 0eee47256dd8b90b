"""Damages the files of a language model and of a run in as many ways as are asked for."""

import copy
import json
import random
import shutil
from pathlib import Path

import torch

from cache.errors import PatchcacheError
from train.model.language_model import add_lora, load_language_model, load_lora, load_tokenizer
from train.model.projector import read_projector, seeded_projector
from train.settings import LlmSettings, LoraSettings

VALUES = (
    None, True, False, 0, -1, 1, 3, 10**6, 10**12, 10**30, 1e308, float("nan"), 0.5, "", "x", "a/b",
    "x" * 5000, [], {}, [1, [2]], ["x"], {"x": 1}, {"": {"": None}}, "(a+)+$", "\ud800",
)  # fmt: skip
"""What is put in place of a value."""

ENTRIES = {
    "config.json": {
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        "attn_implementation": "kernels-community/x",
        "_attn_implementation": "flash_attention_2",
        "_experts_implementation": {"": "kernels-community/x"},
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "rope_scaling": {"type": "dynamic", "factor": 1e30},
        "layer_types": ["x"] * 3,
        "num_labels": 10**11,
        "transformers_weights": "../other.safetensors",
        "model_type": "llama",
        "partial_rotary_factor": 1e9,
        "torch_dtype": "os",
        "head_dim": 10**9,
        "id2label": {"x": "y"},
        "tie_word_embeddings": True,
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["code.T", None]},
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"-1": {"content": "x"}, "99999999999": {"content": "y"}},
        "extra_special_tokens": {"image": []},
        "additional_special_tokens": [[1]],
        "model_max_length": "long",
        "chat_template": "{% for",
        "tokenizer_file": "/etc/passwd",
    },
    "tokenizer.json": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[" * 99}, "behavior": "x"},
        "decoder": {"type": "WordPiece"},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]},
        "truncation": {"max_length": 0, "strategy": "x", "stride": 9, "direction": "Left"},
        "padding": {"strategy": {"Fixed": 10**6}},
    },
    "adapter_config.json": {
        "target_modules": r"(.*)*_proj(x+x+)+y",
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"(x+x+)+y": 10**6},
        "layer_replication": [[0, 10**6]],
        "use_dora": True,
        "peft_type": "PREFIX_TUNING",
        "auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"},
        "megatron_config": {"x": 1},
        "corda_config": {"x": 1},
        "r": 10**9,
        "lora_bias": True,
        "trainable_token_indices": [0],
        "target_parameters": ["x"],
        "init_lora_weights": "gaussian",
    },
}  # fmt: skip
"""Entries that other readers than ours heed."""


class ForeignFiles:
    """A language model, an adapter and a projector, of which one file at a time is damaged."""

    def __init__(self, phi_dir: Path, folder: Path) -> None:
        self.model, self.adapter = folder / "model", folder / "adapter"
        self.projector = folder / "projector.safetensors"
        shutil.copytree(phi_dir, self.model)
        self.settings = LlmSettings(model=str(self.model), quantize="none", dtype="fp32")
        adapter = add_lora(self.load_model(), LoraSettings(r=4, alpha=8, dropout=0.5), 0)
        adapter.save_pretrained(self.adapter, save_embedding_layers=False)
        seeded_projector("mlp", 8, 64, 0).save(self.projector)
        names = (
            "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
            "model.safetensors",
        )  # fmt: skip
        self.files = [
            *(self.model / name for name in names),
            self.adapter / "adapter_config.json",
            self.adapter / "adapter_model.safetensors",
            self.projector,
        ]
        self.whole_model = self.load_model()
        self.bytes = {path: path.read_bytes() for path in self.files}

    def load_model(self):
        return load_language_model(self.settings, torch.device("cpu"))

    def load(self, path: Path) -> None:
        """Load what reads a file."""
        if path == self.projector:
            read_projector(path)
        elif path.parent == self.adapter:
            load_lora(self.whole_model, self.adapter).unload()
        else:
            if path.suffix == ".json":
                load_tokenizer(self.settings)
            if "tokenizer" not in path.name:
                self.load_model()

    def outcome(self, path: Path, data: bytes) -> str:
        """Load a file with other bytes: "loaded", "refused", or what else came."""
        path.write_bytes(data)
        try:
            self.load(path)
        except PatchcacheError as error:
            return "refused" if "\n" not in str(error) else f"more than one line: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        finally:
            path.write_bytes(self.bytes[path])
        return "loaded"

    def damaged(self, seed: int) -> tuple[Path, bytes]:
        """Choose a file and damage it; the same for the same seed."""
        chance = random.Random(seed)
        path = self.files[seed % len(self.files)]
        data = self.bytes[path]
        if path.suffix == ".json":
            return path, damaged_json(data, chance, ENTRIES.get(path.name, {}))
        return path, damaged_safetensors(data, chance)


def damaged_json(data, chance, entries=None):
    """Change entries, or bytes."""
    way = chance.randrange(10)
    if way == 0:
        return damaged_bytes(data, chance)
    if way == 1:
        return chance.choice([b"", b"[]", b"null", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{}"])
    # Copies: a value within itself would never end.
    values = json.loads(data)
    for _ in range(chance.choice([1, 1, 1, 3])):
        nodes = list(containers(values))
        # Rather near the top, where the big lists do not drown all else.
        node = chance.choice(nodes[: chance.choice([1, 4, len(nodes)])])
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if entries and way in (2, 3):
            name = chance.choice(list(entries))
            values[name] = copy.deepcopy(entries[name])
        elif not keys:
            continue
        elif way == 4:
            del node[chance.choice(keys)]
        elif way == 5 and isinstance(node, dict):
            node[chance.choice(["x", "", "type", "id"])] = copy.deepcopy(chance.choice(VALUES))
        elif way == 6:
            node[chance.choice(keys)] = values["deep"] = nested(chance.choice([50, 500]))
        else:
            node[chance.choice(keys)] = copy.deepcopy(chance.choice(VALUES))
    return json.dumps(values).encode()


def containers(value):
    """Yield every dict and list that is not empty, the outer ones first."""
    waiting = [value]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, dict | list) and value:
            yield value
            waiting.extend(value.values() if isinstance(value, dict) else value)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def damaged_bytes(data, chance):
    """Flip, cut, repeat or insert bytes."""
    changed, place = bytearray(data), chance.randrange(len(data))
    way = chance.randrange(4)
    if way == 0:
        for _ in range(chance.choice([1, 1, 9])):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == 1:
        del changed[place:]
    elif way == 2:
        changed[place:place] = changed[place : place + chance.randrange(99)]
    else:
        changed[place:place] = chance.randbytes(chance.randrange(9))
    return bytes(changed)


def damaged_safetensors(data, chance):
    """Damage the header, its length, or any byte."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    way = chance.randrange(4)
    if way == 0:
        return damaged_bytes(data, chance)
    if way == 1:
        return (
            chance.choice([0, 1, length - 1, length + 1, 2**40, 2**64 - 1]).to_bytes(8, "little")
            + data[8:]
        )
    header = damaged_bytes(header, chance) if way == 2 else damaged_json(header, chance)
    return len(header).to_bytes(8, "little") + header + rest
