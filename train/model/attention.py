"""Who sees whom in packed rows, and the attention that keeps to it.

One rule in two forms: a dense mask for SDPA, and the block mask of FlexAttention, which skips
blocks in which nothing is seen. Transformers' models take either through `attention_mask`.

Letters: R rows, T positions of a row.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cache.texts import one_line
from train.data.packing import PackedBatch

NAME = "packed"
"""Of this attention among those of transformers."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From row, head, query and key to whether the query sees the key."""


def rule(batch: PackedBatch) -> Rule:
    """Return who sees whom: of its own image the patches and its own text, up to itself.

    Padding sees padding, since a query without any key has no defined attention.
    """
    images, texts = batch.images, batch.texts

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_image = images[row, query] == images[row, key]
        same_text = (texts[row, key] == 0) | (texts[row, key] == texts[row, query])
        return (key <= query) & same_image & same_text

    return sees


def dense_mask(batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """Return the rule as what is added to the scores: 0 or -inf, [R, 1, T, T]."""
    num_rows, length = batch.images.shape
    rows = torch.arange(num_rows, device=batch.images.device)[:, None, None]
    positions = torch.arange(length, device=batch.images.device)
    seen = rule(batch)(rows, rows, positions[:, None], positions)
    # Not bool: SDPA would make this of it again in every layer.
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]


def block_mask(batch: PackedBatch) -> BlockMask:
    """Return the rule as FlexAttention's blocks, for any number of heads."""
    num_rows, length = batch.images.shape
    return create_block_mask(
        rule(batch), num_rows, None, length, length, device=batch.images.device
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend under a block mask by FlexAttention, under any other mask as transformers' SDPA does.

    The signature is transformers'; query, key, value are [R, heads, T, head width].
    """
    if not isinstance(attention_mask, BlockMask):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return attended
    attend = _compiled() if query.is_cuda else cast(Callable[..., Tensor], flex_attention)
    out = attend(query, key, value, block_mask=attention_mask, scale=options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def use_packed_attention(model: PreTrainedModel) -> Callable[[PackedBatch], Tensor | BlockMask]:
    """Make a model attend by `packed_attention`.

    Returns:
        What makes its mask: blocks for FlexAttention on a GPU where it works with the model's
        width of a head (Phi-2's 80 is no power of two), a dense one elsewhere.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.device.type == "cuda" and _flex_works(model):
        return block_mask
    return lambda batch: dense_mask(batch, model.dtype)


def _flex_works(model: PreTrainedModel) -> bool:
    """Try a small forward and backward pass of FlexAttention, compiled, as the model would."""
    config = model.config
    shape = (1, config.num_attention_heads, 256, config.hidden_size // config.num_attention_heads)
    query = torch.randn(shape, dtype=model.dtype, device=model.device, requires_grad=True)
    causal = create_block_mask(
        lambda row, head, query, key: key <= query, 1, None, 256, 256, device=model.device
    )
    try:
        out = _compiled()(query, query, query, block_mask=causal)
        torch.autograd.grad(out.sum(), query)
    except (RuntimeError, NotImplementedError) as error:
        reason = one_line(error)
        print(f"FlexAttention does not work here, SDPA is used: {reason}", file=sys.stderr)
        return False
    return True


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Without compilation FlexAttention makes the whole matrix of scores.
    return torch.compile(flex_attention)
