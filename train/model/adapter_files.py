"""The files of an adapter in PEFT's format: checks that stage 2 could have written them.

PEFT trusts its config: a regular expression may name the layers, a rank may be a million, and a
dozen entries make it import or build something else. So only three checked numbers of the config
reach PEFT, and no matrix is allocated that the file does not hold.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from cache.files.foreign import reading_foreign_file
from train.model.decoder import linear_shape
from train.settings import LoraSettings
from workspace.checkpoint_files import ADAPTER_CONFIG
from workspace.errors import StageError
from workspace.json_files import read_json
from workspace.tensor_file import read_header

ADAPTER_WEIGHTS = "adapter_model.safetensors"

DESCRIBING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
"""Entries that describe the adapter's origin."""

FLOATS = ("F32", "F16", "BF16")


def refusal(folder: Path, detail: str) -> StageError:
    """Return the error for a folder whose adapter cannot be loaded."""
    return StageError(f"{folder}: no adapter for this model ({detail}).")


def read_lora_settings(folder: Path) -> LoraSettings:
    """Read rank, alpha and dropout of an adapter.

    Raises:
        StageError: No config, or no such numbers in it.
        OSError: The system could not read the file.
    """
    values = _read_config(folder)
    numbers = {"r": int, "lora_alpha": int, "lora_dropout": float}
    for name, wanted in numbers.items():
        found = values.get(name)
        if isinstance(found, bool) or not isinstance(found, (int, wanted)):
            raise _wrong(folder, name, found, f"a number ({wanted.__name__})")
    try:
        return LoraSettings(
            r=values["r"], alpha=values["lora_alpha"], dropout=float(values["lora_dropout"])
        )
    except (ValueError, OverflowError) as error:
        raise refusal(folder, f"{ADAPTER_CONFIG}: {error}") from None


def check_adapter(folder: Path, config: LoraConfig, model: nn.Module) -> None:
    """Refuse an adapter that stage 2 would not write for this model.

    Args:
        folder: Of the adapter.
        config: Stage 2's config for the adapter's rank, alpha and dropout.
        model: The language model, quantised or not, without LoRA.

    Raises:
        StageError: Names the first entry, or the first matrix, that differs.
        OSError: The system could not read a file.
    """
    targets = config.target_modules
    assert isinstance(targets, set)
    _check_config(folder, _read_config(folder), config.to_dict(), targets)
    wanted = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{name}.lora_"
            width, out_width = linear_shape(module)
            wanted[f"{prefix}A.weight"] = (config.r, width)
            wanted[f"{prefix}B.weight"] = (out_width, config.r)
    header = read_header(
        folder / ADAPTER_WEIGHTS, lambda detail: refusal(folder, f"{ADAPTER_WEIGHTS}: {detail}")
    )
    differing = sorted(
        name
        for name in wanted.keys() | header.shapes.keys()
        if wanted.get(name) != header.shapes.get(name)
    )
    if differing:
        first = differing[0]
        raise refusal(
            folder,
            f"{len(differing)} matrices without a match: {first} is of shape "
            f"{header.shapes.get(first, 'none')}, wanted {wanted.get(first, 'none')}",
        )
    for name, (dtype, _) in header.tensors.items():
        if dtype not in FLOATS:
            raise refusal(folder, f"{name} is of type {dtype}, wanted one of {', '.join(FLOATS)}")


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(
        folder / ADAPTER_CONFIG, lambda detail: refusal(folder, f"{ADAPTER_CONFIG}: {detail}")
    )


def _check_config(
    folder: Path, found: dict[str, Any], wanted: dict[str, Any], targets: set[str]
) -> None:
    """Compare all entries that both the writer's PEFT and the installed one know."""
    names = found.get("target_modules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong(folder, "target_modules", names, "a list of names")
    if set(names) != targets:
        raise _wrong(folder, "target_modules", sorted(names), sorted(targets))
    with reading_foreign_file(lambda detail: refusal(folder, f"{ADAPTER_CONFIG}: {detail}")):
        for name in sorted(found.keys() & wanted.keys() - {"target_modules", *DESCRIBING}):
            # Depending on the version, an option is off as null, false or empty.
            if (found[name] or wanted[name]) and found[name] != wanted[name]:
                raise _wrong(folder, name, found[name], repr(wanted[name]))
        for name in ("peft_type", "task_type"):
            if name not in found:
                raise _wrong(folder, name, None, repr(wanted[name]))


def _wrong(folder: Path, name: str, found: object, wanted: object) -> StageError:
    return refusal(folder, f"{ADAPTER_CONFIG}: {name} is {str(found)[:100]!r}, wanted {wanted}")
