"""The files of the language model: where they are, and whether they fit each other.

All of it is known before the model is built, because config.json and headers may claim anything:
a million layers, code to be run, the sizes of another checkpoint.
"""

import contextlib
import errno
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cache.errors import PatchcacheError, SettingsError
from cache.files.atomic import check_ordinary
from cache.files.foreign import reading_foreign_file
from train.model.tensor_file import TensorFile, read_header

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
TOKENIZER = "tokenizer.json, tokenizer_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

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
)
"""What is fetched of a hub's repository: not the same weights in other formats."""

MAX_JSON_BYTES = 20_000_000
MAX_TOKENIZER_BYTES = 64 * 2**20
"""Twice the tokenizer.json of 260,000 entries; read in full before anything in it is checked."""

MAX_COUNT = 10_000
"""Layers, or labels, of which a config makes lists before anything else can be checked."""

ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Values of `_attn_implementation` for which transformers imports nothing."""


def locate(model: str) -> Path:
    """Return the folder with the language model's files; a hub's are fetched where they changed.

    Args:
        model: The setting `llm.model`.

    Raises:
        SettingsError: Neither a folder nor a hub id that can be reached or is there already.
    """
    try:
        return Path(model) if Path(model).is_dir() else _snapshot(model)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise refusal(model[:100])("its name is too long") from None


@functools.cache
def _snapshot(model: str) -> Path:
    """Fetch from the hub, once in a command: all its parts are of one revision."""
    with reading_foreign_file(refusal(model)):
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))


def refusal(model: str, name: str = "") -> Callable[[str], SettingsError]:
    """Return what makes the error for a language model that cannot be loaded.

    Args:
        model: The setting `llm.model`.
        name: The file that is wrong, if it is known.
    """

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"llm.model: cannot load {model!r}: {name and f'{name}: '}{detail}. Wanted a hub id "
            f"that can be reached, or a directory with config.json, safetensors and tokenizer "
            f"files."
        )

    return refuse


def read_config(model: str) -> PreTrainedConfig:
    """Read the language model's config.json; no code that comes with it is run.

    Raises:
        SettingsError: No such model, or a config that cannot be used.
    """
    folder, refuse = locate(model), refusal(model, CONFIG)
    check_config(folder, model)
    # What is warned of here is warned of again when the model is loaded.
    with reading_foreign_file(refuse, folder / CONFIG), holding_back_stderr(for_good=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return config


def check_config(folder: Path, model: str) -> None:
    """Refuse a config.json that makes transformers run code of others, or count to a million.

    Raises:
        SettingsError: Names the entry.
    """
    refuse = refusal(model, CONFIG)
    if (folder / ADAPTER_CONFIG).exists():
        # Transformers would load another model, which that file names, and the adapter into it.
        raise refusal(model, ADAPTER_CONFIG)("wanted the files of a model, without an adapter")
    for name, value in _entries(read_json(folder / CONFIG, refuse)):
        key = name.rpartition(".")[2]
        if "_implementation" in name and isinstance(value, str) and value not in ATTENTIONS:
            raise refuse(f"{name} is {value!r}, wanted one of {', '.join(ATTENTIONS)}, or none")
        if key == "transformers_weights":
            raise refuse(f"{name} is {value!r}, wanted the weights in {WEIGHTS}")
        counts = "layer" in key or "label" in key
        if counts and isinstance(value, int) and value > MAX_COUNT:
            raise refuse(f"{name} is {value}, wanted at most {MAX_COUNT}")


def check_tokenizer_files(model: str) -> Path:
    """Refuse what loading the tokenizer must not read; return the folder with its files.

    Raises:
        SettingsError: Names the file.
    """
    folder = locate(model)
    if (folder / CONFIG).exists():
        # What kind of tokenizer it is may be said there only.
        read_config(model)
    for path in sorted(folder.iterdir()):
        check_ordinary(path, refusal(model, path.name))
        if path.suffix == ".json" and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise refusal(model, path.name)(f"wanted at most {MAX_TOKENIZER_BYTES} bytes")
    return folder


def read_json(path: Path, refuse: Callable[[str], PatchcacheError]) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        PatchcacheError: What `refuse` returned.
        OSError: The system could not read the file.
    """
    if not path.is_file():
        raise refuse("no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise refuse(f"wanted at most {MAX_JSON_BYTES} bytes, found {path.stat().st_size}")
    with reading_foreign_file(refuse, path):
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise refuse(f"wanted a JSON object, found {type(values).__name__}")
    return values


def _entries(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no dict or list, under the names of what it is in, joined by dots."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _entries(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(values, list):
        for value in values:
            yield from _entries(value, prefix)
    else:
        yield prefix, values


def read_headers(model: str) -> dict[Path, TensorFile]:
    """Read the headers of the language model's weights, in one file or in several.

    Raises:
        SettingsError: No safetensors there, a damaged file, or a tensor that is there twice.
    """
    folder = locate(model)
    headers = {
        path: read_header(path, refusal(model, path.name)) for path in _weights(folder, model)
    }
    names = [name for header in headers.values() for name in header.tensors]
    if len(names) > len(set(names)):
        raise refusal(model, WEIGHTS_INDEX)("its files hold a tensor twice")
    return headers


def _weights(folder: Path, model: str) -> list[Path]:
    """Name the files that transformers would load, and in its order of preference."""
    if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file():
        return [folder / WEIGHTS]
    refuse = refusal(model, WEIGHTS_INDEX)
    with reading_foreign_file(refuse):
        names = sorted(set(read_json(folder / WEIGHTS_INDEX, refuse)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("wanted names of files beside it")
    return [folder / name for name in names]


def build_empty(model: str) -> PreTrainedModel:
    """Build the language model without memory for its weights, which its files must have.

    Returns:
        On the device "meta": names and shapes, as without quantisation.

    Raises:
        SettingsError: What config.json describes is not what the files hold.
    """
    config = read_config(model)
    tensors = {n: shape for h in read_headers(model).values() for n, shape in h.shapes.items()}
    with reading_foreign_file(refusal(model, CONFIG)), holding_back_stderr():
        # A layer has more tensors than modules, but for the dropouts and activations.
        with torch.device("meta"), _at_most(2 * len(tensors) + 100):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", trust_remote_code=False
            )
        _check_sizes(empty, tensors, packed=hasattr(config, "quantization_config"))
        if config.model_type == "phi":
            # Shapes alone: heads or frequencies may fit the weights, and not each other.
            with torch.device("meta"), torch.no_grad():
                empty.eval()(torch.zeros(1, 2, dtype=torch.long))
    return empty


@contextlib.contextmanager
def holding_back_stderr(*, for_good: bool = False) -> Iterator[None]:
    """Show what is written to stderr, by any library, after the block, unless the block raises.

    Args:
        for_good: Never show it.
    """
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as afterwards:
        shown = os.dup(2)
        afterwards.callback(os.close, shown)
        os.dup2(held.fileno(), 2)
        afterwards.callback(os.dup2, shown, 2)
        # Before all else: what comes behind an error must not be shown later.
        afterwards.callback(sys.stderr.flush)
        yield
        if not for_good:
            held.seek(0)
            os.write(shown, held.read())


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Stop the building of a model that has more modules than its files have weights for."""
    count = 0

    def registered(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError("it describes more layers than the files hold weights for")

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _check_sizes(empty: nn.Module, tensors: dict[str, tuple[int, ...]], packed: bool) -> None:
    """Refuse sizes other than the files'; of weights that are quantised already, only the sum."""
    described = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    for name in sorted(described.keys() & tensors.keys()):
        if described[name] != tensors[name] and not packed:
            raise ValueError(
                f"it describes {name} as {described[name]}, the files hold {tensors[name]}"
            )
    # Tables that no checkpoint holds, and weights that are missing or under another name.
    unnamed = [
        tensor.numel()
        for name, tensor in [*empty.named_parameters(), *empty.named_buffers()]
        if name not in tensors
    ]
    held = sum(torch.Size(shape).numel() for shape in tensors.values())
    if sum(unnamed) > 8 * held:
        raise ValueError(
            f"it describes {sum(unnamed)} numbers that the files do not hold, beside {held} that "
            f"they do"
        )
