"""Turns the language model of a run into plain weights: NF4 undone, LoRA merged.

LoRA learned beside the quantised weights, so it is merged into those, not into the original ones:
what is exported is the model that was evaluated.
"""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PhiConfig, PreTrainedModel

from train.model.language_model import DTYPES
from train.model.model_files import read_config
from train.settings import LlmSettings
from workspace.errors import StageError

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def phi_config(settings: LlmSettings) -> PhiConfig:
    """Return the language model's config, without loading its weights.

    Raises:
        SettingsError: None that can be read.
        StageError: It is no Phi.
    """
    config = read_config(settings.model)
    if not isinstance(config, PhiConfig):
        raise StageError(
            f"llm.model: {settings.model} is of type {config.model_type!r}, and only Phi can be "
            f"exported (type 'phi', like microsoft/phi-2). Train with one."
        )
    config.name_or_path, config.dtype = "", DTYPES[settings.dtype]
    if config.hidden_act == "gelu_new":
        # The same formula in one operation: what training and evaluation computed.
        config.hidden_act = "gelu_pytorch_tanh"
    return config


def plain_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under the name that it has without LoRA, one at a time.

    Args:
        model: Quantised or not, with LoRA or without.
        dtype: Of what is yielded; the sum with LoRA is made in float32.
    """
    for name, parameter in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        tensor = _dequantized(model.get_submodule(module_name), kind, parameter.data)
        if module_name.endswith(".base_layer"):
            module_name = module_name.removesuffix(".base_layer")
            layer = model.get_submodule(module_name)
            tensor = _merged(layer, tensor) if kind == "weight" else tensor
        yield f"{module_name}.{kind}", tensor.to("cpu", dtype)


def _dequantized(module: nn.Module, kind: str, tensor: Tensor) -> Tensor:
    if isinstance(module, Linear4bit) and kind == "weight":
        plain: Tensor = dequantize_4bit(tensor, module.weight.quant_state)
        return plain
    return tensor


def _merged(layer: nn.Module, weight: Tensor) -> Tensor:
    assert isinstance(layer, LoraLayer)
    learned: Tensor = layer.get_delta_weight(ADAPTER)
    return weight.float() + learned.float()
