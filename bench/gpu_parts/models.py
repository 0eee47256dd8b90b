"""Makes models with random weights where they will run, without a checkpoint on disk.

Weights are drawn and quantised matrix by matrix, so that a card whose memory holds the quantised
model is enough. What the model says is noise; what it costs is what Phi-2 costs.
"""

import copy

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from train.model.captioner import CaptionModel
from train.model.language_model import add_lora
from train.model.projector import seeded_projector
from train.settings import LoraSettings

WEIGHT_STD = 0.02
"""Of all weights, as in Phi-2's config; those of norms have the mean 1."""


def make_language_model(
    config: PreTrainedConfig,
    *,
    quantize: bool,
    dtype: torch.dtype,
    device: torch.device,
    drawn_on: torch.device | None = None,
) -> PreTrainedModel:
    """Make a frozen language model in `eval()`, whose weights are drawn from a fixed seed.

    Args:
        config: Of a Phi or Llama model; copied.
        quantize: Whether the matrices of the blocks are NF4, as `train.model.language_model` loads
            them.
        dtype: Of all other weights, and of the computation.
        device: The model's.
        drawn_on: Device that draws the weights, which decides them; the model's if None.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    if quantize:
        for block in model.model.layers:
            _replace_linear_layers(block, dtype)
        # PEFT and transformers ask the model, not its layers.
        model.is_loaded_in_4bit = True
    generator = torch.Generator(drawn_on or device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
            is_norm = name == "weight" and values.ndim == 1
            values.normal_(float(is_norm), WEIGHT_STD, generator=generator)
            setattr(module, name, _parameter(parameter, values.to(device)))
    # Its frequencies are buffers, which are on the meta device still.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    model.generation_config = GenerationConfig()
    return model.requires_grad_(False).eval()


def _replace_linear_layers(block: nn.Module, dtype: torch.dtype) -> None:
    for module in list(block.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                quantized = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=dtype,
                    quant_type="nf4",
                    device="meta",
                )
                # As after `load_language_model`: gradients pass on a CPU too.
                quantized.support_avx512bf16_for_cpu = False
                setattr(module, name, quantized)


def _parameter(like: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    if not isinstance(like, Params4bit):
        return nn.Parameter(values, requires_grad=False)
    # bitsandbytes quantises a parameter when it is moved.
    quantized: nn.Parameter = Params4bit(values, requires_grad=False, quant_type="nf4").to(
        values.device
    )
    return quantized


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with the same weights in the same memory, to which LoRA can be added alone."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make_caption_model(
    language_model: PreTrainedModel, *, vision_width: int, lora: LoraSettings | None
) -> CaptionModel:
    """Put a projector before a language model, and LoRA on it, on the language model's device."""
    if lora is not None:
        add_lora(language_model, lora, seed=0)
        generator = torch.Generator(language_model.device).manual_seed(0)
        for name, parameter in language_model.named_parameters():
            if "lora_B" in name:
                # Zero in a fresh LoRA, and then no gradient reaches the other matrix.
                nn.init.normal_(parameter, std=WEIGHT_STD, generator=generator)
    projector = seeded_projector("mlp", vision_width, language_model.config.hidden_size, seed=0)
    return CaptionModel(projector.to(language_model.device), language_model)
