"""Converts the language model of a run to the language model of transformers' LLaVA.

NF4 is dequantised and LoRA merged. LoRA was trained on top of the quantised weights, so it is
merged into those and not into the original ones: the exported model is the one that was evaluated.

LLaVA computes logits with a linear layer. What a language model does beside that is measured on a
small copy of it: a constant factor is multiplied into the weights, a bias needs a class of ours,
and any other rule is refused.

Letters: C tokens, H width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cache.files.foreign import reading_foreign_file
from eval.llava.llava_phi import LlavaPhiForConditionalGeneration
from train.model.decoder import output_logits
from train.model.language_model import DTYPES
from train.model.model_files import read_config
from train.model.supported import VOCABULARY, small_copy
from train.settings import LlmSettings
from workspace.checkpoint_files import holding_back_stderr
from workspace.errors import StageError

ADAPTER = "default"
"""PEFT's name for the only adapter."""

LLAVA_EMBEDDINGS = "embed_tokens"
"""The only name of an embedding to which LLaVA can tie its output layer."""

PROBED_TOKENS = 16
TOLERANCE = 1e-5
"""Largest relative difference of logits. Kernels give 1e-7, because some norms compute in float32;
a rule that LLaVA lacks gives more than 1e-3."""


@dataclass(frozen=True)
class TextPart:
    """How LLaVA represents a language model."""

    config: PreTrainedConfig
    """With a row of the embeddings for the image token, and tied as in LLaVA."""
    has_bias: bool
    """Whether the output layer has a bias, which transformers' own LLaVA lacks."""
    scale: float
    """Factor of the logits, which is multiplied into the output layer."""


def text_part(settings: LlmSettings, image_token_id: int) -> TextPart:
    """Find out how LLaVA represents a language model, without loading its weights.

    Args:
        settings: Name the language model.
        image_token_id: Of the token to which patches are assigned. The first id behind the
            embeddings makes them one row longer.

    Raises:
        SettingsError: The model has no readable config.
        StageError: LLaVA cannot represent the model.
    """
    config = read_config(settings.model)

    def refuse(detail: str) -> StageError:
        return StageError(
            f"llm.model: {settings.model} is of type {config.model_type!r}, which transformers' "
            f"LLaVA cannot represent: {detail}. Train with a model of a family that docs/models.md "
            f"lists as exported."
        )

    with reading_foreign_file(refuse):
        part = representable(config)
    config = part.config
    config.name_or_path, config.dtype = "", DTYPES[settings.dtype]
    config.vocab_size = max(config.vocab_size, image_token_id + 1)
    for name, value in config.to_dict().items():
        if value == "gelu_new":
            # The same formula in one operation, as in training and evaluation.
            setattr(config, name, "gelu_pytorch_tanh")
    # The exported weights are not quantised.
    vars(config).pop("quantization_config", None)
    return part


def representable(config: PreTrainedConfig) -> TextPart:
    """Find out how LLaVA represents a kind of language model, on a small copy with random weights.

    Raises:
        ValueError: LLaVA's logits differ from the copy's. Other exceptions come from transformers.
    """
    with holding_back_stderr(for_good=True), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = small_copy(config)
        scale, has_bias = _measure_output(small)
        embeddings = getattr(small.base_model, LLAVA_EMBEDDINGS, None)
        can_tie = scale == 1 and embeddings is small.get_input_embeddings()
        part = TextPart(_text_config(config, can_tie), has_bias, scale)
        _check_logits(small, TextPart(_text_config(small.config, can_tie), has_bias, scale))
    return part


def _text_config(config: PreTrainedConfig, can_tie: bool) -> PreTrainedConfig:
    text = copy.deepcopy(config)
    text.tie_word_embeddings = bool(config.tie_word_embeddings) and can_tie
    return text


