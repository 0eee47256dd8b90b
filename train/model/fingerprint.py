"""Hashes of the frozen language model and its tokenizer.

The fingerprint hashes the loaded model, for resuming a run: another device or dtype is another
model. The identity hashes the files, wherever they lie, for matching a run with its language model:
neither a hub id nor a folder guarantees that the files are still the same.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack

import torch
import xxhash
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cache.files.atomic import canonical_json
from cache.files.foreign import reading_foreign_file
from train.model.language_model import PROBE
from train.model.model_files import read_config, read_headers, refusal
from train.settings import LlmSettings
from workspace.checkpoint_files import CONFIG

INDECISIVE = (
    r"_.*|transformers_version|architectures|auto_map|(torch_)?dtype|use_cache|output_.*|return_.*"
    r"|(bos|eos|pad|sep)_token_id|.*(dropout|pdrop)|initializer_range|id2label|label2id"
)
"""Config entries about its origin, or that matter only when all weights are trained."""


def language_model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the tensors of the loaded language model, and its tokenizer.

    Call it before LoRA is added, which renames the layers.

    Args:
        model: On any device, quantised or not.
        tokenizer: Of the model.

    Returns:
        xxh3-128, 32 hex digits. CPU and GPU may round differently in quantisation, so a model has
        one fingerprint per kind of device.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    rules = f"eos {tokenizer.eos_token_id}\n{tokenizer.backend_tokenizer.to_str()}"
    digest.update(rules.encode())
    return digest.hexdigest()


def language_model_identity(
    settings: LlmSettings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Hash the language model's files, without loading the model.

    The hashes do not depend on folder or hub id, number of files, device, quantisation and dtype.

    Args:
        settings: Name the language model.
        tokenizer: Of the model.

    Returns:
        `name` from the settings, and xxh3-128 of `weights`, `config` and `tokenizer`.

    Raises:
        SettingsError: A file is missing or damaged.
    """
    return {
        "name": settings.model,
        "weights": _weights_hash(settings.model),
        "config": _config_hash(settings.model),
        "tokenizer": _tokenizer_hash(tokenizer),
    }


def _weights_hash(model: str) -> str:
    """Hash names, dtypes, shapes and bytes of all tensors, in order of their names."""
    digest = xxhash.xxh3_128()
    headers = read_headers(model)
    with ExitStack() as opened:
        opened.enter_context(reading_foreign_file(refusal(model)))
        files = {path: opened.enter_context(safe_open(path, "pt")) for path in headers}
        tensors = [(*item, path) for path in headers for item in headers[path].tensors.items()]
        for name, about, path in sorted(tensors, key=lambda tensor: tensor[0]):
            digest.update(f"{name} {about}\n".encode())
            values = files[path].get_tensor(name)
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_hash(model: str) -> str:
    """Hash the config entries that decide numbers and differ from the defaults.

    Leaving out defaults keeps the hash when another version of transformers writes more entries.
    """
    config = read_config(model)
    with reading_foreign_file(refusal(model, CONFIG)):
        usual = type(config)().to_dict()
        decisive = {
            name: value
            for name, value in config.to_dict().items()
            if value != usual.get(name) and not re.fullmatch(INDECISIVE, name)
        }
        return xxhash.xxh3_128(canonical_json([config.model_type, decisive])).hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash entries, merges and the tokens of a probe text.

    Not the tokenizers library's serialised form, which changes with its version.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = state["model"].get("merges") or []
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    rules = [tokenizer.eos_token_id, tokenizer.get_vocab(), pairs, ids, tokenizer.decode(ids)]
    return xxhash.xxh3_128(canonical_json(rules)).hexdigest()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, their quantisation statistics, and buffers, by name.

    Buffers that no checkpoint holds matter: the rotary frequencies depend on the config.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        yield name, tensor.data
        if isinstance(tensor, Params4bit):
            for part, state in sorted(tensor.quant_state.as_dict(packed=True).items()):
                yield f"{name}.{part}", state
