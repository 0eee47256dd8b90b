"""Converts the language model of a run to plain weights: NF4 dequantised, LoRA merged.

LoRA was trained on top of the quantised weights, so it is merged into those and not into the
original ones. The exported model is the one that was evaluated.
"""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PhiConfig, PreTrainedModel

from train.model.language_model import DTYPES
from train.model.model_files import read_config
from train.settings import LlmSettings
from workspace.errors import StageError

ADAPTER = "default"
"""PEFT's name for the only adapter."""


def phi_config(settings: LlmSettings) -> PhiConfig:
    """Return the language model's config, without loading its weights.

    Raises:
        SettingsError: The model has no readable config.
        StageError: The model is not a Phi.
    """
    config = read_config(settings.model)
    if not isinstance(config, PhiConfig):
        raise StageError(
            f"llm.model: {settings.model} is of type {config.model_type!r}, and only Phi can be "
            f"exported (type 'phi', like microsoft/phi-2). Train with one."
        )
    config.name_or_path, config.dtype = "", DTYPES[settings.dtype]
    if config.hidden_act == "gelu_new":
        # The same formula in one operation, as in training and evaluation.
        config.hidden_act = "gelu_pytorch_tanh"
    return config


def plain_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of each parameter of the merged model, one at a time, on the CPU.

    Args:
        model: The language model, quantised or not, with or without LoRA.
        dtype: dtype of the yielded tensors; LoRA is added in float32.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        module_name, _, kind = name.rpartition(".")
        module, tensor = model.get_submodule(module_name), parameter.data
        if isinstance(module, Linear4bit) and kind == "weight":
            tensor = dequantize_4bit(tensor, module.weight.quant_state)
        if module_name.endswith(".base_layer"):
            module_name = module_name.removesuffix(".base_layer")
            layer = model.get_submodule(module_name)
            assert isinstance(layer, LoraLayer)
            if kind == "weight":
                tensor = tensor.float() + layer.get_delta_weight(ADAPTER).float()
        yield f"{module_name}.{kind}", tensor.to("cpu", dtype)