def _measure_output(model: PreTrainedModel) -> tuple[float, bool]:
    """Return the factor of a model's logits, and whether they have a bias.

    Raises:
        ValueError: The logits are no linear function of the hidden states.
    """
    weight_VH = model.get_output_embeddings().weight
    # Large, so that a soft cap shows.
    hidden_CH = 10 * torch.randn(PROBED_TOKENS, weight_VH.shape[1], dtype=weight_VH.dtype)
    linear_CV = hidden_CH @ weight_VH.T
    bias_V = output_logits(model, torch.zeros_like(hidden_CH[:1]))[0]
    found_CV = output_logits(model, hidden_CH) - bias_V
    scale = float((found_CV * linear_CV).sum() / (linear_CV**2).sum())
    difference = _difference(scale * linear_CV, found_CV)
    # Written so that NaN is refused too.
    if not difference < TOLERANCE:
        raise ValueError(
            f"its logits are no linear function of the last hidden states (relative difference "
            f"{difference:.1e}), as with a soft cap of logits"
        )
    return 1.0 if abs(scale - 1) < TOLERANCE else scale, bool(bias_V.any())


def _check_logits(model: PreTrainedModel, part: TextPart) -> None:
    """Compare a model in `eval()` with LLaVA of the same weights.

    Raises:
        ValueError: Logits differ, or LLaVA has other weights.
    """
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=part.config, vision_in_float32=True)
    llava = llava_class(part)(config).eval()
    loading = llava.load_state_dict(
        dict(text_weights(model, part, torch.float64)), strict=False, assign=True
    )
    missing = [name for name in loading.missing_keys if "vision" not in name]
    missing = [name for name in missing if "projector" not in name]
    if missing or loading.unexpected_keys:
        differing = ", ".join([*missing, *loading.unexpected_keys][:3])
        raise ValueError(f"it has other weights: {differing}")
    ids_1C = torch.randint(VOCABULARY, (1, PROBED_TOKENS))
    difference = _difference(llava(ids_1C).logits, model(ids_1C, use_cache=False).logits)
    if not difference < TOLERANCE:
        raise ValueError(
            f"a small copy of it with random weights has other logits (relative difference "
            f"{difference:.1e})"
        )


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def llava_class(part: TextPart) -> type[LlavaForConditionalGeneration]:
    """Return transformers' own class, or ours for an output layer with a bias."""
    return LlavaPhiForConditionalGeneration if part.has_bias else LlavaForConditionalGeneration


def text_weights(
    model: PreTrainedModel, part: TextPart, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield LLaVA's name and weight of each parameter of the merged model, on the CPU.

    Where the embeddings become longer, the new row is the mean of all rows. So is the new row of
    the output layer, and the logit of the image token is the mean of all logits: never the
    greatest, even where a program ignores the list of suppressed tokens.

    Args:
        model: The language model, quantised or not, with or without LoRA.
        part: Its representation.
        dtype: dtype of the yielded tensors.
    """
    embeddings, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = output_layer.weight is embeddings.weight
    for name, tensor in plain_weights(model, dtype):
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        if module is output_layer:
            yield f"lm_head.{kind}", _longer(_scaled(tensor, part.scale), part.config.vocab_size)
            continue
        if module is embeddings:
            tensor = _longer(tensor, part.config.vocab_size)
            if is_tied:
                head = _scaled(tensor, part.scale)
                # Saving would leave out one of two names of the same memory.
                yield "lm_head.weight", head if part.config.tie_word_embeddings else head.clone()
        inner = name.removeprefix(f"{model.base_model_prefix}.")
        yield name if inner == name else f"model.language_model.{inner}", tensor


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return tensor
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale).to(tensor.dtype)


def _longer(tensor: Tensor, rows: int) -> Tensor:
    """Append the mean of all rows until there are `rows` rows."""
    if len(tensor) >= rows:
        return tensor
    mean = tensor.mean(0, keepdim=True, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return torch.cat([tensor, *[mean.to(tensor.dtype)] * (rows - len(tensor))])


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
        if isinstance(module, Linear4bit) and kind == "weight":
            # GPT-2's linear layers hold their weights transposed, until they are quantised.
            tensor = tensor.T if module.source_cls is Conv1D else tensor
        yield f"{module_name}.{kind}", tensor.to("cpu", dtype)
