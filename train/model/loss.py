"""Cross entropy of a frozen output layer, without ever holding the logits of all tokens.

With 51,200 words the logits of one step and their gradient would be most of the memory. Here they
live for one chunk of slots at a time, and their gradient is taken at once.

Letters: U slots that predict, C of them at a time, S supervised tokens, H width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 256
"""Slots at a time: 52 MB of float32 logits with 51,200 words."""


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden_UH: Tensor, targets_S: Tensor, counts_U: Tensor
) -> Tensor:
    """Return the cross entropy summed over the tokens: [], float32 or float64.

    Args:
        head: From [C, H] to logits [C, V]; none of its parameters learns.
        hidden_UH: What it is applied to.
        targets_S: int64, the words that come: those of the first slot, then of the second, ...
        counts_U: int64, how many of them each slot predicts, with logits made once for all.
    """
    loss: Tensor = _SummedCrossEntropy.apply(hidden_UH, targets_S, counts_U, head)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_UH: Tensor,
        targets_S: Tensor,
        counts_U: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ends = [0, *counts_U.cumsum(0).tolist()]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, max(1, len(hidden_UH)), CHUNK):
            stop = min(start + CHUNK, len(hidden_UH))
            hidden_CH = hidden_UH[start:stop].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits_CV = head(hidden_CH)
            loss, gradient_CV = _loss_and_gradient(
                logits_CV.detach(), targets_S[ends[start] : ends[stop]], counts_U[start:stop]
            )
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(logits_CV, hidden_CH, gradient_CV)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_UH,) = ctx.saved_tensors
        return gradient_UH * grad, None, None, None


def _loss_and_gradient(
    logits_CV: Tensor, targets_S: Tensor, counts_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and its gradient with respect to the logits, of their type."""
    # Not of half precision: the sum over the words would lose small ones.
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    scores_CV = nn.functional.log_softmax(logits_CV, dim=1, dtype=exact)
    cells_S = torch.arange(len(counts_C), device=counts_C.device).repeat_interleave(counts_C)
    cells_S = cells_S * logits_CV.shape[1] + targets_S
    loss = -scores_CV.flatten().index_select(0, cells_S).sum()
    # Softmax, once for each target, minus one where the target is; in place of the scores.
    gradient_CV = scores_CV.exp_().mul_(counts_C[:, None])
    gradient_CV.view(-1).index_add_(0, cells_S, torch.full_like(cells_S, -1, dtype=exact))
    return loss, gradient_CV.to(logits_CV.dtype)
