"""Cross entropy of a frozen output layer, without ever holding the logits of all tokens.

With a vocabulary of 51,200, the logits of a step and their gradient would take most of the memory.
Here they exist for one chunk of tokens at a time, and their gradient is taken in the forward pass.

Letters: S supervised tokens, C of them at a time, H width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK, GPU_CHUNK = 256, 1024
"""Tokens at a time: 52 MB of float32 logits for a vocabulary of 51,200, on a GPU 210 MB."""


def cross_entropy(
    head: Callable[[Tensor], Tensor], hidden_SH: Tensor, target_ids_S: Tensor
) -> Tensor:
    """Return the cross entropy of each token: [S], float32 or float64.

    Args:
        head: Maps [C, H] to logits [C, V]; none of its parameters is trainable.
        hidden_SH: Hidden states that predict the tokens.
        target_ids_S: int64, the tokens.
    """
    losses_S: Tensor = _CrossEntropy.apply(hidden_SH, target_ids_S, head)
    return losses_S


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, target_ids_S: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        chunk = GPU_CHUNK if hidden_SH.is_cuda else CHUNK
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, max(1, len(hidden_SH)), chunk):
            hidden_CH = hidden_SH[start : start + chunk].detach().requires_grad_(needs_gradient)
            target_ids_C = target_ids_S[start : start + chunk]
            with torch.set_grad_enabled(needs_gradient):
                logits_CV = head(hidden_CH)
            # Half precision would lose small terms in the sum over the vocabulary.
            dtype = torch.promote_types(logits_CV.dtype, torch.float32)
            log_probs_CV = nn.functional.log_softmax(logits_CV.detach(), dim=1, dtype=dtype)
            flat_targets_C = torch.arange(len(target_ids_C), device=target_ids_C.device)
            flat_targets_C = flat_targets_C * log_probs_CV.shape[1] + target_ids_C
            losses.append(-log_probs_CV.flatten().index_select(0, flat_targets_C))
            if needs_gradient:
                # The gradient of the logits is softmax, minus 1 at the target; it overwrites the
                # log-probabilities.
                gradient_CV = log_probs_CV.exp_()
                ones_C = torch.ones_like(flat_targets_C, dtype=dtype)
                gradient_CV.view(-1).index_add_(0, flat_targets_C, ones_C, alpha=-1)
                gradients += torch.autograd.grad(
                    logits_CV, hidden_CH, gradient_CV.to(logits_CV.dtype)
                )
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None, None]:
        (gradient_SH,) = ctx.saved_tensors
        return (gradient_SH * grad_S[:, None]).to(gradient_SH.dtype), None, None
