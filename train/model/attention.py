"""Attention over packed rows: each position attends to its image's patches and its own text.

One mask in two forms: a dense mask for SDPA, and FlexAttention's block mask, which skips blocks
without any attention. Transformers' models take either through `attention_mask`.

Letters: R rows, T positions of a row.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cache.texts import one_line
from train.data.packing import PackedBatch

NAME = "packed"
"""Name under which transformers knows this attention."""

PROBE_LENGTH = 256
"""Positions of the pass that tries FlexAttention: two blocks."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(image_numbers: Tensor, text_ids: Tensor) -> MaskMod:
    """Return FlexAttention's `mask_mod`: whether a query position may attend to a key position.

    A query sees its own image's patches and its own text, up to itself. Padding sees padding:
    attention without any key is undefined.

    Args:
        image_numbers: int64 [R, T], as in `PackedBatch`.
        text_ids: int64 [R, T], as in `PackedBatch`.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_image = image_numbers[row, query] == image_numbers[row, key]
        same_text = (text_ids[row, key] == 0) | (text_ids[row, key] == text_ids[row, query])
        return (key <= query) & same_image & same_text

    return sees


def dense_mask(batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to attention scores: 0 or -inf, [R, 1, T, T]."""
    num_rows, length = batch.token_ids.shape
    rows = torch.arange(num_rows, device=batch.token_ids.device)[:, None, None]
    positions = torch.arange(length, device=batch.token_ids.device)
    # All heads share the mask, so the second argument is ignored.
    sees = mask_mod(batch.image_numbers, batch.text_ids)
    seen = sees(rows, rows, positions[:, None], positions)
    # Not bool: SDPA would convert a bool mask in every layer.
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]


def block_mask(batch: PackedBatch) -> BlockMask:
    """Return the mask as FlexAttention's blocks, for any number of heads."""
    return _block_mask(batch.image_numbers, batch.text_ids)


def _block_mask(image_numbers: Tensor, text_ids: Tensor) -> BlockMask:
    num_rows, length = image_numbers.shape
    device = image_numbers.device
    # Uncompiled, all T x T pairs are materialised.
    create = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    sees = mask_mod(image_numbers, text_ids)
    mask: BlockMask = create(sees, num_rows, None, length, length, device=device)
    return mask


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a model of some dtype computes attention.

    Float32 instead of float16, whose largest number is 65,504: Phi-2's scores exceed it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by FlexAttention under a block mask, by transformers' SDPA under any other mask.

    The signature is transformers'; query, key and value are [R, heads, T, head width].
    """
    dtype, computed = query.dtype, score_dtype(query.dtype)
    query, key, value = query.to(computed), key.to(computed), value.to(computed)
    if not isinstance(attention_mask, BlockMask):
        attended: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )[0]
        return attended.to(dtype), None
    # Uncompiled, FlexAttention materialises the whole score matrix.
    attend: Callable[..., Tensor] = flex_attention
    # Within compiled blocks, it is compiled with them.
    if query.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled(flex_attention)
    out = attend(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=options.get("scaling"),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous().to(dtype), None


def use_packed_attention(model: PreTrainedModel) -> Callable[[PackedBatch], Tensor | BlockMask]:
    """Set a model's attention to `packed_attention`.

    Returns:
        The function that makes its mask: a block mask on a GPU where FlexAttention works with the
        model's head width (Phi-2's 80 is no power of two), a dense mask elsewhere.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.device.type == "cuda" and _in_all_processes(_flex_works(model), model.device):
        return block_mask
    return lambda batch: dense_mask(batch, score_dtype(model.dtype))


def _in_all_processes(works: bool, device: torch.device) -> bool:
    """Return whether it works in every process: they pack the same passes, so all use one mask."""
    if PartialState().num_processes == 1:
        return works
    everywhere: Tensor = gather(torch.tensor([works], device=device))
    if works and not everywhere.all():
        print("FlexAttention fails in another process, SDPA is used", file=sys.stderr)
    return bool(everywhere.all())


@torch.inference_mode(False)
@torch.enable_grad()
def _flex_works(model: PreTrainedModel) -> bool:
    """Try a small forward and backward pass of compiled FlexAttention with the model's heads."""
    config = model.config
    heads = config.num_attention_heads
    # Configs without grouped queries or a head width of their own lack these.
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, key, value = (
        torch.randn(
            (1, num_heads, PROBE_LENGTH, head_width),
            dtype=model.dtype,
            device=model.device,
            requires_grad=True,
        )
        for num_heads in (heads, key_heads, key_heads)
    )
    try:
        zeros = torch.zeros((1, PROBE_LENGTH), dtype=torch.int64, device=model.device)
        mask = _block_mask(zeros, zeros)
        out, _ = packed_attention(model, query, key, value, mask)
        torch.autograd.grad(out.sum(), (query, key, value))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = one_line(error)
        print(f"FlexAttention does not work here, SDPA is used: {reason}", file=sys.stderr)
        return False
    return True


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of FlexAttention, for the first length and once more for all others.

    With `fullgraph`, one compilation too many is an error. Without it, torch would go on with the
    uncompiled function, and run out of memory.
    """
    return torch.compile(function, fullgraph=True)
