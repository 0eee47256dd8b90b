"""Turns a vision tower of open_clip into transformers' CLIP vision model, weight for weight.

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
"""How transformers calls what open_clip calls otherwise; within a block without its prefix."""

UNUSED = "proj"
"""Maps the class token to the text tower's space, where LLaVA never goes."""


def clip_vision_config(visual: nn.Module, model: str) -> CLIPVisionConfig:
    """Describe a vision tower as transformers does.

    Args:
        visual: open_clip's.
        model: Its name, for the error text.

    Raises:
        StageError: It has parts that transformers' CLIP has not.
    """
    if not isinstance(visual, VisionTransformer):
        raise _cannot_hold(model, f"it is a {type(visual).__module__}.{type(visual).__name__}")
    blocks = list(visual.transformer.resblocks)
    norms = [m for m in visual.modules() if isinstance(m, nn.LayerNorm)]
    activations = {_activation(block, model) for block in blocks}
    epsilons = {norm.eps for norm in norms}
    (height, width), (patch_height, patch_width) = visual.image_size, visual.patch_size
    if not isinstance(visual.ln_pre, nn.LayerNorm) or visual.attn_pool is not None:
        raise _cannot_hold(model, "it has no norm before its blocks, or pools by attention")
    if any(type(norm) not in (LayerNorm, LayerNormFp32) for norm in norms) or len(epsilons) > 1:
        raise _cannot_hold(model, "its norms are not all of one kind")
    if len(activations) > 1 or height != width or patch_height != patch_width:
        raise _cannot_hold(model, "its blocks differ, or its patches or pictures are no squares")
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
        StageError: A block or an activation that CLIP does not have.
    """
    if type(block) is not ResidualAttentionBlock or not isinstance(block.ls_1, nn.Identity):
        raise _cannot_hold(model, "its blocks scale their outputs, or are otherwise not CLIP's")
    gelu = block.mlp.gelu
    if isinstance(gelu, QuickGELU):
        return "quick_gelu"
    if isinstance(gelu, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[gelu.approximate]
    raise _cannot_hold(model, f"its activation is {type(gelu).__name__}")


def clip_vision_weights(visual: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a tower that `clip_vision_config` describes, under transformers' names.

    Queries, keys and values lie in one matrix in open_clip, [3 D, D], and in three here.
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


def _cannot_hold(model: str, why: str) -> StageError:
    return StageError(
        f"{model}: cannot be exported: {why}; LLaVA's vision tower is transformers' CLIP. Train "
        f"with features of one of open_clip's own ViTs, like ViT-B-32-quickgelu."
    )
