"""An optimizer step of a loop that packs: the best that others do, to be measured beside ours.

One sequence a text, behind a copy of its image's patches, packed without padding between them, and
FlashAttention over sequences of any lengths, from torch itself. The output layer is one of `HEADS`.

Source: the padding-free collator of transformers and TRL, and the heads of Liger and of Apple's
Cut Cross-Entropy as their documentation has them.

Letters: R rows, T positions, N positions of all rows, S supervised tokens, H width, V vocabulary.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bench.usual_loop import IGNORE_INDEX, finish
from train.data.packing import PackedBatch
from train.loop.step import StepData
from train.model.captioner import CaptionModel
from train.model.loss import cross_entropy

NAME = "documents"
"""Name under which transformers knows this attention."""

Head = Callable[[Any, Tensor, Tensor], Tensor]
"""From the output layer, hidden states [N, H] and labels [N] to the summed cross entropy."""


@dataclass(frozen=True)
class Documents:
    """A forward pass, and where each of its sequences begins."""

    batch: PackedBatch
    starts: Tensor
    """int32: the first slot of each sequence, and the number of slots."""
    longest: int


def find_documents(batch: PackedBatch) -> Documents:
    """Find the sequences of a batch in which every image has one text; padding is one too."""
    numbers = batch.image_numbers
    is_start = torch.ones_like(numbers, dtype=torch.bool)
    is_start[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    slots = is_start.flatten().nonzero().flatten().tolist()
    starts = torch.tensor([*slots, numbers.numel()], dtype=torch.int32)
    return Documents(batch, starts, int(starts.diff().max()))


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence, causally; signature and keywords are transformers'."""
    rows, _heads, length, _width = query.shape
    # [N, heads, head width]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if query.is_cuda:
        # The operation under torch's `varlen_attn`, whose own signature differs between versions.
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, 0.0, True, False,
            scale=scaling,
        )[0]  # fmt: skip
    else:
        out = _masked_attention(q, k, v, cu_seq_lens_q, scaling)
    return out.unflatten(0, (rows, length)), None


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float
) -> Tensor:
    """Do the same on a CPU, by a mask over all pairs of the N positions."""
    places = torch.arange(len(query))
    document = torch.searchsorted(starts, places, right=True)
    sees = (document[:, None] == document) & (places[:, None] >= places)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling)
    return out.transpose(0, 1)


def use_document_attention(model: CaptionModel) -> None:
    """Set the language model's attention to `document_attention`."""
    AttentionInterface.register(NAME, document_attention)
    # No mask: the starts of the sequences come with every call.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.language_model.set_attn_implementation(NAME)


def optimizer_step(
    model: CaptionModel,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    passes: Sequence[Documents],
    head: Head,
) -> float:
    """Make one optimizer step; return the mean cross entropy of the supervised tokens."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for documents in passes:
        loss = summed_loss(model, documents, head)
        torch.autograd.backward(loss / data.num_target_tokens)
        losses.append(loss.detach().double())
    finish(optimizer)
    return float(torch.stack(losses).sum()) / data.num_target_tokens


def summed_loss(model: CaptionModel, documents: Documents, head: Head) -> Tensor:
    """Return the summed cross entropy of a forward pass."""
    batch = documents.batch.to(model.device)
    patches_NPH = model.embed_patches(batch.patches_NPD)
    slots_NH = model.embed_text(batch.token_ids.flatten())
    slots_NH = slots_NH.index_copy(0, batch.patch_slots, patches_NPH.flatten(0, 1))
    starts = documents.starts.to(model.device, non_blocking=True)
    hidden_RTH = model.language_model.base_model(
        inputs_embeds=slots_NH.view(*batch.token_ids.shape, -1),
        position_ids=batch.positions,
        use_cache=False,
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=documents.longest,
        max_length_k=documents.longest,
    ).last_hidden_state
    labels_N = torch.full_like(batch.token_ids.flatten(), IGNORE_INDEX)
    # With one text an image, no slot predicts two tokens.
    labels_N = labels_N.index_copy(0, batch.target_slots, batch.target_ids)
    return head(model.language_model.lm_head, hidden_RTH.flatten(0, 1), labels_N)


def all_logits(head: Any, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Make the logits of all positions, as transformers does."""
    return nn.functional.cross_entropy(
        head(hidden_NH).float(), labels_N, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def supervised_logits(head: Any, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Make the logits at supervised positions, in chunks: our own head."""
    slots = (labels_N != IGNORE_INDEX).nonzero().flatten()
    return cross_entropy(head, hidden_NH[slots], labels_N[slots]).sum()


def liger_head(head: Any, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Give all positions to Liger's fused output layer and loss."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
    summed: Tensor = loss(head.weight, hidden_NH, labels_N, head.bias)
    return summed


def cut_cross_entropy_head(head: Any, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Give all positions to Apple's Cut Cross-Entropy."""
    module = importlib.import_module("cut_cross_entropy")
    summed: Tensor = module.linear_cross_entropy(
        hidden_NH,
        head.weight,
        labels_N,
        bias=head.bias,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return summed


HEADS: dict[str, Head] = {
    "supervised logits": supervised_logits,
    "all logits": all_logits,
    "Liger head": liger_head,
    "Cut Cross-Entropy": cut_cross_entropy_head,
}
PACKAGES = {"Liger head": "liger_kernel", "Cut Cross-Entropy": "cut_cross_entropy"}
"""What a head needs beyond requirements.lock."""


def is_installed(head: str) -> bool:
    """Return whether a head's package is there."""
    return head not in PACKAGES or importlib.util.find_spec(PACKAGES[head]) is not None
