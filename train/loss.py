"""Cross entropy of a frozen output layer, without ever holding the logits of all tokens.

With 51,200 words the logits of one step and their gradient would be most of the memory. Here they
live for one chunk of tokens at a time, and their gradient is taken at once.

Letters: S supervised tokens, H width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 256
"""Tokens at a time: 52 MB of float32 logits with 51,200 words."""


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden_SH: Tensor, targets_S: Tensor
) -> Tensor:
    """Return the cross entropy summed over the tokens: [], float32 or float64.

    Args:
        head: From [C, H] to logits [C, V]; none of its parameters learns.
        hidden_SH: What it is applied to.
        targets_S: int64, the words that come.
    """
    loss: Tensor = _SummedCrossEntropy.apply(hidden_SH, targets_S, head)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, targets_S: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, max(1, len(targets_S)), CHUNK):
            targets_C = targets_S[start : start + CHUNK]
            with torch.set_grad_enabled(needed):
                hidden_CH = hidden_SH[start : start + CHUNK].detach().requires_grad_(needed)
                logits_CV = head(hidden_CH)
                # Not of half precision: the sum over the words would lose small ones.
                logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
                loss = nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum")
            if needed:
                gradients += torch.autograd.grad(loss, hidden_CH)
            losses.append(loss.detach())
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient_SH,) = ctx.saved_tensors
        return gradient_SH * grad, None, None
