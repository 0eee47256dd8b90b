"""The files of the language model: locates them, and checks that they fit each other.

All checks run before the model is built, because config.json and headers may claim anything: a
million layers, code to run, the sizes of another checkpoint.
"""

import contextlib
import errno
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cache.errors import SettingsError
from cache.files.atomic import check_ordinary
from cache.files.foreign import reading_foreign_file
from train.json_files import flatten, read_json
from train.model.tensor_file import TensorFile, read_header

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
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
    "chat_template.jinja",
)
"""Files fetched from a hub repository: not the same weights in other formats."""

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Twice a tokenizer.json of 260,000 entries; the file is read in full before any check."""

MAX_COUNT = 10_000
"""Most layers or labels: a config builds lists of them before anything else can be checked."""

ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Values of `_attn_implementation` that make transformers import nothing."""


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
    check_config(folder, model)
    # The same warnings appear again when the model is loaded.
    with reading_foreign_file(refuse, folder / CONFIG), holding_back_stderr(for_good=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return config


def check_config(folder: Path, model: str) -> None:
    """Refuse a config.json that makes transformers run foreign code or build a million layers.

    Raises:
        SettingsError: Names the entry.
    """
    refuse = refusal(model, CONFIG)
    if (folder / ADAPTER_CONFIG).exists():
        # Transformers would load the model that this file names, with the adapter in it.
        raise refusal(model, ADAPTER_CONFIG)("wanted the files of a model, without an adapter")
    for name, value in flatten(read_json(folder / CONFIG, refuse)).items():
        # An entry of a list is named by its list.
        key = name.rstrip(".0123456789").rpartition(".")[2]
        if "_implementation" in name and isinstance(value, str) and value not in ATTENTIONS:
            raise refuse(f"{name} is {value!r}, wanted one of {', '.join(ATTENTIONS)}, or none")
        if key == "transformers_weights":
            raise refuse(f"{name} is {value!r}, wanted the weights in {WEIGHTS}")
        counts = "layer" in key or "label" in key
        if counts and isinstance(value, int) and value > MAX_COUNT:
            raise refuse(f"{name} is {value}, wanted at most {MAX_COUNT}")


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
    folder = locate(model)
    headers = {
        path: read_header(path, refusal(model, path.name)) for path in _weights(folder, model)
    }
    names = [name for header in headers.values() for name in header.tensors]
    if len(names) > len(set(names)):
        raise refusal(model, WEIGHTS_INDEX)("its files hold a tensor twice")
    return headers


def _weights(folder: Path, model: str) -> list[Path]:
    """Return the weights files that transformers would load."""
    if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file():
        return [folder / WEIGHTS]
    refuse = refusal(model, WEIGHTS_INDEX)
    with reading_foreign_file(refuse):
        names = sorted(set(read_json(folder / WEIGHTS_INDEX, refuse)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("wanted names of files beside it")
    return [folder / name for name in names]


def build_empty(model: str) -> PreTrainedModel:
    """Build the language model on the device "meta", without memory for its weights.

    Returns:
        Names and shapes as without quantisation.

    Raises:
        SettingsError: config.json describes another model than the weights files.
    """
    config = read_config(model)
    tensors = {n: shape for h in read_headers(model).values() for n, shape in h.shapes.items()}
    with reading_foreign_file(refusal(model, CONFIG)), holding_back_stderr():
        # Layers have more tensors than modules, except for dropouts and activations.
        with torch.device("meta"), _at_most(2 * len(tensors) + 100):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
        _check_sizes(empty, tensors, packed=hasattr(config, "quantization_config"))
        if config.model_type == "phi":
            # A forward pass: heads and frequencies may fit the weights but not each other.
            with torch.device("meta"), torch.no_grad():
                empty.eval()(torch.zeros(1, 2, dtype=torch.long))
    return empty


@contextlib.contextmanager
def holding_back_stderr(*, for_good: bool = False) -> Iterator[None]:
    """Delay the stderr output of all libraries until the block has ended without an error.

    Args:
        for_good: Drop the output.
    """
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as afterwards:
        shown = os.dup(2)
        afterwards.callback(os.close, shown)
        os.dup2(held.fileno(), 2)
        afterwards.callback(os.dup2, shown, 2)
        # Runs first, so that buffered output after an error is dropped too.
        afterwards.callback(sys.stderr.flush)
        yield
        if not for_good:
            held.seek(0)
            os.write(shown, held.read())


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Stop building a model that has more modules than its files have weights for."""
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
    """Compare the model's sizes with the files'; for quantised files, only the total."""
    described = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    for name in sorted(described.keys() & tensors.keys()):
        if described[name] != tensors[name] and not packed:
            raise ValueError(
                f"it describes {name} as {described[name]}, the files hold {tensors[name]}"
            )
    # Tables that no checkpoint holds, and missing or renamed weights.
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
