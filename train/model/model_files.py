"""The files of the language model: locates them, and checks that they fit each other.

All checks run before the model is built, because config.json and headers may claim anything: a
million layers, code to run, the sizes of another checkpoint.
"""

import errno
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cache.errors import SettingsError
from cache.files.atomic import check_ordinary
from cache.files.foreign import reading_foreign_file
from workspace import checkpoint_files
from workspace.checkpoint_files import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    at_most_modules,
    check_config,
    check_dtypes,
    check_sizes,
    holding_back_stderr,
)
from workspace.json_files import read_json
from workspace.tensor_file import TensorFile

GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json, tokenizer_config.json"

HUB_FILES = (
    "*config.json",
    WEIGHTS,
    "model-*.safetensors",
    WEIGHTS_INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
)
"""Files fetched from a hub repository: not the same weights in other formats."""

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Twice a tokenizer.json of 260,000 entries; the file is read in full before any check."""


def locate(model: str) -> Path:
    """Return the folder with the language model's files, fetched from the hub if needed.

    Args:
        model: The setting `llm.model`.

    Raises:
        SettingsError: Neither a folder nor a hub id that is cached or can be reached.
    """
    try:
        return Path(model) if Path(model).is_dir() else _snapshot(model)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise refusal(model[:100])("its name is too long") from None


@functools.cache
def _snapshot(model: str) -> Path:
    """Fetch from the hub once per command, so that all files are of one revision."""
    with reading_foreign_file(refusal(model)):
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))


def refusal(model: str, name: str = "") -> Callable[[str], SettingsError]:
    """Return a function that makes the error for a language model that cannot be loaded.

    Args:
        model: The setting `llm.model`.
        name: The faulty file, if known.
    """

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"llm.model: cannot load {model!r}: {name and f'{name}: '}{detail}. Wanted a hub id "
            f"that can be reached, or a directory with config.json, safetensors and tokenizer "
            f"files."
        )

    return refuse


def read_config(model: str) -> PreTrainedConfig:
    """Read the language model's config.json, without running code that comes with it.

    Raises:
        SettingsError: No such model, or a config that cannot be used.
    """
    folder, refuse = locate(model), refusal(model, CONFIG)
    check_config(folder, functools.partial(refusal, model))
    # The same warnings appear again when the model is loaded.
    with reading_foreign_file(refuse, folder / CONFIG), holding_back_stderr(for_good=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return config


def generation_end_ids(model: str) -> set[int]:
    """Return the ids that end a text by the language model's generation_config.json, if any.

    Raises:
        SettingsError: The file is damaged, or names something else than ids.
    """
    path, refuse = locate(model) / GENERATION_CONFIG, refusal(model, GENERATION_CONFIG)
    if not path.exists():
        return set()
    value = read_json(path, refuse).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise refuse(f"eos_token_id is {str(value)[:50]!r}, wanted an id, a list of ids, or none")
    return set(ids)


def check_tokenizer_files(model: str) -> Path:
    """Check the tokenizer's files before they are loaded; return their folder.

    Raises:
        SettingsError: Names the file.
    """
    folder = locate(model)
    if (folder / CONFIG).exists():
        # The tokenizer's class may be named only there.
        read_config(model)
    for path in sorted(folder.iterdir()):
        check_ordinary(path, refusal(model, path.name))
        if path.suffix == ".json" and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise refusal(model, path.name)(f"wanted at most {MAX_TOKENIZER_BYTES} bytes")
    return folder


def read_headers(model: str) -> dict[Path, TensorFile]:
    """Read the headers of the language model's weights, in one file or in several.

    Raises:
        SettingsError: No safetensors, a damaged file, or a duplicate tensor.
    """
    return checkpoint_files.read_headers(locate(model), functools.partial(refusal, model))


def build_empty(model: str) -> PreTrainedModel:
    """Build the language model on the device "meta", without memory for its weights.

    Returns:
        Names and shapes as without quantisation.

    Raises:
        SettingsError: config.json describes another model than the weights files.
    """
    config, headers = read_config(model), read_headers(model)
    is_quantised = hasattr(config, "quantization_config")
    if not is_quantised:
        check_dtypes(headers, functools.partial(refusal, model))
    tensors = {n: shape for header in headers.values() for n, shape in header.shapes.items()}
    with reading_foreign_file(refusal(model, CONFIG)), holding_back_stderr():
        # Layers have more tensors than modules, except for dropouts and activations.
        with torch.device("meta"), at_most_modules(2 * len(tensors) + 100):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
        check_sizes(empty, tensors, packed=is_quantised)
        if config.model_type == "phi":
            # A forward pass: heads and frequencies may fit the weights but not each other.
            with torch.device("meta"), torch.no_grad():
                empty.eval()(torch.zeros(1, 2, dtype=torch.long))
    return empty
