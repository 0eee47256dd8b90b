"""The files of a model in transformers' layout, before anything is built from them.

config.json and headers may claim anything: a million layers, code to run, the sizes of another
checkpoint. Each error names its file through the function `refusal` that the caller gives.
"""

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file
from workspace.json_files import flatten, read_json
from workspace.tensor_file import TensorFile, read_header

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_COUNT = 10_000
"""Most layers or labels: a config builds lists of them before anything else can be checked."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors spells them, that are numbers without a scale elsewhere."""

ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Values of `_attn_implementation` that make transformers import nothing."""

Refusal = Callable[[str], Callable[[str], PatchcacheError]]
"""From the name of a faulty file to a function that makes the error from a line about the fault."""


def check_config(folder: Path, refusal: Refusal) -> dict[str, Any]:
    """Refuse a config.json that makes transformers run foreign code or build a million layers.

    Returns:
        Its values, as they stand in the file.

    Raises:
        PatchcacheError: From `refusal`; names the entry.
    """
    refuse = refusal(CONFIG)
    if (folder / ADAPTER_CONFIG).exists():
        # Transformers would load the model that this file names, with the adapter in it.
        raise refusal(ADAPTER_CONFIG)("wanted the files of a model, without an adapter")
    values = read_json(folder / CONFIG, refuse)
    for name, value in flatten(values).items():
        # An entry of a list is named by its list.
        key = name.rstrip(".0123456789").rpartition(".")[2]
        if "_implementation" in name and isinstance(value, str) and value not in ATTENTIONS:
            raise refuse(f"{name} is {value!r}, wanted one of {', '.join(ATTENTIONS)}, or none")
        if key == "transformers_weights":
            raise refuse(f"{name} is {value!r}, wanted the weights in {WEIGHTS}")
        if isinstance(value, float) and not math.isfinite(value):
            raise refuse(f"{name} is {value}, wanted a finite number")
        counts = "layer" in key or "label" in key
        if counts and isinstance(value, int) and value > MAX_COUNT:
            raise refuse(f"{name} is {value}, wanted at most {MAX_COUNT}")
    return values


def weights_files(folder: Path, refusal: Refusal) -> list[Path]:
    """Return the weights files that transformers would load.

    Raises:
        PatchcacheError: From `refusal`: an index of files elsewhere.
    """
    if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file():
        return [folder / WEIGHTS]
    refuse = refusal(WEIGHTS_INDEX)
    with reading_foreign_file(refuse):
        names = sorted(set(read_json(folder / WEIGHTS_INDEX, refuse)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("wanted names of files beside it")
    return [folder / name for name in names]


def read_headers(folder: Path, refusal: Refusal) -> dict[Path, TensorFile]:
    """Read the headers of a model's weights, in one file or in several.

    Raises:
        PatchcacheError: From `refusal`: no safetensors, a damaged file, or a duplicate tensor.
    """
    headers = {
        path: read_header(path, refusal(path.name)) for path in weights_files(folder, refusal)
    }
    names = [name for header in headers.values() for name in header.tensors]
    if len(names) > len(set(names)):
        raise refusal(WEIGHTS_INDEX)("its files hold a tensor twice")
    return headers


def check_dtypes(headers: Mapping[Path, TensorFile], refusal: Refusal) -> None:
    """Refuse quantised weights, which transformers would load as numbers, without their scales.

    Raises:
        PatchcacheError: From `refusal`; names the tensor.
    """
    for path, header in headers.items():
        for name, (dtype, _) in header.tensors.items():
            if name.endswith(".weight") and dtype not in FLOATS:
                raise refusal(path.name)(f"{name} is of type {dtype}, wanted one of {FLOATS}")


@contextlib.contextmanager
def at_most_modules(most: int) -> Iterator[None]:
    """Stop building a model that has more modules than its files have weights for.

    Raises:
        ValueError: In the block, as soon as there is one module more.
    """
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


def check_sizes(
    empty: nn.Module, tensors: Mapping[str, tuple[int, ...]], *, packed: bool = False
) -> None:
    """Compare the sizes of a model with those in its files.

    Args:
        empty: The model, on the device "meta".
        tensors: The shapes in the files, by name.
        packed: Whether the files are quantised: only the total is compared then.

    Raises:
        ValueError: Says what differs.
    """
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
