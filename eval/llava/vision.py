"""Represents the vision tower of a run as the vision model of transformers' LLaVA.

A tower of open_clip is converted to transformers' CLIP; one of transformers is taken as it is.

Letters: S side of the input in pixels, D width of the tower.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig, PreTrainedConfig

from pipeline.encoding.encoder import Encoder
from pipeline.settings import TRANSFORMERS, EncoderSettings
from pipeline.towers.tower import PATCH, patch_tokens
from pipeline.towers.transformers_tower import load_vision_model, num_prefix_tokens
from workspace.errors import StageError

NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
"""open_clip's names to transformers'; names within a block have no prefix."""

UNUSED = "proj"
"""The projection of the class token, which LLaVA does not use."""

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest relative difference of features, by precision; a wrong layer, norm or token gives more.
"""


@dataclass(frozen=True)
class VisionPart:
    """How LLaVA represents a vision tower."""

    config: PreTrainedConfig
    weights: Mapping[str, Tensor]
    num_prefix_tokens: int
    """Tokens before the patches: 0 or 1, the class token."""

    @property
    def strategy(self) -> Literal["default", "full"]:
        """LLaVA's `vision_feature_select_strategy`: without the first token, or all tokens."""
        return "default" if self.num_prefix_tokens else "full"


def vision_part(tower: Encoder, settings: EncoderSettings) -> VisionPart:
    """Represent a tower, and compare its features of a picture of noise.

    Args:
        tower: On the CPU.
        settings: Its settings.

    Raises:
        StageError: LLaVA cannot represent the tower.
    """
    if tower.spec.tokens != PATCH:
        raise _unsupported(settings.model, "the places of a map are its patches, not its tokens")
    if settings.model.startswith(TRANSFORMERS):
        model = load_vision_model(settings)
        prefix = num_prefix_tokens(model.config)
        if prefix > 1:
            raise _unsupported(
                settings.model, f"LLaVA drops one token before the patches, it has {prefix}"
            )
        # Like the names of the folders, nothing of this machine.
        model.config.name_or_path = ""
        part = VisionPart(model.config, model.to(tower._dtype).state_dict(), prefix)
    else:
        config = clip_vision_config(tower._visual, settings.model)
        part = VisionPart(config, dict(clip_vision_weights(tower._visual)), 1)
    _check_features(part, tower, settings.model)
    return part


@torch.inference_mode()
def _check_features(part: VisionPart, tower: Encoder, model: str) -> None:
    """Refuse a tower of which LLaVA would take other features."""
    side = tower.spec.image_size
    noise_1CSS = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    noise_1CSS = noise_1CSS.to(tower._dtype)
    vision = AutoModel.from_config(part.config, dtype=tower._dtype).eval()
    vision.load_state_dict(part.weights)
    outputs = vision(noise_1CSS, output_hidden_states=True)
    found = outputs.hidden_states[tower.spec.layer][:, part.num_prefix_tokens :].float()
    wanted = patch_tokens(tower._visual, noise_1CSS, tower.spec.layer).float()
    difference = "another shape"
    if found.shape == wanted.shape:
        relative = float((found - wanted).norm() / wanted.norm())
        # Not `>`, which is False for NaN.
        if relative <= TOLERANCE[tower.spec.precision]:
            return
        difference = f"relative difference {relative:.1e}"
    raise _unsupported(model, f"transformers' model gives other features ({difference})")


def clip_vision_config(visual: nn.Module, model: str) -> CLIPVisionConfig:
    """Return the config of the equivalent transformers model.

    Args:
        visual: open_clip's vision tower.
        model: The tower's name, for error texts.

    Raises:
        StageError: The tower has parts that transformers' CLIP does not have.
    """
    if not isinstance(visual, VisionTransformer):
        raise _unsupported(model, f"its class is {type(visual).__module__}.{type(visual).__name__}")
    blocks = list(visual.transformer.resblocks)
    norms = [m for m in visual.modules() if isinstance(m, nn.LayerNorm)]
    activations = {_activation(block, model) for block in blocks}
    epsilons = {norm.eps for norm in norms}
    (height, width), (patch_height, patch_width) = visual.image_size, visual.patch_size
    if not isinstance(visual.ln_pre, nn.LayerNorm) or visual.attn_pool is not None:
        raise _unsupported(model, "it has no norm before its blocks, or an attention pool")
    if any(type(norm) not in (LayerNorm, LayerNormFp32) for norm in norms) or len(epsilons) > 1:
        raise _unsupported(model, "its norms differ")
    if len(activations) > 1 or height != width or patch_height != patch_width:
        raise _unsupported(model, "its activations differ, or patches or pictures are not square")
    return CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=height,
        patch_size=patch_height,
        hidden_act=activations.pop(),
        layer_norm_eps=epsilons.pop(),
        projection_dim=visual.output_dim,
    )


def _activation(block: Any, model: str) -> str:
    """Return transformers' name of a block's activation.

    Raises:
        StageError: transformers' CLIP does not have this block or activation.
    """
    if type(block) is not ResidualAttentionBlock or not isinstance(block.ls_1, nn.Identity):
        raise _unsupported(model, "its blocks have layer scale, or are of another class")
    gelu = block.mlp.gelu
    if isinstance(gelu, QuickGELU):
        return "quick_gelu"
    if isinstance(gelu, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[gelu.approximate]
    raise _unsupported(model, f"its activation is {type(gelu).__name__}")


def clip_vision_weights(visual: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of each parameter of the transformers model.

    open_clip has queries, keys and values in one matrix [3 D, D], transformers in three [D, D].
    """
    for name, tensor in visual.state_dict().items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        prefix, rest = (f"encoder.layers.{found[1]}.", found[2]) if found else ("", name)
        if rest == UNUSED:
            continue
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}self_attn.{part}_proj.{kind}", chunk.contiguous()
            continue
        (old,) = (old for old in NAMES if rest.startswith(old))
        yield prefix + NAMES[old] + rest.removeprefix(old), tensor


def _unsupported(model: str, why: str) -> StageError:
    return StageError(
        f"{model}: cannot be exported as the vision tower of transformers' LLaVA: {why}. Train "
        f"with features of one of open_clip's own ViTs, like ViT-B-32-quickgelu, or of "
        f"transformers' CLIP, SigLIP, DINOv2 without registers, or AIMv2."
    )
