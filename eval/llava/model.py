"""Builds and saves the LLaVA model of a run: vision tower, projector, language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from cache.spec import Spec
from eval.llava.processor import IMAGE_TOKEN
from eval.llava.text import TextPart, llava_class, text_weights
from eval.llava.vision import VisionPart
from train.model.attention import score_dtype
from train.model.captioner import CaptionModel

MAX_SHARD = "2GB"
"""Largest file of weights. Saving needs about as much memory on top of the weights."""


@dataclass(frozen=True)
class LlavaParts:
    """All of an export but the language model's weights and the projector."""

    spec: Spec
    """Of the tower's features."""
    vision: VisionPart
    text: TextPart
    tokenizer: PreTrainedTokenizerBase
    """With the image token."""
    end_ids: Sequence[int]
    """The tokens at which generation stops."""

    @property
    def image_token_id(self) -> int:
        """The id of the image token."""
        token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return token_id


def build_model(
    trained: CaptionModel, parts: LlavaParts, dtype: torch.dtype, max_tokens: int
) -> LlavaForConditionalGeneration:
    """Build the LLaVA model of a run, on the CPU.

    Args:
        trained: The run's projector and language model.
        parts: The rest of the model.
        dtype: The language model's in training and evaluation.
        max_tokens: Most tokens of a generated text.
    """
    # Transformers' attention computes in the dtype of the weights, and Phi's overflows in float16.
    dtype = parts.text.config.dtype = score_dtype(dtype)
    config = LlavaConfig(
        vision_config=parts.vision.config,
        text_config=parts.text.config,
        image_token_index=parts.image_token_id,
        image_seq_length=parts.spec.patches,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=parts.vision.strategy,
        vision_feature_layer=parts.spec.layer,
    )
    if parts.text.has_bias:
        config.vision_in_float32 = parts.spec.precision == "fp32"
    with torch.device("meta"):
        model = llava_class(parts.text)(config)
    model.load_state_dict(dict(_weights(trained, parts, dtype)), assign=True)
    model.tie_weights()
    model.generation_config = _generation_config(parts, max_tokens)
    return model


def _generation_config(parts: LlavaParts, max_tokens: int) -> GenerationConfig:
    rows = set(range(parts.text.config.vocab_size))
    unused = rows - set(parts.tokenizer.get_vocab().values())
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(parts.end_ids),
        pad_token_id=parts.tokenizer.eos_token_id,
        suppress_tokens=sorted(unused | {parts.image_token_id}),
    )


def _weights(
    trained: CaptionModel, parts: LlavaParts, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts.vision.weights.items():
        yield f"model.vision_tower.{name}", tensor
    layers = trained.projector.layers
    for linear, module in (("linear_1", layers[0]), ("linear_2", layers[2])):
        for kind, tensor in module.state_dict().items():
            yield f"model.multi_modal_projector.{linear}.{kind}", tensor.cpu()
    yield from text_weights(trained.language_model, parts.text, dtype)


def save_model(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save a model with each part in its own dtype, and the language model's in the config.

    Transformers loads all parts in the dtype of the config; our class keeps tower and projector.
    """
    dtype = model.config.text_config.dtype
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    if model.config.dtype != dtype:
        # Transformers wrote the dtype of the first weights, the tower's.
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
