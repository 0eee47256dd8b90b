"""Converts open_clip's vision tower to transformers' CLIP vision model.

Letters: D width of the tower.
"""

import re
from collections.abc import Iterator
from typing import Any

from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from transformers import CLIPVisionConfig

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
        f"{model}: cannot be exported as transformers' CLIP: {why}. Train with features of one of "
        f"open_clip's own ViTs, like ViT-B-32-quickgelu."
    )
