"""Attention over packed rows: each position attends to its image's patches and its own text.

One mask in two forms: a dense mask for SDPA, and FlexAttention's block mask, which skips blocks
without any attention. Transformers' models take either through `attention_mask`, and hand every
further argument on to their attention: in that way, layers with a sliding window get their mask.

Letters: R rows, T positions of a row.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cache.texts import one_line
from train.data.packing import PackedBatch
from train.ranks import gather_of_ranks

NAME = "packed"
"""Name under which transformers knows this attention."""

PROBE_LENGTH = 256
"""Positions of the pass that tries FlexAttention: two blocks."""

Mask = Tensor | BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

Masks = dict[str, Mask]
"""The arguments of a model that are masks."""


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


def window_mask_mod(sees: MaskMod, positions: Tensor, window: int) -> MaskMod:
    """Return a `mask_mod` in which a query also sees no key that lies `window` or more before it.

    The distance is that of position ids: behind other texts in its row, a text is as far from its
    patches as it would be alone.

    Args:
        sees: Without the window.
        positions: int64 [R, T], as in `PackedBatch`.
        window: Positions that a query sees at most, its own included.
    """

    def sees_in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = positions[row, key] > positions[row, query] - window
        # At padding, which has the position 0 everywhere, nothing is far.
        return sees(row, head, query, key) & is_near

    return sees_in_window


def dense_mask(batch: PackedBatch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the mask to add to attention scores: 0 or -inf, [R, 1, T, T]."""
    num_rows, length = batch.token_ids.shape
    rows = torch.arange(num_rows, device=batch.token_ids.device)[:, None, None]
    slots = torch.arange(length, device=batch.token_ids.device)
    # All heads share the mask, so the second argument is ignored.
    seen = _mask_mod(batch, window)(rows, rows, slots[:, None], slots)
    # Not bool: SDPA would convert a bool mask in every layer.
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]


def block_mask(batch: PackedBatch, window: int | None = None) -> BlockMask:
    """Return the mask as FlexAttention's blocks, for any number of heads."""
    return _block_mask(_mask_mod(batch, window), batch.image_numbers)


def _mask_mod(batch: PackedBatch, window: int | None) -> MaskMod:
    sees = mask_mod(batch.image_numbers, batch.text_ids)
    return sees if window is None else window_mask_mod(sees, batch.positions, window)


def _block_mask(sees: MaskMod, image_numbers: Tensor) -> BlockMask:
    num_rows, length = image_numbers.shape
    device = image_numbers.device
    # Uncompiled, all T x T pairs are materialised.
    create = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    mask: BlockMask = create(sees, num_rows, None, length, length, device=device)
    return mask


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return the window of a model's layers with sliding attention; None without such layers."""
    window: int | None = getattr(config, "sliding_window", None)
    # A config without types of layers has one type.
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return window if "sliding_attention" in types else None


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
    attention_mask: Mask | None,
    *,
    window_mask: Mask | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by FlexAttention under a block mask, by transformers' SDPA under any other mask.

    The signature is transformers'; query, key and value are [R, heads, T, head width].

    Args:
        module: The attention layer.
        query: Of all heads.
        key: Of as many heads, or of fewer that several queries share.
        value: As key.
        attention_mask: Of layers without a window, or of generation.
        window_mask: Of layers with a sliding window; None if no text reaches beyond it.
        softcap: Scores are squeezed into this distance from 0, as in Gemma 2.
        options: Further arguments of transformers' attention functions.
    """
    dtype, computed = query.dtype, score_dtype(query.dtype)
    query, key, value = query.to(computed), key.to(computed), value.to(computed)
    if window_mask is not None and options.get("sliding_window"):
        attention_mask = window_mask
    if not isinstance(attention_mask, BlockMask):
        if softcap is not None:
            scale = options["scaling"]
            attended = _soft_capped(query, key, value, attention_mask, scale, softcap)
        else:
            attended = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[
                0
            ]
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
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=attention_mask,
        scale=options.get("scaling"),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous().to(dtype), None


def _soft_cap(softcap: float) -> Callable[..., Tensor]:
    """Return FlexAttention's `score_mod` that squeezes scores."""

    def squeeze(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return squeeze


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attend with squeezed scores, which SDPA does not have: [R, T, heads, head width]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is None:
        # Generation without padding; a query of one token sees all keys.
        queries, keys = scores.shape[2:]
        mask = scores.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


def use_packed_attention(model: PreTrainedModel) -> tuple[Callable[[PackedBatch], Masks], bool]:
    """Set a model's attention to `packed_attention`.

    Returns:
        The function that makes its masks, and whether they are block masks: on a GPU where
        FlexAttention works with the model's heads (Phi-2's width of 80 is no power of two).
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    window = sliding_window(model.config)
    has_blocks = model.device.type == "cuda" and _in_all_processes(_flex_works(model), model.device)

    def make_mask(batch: PackedBatch, window: int | None) -> Mask:
        if has_blocks:
            return block_mask(batch, window)
        return dense_mask(batch, score_dtype(model.dtype), window)

    def make_masks(batch: PackedBatch) -> Masks:
        masks = {"attention_mask": make_mask(batch, None)}
        # No position is larger than a row.
        if window is not None and window < batch.token_ids.shape[1]:
            masks["window_mask"] = make_mask(batch, window)
        return masks

    return make_masks, has_blocks


def _in_all_processes(works: bool, device: torch.device) -> bool:
    """Return whether it works in every process: they pack the same passes, so all use one mask."""
    if PartialState().num_processes == 1:
        return works
    everywhere = gather_of_ranks(torch.tensor([works], device=device))
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
        mask = _block_mask(mask_mod(zeros, zeros), zeros)
        softcap = getattr(config, "attn_logit_softcapping", None)
        out, _ = packed_attention(model, query, key, value, mask, softcap=softcap)
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
